"""What a stage learns from, as one endless order: sources mixed by weight, hard records drawn more.

Every dataset here has random access: element i is a function of the seed and of i, so a stage's
place in its data is one number, whatever the number of hosts or workers.
"""

import bisect
import dataclasses
import functools
import math
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import numpy as np

EXHAUSTED = REPEAT, DROP, STOP = "repeat", "drop", "stop"
_EPOCHS_KEPT = 2  # whose orders are remembered
_LARGE = 1 << 20  # records of a source whose orders take too much memory


class Mapped(Sequence[Any]):
    """What `make` makes of the items at some places, when it is asked for."""

    def __init__(self, items: Sequence[Any], places: np.ndarray, make: Callable[[Any], Any]):
        self._items, self._places, self._make = items, places, make

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self[place] for place in range(*at.indices(len(self)))]
        return self._make(self._items[int(self._places[at])])

    def __repr__(self) -> str:
        return f"Mapped({len(self)} of {self._items!r:.80})"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """From the element `begin` on, the sources are drawn by these weights."""

    begin: int
    weights: Mapping[str, float]


def draw_weights(hardness: np.ndarray, emphasis: float) -> np.ndarray | None:
    """1 + emphasis x hardness (records.Label.hardness) for each record; None where all are alike.

    A record whose analyses are half 0 and half 1 is drawn 1 + emphasis times as often as one that
    they agree on. ValueError where the emphasis is negative or not finite.
    """
    if not 0.0 <= emphasis < math.inf:
        raise ValueError(f"an emphasis on hard records of {emphasis}: give it 0 or more")
    found = 1.0 + emphasis * np.asarray(hardness)
    return found if emphasis and np.ptp(found) > 0 else None


def stream(
    sources: Mapping[str, Sequence[Any]],
    phases: Sequence[Phase],
    seed: int,
    *,
    exhausted: str = REPEAT,
    weights: Mapping[str, np.ndarray | None] = types.MappingProxyType({}),
) -> grain.MapDataset:
    """A shuffled mixture with random access.

    The first phase begins at 0. `weights` are draw weights of a source's records. A source that has
    been gone through once is shuffled anew ("repeat"), leaves its share to the others until none
    is left ("drop"), or ends the stream ("stop"), whose length then is finite. ValueError names a
    source with a weight that is empty or unknown, and weights that are negative or not finite.
    """
    if exhausted not in EXHAUSTED:
        raise ValueError(f"exhausted = {exhausted!r}: one of {REPEAT}, {DROP} and {STOP}")
    names = _used(sources, phases)
    parts = [
        _shuffled(sources[name], (seed + place) % 2**31, weights.get(name))
        for place, name in enumerate(names)
    ]
    spans = [(p.begin, _shares(names, p.weights)) for p in phases]
    if exhausted == REPEAT:
        return _Mixture(parts, _place(spans), sys.maxsize)
    sizes = [len(sources[name]) for name in names]
    return _Mixture(parts, *_finite(spans, sizes, drop=exhausted == DROP))


def _used(sources: Mapping[str, Sequence[Any]], phases: Sequence[Phase]) -> list[str]:
    """The sources with a weight in any phase, by name."""
    begins = [phase.begin for phase in phases]
    if not begins or begins[0] != 0 or sorted(set(begins)) != begins:
        raise ValueError(f"phases begin at {begins}: the first at 0, each after the one before")
    found = set()
    for phase in phases:
        for name, weight in phase.weights.items():
            if not 0.0 <= weight < math.inf:
                raise ValueError(f"source {name!r} has weight {weight}: give it 0 or more")
            if weight and name not in sources:
                raise ValueError(f"source {name!r} has a weight, but there are {sorted(sources)}")
            if weight and not sources[name]:
                raise ValueError(
                    f"source {name!r} is empty: give it records or take its weight away"
                )
            if weight:
                found.add(name)
        if not any(phase.weights.values()):
            raise ValueError(f"no source has a positive weight among {sorted(sources)}")
    return sorted(found)


def _shares(names: Sequence[str], weights: Mapping[str, float]) -> tuple[float, ...]:
    total = sum(weights.get(name, 0.0) for name in names)
    return tuple(weights.get(name, 0.0) / total for name in names)


def counts(number: int, shares: Sequence[float]) -> list[int]:
    """How many of the first `number` elements come from each source.

    Each is less than len(shares) from its share: the first source gets the whole part of its own,
    the others mix what is left in the same way.
    """
    found, rest = [], 1.0
    for share in shares[:-1]:
        taken = _taken(number, share, rest)
        found.append(taken)
        number, rest = number - taken, rest - share
    return [*found, number]


def select(at: int, shares: Sequence[float]) -> tuple[int, int]:
    """The source of element `at`, and how many of the elements before come from it."""
    rest = 1.0
    for source, share in enumerate(shares[:-1]):
        before = _taken(at, share, rest)
        if _taken(at + 1, share, rest) > before:
            return source, before
        at, rest = at - before, rest - share
    return len(shares) - 1, at


def _taken(number: int, share: float, rest: float) -> int:
    # The last source with a share has all of the rest, whatever the rounding of the differences.
    part = 1.0 if share and share >= rest * (1 - 1e-9) else share / rest if rest > 0 else 0.0
    return math.floor(number * part)


@dataclasses.dataclass(frozen=True)
class _Span:
    """Elements from `begin` on by `shares`; `before` of each source were drawn until there."""

    begin: int
    shares: tuple[float, ...]
    before: tuple[int, ...]


def _place(spans: Sequence[tuple[int, tuple[float, ...]]]) -> list[_Span]:
    found = [_Span(0, spans[0][1], (0,) * len(spans[0][1]))]
    for begin, shares in spans[1:]:
        found.append(_Span(begin, shares, _drawn(found[-1], begin)))
    return found


def _drawn(span: _Span, end: int) -> tuple[int, ...]:
    """How many of each source were drawn up to `end`, which the span reaches."""
    more = counts(end - span.begin, span.shares)
    return tuple(a + b for a, b in zip(span.before, more, strict=True))


def _finite(
    phases: Sequence[tuple[int, tuple[float, ...]]], sizes: Sequence[int], *, drop: bool
) -> tuple[list[_Span], int]:
    """The spans until the sources are used up, and the length; dropped ones leave new spans."""
    spans: list[_Span] = []
    at, drawn, gone = 0, (0,) * len(sizes), set[int]()
    for number, (_, wanted) in enumerate(phases):
        end = phases[number + 1][0] if number + 1 < len(phases) else sys.maxsize
        while at < end:
            left = [0.0 if source in gone else share for source, share in enumerate(wanted)]
            if not sum(left):
                break  # all of this phase's sources are used up: the next one begins
            shares = tuple(share / sum(left) for share in left)
            span = _Span(at, shares, drawn)
            at = min(end, at + _until_one_ends(span, sizes))
            if at > span.begin:
                spans.append(span)
            drawn = _drawn(span, at)
            used_up = {s for s, size in enumerate(sizes) if shares[s] and drawn[s] >= size}
            if used_up and not drop:
                return spans, at
            gone |= used_up
    return spans, at


def _until_one_ends(span: _Span, sizes: Sequence[int]) -> int:
    """After how many elements of the span the first of its sources is used up."""

    def over(number: int) -> bool:
        drawn = _drawn(span, span.begin + number)
        return any(d >= s for d, s, share in zip(drawn, sizes, span.shares, strict=True) if share)

    room = [s - b for s, b, share in zip(sizes, span.before, span.shares, strict=True) if share]
    return bisect.bisect_left(range(sum(room) + 1), True, key=over)


class _Mixture(grain.MapDataset):
    """Elements of its parents, which never end, by spans."""

    def __init__(self, parents: Sequence[grain.MapDataset], spans: Sequence[_Span], length: int):
        super().__init__(parents)
        self._spans, self._length = list(spans), length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        if not 0 <= index < self._length:
            raise IndexError(f"element {index} of a mixture of {self._length}")
        span = self._spans[bisect.bisect_right(self._spans, index, key=lambda s: s.begin) - 1]
        source, number = select(index - span.begin, span.shares)
        return self._parents[source][span.before[source] + number]


def _shuffled(records_: Sequence[Any], seed: int, weights: np.ndarray | None) -> grain.MapDataset:
    """Endless epochs of a source: each in a new order, by the weights where there are any."""
    source = grain.MapDataset.source(records_)
    if weights is None and len(records_) > _LARGE:
        return source.seed(seed).shuffle().repeat()
    return _Epochs(source, weights, seed)


class _Epochs(grain.MapDataset):
    """Epochs as long as the source, each in an order of its own, which is held as a whole: Grain's
    shuffle, which holds nothing, takes milliseconds an element where a source is small.

    By weights a record comes as often as its own over the mean one says, rounded up or down by
    systematic sampling.
    """

    def __init__(self, parent: grain.MapDataset, weights: np.ndarray | None, seed: int):
        super().__init__(parent)
        self._ends = None if weights is None else _ends(weights, len(parent))
        self._epoch, self._seed = len(parent), seed
        self._order = functools.lru_cache(_EPOCHS_KEPT)(self._order_of)

    def __len__(self) -> int:
        return sys.maxsize

    def _order_of(self, epoch: int) -> np.ndarray:
        draw, size = np.random.default_rng((self._seed, epoch)), self._epoch
        if self._ends is None:
            return draw.permutation(size)
        chosen = np.searchsorted(self._ends, np.arange(size) + draw.random(), side="right")
        return draw.permutation(np.minimum(chosen, size - 1))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        epoch, place = divmod(index, self._epoch)
        return self._parent[int(self._order(epoch)[place])]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_order"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._order = functools.lru_cache(_EPOCHS_KEPT)(self._order_of)


def _ends(weights: np.ndarray, size: int) -> np.ndarray:
    """Where each record's part of an epoch ends, in its places."""
    if len(weights) != size or not (np.isfinite(weights) & (weights >= 0)).all():
        raise ValueError(f"{len(weights)} draw weights of {size} records: one each, 0 or more")
    if not weights.sum() > 0:
        raise ValueError("no record has a positive draw weight")
    return np.cumsum(weights) / weights.sum() * size


class Bucketed(grain.MapDataset):
    """The same elements, so that `size` of them in a row are of like length.

    Windows of `window` elements are sorted by `length` and cut into runs of `size`, which come in
    an order of their own. With a window of one run nothing changes but the order within it.
    """

    def __init__(
        self,
        parent: grain.MapDataset,
        length: Callable[[Any], int],
        *,
        size: int,
        window: int,
        seed: int,
    ):
        super().__init__(parent)
        if size < 1 or window < size or window % size:
            raise ValueError(
                f"buckets of {size} elements in windows of {window}: a window is a multiple of a "
                "bucket"
            )
        self._length, self._size, self._window, self._seed = length, size, window, seed
        self._order = functools.lru_cache(_EPOCHS_KEPT)(self._order_of)

    def __len__(self) -> int:
        return len(self._parent)

    def _order_of(self, number: int) -> np.ndarray:
        begin = number * self._window
        end = min(begin + self._window, len(self._parent))
        lengths = [self._length(self._parent[at]) for at in range(begin, end)]
        order = np.argsort(lengths, kind="stable")
        whole = len(order) // self._size
        runs = order[: whole * self._size].reshape(whole, self._size)
        shuffled = np.random.default_rng((self._seed, number)).permutation(runs)
        return begin + np.concatenate([shuffled.ravel(), order[whole * self._size :]])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        number, place = divmod(index, self._window)
        return self._parent[int(self._order(number)[place])]

    __getstate__, __setstate__ = _Epochs.__getstate__, _Epochs.__setstate__
