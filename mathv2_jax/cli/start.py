"""A run that starts from an imported model: what `config.start = DIR` says of its other fields.

DIR is a folder that mathv2-convert --from_hf has written. It stays in use as long as the run: each
stage with init="fresh" reads its variables there.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

from mathv2_jax import checkpoint, storage
from mathv2_jax.cli import shell
from mathv2_jax.hf import folder
from mathv2_jax.text import hf_tokenizer

# How the model is computed with, not what it is: these may differ from what the import chose.
FREE = ("param_dtype", "compute_dtype", "remat", "logprob_chunk", "scan_unroll")


def locate(start: str) -> folder.Trained:
    """The imported model of `config.start`; FileNotFoundError or ValueError where there is none."""
    path = shell.absolute(start)
    if not path.is_dir():
        raise FileNotFoundError(f"config.start = {start}: there is no such folder")
    try:
        found = folder.locate(path)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"config.start = {start}: {error}") from error
    if found.checkpoints != path / folder.CHECKPOINTS:
        raise ValueError(
            f"config.start = {start} is the workdir of a run: a run starts from what "
            "mathv2-convert --from_hf has written; export that run's model, then import it"
        )
    return found


def complete(body: Mapping[str, Any]) -> dict[str, Any]:
    """The config's fields with those of the model and the tokenizer that `start` names.

    ValueError where `model` or `tokenizer` says something else than the model that is there.
    """
    start, found = body["start"], locate(body["start"])
    sizes, given = dataclasses.asdict(found.config), body.get("model", {})
    tokenizer = body.get("tokenizer", {})
    if not isinstance(given, Mapping) or not isinstance(tokenizer, Mapping):
        return dict(body)  # an error of its own, when the config is built
    wrong = [
        f"config.model.{name} = {value!r}, there {sizes[name]!r}"
        for name, value in given.items()
        if name in sizes and name not in FREE and value != sizes[name]
    ]
    if wrong:
        raise ValueError(
            f"config.start = {start} holds another model than config.model: {'; '.join(wrong)}. "
            "Leave out what the folder says, all of it with --config.model={}; free are "
            f"{', '.join(FREE)}"
        )
    if tokenizer.get("vocab_size"):
        raise ValueError(
            f"config.tokenizer.vocab_size = {tokenizer['vocab_size']} trains a tokenizer, but the "
            f"model of config.start = {start} was made with one: --config.tokenizer={{}} takes "
            "that, config.tokenizer.directory another"
        )
    if not tokenizer.get("directory"):
        kept = found.tokenizer
        if kept is None or not storage.exists(kept / hf_tokenizer.TOKENIZER):
            raise ValueError(
                f"config.start = {start} was imported without a tokenizer: give "
                "config.tokenizer.directory"
            )
        tokenizer = {**tokenizer, "directory": os.path.join(start, folder.TOKENIZER)}
    return {**body, "model": {**sizes, **given}, "tokenizer": tokenizer}


def weights(start: str) -> str:
    """A fingerprint of the variables in `config.start`, whatever the folder is called."""
    found = locate(start)
    try:
        seal = checkpoint.read_seal(found.checkpoints / str(found.steps[0]))
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"config.start = {start}: its seal cannot be read: {error}") from error
    leaves = json.dumps(seal["leaves"], sort_keys=True)
    return hashlib.sha256(leaves.encode()).hexdigest()[:16]
