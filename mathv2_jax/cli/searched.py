"""A search as its workdir holds it, finished or not, for what is said of it afterwards."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from mathv2_jax import records, storage
from mathv2_jax.cli import config as config_lib
from mathv2_jax.cli import search_config, shell
from mathv2_jax.data import sources
from mathv2_jax.search import candidates as candidates_lib
from mathv2_jax.search import rounds
from mathv2_jax.search import run as run_lib


@dataclasses.dataclass(frozen=True)
class Searched:
    """A search, which the flag `name` named.

    `identity` is what was searched. `problems` are all of them, `written` those that are begun,
    each with its samples; `broken_off` are ids of those among these whose round a budget broke off.
    """

    name: str
    config: search_config.SearchConfig
    identity: Mapping[str, Any]
    problems: list[records.Problem]
    written: list[tuple[records.Problem, list[records.Sample]]]
    broken_off: frozenset[str]

    @property
    def method(self) -> search_config.Method:
        """How its pools have grown."""
        return search_config.make_method(self.config)

    def pools(self) -> list[candidates_lib.Pool]:
        """Each problem's pool, as the search left it."""
        made = []
        for problem, samples in self.written:
            pool = candidates_lib.Pool(problem)
            whole = [s for s in samples if s.id not in self.broken_off]
            for _, own in itertools.groupby(whole, key=lambda sample: sample.step):
                pool.end_round(own)
            pool.absorb(s for s in samples if s.id in self.broken_off)
            made.append(pool)
        return made

    def notes(self, pools: Sequence[candidates_lib.Pool]) -> list[str]:
        """What a reader must know of a search that is not finished."""
        found = []
        if len(self.written) < len(self.problems):
            left_out = len(self.problems) - len(self.written)
            found.append(f"{left_out} problems are not begun, and are left out of all figures")
        going = sum(not self.method.is_done(pool) for pool in pools)
        if going:
            found.append(f"the search is not finished: {going} problems are not done")
        if self.broken_off:
            number = len(self.broken_off)
            found.append(f"{number} answers are of a round that the search's budget broke off")
        return found


def read(flag: str, name: str) -> Searched:
    """The search in a workdir that a flag names; FileNotFoundError or ValueError without one."""
    said, workdir = f"--{flag}={name}", shell.absolute(name)
    path = workdir / "config.json"
    if not storage.exists(path):
        raise FileNotFoundError(f"{said}: {path} is not there: it is no search's workdir")
    try:
        body = storage.parse_json(storage.read_bytes(path))
        if "search" not in body:
            raise ValueError("it is of a run of mathv2-train, or of nothing that is known here")
        saved = body["search"]
        fields = {f.name for f in dataclasses.fields(search_config.SearchConfig)}
        known = {name: saved[name] for name in saved if name in fields}
        config = config_lib.build_as(search_config.SearchConfig, known, "config")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{said}: {path} is of no search: {error}") from error
    problems = sources.read(workdir / "records" / "input" / "problems.jsonl", records.Problem)
    by_problem: dict[str, list[records.Sample]] = {p.id: [] for p in problems}
    parts = storage.Parts(workdir / "records" / rounds.STAGE)
    unfinished = workdir / "records" / run_lib.UNFINISHED
    broken_off = sources.read(unfinished, records.Sample) if storage.exists(unfinished) else []
    found = sources.parse_lines(list(parts.read()), records.Sample, said)
    recorded = {sample.id for sample in found}  # since, by a search that was killed right then
    broken_off = [sample for sample in broken_off if sample.id not in recorded]
    for sample in [*found, *broken_off]:
        if sample.problem_id not in by_problem:
            raise ValueError(f"{said}: sample {sample.id} is of a problem it does not have")
        by_problem[sample.problem_id].append(sample)
    written = [(p, by_problem[p.id]) for p in problems if by_problem[p.id]]
    if not written:
        raise ValueError(f"{said}: this search has written nothing yet")
    cut = frozenset(sample.id for sample in broken_off)
    return Searched(said, config, saved, problems, written, cut)


def require_alike(found: Searched, other: Searched) -> None:
    """ValueError where two searches are of other problems or models, or verify otherwise."""
    if [p.id for p, _ in other.written] != [p.id for p, _ in found.written]:
        raise ValueError(f"{other.name}: it has answers to other problems than {found.name}")
    for field in ("players", "roles", "templates"):
        for where, ours, theirs in config_lib.differences(
            found.identity.get(field), other.identity.get(field), field
        ):
            raise ValueError(
                f"{other.name}: {where} is {theirs} there and {ours} in {found.name}; "
                "compare searches of the same models"
            )
    for field in ("verifications", "min_votes", "max_lost"):
        ours, theirs = getattr(found.config.pool, field), getattr(other.config.pool, field)
        if ours != theirs:
            raise ValueError(
                f"{other.name}: config.pool.{field} is {theirs} there and {ours} in {found.name}; "
                "compare proofs that are verified alike"
            )
