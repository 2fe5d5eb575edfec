"""Who answers a command: a checkpoint of this project, or a model behind a server.

checkpoint:DIR[#STAGE[@STEP]]   a run of mathv2-train, or what mathv2-convert has imported
openai:URL#MODEL                any server of OpenAI's chat completions; URL ends before
                                /chat/completions, mostly in /v1
"""

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from mathv2_jax import checkpoint, roles, sharding, storage
from mathv2_jax.cli import config as config_lib
from mathv2_jax.cli import machine, shell
from mathv2_jax.hf import folder
from mathv2_jax.model import transformer
from mathv2_jax.rollout import decode, durable, engine, remote, replicas, schedule
from mathv2_jax.stages import run as run_lib
from mathv2_jax.text import tokenizer as tokenizer_lib
from mathv2_jax.text import tokenizer_files

CHECKPOINT, SERVER = "checkpoint", "openai"
_FORMS = "checkpoint:DIR[#STAGE[@STEP]] or openai:URL#MODEL"


@dataclasses.dataclass(frozen=True)
class Spec:
    """An engine as the command line names it: a folder with a stage and step, or a URL and a model.

    `part` is STAGE[@STEP] or MODEL.
    """

    kind: str
    where: str
    part: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.where}" + (f"#{self.part}" if self.part else "")


def parse(flag: str, text: str) -> Spec:
    """The engine that a flag names; ValueError where it is in neither form."""
    kind, colon, rest = text.partition(":")
    where, _, part = rest.partition("#")
    if kind not in (CHECKPOINT, SERVER) or not colon or not where:
        near = difflib.get_close_matches(kind, (CHECKPOINT, SERVER), n=1)
        hint = f"; did you mean {near[0]}:?" if near and kind != near[0] else ""
        raise ValueError(f"--{flag}={text}: an engine is {_FORMS}{hint}")
    if kind == SERVER and not part:
        raise ValueError(f"--{flag}={text}: name the model after the URL, {SERVER}:{where}#MODEL")
    return Spec(kind, where, part)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """A checkpoint as its folder describes it. `roles` and `engine` are its run's own settings,
    empty for an imported model; `print` tells its variables from all others, wherever they lie."""

    trained: folder.Trained
    print: str
    tokenizer: tokenizer_lib.Tokenizer
    roles: Mapping[str, Any]
    engine: Mapping[str, Any]


def locate(spec: Spec) -> Found:
    """The checkpoint that a spec names; FileNotFoundError or ValueError where there is none."""
    path = shell.absolute(spec.where)
    stage, _, step = spec.part.partition("@")
    if step and not step.isdigit():
        raise ValueError(f"{spec}: step {step!r} is no number")
    if not path.is_dir():
        raise FileNotFoundError(f"{spec}: there is no folder {path}")
    trained = folder.locate(path, stage or None, int(step) if step else None)
    if trained.tokenizer is None or not _is_tokenizer(trained.tokenizer):
        raise ValueError(f"{path} holds no tokenizer: an engine needs one to read and write text")
    body = storage.parse_json(storage.read_bytes(path / "config.json"))
    identity = body.get("identity", {})
    return Found(
        trained=trained,
        print=_newest_print(trained),
        tokenizer=_tokenizer(trained.tokenizer),
        roles=identity.get("roles", {}),
        engine=identity.get("engine", {}),
    )


def _newest_print(trained: folder.Trained) -> str:
    """Of the newest checkpoint whose seal can be read, by that."""
    complaints = []
    for step in trained.steps:
        try:
            leaves = checkpoint.read_seal(trained.checkpoints / str(step))["leaves"]
        except (OSError, ValueError, KeyError) as error:
            complaints.append(f"{step}: {error}")
            continue
        prefix = trained.prefix
        own = {n.removeprefix(prefix): leaves[n][2] for n in leaves if n.startswith(prefix)}
        return _print(step, own)
    raise ValueError(f"no sound checkpoint in {trained.checkpoints}: {'; '.join(complaints)}")


def _print(step: int, prints: Mapping[str, int]) -> str:
    digest = hashlib.sha256(json.dumps(prints, sort_keys=True).encode()).hexdigest()
    return f"step {step} #{digest[:16]}"


def _is_tokenizer(path: epath.Path) -> bool:
    return not path.is_dir() or storage.exists(path / "tokenizer.json")


def _tokenizer(path: epath.Path) -> tokenizer_lib.Tokenizer:
    if path.is_dir():
        return tokenizer_files.load(path)
    return tokenizer_lib.SentencePieceTokenizer.from_bytes(storage.read_bytes(path))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
    """An engine that is ready. `version` names its variables, or its server and model."""

    engine: durable.Asked
    version: str
    first_opinions: Callable[[Sequence[Sequence[int]]], np.ndarray] | None = None


def open_checkpoint(
    found: Found, config: schedule.EngineConfig, runtime: run_lib.RuntimeConfig, *, think: bool
) -> Opened:
    """An engine with a checkpoint's variables, on all devices of this process.

    Of several steps the newest one. ValueError where that is damaged, since its place would be
    taken by another without a word in what is found, or where the model does not fit the engine.
    """
    trained = found.trained
    if config.context > trained.config.max_position:
        raise ValueError(
            f"config.engine.context = {config.context} is longer than the model's max_position = "
            f"{trained.config.max_position}"
        )
    kernels = machine.make_kernels(runtime, jax.default_backend(), trained.config)
    mesh = sharding.make_mesh(runtime.mesh)
    variables, version = _variables(trained, kernels, mesh)
    if version != found.print:
        raise ValueError(
            f"{trained.checkpoints}: {found.print} is damaged; {version} is the newest sound one: "
            "name it, checkpoint:DIR#STAGE@STEP"
        )
    dtype = config.param_dtype or trained.config.param_dtype
    programs = decode.Programs(dataclasses.replace(trained.config, param_dtype=dtype), kernels)

    def make_engine(own: jax.sharding.Mesh) -> engine.Engine:
        return engine.Engine(programs, found.tokenizer, config, own, think=think)

    made = replicas.Replicas(sharding.make_sampling_mesh(None, mesh), make_engine)
    made.load(variables, version)
    (own,) = made.engines.values()
    return Opened(engine=own, version=version, first_opinions=own.first_opinions)


def _variables(
    trained: folder.Trained, kernels: transformer.Kernels, mesh: jax.sharding.Mesh
) -> tuple[transformer.Variables, str]:
    """A checkpoint's variables as they are stored, and a name that no others have."""
    boxed = transformer.boxed_abstract(trained.config, kernels)
    wanted = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        transformer.unboxed(boxed),
        sharding.shardings_for(boxed, mesh),
    )
    complaints = []
    for step in trained.steps:
        at = trained.checkpoints / str(step)
        try:
            variables, prints = checkpoint.read_part(at, wanted, trained.prefix)
        except checkpoint.DamagedError as error:
            complaints.append(str(error))
            logging.warning("%s: damaged checkpoint (%s)", at, error)
            continue
        return variables, _print(step, prints)
    raise ValueError(f"no sound checkpoint in {trained.checkpoints}: {'; '.join(complaints)}")


def server_config(spec: Spec, settings: Mapping[str, Any], where: str) -> remote.RemoteConfig:
    """How a server is asked: the fields in `config.WHERE`, and what the spec says.

    ValueError names a field at fault, or one that the spec sets.
    """
    given = {"base_url": spec.where, "model": spec.part}
    for name in given.keys() & settings.keys():
        raise ValueError(f"config.{where}.{name}: the engine {spec} says it; leave it out")
    return config_lib.build_as(remote.RemoteConfig, {**settings, **given}, f"config.{where}")


def open_server(config: remote.RemoteConfig) -> Opened:
    """A server as an engine."""
    made = remote.RemoteEngine(config)
    return Opened(engine=made, version=made.version)


def default_engine(trained: folder.Trained) -> dict[str, Any]:
    """Settings for a model that comes without those of a run: its whole context, few rows."""
    context = min(trained.config.max_position, 2**17)
    return dict(context=context, rows=16, page=64, chunk=min(512, context), chunks=4, steps=32)


def default_roles(context: int | None) -> dict[str, Any]:
    """Roles of a model that comes without those of a run: the paper's sampling, 128K tokens a proof
    and 64K an analysis, of which half of the context is left for, where that is known."""
    limits = {name: 2**17 if name == roles.GENERATOR else 2**16 for name in roles.NAMES}
    if context is not None:
        limits = {name: min(limit, context // 2) for name, limit in limits.items()}
    sampling = {n: dict(max_tokens=m, temperature=1.0, top_p=0.95) for n, m in limits.items()}
    return dict(templates="olympiad", think=True, **sampling)
