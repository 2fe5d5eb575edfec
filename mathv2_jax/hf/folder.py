"""What lies around the arrays: the folder of an imported model, a run's, and safe new folders."""

import contextlib
import dataclasses
import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from mathv2_jax import checkpoint, storage
from mathv2_jax.model.config import ModelConfig
from mathv2_jax.text import sentencepiece_export

SCHEMA = 1
CHECKPOINTS, TOKENIZER = "checkpoints", "tokenizer"
IMPORTED_STEP = 0
GENERATION = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "tiktoken.model",
    "vocab.json",
    "merges.txt",
    sentencepiece_export.MODEL,
    GENERATION,
)


@contextlib.contextmanager
def drafted(target: epath.Path) -> Iterator[epath.Path]:
    """A folder to write into that becomes `target`, at once, if the block ends well.

    ValueError where `target` holds anything. Locally the draft is a hidden sibling; elsewhere,
    where nothing can be renamed, it is the target itself, emptied after a failure.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is not empty: give a folder that is new")
    local = storage.is_local(target)
    draft = target
    if local:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.draft"
    draft.mkdir(parents=True, exist_ok=True)
    try:
        yield draft
        if local:
            os.replace(draft, target)  # an empty folder gives way to a full one
            storage.sync_folder(target.parent)
    except BaseException:
        if draft.exists():
            draft.rmtree()
        raise


def write_config(draft: epath.Path, config: ModelConfig, tokens: Mapping[str, Any]) -> None:
    """What the arrays cannot say of themselves."""
    body = {"schema": SCHEMA, "model": dataclasses.asdict(config), "tokens": dict(tokens)}
    text = json.dumps(body, indent=1, sort_keys=True) + "\n"
    storage.write_whole(draft / "config.json", text.encode())


def copy_tokenizer(path: str, draft: epath.Path, tokens: Mapping[str, Any]) -> None:
    """The tokenizer's files, as they are; nothing that could be executed is among them.

    Where none of them says which tokens end a text, generation_config.json is made of `tokens`.
    """
    found = [name for name in TOKENIZER_FILES if os.path.isfile(os.path.join(path, name))]
    for name in found:
        data = storage.read_bytes(os.path.join(path, name))
        storage.write_whole(draft / TOKENIZER / name, data)
    if GENERATION not in found and tokens:
        text = json.dumps(dict(tokens), indent=2, sort_keys=True) + "\n"
        storage.write_whole(draft / TOKENIZER / GENERATION, text.encode())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """Where variables lie: a folder of checkpoints whose leaves are named `prefix` and on.

    `steps` are to be tried in their order. `tokenizer` is a folder of tokenizer files or a
    SentencePiece model, None where there is none; `think` says whether its chats open thinking.
    """

    config: ModelConfig
    checkpoints: epath.Path
    steps: Sequence[int]
    prefix: str
    tokens: Mapping[str, Any]
    tokenizer: epath.Path | None
    think: bool = False


def locate(path: epath.Path, stage: str | None = None, step: int | None = None) -> Trained:
    """The variables of an imported model, or of a run of mathv2-train.

    Of a run: those of `stage`, by default the last that has any; what the stage left at its end,
    or, before that or given a `step`, the train states of its steps. FileNotFoundError or
    ValueError where there is no such thing.
    """
    if not (path / "config.json").exists():
        raise FileNotFoundError(
            f"{path} holds no config.json: give a folder made by mathv2-convert or the workdir of "
            "mathv2-train"
        )
    try:
        body = json.loads(storage.read_bytes(path / "config.json"))
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'} is damaged: {error}") from error
    if isinstance(body, dict) and "identity" in body:
        return _locate_in_run(path, body["identity"], stage, step)
    if not isinstance(body, dict) or {"schema", "model", "tokens"} - set(body):
        raise ValueError(f"{path / 'config.json'} is neither mathv2-convert's nor mathv2-train's")
    if body["schema"] != SCHEMA:
        raise ValueError(
            f"{path / 'config.json'} has schema {body['schema']!r}, this program reads {SCHEMA}: "
            "use the program that wrote it"
        )
    if stage is not None:
        raise ValueError(f"{path} is an imported model: it has no stages, so none is {stage!r}")
    tokenizer = path / TOKENIZER
    try:
        config = ModelConfig(**body["model"])
    except TypeError as error:  # a field that this program does not have, or one too few
        raise ValueError(f"{path / 'config.json'} has another program's model: {error}") from error
    return Trained(
        config=config,
        checkpoints=path / CHECKPOINTS,
        steps=_steps(path / CHECKPOINTS, step),
        prefix="",
        tokens=body["tokens"],
        tokenizer=tokenizer if tokenizer.exists() else None,
    )


def _locate_in_run(
    path: epath.Path, identity: Mapping[str, Any], stage: str | None, step: int | None
) -> Trained:
    root = path / CHECKPOINTS
    stages = [s["name"] for s in identity["stages"] if (root / s["name"]).exists()]
    if stage is not None and stage not in stages:
        raise ValueError(f"stage {stage!r} has no checkpoints in {path}; there are {stages}")
    if not stages:
        raise ValueError(f"{path} holds no checkpoints yet")
    at = root / (stage or stages[-1])
    final = step is None and (at / "final").exists()
    checkpoints = at / ("final" if final else "steps")
    model = ModelConfig(**identity["model"])
    steps = _steps(checkpoints, step)
    prefix = "" if final else "variables."
    embed = checkpoint.read_seal(checkpoints / str(steps[0]))["leaves"][f"{prefix}params.embed"]
    given, made = (path / "records" / "input" / n for n in ("tokenizer", "tokenizer.model"))
    tokenizer = given if given.exists() else made
    return Trained(
        config=dataclasses.replace(model, vocab_size=embed[0][0]),  # the tokenizer has set it
        checkpoints=checkpoints,
        steps=steps,
        prefix=prefix,
        tokens={},
        tokenizer=tokenizer if tokenizer.exists() else None,
        think=identity["roles"]["think"],
    )


def _steps(checkpoints: epath.Path, step: int | None) -> list[int]:
    with checkpoint.Checkpoints(checkpoints) as saved:
        steps = saved.steps()
    if not steps:
        raise ValueError(f"{checkpoints} holds no checkpoints")
    if step is not None and step not in steps:
        raise ValueError(f"no checkpoint of step {step} in {checkpoints}; there are {steps}")
    return steps if step is None else [step]
