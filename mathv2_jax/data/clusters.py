"""Problem clusters of real statements: what must not be split between training and evaluation.

Two statements share a cluster where their letters and digits are the same, or where nearly all of
the shorter one stands in the longer one: a contest's problem is often found again with another
layout, another phrase, or a corrected bound.
"""

import collections
import unicodedata

from mathv2_jax import records

SHINGLE = 8  # characters
MIN_SHINGLES = 24  # shorter statements have only exact twins


def normalise(statement: str) -> str:
    """Letters and digits alone, compatibility forms and case folded."""
    folded = unicodedata.normalize("NFKC", statement).casefold()
    return "".join(c for c in folded if c.isalnum())


class Clusters:
    """Names the cluster of one statement after another; the first of a cluster founds it.

    `near` is the share of the shorter statement's shingles that the other must hold.
    """

    def __init__(self, near: float):
        self.near = near
        self._exact: dict[str, str] = {}
        self._holders: dict[str, list[int]] = collections.defaultdict(list)
        self._remembered: list[tuple[str, int]] = []  # cluster and number of shingles

    def of(self, statement: str, *, remember: bool = True) -> str:
        """The statement's cluster. Later statements may be near it only if it is remembered."""
        text = normalise(statement) or statement
        if text in self._exact:
            return self._exact[text]
        shingles = {text[i : i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1))}
        cluster = self._nearest(shingles) or records.content_id("cluster", text)
        self._exact[text] = cluster
        if remember:
            place = len(self._remembered)
            self._remembered.append((cluster, len(shingles)))
            for shingle in shingles:
                self._holders[shingle].append(place)
        return cluster

    def _nearest(self, shingles: set[str]) -> str | None:
        if len(shingles) < MIN_SHINGLES:
            return None
        shared: collections.Counter[int] = collections.Counter()
        for shingle in shingles:
            shared.update(self._holders.get(shingle, ()))
        best, found = self.near, None
        for place, count in sorted(shared.items()):
            cluster, size = self._remembered[place]
            if size >= MIN_SHINGLES and count / min(size, len(shingles)) >= best:
                best, found = count / min(size, len(shingles)), cluster
        return found
