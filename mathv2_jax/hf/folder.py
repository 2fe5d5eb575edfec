"""What lies around the arrays: the folder of an imported model, and a run's."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from mathv2_jax import checkpoint, storage
from mathv2_jax.hf import config as config_lib
from mathv2_jax.hf import store
from mathv2_jax.model.config import ModelConfig
from mathv2_jax.text import hf_tokenizer, tokenizer_files

SCHEMA = 1
CHECKPOINTS, TOKENIZER = "checkpoints", "tokenizer"
IMPORTED_STEP = 0


def write_config(draft: epath.Path, config: ModelConfig, tokens: Mapping[str, Any]) -> None:
    """What the arrays cannot say of themselves."""
    body = {"schema": SCHEMA, "model": dataclasses.asdict(config), "tokens": dict(tokens)}
    text = json.dumps(body, indent=1, sort_keys=True) + "\n"
    storage.write_whole(draft / "config.json", text.encode())


def require_generation_config(path: str, vocab_size: int) -> None:
    """ValueError where a folder's generation_config.json is damaged; it need not be there."""
    name = hf_tokenizer.GENERATION
    at = os.path.join(path, name)
    if not os.path.lexists(at):
        return
    if not os.path.isfile(at):
        raise ValueError(f"{at} is no file: mend it or take it away")
    try:
        body = hf_tokenizer.read_json({name: storage.read_bytes(at)}, name)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; mend it or take it away") from error
    wrong = config_lib.wrong_ids(body, vocab_size)
    if wrong:
        raise ValueError(f"{at}: {'; '.join(wrong)}; mend it or take it away")


def read_tokenizer(path: str) -> tuple[dict[str, bytes], str]:
    """(files, "") of the tokenizer in a folder, as they are, if they make one that can be used.

    Else why they do not, with no file but generation_config.json, if it is there. Nothing that
    could be executed is among the files.
    """
    try:
        files = tokenizer_files.read(path)
        tokenizer_files.from_files(files)
        return files, ""
    except ValueError as error:
        reason = str(error)
    except (AttributeError, IndexError, KeyError, OSError, TypeError) as error:
        # Files of others, in which anything may stand where we look for something else.
        reason = f"its files are damaged: {error!r}"
    at = os.path.join(path, hf_tokenizer.GENERATION)
    if not os.path.isfile(at):
        return {}, reason
    return {hf_tokenizer.GENERATION: storage.read_bytes(at)}, reason


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """Where variables lie: a folder of checkpoints whose leaves are named `prefix` and on.

    `steps` are to be tried in their order. `tokenizer` is a SentencePiece model or a folder of
    tokenizer files, which holds generation_config.json alone where only that was imported; None
    where there is neither. `think` says whether its chats open thinking.
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
        body = storage.parse_json(storage.read_bytes(path / "config.json"))
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'} is damaged: {error}") from error
    if isinstance(body, dict) and isinstance(body.get("identity"), dict):
        try:
            return _locate_in_run(path, body["identity"], stage, step)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path / 'config.json'} is damaged: its identity has no {error}"
            ) from error
    if not isinstance(body, dict) or {"schema", "model", "tokens"} - set(body):
        raise ValueError(f"{path / 'config.json'} is neither mathv2-convert's nor mathv2-train's")
    if body["schema"] != SCHEMA:
        raise ValueError(
            f"{path / 'config.json'} has schema {body['schema']!r}, this program reads {SCHEMA}: "
            "use the program that wrote it"
        )
    if stage is not None:
        raise ValueError(f"{path} is an imported model: it has no stages, so none is {stage!r}")
    tokenizer, model = path / TOKENIZER, _model(body["model"], path)
    tokens = body["tokens"] if isinstance(body["tokens"], dict) else {"eos_token_id": "no object"}
    if wrong := config_lib.wrong_ids(tokens, model.vocab_size):
        raise ValueError(f"{path / 'config.json'} is damaged: tokens: {'; '.join(wrong)}")
    return Trained(
        config=model,
        checkpoints=path / CHECKPOINTS,
        steps=_steps(path / CHECKPOINTS, step),
        prefix="",
        tokens=tokens,
        tokenizer=tokenizer if tokenizer.exists() else None,
    )


def _model(fields: Mapping[str, Any], path: epath.Path) -> ModelConfig:
    try:
        return ModelConfig(**fields)
    except TypeError as error:  # a field that this program does not have, or one too few
        raise ValueError(f"{path / 'config.json'} has another program's model: {error}") from error


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
    model = _model(identity["model"], path)
    steps = _steps(checkpoints, step)
    prefix = "" if final else "variables."
    vocab_size, _ = _shape(checkpoints, steps, f"{prefix}params.embed")
    given, made = (path / "records" / "input" / n for n in ("tokenizer", "tokenizer.model"))
    tokenizer = given if given.exists() else made
    return Trained(
        config=dataclasses.replace(model, vocab_size=vocab_size),  # the tokenizer has set it
        checkpoints=checkpoints,
        steps=steps,
        prefix=prefix,
        tokens={},
        tokenizer=tokenizer if tokenizer.exists() else None,
        think=identity["roles"]["think"],
    )


def _shape(checkpoints: epath.Path, steps: Sequence[int], name: str) -> tuple[int, ...]:
    """The shape of a leaf, by the first of `steps` whose seal can be read."""
    complaints = []
    for step in steps:
        try:
            return store.Reader(checkpoints / str(step)).leaves[name][0]
        except store.DamagedError as error:
            complaints.append(str(error))
    raise ValueError(f"no sound checkpoint in {checkpoints}: {'; '.join(complaints)}")


def _steps(checkpoints: epath.Path, step: int | None) -> list[int]:
    with checkpoint.Checkpoints(checkpoints) as saved:
        steps = saved.steps()
    if not steps:
        raise ValueError(f"{checkpoints} holds no checkpoints")
    if step is not None and step not in steps:
        raise ValueError(f"no checkpoint of step {step} in {checkpoints}; there are {steps}")
    return steps if step is None else [step]
