"""Which proofs of a pool are kept, refined, and verified further: functions of the votes alone."""

import bisect
import dataclasses
from collections.abc import Sequence

import numpy as np

from mathv2_jax import roles
from mathv2_jax.search import candidates as candidates_lib

Candidate = candidates_lib.Candidate
Cast = candidates_lib.Cast
_NEVER = -1.0  # below every mean: what has too few votes to be ranked
Key = tuple[float, float, int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Voting:
    """How many votes a proof is given, and what they must be.

    A proof is ranked by the mean of its parsed votes, of which there must be `min_votes`. It passes
    where all `verifications` are cast, none of them below 1, and at most `max_lost` are lost.
    """

    verifications: int
    min_votes: int = 1
    max_lost: int = 0

    def left(self, candidate: Candidate) -> int:
        """Votes that are still to be cast."""
        return max(0, self.verifications - len(candidate.cast))

    def passes(self, candidate: Candidate) -> bool:
        """Whether the proof has passed all verifications."""
        return not self.left(candidate) and self._spotless(candidate) and bool(candidate.votes)

    def may_pass(self, candidate: Candidate) -> bool:
        """Whether votes are left, and the proof passes if they are all 1."""
        return bool(self.left(candidate)) and self._spotless(candidate)

    def _spotless(self, candidate: Candidate) -> bool:
        votes = candidate.votes
        return all(v == 1.0 for v in votes) and len(candidate.cast) - len(votes) <= self.max_lost

    def bounds(self, candidate: Candidate) -> tuple[float, float]:
        """The least and the greatest mean that the votes left can lead to; equal without any."""
        votes, left = candidate.votes, self.left(candidate)
        if len(votes) + left < self.min_votes or not len(votes) + left:
            return _NEVER, _NEVER
        total = sum(votes)
        least = total / (len(votes) + left) if len(votes) >= self.min_votes else _NEVER
        return (least if left else total / len(votes)), (total + left) / (len(votes) + left)


def _key(value: float, candidate: Candidate) -> Key:
    """The order of candidates: by mean vote, then self-score, then the later round, which has been
    refined further, then who came first."""
    return value, candidate.self_score, candidate.round, -candidate.place


def ranked(pool: Sequence[Candidate], voting: Voting) -> list[Candidate]:
    """The candidates with votes enough, best first: by the mean of the votes cast so far, ties by
    self-score (the released code's rule), then the newest round's, then the first (ours)."""
    counted = [c for c in pool if len(c.votes) >= max(1, voting.min_votes)]
    return sorted(counted, key=lambda c: _key(c.mean or 0.0, c), reverse=True)


def undecided(pool: Sequence[Candidate], best: int, voting: Voting) -> list[Candidate]:
    """Those with votes left that can still change who the `best` are, or whether one passes.

    A candidate is in for certain where it will have votes enough and fewer than `best` others can
    end above it, whatever votes are left, and out for certain where at least so many must.
    """
    bounds = {c.place: voting.bounds(c) for c in pool}
    least = sorted(_key(bounds[c.place][0], c) for c in pool)
    most = sorted(_key(bounds[c.place][1], c) for c in pool)
    found = []
    for c in pool:
        low, high = bounds[c.place]
        if not voting.left(c):
            continue
        surely_above = len(least) - bisect.bisect_right(least, _key(high, c))
        # A candidate's own greatest key may count among those above its least: it is taken out.
        maybe_above = len(most) - bisect.bisect_right(most, _key(low, c)) - (high > low)
        may_be_out = maybe_above >= best or low == _NEVER < high
        if voting.may_pass(c) or (surely_above < best and may_be_out):
            found.append(c)
    return found


def chosen_analyses(candidate: Candidate, number: int, *seed: object) -> list[Cast]:
    """The analyses that a proof is refined with: those that report issues first, else at random.

    Of analyses with the same text the first counts.
    """
    by_text: dict[str, Cast] = {}
    for cast in candidate.cast:
        if cast.score is not None:
            by_text.setdefault(cast.text, cast)
    parsed = list(by_text.values())
    order = np.random.default_rng(roles.seed_for(*seed)).permutation(len(parsed))
    shuffled = [parsed[place] for place in order]
    reporting = [c for c in shuffled if c.score != 1.0]
    return [*reporting, *(c for c in shuffled if c.score == 1.0)][:number]


def pairs(
    best: Sequence[Candidate], analyses: int, proofs: int, *seed: object
) -> list[tuple[tuple[Candidate, Cast], ...]]:
    """What is refined: a proof with one of its analyses each, or several proofs at once.

    Of each of the `best` up to `analyses` analyses, a refinement each. With `proofs` above 1 the
    pairs of so many proofs that follow each other in rank stand together, the last ones with the
    first.
    """
    chosen = [(c, chosen_analyses(c, analyses, *seed, c.id)) for c in best]
    chosen = [(c, found) for c, found in chosen if found]
    sets = []
    for place, (_, own) in enumerate(chosen):
        for number in range(len(own)):
            together = range(min(proofs, len(chosen)))
            members = [chosen[(place + further) % len(chosen)] for further in together]
            sets.append(tuple((c, found[number % len(found)]) for c, found in members))
    return sets
