"""Confidence intervals by bootstrap over problems.

What is drawn again is whole problems, not items, since the proofs of one problem are alike.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np

ROUNDS = 2000
COVERAGE = 0.95


@dataclasses.dataclass(frozen=True)
class Figure:
    """A statistic with its interval, and how many items and problems it is of. None: undefined."""

    value: float | None
    low: float | None
    high: float | None
    items: int
    problems: int

    def __str__(self) -> str:
        if self.value is None:
            return "-"
        if self.low is None or self.high is None:
            return f"{self.value:.3f}"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(
    problems: Sequence[Hashable],
    statistic: Callable[[np.ndarray], float],
    *,
    rounds: int = ROUNDS,
    seed: int = 0,
) -> Figure:
    """The statistic of all items, and the middle 95 % of what it is on problems drawn anew.

    `problems` names the problem of each item; `statistic` takes places of items, which may repeat,
    and gives nan where it is undefined: such draws are left out. One problem has no interval.
    """
    items = len(problems)
    if not items:
        return Figure(None, None, None, 0, 0)
    names = list(dict.fromkeys(problems))
    places = [np.flatnonzero([p == name for p in problems]) for name in names]
    value = statistic(np.arange(items))
    if math.isnan(value):
        return Figure(None, None, None, items, len(names))
    if len(names) == 1:
        return Figure(value, None, None, items, 1)
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(rounds):
        chosen = rng.integers(len(names), size=len(names))
        drawn.append(statistic(np.concatenate([places[c] for c in chosen])))
    kept = [x for x in drawn if not math.isnan(x)]
    tail = (1.0 - COVERAGE) / 2
    low, high = np.quantile(kept, [tail, 1.0 - tail]) if kept else (math.nan, math.nan)
    return Figure(value, float(low), float(high), items, len(names))


def mean(problems: Sequence[Hashable], values: Sequence[float], **settings: int) -> Figure:
    """The mean of a value of each item."""
    array = np.asarray(values, float)
    return bootstrap(problems, lambda at: float(array[at].mean()), **settings)
