"""Whoever answers a search, within a budget: every answer is counted, and kept till recorded.

A budget is looked at as each answer comes: what an engine is writing then is left, and only answers
that are complete at the same moment go beyond the limit.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

from mathv2_jax import records
from mathv2_jax.rollout import answers, durable
from mathv2_jax.text import tokenizer as tokenizer_lib

_SECONDS_AN_HOUR = 3600.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """The most that a search may take, of all problems together; None: no limit.

    `tokens` and `answers` count what engines generate, `hours` the time of all sessions.
    """

    tokens: int | None = None
    answers: int | None = None
    hours: float | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and not value > 0:
                raise ValueError(
                    f"budget.{field.name} = {value}: must be positive, or None for no limit"
                )


@dataclasses.dataclass
class Spent:
    """What a search has taken so far, recorded or not."""

    tokens: int = 0
    answers: int = 0
    lost: int = 0  # of the answers: refused, or failed at in all attempts

    def count(self, finish: records.Finish, tokens: int) -> None:
        """One answer more."""
        self.answers += 1
        self.tokens += tokens
        self.lost += finish is records.Finish.LOST


class Meter:
    """What is left of a budget. `before` are the seconds of earlier sessions."""

    def __init__(
        self,
        budget: Budget,
        before: float = 0.0,
        now: Callable[[], float] = time.monotonic,
    ):
        self.budget, self.spent = budget, Spent()
        self.left_out = 0  # answers that were not asked for, since a limit was reached
        self._before, self._now, self._began = before, now, now()

    @property
    def seconds(self) -> float:
        """Of all sessions."""
        return self._before + self._now() - self._began

    def exceeded(self) -> str:
        """Which limit is reached, in words; empty where none is."""
        budget, hours = self.budget, self.seconds / _SECONDS_AN_HOUR
        for name, spent, limit in (
            ("tokens", self.spent.tokens, budget.tokens),
            ("answers", self.spent.answers, budget.answers),
            ("hours", hours, budget.hours),
        ):
            if limit is not None and spent >= limit:
                return f"budget.{name} = {limit:,} is spent"
        return ""


class Counted:
    """A respondent whose answers are kept, counted, and asked for while the budget lasts.

    An engine is given at least `call` answers to write at once, where there are so many. What the
    budget does not reach comes back as cancelled. `told` is called with the number of answers that
    have been written now, not read from disk.
    """

    def __init__(
        self,
        engine: durable.DurableEngine,
        meter: Meter,
        call: int,
        told: Callable[[int], None] = lambda _: None,
    ):
        self._engine, self._meter, self._call, self._told = engine, meter, call, told

    @property
    def tokenizer(self) -> tokenizer_lib.Tokenizer | None:
        """The engine's."""
        return self._engine.tokenizer

    def generate(self, requests: Sequence[records.Request], /) -> list[list[records.Response]]:
        """`num_samples` responses for each request, in the requests' order."""
        found: list[list[records.Response]] = []
        for together in self._calls(requests):
            if self._meter.exceeded():
                came = [self._unasked(request) for request in together]
            else:
                came = self._within_budget(together)
            self._meter.left_out += sum(_is_cancelled(r) for each in came for r in each)
            found += came
        return found

    def _within_budget(self, together: Sequence[records.Request]) -> list[list[records.Response]]:
        """Counts each answer as it comes; cancels the others where that reaches a limit."""
        counted: set[tuple[int, int]] = set()
        left: list[records.Request] = list(together)

        def count(place: int, response: records.Response) -> None:
            if _is_cancelled(response) or (place, response.index) in counted:
                return
            counted.add((place, response.index))
            self._meter.spent.count(response.finish, response.num_tokens)

        def came(place: int, response: records.Response, *, new: bool) -> None:
            count(place, response)
            self._told(int(new))
            if left and self._meter.exceeded():
                for request in left:
                    self._engine.cancel(request.id)
                left.clear()

        found = self._engine.generate(together, came)
        for place, responses in enumerate(found):
            for response in responses:
                count(place, response)
        return found

    def _calls(self, requests: Sequence[records.Request]) -> Iterator[list[records.Request]]:
        together: list[records.Request] = []
        for request in requests:
            together.append(request)
            if sum(r.num_samples for r in together) >= self._call:
                yield together
                together = []
        if together:
            yield together

    def _unasked(self, request: records.Request) -> list[records.Response]:
        left, version = records.Finish.CANCELLED, self._engine.version
        return [answers.unanswered(request, i, left, version) for i in range(request.num_samples)]


def _is_cancelled(response: records.Response) -> bool:
    return response.finish is records.Finish.CANCELLED
