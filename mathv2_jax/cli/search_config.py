"""The settings of mathv2-search: defaults, what engines bring along, and --config.field=value."""

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mathv2_jax import roles, sharding
from mathv2_jax.cli import config as config_lib
from mathv2_jax.cli import engines
from mathv2_jax.cli import overrides as overrides_lib
from mathv2_jax.rollout import schedule
from mathv2_jax.search import asking
from mathv2_jax.search import pool as pool_lib
from mathv2_jax.search import refine as refine_lib
from mathv2_jax.text import prompts

SCHEMA = 1
POOL, REFINE = "pool", "refine"
_VERIFYING = (roles.VERIFIER, roles.META_VERIFIER)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runtime:
    """How a search is carried out, never what it finds.

    An engine is given `call` answers at once. Answers are on disk `responses_every` seconds after
    they came (0: each in a file of its own); progress is printed every `progress_every` seconds.
    `thinking` keeps what models thought in the records.
    """

    call: int = 4096
    responses_every: float = 1.0
    progress_every: float = 30.0
    thinking: bool = True
    mesh: sharding.MeshConfig = dataclasses.field(default_factory=sharding.MeshConfig)
    model_kernels: str = "auto"
    attention: str = "auto"

    def __post_init__(self):
        if self.call < 1 or self.responses_every < 0 or self.progress_every <= 0:
            raise ValueError(
                f"config.runtime: call = {self.call} and progress_every = {self.progress_every} "
                f"must be positive, responses_every = {self.responses_every} not negative"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """One search. `method` is pool (high-compute search) or refine (sequential refinement).

    `at_once` problems go on together. `engine` is for a checkpoint that writes, `verifier_engine`
    for another that verifies; `remote` and `verifier_remote` are the fields of `RemoteConfig`.
    """

    method: str = POOL
    seed: int = 0
    at_once: int = 8
    pool: pool_lib.PoolConfig = dataclasses.field(default_factory=pool_lib.PoolConfig)
    refine: refine_lib.RefineConfig = dataclasses.field(default_factory=refine_lib.RefineConfig)
    roles: roles.RolesConfig
    engine: schedule.EngineConfig = dataclasses.field(default_factory=schedule.EngineConfig)
    verifier_engine: schedule.EngineConfig = dataclasses.field(
        default_factory=schedule.EngineConfig
    )
    remote: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    verifier_remote: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    budget: asking.Budget = dataclasses.field(default_factory=asking.Budget)
    runtime: Runtime = dataclasses.field(default_factory=Runtime)

    def __post_init__(self):
        if self.method not in (POOL, REFINE):
            raise ValueError(f"config.method = {self.method!r}: must be {POOL} or {REFINE}")
        if self.at_once < 1:
            raise ValueError(f"config.at_once = {self.at_once}: must be at least 1")


Method = pool_lib.PoolSearch | refine_lib.Refinement


def make_method(config: SearchConfig) -> Method:
    """How the pools of a search grow."""
    if config.method == POOL:
        return pool_lib.PoolSearch(config.pool, config.seed)
    return refine_lib.Refinement(config.refine, config.seed)


def build(
    overrides: Sequence[tuple[str, str]],
    writer: engines.Found | None,
    verifier: engines.Found | None,
) -> SearchConfig:
    """The settings; a checkpoint brings its run's roles and engine, None stands for a server.

    `writer` and `verifier` are the same where one engine does both, with the settings of `engine`.
    ValueError names a field at fault, or two runs whose prompts differ where no override says which
    are meant.
    """
    body: dict[str, Any] = {"roles": _roles(writer, verifier, {name for name, _ in overrides})}
    local = {"engine": writer, "verifier_engine": None if verifier is writer else verifier}
    for name, found in local.items():
        if found is not None:
            body[name] = dict(found.engine or engines.default_engine(found.trained))
    body = overrides_lib.apply(body, overrides)
    config = config_lib.build_as(SearchConfig, body, "config")
    asked: dict[str, Sequence[str]] = {
        "engine": roles.NAMES if verifier is writer else (roles.GENERATOR,),
        "verifier_engine": _VERIFYING,
    }
    for name, found in local.items():
        if found is not None:
            _require_room(name, getattr(config, name), config.roles, asked[name])
    return config


def _roles(
    writer: engines.Found | None, verifier: engines.Found | None, said: Collection[str]
) -> dict[str, Any]:
    """A server is asked with the prompts of the checkpoint beside it; `said` are overrides."""
    sides = [_own_roles(writer), _own_roles(verifier)]
    for field in ("templates", "think"):
        first, second = (side[field] for side in sides)
        if None in (writer, verifier):
            sides[1][field] = sides[0][field] = second if writer is None else first
        elif first != second and f"config.roles.{field}" not in said:
            raise ValueError(
                f"--engine and --verifier_engine were trained with other prompts: roles.{field} is "
                f"{first!r} and {second!r}; search with engines of one kind, or say which are "
                f"meant, --config.roles.{field}="
            )
    return sides[0] | {name: sides[1][name] for name in _VERIFYING}


def _own_roles(found: engines.Found | None) -> dict[str, Any]:
    if found is None:
        return engines.default_roles(None) | {"think": False}
    if not found.roles:
        return engines.default_roles(engines.default_engine(found.trained)["context"])
    return dict(found.roles)


def _require_room(
    name: str, engine: schedule.EngineConfig, asked: roles.RolesConfig, names: Sequence[str]
) -> None:
    for role in names:
        most = asked.sampling[role].max_tokens
        if most >= engine.context:
            raise ValueError(
                f"config.roles.{role}.max_tokens = {most} leaves no room for a prompt in "
                f"config.{name}.context = {engine.context}: lower it, or raise that"
            )


def identity(config: SearchConfig, problems: str, players: Mapping[str, str]) -> dict[str, Any]:
    """What is searched, as JSON data: all but runtime fields and the budget.

    `problems` is a fingerprint of them, `players` names the models by what they do.
    """
    loaded = prompts.load(config.roles.templates)
    apart = ("runtime", "budget", "remote", "verifier_remote")
    body = {
        field.name: config_lib.plain(getattr(config, field.name))
        for field in dataclasses.fields(config)
        if field.name not in apart
    }
    body["problems"], body["players"] = problems, dict(players)
    body["templates"] = {
        field.name: getattr(loaded, field.name).fingerprint for field in dataclasses.fields(loaded)
    }
    return json.loads(json.dumps(body))
