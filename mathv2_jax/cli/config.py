"""From ml-collections configs to frozen dataclasses: the one place where the two meet.

A field that no dataclass has is an error that names the nearest one that it has; so is a value of
the wrong type. Fields are of two kinds: runtime ones (how a run is carried out) may change when a
run is resumed, all others (what is computed) may not, but for stages that have not begun.
"""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import ml_collections

from mathv2_jax import roles
from mathv2_jax.cli import inputs, machine
from mathv2_jax.cli import overrides as overrides_lib
from mathv2_jax.cli import start as start_lib
from mathv2_jax.model.config import ModelConfig
from mathv2_jax.rollout import schedule
from mathv2_jax.stages import answer, iterate
from mathv2_jax.stages import run as run_lib
from mathv2_jax.text import prompts

T = TypeVar("T")
SCHEMA = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """SentencePiece, trained by the run on its own input text, or the tokenizer of `directory`.

    A directory, local or gs://, holds tokenizer.json, tokenizer_config.json and a chat template.
    """

    vocab_size: int = 0
    whole_phrases: tuple[str, ...] = ()
    max_texts: int = 20_000
    directory: str = ""

    def __post_init__(self):
        if self.vocab_size < 0 or bool(self.directory) == (self.vocab_size > 0):
            raise ValueError(
                f"config.tokenizer: vocab_size = {self.vocab_size} and directory = "
                f"{self.directory!r}: give one of the two, a size to train to or a tokenizer made "
                "before"
            )
        if self.directory and self.whole_phrases:
            raise ValueError(
                f"config.tokenizer.whole_phrases with directory = {self.directory!r}: phrases are "
                "for a tokenizer that is trained; leave them out"
            )
        if self.max_texts < 1:
            raise ValueError(f"config.tokenizer.max_texts = {self.max_texts}: must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run. `before` and `after` name the answer stages that the result table compares;
    both empty: there is no table.

    `real` says how the files in the folder `data` are used; the world needs neither. `start` is a
    folder that mathv2-convert --from_hf wrote: the run trains that model, not a fresh one.
    """

    seed: int
    data: str
    world: inputs.WorldConfig | None
    tokenizer: TokenizerConfig
    model: ModelConfig
    roles: roles.RolesConfig
    engine: schedule.EngineConfig
    stages: tuple[iterate.Stage, ...]
    before: str
    after: str
    real: inputs.RealConfig | None = None
    start: str = ""
    router_bias_rate: float = 1e-3
    runtime: run_lib.RuntimeConfig = dataclasses.field(default_factory=run_lib.RuntimeConfig)

    def __post_init__(self):
        for stage in self.stages:
            for part in ("sft", "rl"):
                config = getattr(stage, part, None)
                if config is not None:
                    where = f"config.stage.{stage.name}.{part}.auxiliary"
                    config.auxiliary.require(self.model, where)
        self._check_lengths()
        if (self.world is None) == (self.data == ""):
            raise ValueError(
                "a run reads real files (config.data = DIR) or the embedded world (config.world), "
                f"one of the two; config.data is {self.data!r}"
            )
        if not self.stages:
            raise ValueError("config.stages is empty: list the stages to run")
        iterate.check_stages(self.stages)
        iterate.check_settings(
            self.stages, self.roles.sampling, inputs.conversations(real=self.world is None)
        )
        self._check_compared()
        for field, known in (
            ("model_kernels", [machine.AUTO, *machine.EXPERTS]),
            ("attention", [*machine.ATTENTION]),
        ):
            chosen = getattr(self.runtime, field)
            if chosen not in known:
                raise ValueError(
                    f"config.runtime.{field} = {chosen!r} is none of {known}"
                    f"{_nearest(chosen, known)}"
                )
        if self.runtime.attention == "gathered" and not self.model.index_topk:
            raise ValueError(
                "config.runtime.attention = 'gathered' is of tokens that an indexer picks, and "
                "config.model.index_topk = 0: the model has none; give another"
            )

    def _check_lengths(self) -> None:
        """No sequence may be longer than the model's context. Rows of RL hold several of them."""
        context = self.engine.context
        longest = {f"engine.context = {context}": context}
        for stage in self.stages:
            sft = getattr(stage, "sft", None)
            if sft is not None:
                longest[f"stage.{stage.name}.sft.row_length = {sft.row_length}"] = sft.row_length
        for name, sampling in self.roles.sampling.items():
            if sampling.max_tokens >= context:
                raise ValueError(
                    f"config.roles.{name}.max_tokens = {sampling.max_tokens} leaves no room for a "
                    f"prompt in config.engine.context = {context}: lower it, or raise that"
                )
        for said, length in longest.items():
            if length > self.model.max_position:
                raise ValueError(
                    f"config.{said}: a sequence of {length} tokens is longer than "
                    f"config.model.max_position = {self.model.max_position}; lower them, or raise "
                    "that of a model that is not imported"
                )

    def _check_compared(self) -> None:
        answers = {s.name: s for s in self.stages if isinstance(s, answer.AnswerStage)}
        compared = {"before": self.before, "after": self.after}
        if not any(compared.values()):
            return
        for field, name in compared.items():
            if name not in answers:
                raise ValueError(
                    f"config.{field} = {name!r} is no answer stage of config.stages, which has "
                    f"{list(answers) or 'none'}{_nearest(name, answers)}; the result table "
                    "compares two: name them, or add --config.before= --config.after= to have none"
                )
        sizes = [answers[name].num_autolabel for name in compared.values()]
        if len(set(sizes)) > 1:
            raise ValueError(
                f"stages {self.before!r} and {self.after!r} are compared on the same items, but "
                f"their num_autolabel is {sizes[0]} and {sizes[1]}: give them one"
            )


def _nearest(name: str, valid: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(valid), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def build(
    config: ml_collections.ConfigDict, overrides: Sequence[tuple[str, str]] = ()
) -> RunConfig:
    """The frozen config; ValueError names the field at fault by its full path.

    In the file, `stages` is the recipe, a tuple of names, and `stage.NAME` holds each one's fields.
    """
    body = overrides_lib.apply(config.to_dict(), overrides)
    if body.get("start"):
        _convert(str, body["start"], "config.start")
        body = start_lib.complete(body)
    if isinstance(body.get("model"), dict) and isinstance(body.get("tokenizer"), dict):
        if body["tokenizer"].get("directory") and "vocab_size" not in body["model"]:
            raise ValueError(
                "config.model.vocab_size must be given beside config.tokenizer.directory: the "
                "number of tokens there or more, as the model was made (129280 of DeepSeek-V3)"
            )
        wanted = body["tokenizer"].get("vocab_size", 0)
        given = body["model"].setdefault("vocab_size", wanted)
        if given != wanted and not body["tokenizer"].get("directory"):
            raise ValueError(
                f"config.model.vocab_size = {given}, but a model's vocabulary is its tokenizer's, "
                f"of {wanted}: set config.tokenizer.vocab_size"
            )
        build_as(TokenizerConfig, body["tokenizer"], "config.tokenizer")  # before the model's share
    body["stages"] = _listed_stages(body.get("stages", ()), body.pop("stage", {}))
    return build_as(RunConfig, body, "config")


def _listed_stages(names: Any, bodies: Any) -> tuple[iterate.Stage, ...]:
    if not isinstance(bodies, Mapping):
        raise ValueError(f"config.stage must hold the stages by name, it is {bodies!r:.80}")
    listed = []
    for name in _convert(tuple[str, ...], names, "config.stages"):
        if name not in bodies:
            raise ValueError(
                f"config.stages lists {name!r}, but config.stage has only {sorted(bodies)}"
                f"{_nearest(name, bodies)}"
            )
        listed.append(_stage(name, bodies[name], bodies))
    unlisted = [name for name in bodies if name not in {s.name for s in listed}]
    for name in unlisted:  # a typo in one of these should not wait until it is listed
        _stage(name, bodies[name], bodies)
    return tuple(listed)


def build_as(kind: type[T], body: Any, where: str) -> T:
    """A dataclass from its fields as data; ValueError names the field at fault by its full path."""
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
    if hint is Any or hint == tuple[iterate.Stage, ...]:
        return value  # checked where it is used; stages are built by _listed_stages
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
        return build_as(hint, value, where)  # pyright: ignore[reportArgumentType] - hint is a class
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


def _stage(name: str, body: Any, others: Mapping[str, Any]) -> iterate.Stage:
    where = f"config.stage.{name}"
    if not isinstance(body, Mapping) or "kind" not in body:
        known = [n for n, b in others.items() if isinstance(b, Mapping) and "kind" in b]
        raise ValueError(
            f"{where} must have a field 'kind', one of {sorted(iterate.KINDS)}"
            f"{_nearest(name, known)}"
        )
    kind = body["kind"]
    if kind not in iterate.KINDS:
        raise ValueError(
            f"{where}.kind = {kind!r} is none of {sorted(iterate.KINDS)}"
            f"{_nearest(str(kind), iterate.KINDS)}"
        )
    if body.get("name", name) != name:
        raise ValueError(
            f"{where}.name = {body['name']!r}: a stage's name is its key, leave it out"
        )
    rest = {n: v for n, v in body.items() if n != "kind"}
    return build_as(iterate.KINDS[kind][0], {**rest, "name": name}, where)


def identity(config: RunConfig) -> dict[str, Any]:
    """What is computed, as JSON data: everything but the runtime fields.

    `templates` are the fingerprints of the prompts, whose files may change under one name, and
    `start` has that of the variables; it is there only where the run starts from a folder.
    """
    loaded = prompts.load(config.roles.templates)
    body = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in ("runtime", "stages", "start")
    }
    if config.start:
        body["start"] = {"folder": config.start, "weights": start_lib.weights(config.start)}
    body["stages"] = [
        {"kind": next(k for k, (t, _) in iterate.KINDS.items() if t is type(s)), **plain(s)}
        for s in config.stages
    ]
    body["templates"] = {
        field.name: getattr(loaded, field.name).fingerprint for field in dataclasses.fields(loaded)
    }
    return json.loads(json.dumps(plain(body)))


def runtime(config: RunConfig) -> dict[str, Any]:
    """How the run is carried out, as JSON data."""
    return json.loads(json.dumps(plain(config.runtime)))


def plain(value: Any) -> Any:
    """Dataclasses as mappings, sequences as lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(v) for v in value]
    return value


def require_same(
    saved: Mapping[str, Any], asked: Mapping[str, Any], done: Sequence[str], begun: Sequence[str]
) -> None:
    """ValueError where a resumed run would compute something else than the run it goes on from.

    A stage in `done` never changes, one in `begun` only in its number of steps and its gate; the
    list is free behind the last of both.
    """
    for name in sorted(set(saved) | set(asked)):
        if name not in ("stages", "before", "after") and saved.get(name) != asked.get(name):
            where, old, new = next(differences(saved.get(name), asked.get(name), name))
            raise ValueError(
                f"this workdir was begun with another config: {where} was {old}, now {new}. Take "
                "another workdir, or the old value; only runtime fields, and stages that have not "
                "begun, may change when a run goes on"
            )
    for place in range(num_fixed(saved, (*done, *begun))):
        before = saved["stages"][place]
        name = before["name"]
        now = asked["stages"][place] if place < len(asked["stages"]) else None
        if now is not None and name not in done:
            before, now = _without_steps(before), _without_steps(now)
        if now != before:
            where, old, new = next(differences(before, now, f"stages[{place}]"))
            may = "has begun, so only its steps and its gate may change"
            state = "is finished" if name in done else may
            raise ValueError(
                f"this workdir was begun with other stages: {where} was {old}, now {new}; stage "
                f"{name!r} {state}. Take the old value, or --restart_stage={name}, which deletes "
                "what it and the stages after it wrote, and runs them anew"
            )


def num_fixed(saved: Mapping[str, Any], begun: Sequence[str]) -> int:
    """How many stages, from the first on, a run holds fixed that was begun as `saved`."""
    names = [stage["name"] for stage in saved["stages"]]
    return max((place + 1 for place, name in enumerate(names) if name in begun), default=0)


def _without_steps(stage: Mapping[str, Any]) -> dict[str, Any]:
    free = ("steps", "gate", "gate_share")  # a gate lets through or does not, and changes nothing
    return {
        n: {k: x for k, x in v.items() if k not in free} if n in ("sft", "rl") else v
        for n, v in stage.items()
    }


ABSENT = "absent (that was another version of this program)"


def differences(saved: Any, asked: Any, where: str) -> Iterator[tuple[str, str, str]]:
    """Each field that differs, with its values as short texts."""
    if isinstance(saved, Mapping) and isinstance(asked, Mapping):
        for name in sorted(set(saved) | set(asked)):
            if name in saved and name in asked:
                yield from differences(saved[name], asked[name], f"{where}.{name}")
            else:  # written by another version of this program
                old, new = (f"{m[name]!r:.80}" if name in m else ABSENT for m in (saved, asked))
                yield f"{where}.{name}", old, new
    elif saved != asked:
        yield where, f"{saved!r:.80}", f"{asked!r:.80}"
