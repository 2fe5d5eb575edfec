"""Tokenizers as the files of a model's folder: read from it, written beside an exported model."""

import json
import os
from collections.abc import Mapping

from etils import epath

from mathv2_jax import storage
from mathv2_jax.text import hf_tokenizer, sentencepiece_export, tokenizer

_REMOTE = (
    "its split pattern and special tokens stand in Python code of the model's authors "
    "(tokenization_*.py), which is never run here"
)


def load(directory: epath.PathLike) -> tokenizer.Tokenizer:
    """The tokenizer of a folder in the format of Hugging Face, or of a folder that we exported.

    FileNotFoundError where there is no such folder, ValueError where its files are no tokenizer,
    one that is not supported, or one that would need code from the folder.
    """
    try:
        return from_files(read(directory))
    except ValueError as error:
        raise ValueError(f"tokenizer directory {os.fspath(directory)}: {error}") from error


def read(directory: epath.PathLike) -> dict[str, bytes]:
    """The tokenizer files of a folder by name, tokenizer.json last; errors as `load` has them.

    Where generation_config.json names no end tokens, or is missing, it has those of config.json.
    """
    folder = epath.Path(directory)
    if not folder.is_dir():
        raise FileNotFoundError(f"tokenizer directory {os.fspath(folder)}: there is no such folder")
    names = (*hf_tokenizer.FILES, sentencepiece_export.MODEL)
    files = {n: storage.read_bytes(folder / n) for n in names if storage.exists(folder / n)}
    if hf_tokenizer.TOKENIZER not in files:
        raise ValueError(_why_not(folder))
    name = hf_tokenizer.GENERATION
    generation = hf_tokenizer.read_json(files, name) if name in files else {}
    if generation.get("eos_token_id") is None and storage.exists(folder / "config.json"):
        stops = _model_config(folder).get("eos_token_id")
        if stops is not None:
            files[name] = json.dumps(generation | {"eos_token_id": stops}).encode()
    last = files.pop(hf_tokenizer.TOKENIZER)
    return {**files, hf_tokenizer.TOKENIZER: last}


def from_files(
    files: Mapping[str, bytes],
) -> hf_tokenizer.HfTokenizer | tokenizer.SentencePieceTokenizer:
    """The tokenizer that `files_of` gave these files for, or that a folder holds."""
    if sentencepiece_export.MODEL in files:
        model = files[sentencepiece_export.MODEL]
        return tokenizer.SentencePieceTokenizer.from_bytes(model)
    return hf_tokenizer.HfTokenizer(files)


def files_of(found: tokenizer.Tokenizer, *, think: bool = False) -> dict[str, bytes]:
    """The files by name that transformers reads, and `load` makes the same tokenizer of.

    Those of a `HfTokenizer` are the bytes it was made from. A SentencePiece model is converted;
    its chat template opens thinking unless told otherwise where `think` is true.
    """
    if isinstance(found, hf_tokenizer.HfTokenizer):
        return dict(found.files)
    if isinstance(found, tokenizer.SentencePieceTokenizer):
        return sentencepiece_export.files_of(found, think=think)
    raise TypeError(f"a {type(found).__name__} has no files")


def _why_not(folder: epath.Path) -> str:
    if storage.exists(folder / "tiktoken.model"):
        return (
            f"tiktoken.model alone does not say how texts are cut: {_REMOTE}. Convert it where you "
            "trust that code: AutoTokenizer.from_pretrained(DIR, trust_remote_code=True), then "
            f"save a {hf_tokenizer.TOKENIZER}"
        )
    if storage.exists(folder / "tokenizer.model"):
        return (
            "a SentencePiece tokenizer.model of others has no control tokens of its own; convert "
            f"it to {hf_tokenizer.TOKENIZER} with transformers' save_pretrained"
        )
    there = storage.list_names(folder)[:10]
    return f"it holds no {hf_tokenizer.TOKENIZER}, but {there}; name the folder that does"


def _model_config(folder: epath.Path) -> dict[str, object]:
    try:
        return storage.parse_json(storage.read_bytes(folder / "config.json"))
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} is not valid JSON: {error}") from error
