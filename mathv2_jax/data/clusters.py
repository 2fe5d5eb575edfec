"""Problem clusters of real statements: what must not be split between training and evaluation.

Two statements are neighbours where their letters and digits are the same, or where nearly all of
the shorter one stands in the longer one: a contest's problem is often found again with another
layout, another phrase, or a corrected bound. A cluster is all that neighbours join, however many of
them lie between.
"""

import collections
import heapq
import itertools
import math
import re
import unicodedata
from collections.abc import Iterable
from typing import NamedTuple

from mathv2_jax import records

SHINGLE = 8  # characters
MIN_SHINGLES = 24  # shorter statements have only exact twins

_NUMBER = re.compile(r"\s*(?:problem\s*)?\(?\d{1,3}(?:[.)]|\s*:)\s+", re.IGNORECASE)


def normalise(statement: str) -> str:
    """Letters and digits alone, compatibility forms and case folded, without a number in front."""
    folded = unicodedata.normalize("NFKC", _NUMBER.sub("", statement, count=1)).casefold()
    return "".join(c for c in folded if c.isalnum())


class _Remembered(NamedTuple):
    cluster: str
    shingles: frozenset[str]
    number: int  # of some of them that one must hold who is near


class Clusters:
    """Names the cluster of one statement after another; the first of a cluster founds it.

    A statement may join clusters that were two before: `current` names a cluster as it is called
    now, and `joined` counts how often that has happened. `near` is the share of the shorter
    statement's shingles that the other must hold. All of them are held in memory.
    """

    def __init__(self, near: float):
        self.near, self.joined = near, 0
        self._into: dict[str, str] = {}  # the cluster that another has become a part of
        self._exact: dict[str, str] = {}
        self._remembered: list[_Remembered] = []
        self._holders: dict[str, list[int]] = collections.defaultdict(list)
        self._some_holders: dict[str, list[int]] = collections.defaultdict(list)

    def of(self, statement: str) -> str:
        """The statement's cluster, which later ones may join."""
        text = normalise(statement) or statement
        if text in self._exact:
            return self.current(self._exact[text])
        shingles = frozenset(text[i : i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1)))
        first, *others = self._near(shingles) or [records.content_id("cluster", text)]
        cluster = self.current(first)
        for other in map(self.current, others):
            if other != cluster:
                self._into[other] = cluster
                self.joined += 1
        self._exact[text] = cluster
        if len(shingles) >= MIN_SHINGLES:
            place = len(self._remembered)
            some, number = self._some(shingles)
            self._remembered.append(_Remembered(cluster, shingles, number))
            for shingle in shingles:
                self._holders[shingle].append(place)
            for shingle in some:
                self._some_holders[shingle].append(place)
        return cluster

    def current(self, cluster: str) -> str:
        """What a cluster that `of` has named is called now."""
        while cluster in self._into:
            cluster = self._into[cluster]
        return cluster

    def _some(self, shingles: frozenset[str]) -> tuple[list[str], int]:
        """The rarest of them, and how many of these one holds who holds `near` of all: who lacks so
        many in all lacks no more of a part. Rare ones are in few others that need a look.
        """
        missing = len(shingles) - math.ceil(self.near * len(shingles))
        number = max(1, missing // 3)
        rarest = heapq.nsmallest(
            missing + number, shingles, key=lambda s: (len(self._holders.get(s, ())), s)
        )
        return rarest, number

    def _near(self, shingles: frozenset[str]) -> list[str]:
        """The clusters of its neighbours, by age."""
        if len(shingles) < MIN_SHINGLES:
            return []
        # The shorter of two is this one, and the other holds enough of a part of it, or the other.
        some, number = self._some(shingles)
        shared = collections.Counter(_chained(self._holders, some))
        places = {place for place, count in shared.items() if count >= number}
        shared = collections.Counter(_chained(self._some_holders, shingles))
        places |= {p for p, count in shared.items() if count >= self._remembered[p].number}
        found = []
        for place in sorted(places):
            other = self._remembered[place]
            common = len(shingles & other.shingles)
            if common >= self.near * min(len(other.shingles), len(shingles)):
                found.append(other.cluster)
        return found


def _chained(holders: dict[str, list[int]], shingles: Iterable[str]) -> Iterable[int]:
    return itertools.chain.from_iterable(holders.get(s, ()) for s in shingles)
