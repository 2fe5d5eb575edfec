"""A search from its problems to its answers, which may be killed at any moment and goes on.

What is durable are a table of samples, a part for each step, and the responses of the step that has
not ended. A step is a round of every problem that is at work: some problems go on together, and
where one is done the next begins. All of it is a function of the configuration and the answers, so
that a search with an engine that is seeded has the same pools however often it was interrupted.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

from etils import epath

from mathv2_jax import records, storage
from mathv2_jax.rollout import durable
from mathv2_jax.search import asking, rounds
from mathv2_jax.search import candidates as candidates_lib

Pool = candidates_lib.Pool
Candidate = candidates_lib.Candidate


class Method(Protocol):
    """How pools grow: `pool.PoolSearch` or `refine.Refinement`. A `step` ends no round."""

    def is_done(self, pool: Pool, /) -> bool: ...
    def best(self, pool: Pool, /) -> Candidate | None: ...
    def most_left(self, pool: Pool, /) -> int: ...
    def step(self, players: rounds.Players, pools: Sequence[Pool], /) -> list[records.Sample]: ...


UNFINISHED = "unfinished.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folders:
    """Where a search keeps its samples and the responses that are not in them yet."""

    samples: epath.Path
    responses: epath.Path

    @property
    def unfinished(self) -> epath.Path:
        """What is known of a round that a budget broke off, for readers; none of it is a record."""
        return self.samples.parent / UNFINISHED


def open_responses(folders: Folders, every: float) -> durable.Responses:
    """The responses of the step that has not ended; see `durable.Responses`."""
    return durable.Responses(folders.responses, every)


class Search:
    """A search of some problems; `at_once` of them go on together.

    `thinking` says whether records keep what models thought before they wrote.
    """

    def __init__(
        self,
        method: Method,
        problems: Sequence[records.Problem],
        folders: Folders,
        responses: durable.Responses,
        meter: asking.Meter,
        at_once: int,
        *,
        thinking: bool = True,
    ):
        self.method, self.meter = method, meter
        self.pools = [Pool(problem) for problem in problems]
        self.last: list[Pool] = []  # the pools that the last step was of
        self._responses, self._at_once, self._thinking = responses, at_once, thinking
        self._unfinished = folders.unfinished
        self._parts = storage.Parts(folders.samples)
        self.steps = 0  # that are recorded
        self._recall()

    def _recall(self) -> None:
        """The steps that are recorded, taken in again."""
        by_id = {pool.problem.id: pool for pool in self.pools}
        for name in self._parts.names():
            lines = self._parts.read_part(name).decode("ascii").split("\n")[:-1]
            samples = [records.from_json(records.Sample, line) for line in lines]
            for pool in self.at_work():
                pool.end_round(s for s in samples if s.problem_id == pool.problem.id)
            unknown = {s.problem_id for s in samples} - set(by_id)
            if unknown:
                raise ValueError(
                    f"part {name} holds samples of problem {min(unknown)}, which this search does "
                    "not have: its files are of another search"
                )
            for sample in samples:
                self.meter.spent.count(sample.finish, sample.num_tokens)
            self.steps += 1

    def at_work(self) -> list[Pool]:
        """The pools whose next round comes next, in the order of their problems."""
        return [p for p in self.pools if not self.method.is_done(p)][: self._at_once]

    def run(self, players: rounds.Players, recorded: Callable[[], None] = lambda: None) -> str:
        """Every step until all problems are done, or the budget is spent: which limit, or "".

        What is answered when the budget is spent counts in the pools, is no record yet, and is not
        asked again if the search goes on with more. `recorded` is called after each step.
        """
        while pools := self.at_work():
            if spent := self.meter.exceeded():
                return spent
            self._responses.begin(self.steps)
            self.last = pools
            samples = self.method.step(players, pools)
            self._responses.flush()
            if not self._thinking:
                samples = [dataclasses.replace(s, thinking=None) for s in samples]
            if spent := self._broken_off():
                storage.write_whole(self._unfinished, records.to_lines(samples))
                return spent
            for pool in pools:
                pool.end_round()
            name = storage.part_name(self.steps + 1)
            self._parts.write_part(name, records.to_lines(samples))
            self._parts.commit(self.steps + 1)
            self._unfinished.unlink(missing_ok=True)
            self.steps += 1
            self._responses.drop_before(self.steps)
            recorded()
        return ""

    def _broken_off(self) -> str:
        return self.meter.exceeded() if self.meter.left_out else ""
