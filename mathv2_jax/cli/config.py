"""From ml-collections configs to frozen dataclasses: the one place where the two meet.

A field that no dataclass has is an error that names the nearest one that it has; so is a value of
the wrong type. Fields are of two kinds: runtime ones (how a run is carried out) may change when a
run is resumed, all others (what is computed) may not.
"""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import ml_collections

from mathv2_jax import roles
from mathv2_jax.cli import inputs
from mathv2_jax.cli import overrides as overrides_lib
from mathv2_jax.model.config import ModelConfig
from mathv2_jax.rollout import engine
from mathv2_jax.stages import iterate
from mathv2_jax.stages import run as run_lib

T = TypeVar("T")
SCHEMA = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """SentencePiece, trained by the run on its own input text."""

    vocab_size: int
    whole_phrases: tuple[str, ...] = ()
    max_texts: int = 20_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run. `before` and `after` name the answer stages that the result table compares.

    `real` says how the files in the folder `data` are used; the world needs neither.
    """

    seed: int
    data: str
    world: inputs.WorldConfig | None
    tokenizer: TokenizerConfig
    model: ModelConfig
    roles: roles.RolesConfig
    engine: engine.EngineConfig
    stages: tuple[iterate.Stage, ...]
    before: str
    after: str
    real: inputs.RealConfig | None = None
    router_bias_rate: float = 1e-3
    runtime: run_lib.RuntimeConfig = dataclasses.field(default_factory=run_lib.RuntimeConfig)

    def __post_init__(self):
        iterate.check_stages(self.stages)
        iterate.check_settings(
            self.stages, self.roles.sampling, inputs.conversations(real=self.world is None)
        )
        if (self.world is None) == (self.data == ""):
            raise ValueError(
                "a run reads real files (config.data = DIR) or the embedded world (config.world), "
                f"one of the two; config.data is {self.data!r}"
            )


def build(
    config: ml_collections.ConfigDict, overrides: Sequence[tuple[str, str]] = ()
) -> RunConfig:
    """The frozen config; ValueError names the field at fault by its full path.

    In the file, `stages` is the recipe, a tuple of names, and `stage.NAME` holds each one's fields.
    """
    body = overrides_lib.apply(config.to_dict(), overrides)
    if isinstance(body.get("model"), dict) and isinstance(body.get("tokenizer"), dict):
        body["model"].setdefault("vocab_size", body["tokenizer"].get("vocab_size", 0))
    body["stages"] = _listed_stages(body.get("stages", ()), body.pop("stage", {}))
    return _build(RunConfig, body, "config")


def _listed_stages(names: Any, bodies: Any) -> tuple[iterate.Stage, ...]:
    if not isinstance(bodies, Mapping):
        raise ValueError(f"config.stage must hold the stages by name, it is {bodies!r:.80}")
    listed = []
    for name in _convert(tuple[str, ...], names, "config.stages"):
        if name not in bodies:
            near = difflib.get_close_matches(name, list(bodies), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"config.stages lists {name!r}, but config.stage has only {sorted(bodies)}{hint}"
            )
        listed.append(_stage(name, bodies[name]))
    unlisted = [name for name in bodies if name not in {s.name for s in listed}]
    for name in unlisted:  # a typo in one of these should not wait until it is listed
        _stage(name, bodies[name])
    return tuple(listed)


def _build(kind: type[T], body: Any, where: str) -> T:
    if not isinstance(body, Mapping):
        raise ValueError(f"{where} must hold the fields of {kind.__name__}, it is {body!r:.80}")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType] - T is a dataclass
    for name in body:
        if name not in fields:
            near = difflib.get_close_matches(name, list(fields), n=1)
            hint = f"; did you mean {where}.{near[0]}?" if near else f"; it has {sorted(fields)}"
            raise ValueError(f"{where} has no field {name!r}{hint}")
    for name, field in fields.items():
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if required and name not in body:
            raise ValueError(f"{where}.{name} must be given: it has no default")
    values = {n: _convert(hints[n], v, f"{where}.{n}") for n, v in body.items()}
    return kind(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    if hint == tuple[iterate.Stage, ...]:
        return value  # built by _listed_stages
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and types.NoneType in args:
            return None
        return _convert(next(a for a in args if a is not types.NoneType), value, where)
    if origin is tuple:
        return _convert_tuple(args, value, where)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} must be a mapping, it is {value!r:.80}")
        return types.MappingProxyType(
            {str(k): _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
        )
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)  # pyright: ignore[reportArgumentType] - hint is a class
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{where} must be of type {hint.__name__}, it is {value!r:.80}")
    return value


def _convert_tuple(args: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if isinstance(value, str) and args[0] is str:
        value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{where} must be a sequence, it is {value!r:.80}")
    kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
    if len(kinds) != len(value):
        raise ValueError(f"{where} must have {len(kinds)} entries, it has {len(value)}")
    return tuple(_convert(k, v, where) for k, v in zip(kinds, value, strict=True))


def _stage(name: str, body: Any) -> iterate.Stage:
    where = f"config.stage.{name}"
    if not isinstance(body, Mapping) or "kind" not in body:
        raise ValueError(f"{where} must have a field 'kind', one of {sorted(iterate.KINDS)}")
    kind = body["kind"]
    if kind not in iterate.KINDS:
        near = difflib.get_close_matches(str(kind), list(iterate.KINDS), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{where}.kind = {kind!r} is none of {sorted(iterate.KINDS)}{hint}")
    if body.get("name", name) != name:
        raise ValueError(
            f"{where}.name = {body['name']!r}: a stage's name is its key, leave it out"
        )
    rest = {n: v for n, v in body.items() if n != "kind"}
    return _build(iterate.KINDS[kind][0], {**rest, "name": name}, where)


def identity(config: RunConfig) -> dict[str, Any]:
    """What is computed, as JSON data: everything but the runtime fields."""
    body = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in ("runtime", "stages")
    }
    body["stages"] = [
        {"kind": next(k for k, (t, _) in iterate.KINDS.items() if t is type(s)), **_plain(s)}
        for s in config.stages
    ]
    return json.loads(json.dumps(_plain(body)))


def runtime(config: RunConfig) -> dict[str, Any]:
    """How the run is carried out, as JSON data."""
    return json.loads(json.dumps(_plain(config.runtime)))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(v) for v in value]
    return value


def require_same(saved: Mapping[str, Any], asked: Mapping[str, Any], done: Sequence[str]) -> None:
    """ValueError where a resumed run would compute something else than the run it goes on from.

    The stage list may grow at its end, and a stage that has not finished may take more steps;
    stages in `done` never change.
    """
    for name in sorted(set(saved) | set(asked)):
        if name not in ("stages", "before", "after") and saved.get(name) != asked.get(name):
            path = _first_difference(saved.get(name), asked.get(name), name)
            raise ValueError(
                f"this workdir was begun with another config: {path}. Take another workdir, or "
                "the old value; only runtime fields may change when a run goes on"
            )
    for place, before in enumerate(saved["stages"]):
        now = asked["stages"][place] if place < len(asked["stages"]) else None
        finished = before["name"] in done
        if now is not None and not finished:
            before, now = _without_steps(before), _without_steps(now)
        if now != before:
            path = _first_difference(before, now, f"stages[{place}]")
            raise ValueError(
                f"this workdir was begun with other stages: {path}. Stages may be added at the "
                "end, and the steps of an unfinished stage may change, nothing else"
            )


def _without_steps(stage: Mapping[str, Any]) -> dict[str, Any]:
    return {
        n: {k: x for k, x in v.items() if k != "steps"} if n in ("sft", "rl") else v
        for n, v in stage.items()
    }


def _first_difference(saved: Any, asked: Any, where: str) -> str:
    if isinstance(saved, Mapping) and isinstance(asked, Mapping):
        for name in sorted(set(saved) | set(asked)):
            if saved.get(name) != asked.get(name):
                return _first_difference(saved.get(name), asked.get(name), f"{where}.{name}")
    return f"{where} was {saved!r:.80}, now {asked!r:.80}"
