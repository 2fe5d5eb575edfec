"""Problem clusters of real statements: what must not be split between training and evaluation.

Two statements share a cluster where their letters and digits are the same, or where nearly all of
the shorter one stands in the longer one: a contest's problem is often found again with another
layout, another phrase, or a corrected bound.
"""

import collections
import math
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

    `near` is the share of the shorter statement's shingles that the other must hold. All are held
    in memory: about 30 kB for a statement of a thousand characters.
    """

    def __init__(self, near: float):
        self.near = near
        self._exact: dict[str, str] = {}
        self._remembered: list[tuple[str, frozenset[str]]] = []  # cluster and shingles
        self._holders: dict[str, list[int]] = collections.defaultdict(list)
        self._first_holders: dict[str, list[int]] = collections.defaultdict(list)

    def of(self, statement: str) -> str:
        """The statement's cluster, which later ones may join."""
        text = normalise(statement) or statement
        if text in self._exact:
            return self._exact[text]
        shingles = frozenset(text[i : i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1)))
        cluster = self._nearest(shingles) or records.content_id("cluster", text)
        self._exact[text] = cluster
        if len(shingles) >= MIN_SHINGLES:
            place = len(self._remembered)
            self._remembered.append((cluster, shingles))
            for shingle in shingles:
                self._holders[shingle].append(place)
            for shingle in self._first(shingles):
                self._first_holders[shingle].append(place)
        return cluster

    def _first(self, shingles: frozenset[str]) -> list[str]:
        """So many, in one order of all, that who holds `near` of them holds one of these."""
        missing = len(shingles) - math.ceil(self.near * len(shingles))
        return sorted(shingles, key=hash)[: missing + 1]

    def _nearest(self, shingles: frozenset[str]) -> str | None:
        if len(shingles) < MIN_SHINGLES:
            return None
        # The shorter of two is this one, which has one of its first in the other, or the other.
        places = {p for s in self._first(shingles) for p in self._holders.get(s, ())}
        places |= {p for s in shingles for p in self._first_holders.get(s, ())}
        best, found = self.near, None
        for place in sorted(places):
            cluster, others = self._remembered[place]
            share = len(shingles & others) / min(len(others), len(shingles))
            if share >= best and (found is None or share > best):
                best, found = share, cluster
        return found
