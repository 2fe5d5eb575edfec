"""The run's input files, from the embedded world or from real data, written before the first stage;
in the world also those in which its experts answer a stage.

Stages read these files and nothing else; this is the only place where the world's labels are
written for training.
"""

import dataclasses
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from absl import logging
from etils import epath

from mathv2_jax import records, storage
from mathv2_jax.data import corpus as real_corpus
from mathv2_jax.data import importing, sources, store, table
from mathv2_jax.stages import experts
from mathv2_jax.text import parse, prompts, tokenizer_files
from mathv2_jax.text import tokenizer as tokenizer_lib
from mathv2_jax.world import corpus

WorldConfig = corpus.WorldConfig
RealConfig = real_corpus.RealConfig

TRAINING = real_corpus.TRAINING


def conversations(*, real: bool) -> tuple[str, ...]:
    """The input files of demonstrations that a run of real data, or of the world, begins with."""
    if real:
        return ("demonstrations",)
    hints = typing.get_type_hints(corpus.Corpus)
    return tuple(n for n, hint in hints.items() if hint == tuple[records.Demonstration, ...])


def write_world(
    workdir: epath.Path, config: corpus.WorldConfig, seed: int, templates: str
) -> dict[str, int]:
    """Every file of the world's corpus; how many records each holds."""
    made = corpus.make_corpus(config, seed, prompts.load(templates))
    return write_files(workdir, {f.name: getattr(made, f.name) for f in dataclasses.fields(made)})


def world_experts(
    workdir: epath.Path, config: corpus.WorldConfig, seed: int
) -> Callable[[str], None]:
    """The world's experts: they answer what a stage of kind `experts` wants, file for file."""

    def answer(stage: str) -> None:
        folder = workdir / "records" / f"{stage}{experts.WANTED}"
        wanted = sources.parse_lines(list(storage.Parts(folder).read()), records.Proof, str(folder))
        graded = corpus.grade(config, seed, wanted)
        write_files(workdir, {f"{experts.ANSWERS}/{stage}": graded})

    return answer


def write_real(
    workdir: epath.Path,
    folder: epath.Path,
    config: RealConfig,
    templates: str,
    tokenizer: Callable[[], tokenizer_lib.Tokenizer],
) -> dict[str, int]:
    """Every file of the corpus of imported records, and `rejects`; how many records each holds.

    `tokenizer` makes (or reads back) the run's tokenizer from the files that are written, since
    only it can say what is too long. What is left out is printed, by file and rule.
    """
    if not folder.exists():
        raise FileNotFoundError(f"config.data={folder}: there is no such folder")
    loaded = prompts.load(templates)
    made = real_corpus.make_corpus(store.require(folder), config, loaded)
    write_files(workdir, made.records())
    trained = tokenizer()

    def num_tokens(text: str) -> int:
        return len(trained.encode([tokenizer_lib.Message("user", text)], think=True))

    made = real_corpus.within_limits(made, config, loaded, num_tokens)
    print(f"left out:\n{importing.describe(made.rejects)}", flush=True)
    return write_files(workdir, made.records())


def write_files(workdir: epath.Path, files: Mapping[str, Sequence[Any]]) -> dict[str, int]:
    """One JSON-lines file a kind under `records/input`; the counts."""
    for name, items in sorted(files.items()):
        table.write_file(workdir / "records" / "input" / f"{name}.jsonl", items)
    return {name: len(items) for name, items in sorted(files.items())}


def training_texts(workdir: epath.Path, limit: int) -> Iterable[str]:
    """What a tokenizer may see: texts of the training files, the first `limit` records of each."""
    for name in TRAINING:
        path = workdir / "records" / "input" / f"{name}.jsonl"
        for line in storage.read_bytes(path).decode().splitlines()[:limit]:
            yield from _texts(name, line)


def _texts(name: str, line: str) -> list[str]:
    if name == "problems":
        return [records.from_json(records.Problem, line).statement]
    if name == "proofs":
        proof = records.from_json(records.Proof, line)
        return [proof.statement, proof.text]
    if name == "analyses":
        return [records.from_json(records.Analysis, line).text]
    demonstration = records.from_json(records.Demonstration, line)
    return [demonstration.user, demonstration.assistant]


def copy_tokenizer(workdir: epath.Path, directory: epath.Path, model_vocab_size: int) -> None:
    """Puts the tokenizer files of a folder into the workdir, where `read_tokenizer` finds them.

    FileNotFoundError or ValueError, and nothing written, where the folder holds no tokenizer that
    can be used, or one with more tokens than the model has.
    """
    size = tokenizer_files.load(directory).vocab_size
    if size > model_vocab_size:
        raise ValueError(
            f"config.model.vocab_size = {model_vocab_size}: the tokenizer of "
            f"config.tokenizer.directory = {directory} has {size} tokens, and the model needs at "
            f"least as many; set config.model.vocab_size to {size} or more"
        )
    files, kept = tokenizer_files.read(directory), _copied_tokenizer(workdir)
    for name in storage.list_names(kept):
        storage.remove(kept / name)
    for name, data in files.items():
        storage.write_whole(kept / name, data)


def read_tokenizer(workdir: epath.Path) -> tokenizer_lib.Tokenizer:
    """The tokenizer that `copy_tokenizer` put into the workdir."""
    return tokenizer_files.load(_copied_tokenizer(workdir))


def _copied_tokenizer(workdir: epath.Path) -> epath.Path:
    return workdir / "records" / "input" / "tokenizer"


def make_tokenizer(
    workdir: epath.Path, vocab_size: int, whole_phrases: Sequence[str], limit: int
) -> tokenizer_lib.Tokenizer:
    """The run's tokenizer, trained once and kept in the workdir; read back afterwards."""
    path = workdir / "records" / "input" / "tokenizer.model"
    if not storage.exists(path):
        phrases = (*parse.KEY_PHRASES, *whole_phrases)
        texts = training_texts(workdir, limit)
        try:
            model = tokenizer_lib.train(texts, vocab_size=vocab_size, whole_phrases=phrases)
        except ValueError as error:
            raise ValueError(f"config.tokenizer: {error}") from error
        storage.write_whole(path, model)
        made = tokenizer_lib.SentencePieceTokenizer.from_bytes(model).vocab_size
        if made < vocab_size:
            logging.warning(
                "the vocabulary has %d tokens, not config.tokenizer.vocab_size = %d: the texts "
                "hold no more to merge",
                made,
                vocab_size,
            )
    return tokenizer_lib.SentencePieceTokenizer.from_bytes(storage.read_bytes(path))
