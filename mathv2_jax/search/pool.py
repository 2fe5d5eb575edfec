"""High-compute search: a pool of proofs for each problem, verified and refined round by round.

Arxiv 2511.22570, section 3: so many proofs, each verified so many times; a round takes the best by
mean score, pairs each with some of its analyses, those that report issues first, and writes one
refined proof for each pair; until one proof passes all verifications, or the rounds are used.
One-shot generation is the same without a round.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from mathv2_jax import records, roles
from mathv2_jax.search import candidates as candidates_lib
from mathv2_jax.search import rounds, selection

Pool = candidates_lib.Pool
Candidate = candidates_lib.Candidate
FirstOpinions = rounds.FirstOpinions


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """The paper's numbers. `rounds` are those of refinement, after the first proofs.

    `together` proofs, each with one of its analyses, are shown to one refinement. `min_votes` and
    `max_lost` are `selection.Voting`'s. Votes are asked for in waves of `wave`; `adaptive` asks
    for the next one only of proofs whose votes can still change who the best are, or whether one
    passes; in the last round, which of them is the first.

    `unverified` is the share of a round's proofs, those that the verifier head thinks least of,
    that are left without verification; of these the share `audited` is verified nevertheless, which
    measures what the filter loses.
    """

    proofs: int = 64
    verifications: int = 64
    best: int = 64
    analyses: int = 8
    rounds: int = 16
    together: int = 1
    min_votes: int = 1
    max_lost: int = 0
    wave: int = 8
    adaptive: bool = False
    unverified: float = 0.0
    audited: float = 0.1

    def __post_init__(self):
        for name in (
            "proofs",
            "verifications",
            "best",
            "analyses",
            "together",
            "min_votes",
            "wave",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"pool.{name} = {getattr(self, name)}: must be at least 1")
        for name in ("rounds", "max_lost"):
            if getattr(self, name) < 0:
                raise ValueError(f"pool.{name} = {getattr(self, name)}: must not be negative")
        if self.min_votes > self.verifications or self.max_lost >= self.verifications:
            raise ValueError(
                f"pool.min_votes = {self.min_votes} must be at most pool.verifications = "
                f"{self.verifications}, and pool.max_lost = {self.max_lost} less"
            )
        if not 0.0 <= self.unverified < 1.0 or not 0.0 <= self.audited <= 1.0:
            raise ValueError(
                f"pool.unverified = {self.unverified} must lie in [0, 1), pool.audited = "
                f"{self.audited} in [0, 1]"
            )

    def require_head(self, first_opinions: FirstOpinions | None) -> None:
        """ValueError where proofs are to be filtered by a verifier that has no head."""
        if self.unverified and first_opinions is None:
            raise ValueError(
                f"pool.unverified = {self.unverified}: this verifier has no head to filter with; "
                "set it to 0, or verify with a checkpoint of mathv2-train"
            )

    @property
    def voting(self) -> selection.Voting:
        """The rule for votes."""
        return selection.Voting(
            verifications=self.verifications, min_votes=self.min_votes, max_lost=self.max_lost
        )

    @property
    def most_answers(self) -> int:
        """The most that one problem can take."""
        written = self.proofs + self.rounds * self.best * self.analyses
        return written * (1 + self.verifications)


class PoolSearch:
    """How a pool grows by a round; see `PoolConfig`."""

    def __init__(self, config: PoolConfig, seed: int):
        self.config, self._seed = config, seed

    def passed(self, pool: Pool) -> Candidate | None:
        """The best proof that passes all verifications, None while there is none."""
        passing = [c for c in pool.candidates if self.config.voting.passes(c)]
        return max(passing, key=lambda c: (c.self_score, -c.place)) if passing else None

    def is_done(self, pool: Pool) -> bool:
        """Whether a proof has passed, or no round is left."""
        return self.passed(pool) is not None or pool.rounds > self.config.rounds

    def best(self, pool: Pool) -> Candidate | None:
        """The best so far: one that passed, else by mean vote, else, without any, by self-score."""
        ranked = selection.ranked(pool.candidates, self.config.voting)
        unvoted = sorted(pool.candidates, key=lambda c: (-c.self_score, c.place))
        return self.passed(pool) or next(iter(ranked or unvoted), None)

    def most_left(self, pool: Pool) -> int:
        """The most answers that the rounds left can take."""
        config = self.config
        if self.is_done(pool):
            return 0
        later = (config.rounds - max(pool.rounds - 1, 0)) * config.best * config.analyses
        return (later + (0 if pool.rounds else config.proofs)) * (1 + config.verifications)

    def step(self, players: rounds.Players, pools: Sequence[Pool]) -> list[records.Sample]:
        """One round of each pool, which has taken it in and is to end it: the samples, in order."""
        prompts = [(pool, self._prompts(pool)) for pool in pools]
        mark = functools.partial(self._filtered, players)
        samples = rounds.take(players, self._seed, prompts, mark)
        if self.config.adaptive:
            samples += self._verify_adaptively(players, pools)
        else:
            voting, wave = self.config.voting, self.config.wave
            samples += rounds.verify_all(players, self._seed, pools, voting, wave)
        return samples

    def _prompts(self, pool: Pool) -> list[rounds.Prompt]:
        config = self.config
        best = selection.ranked(pool.candidates, config.voting)[: config.best]
        seed = (self._seed, rounds.STAGE, "pairs", pool.problem.id, pool.rounds)
        sets = selection.pairs(best, config.analyses, config.together, *seed)
        if not sets:  # at the beginning, or where nothing could be read so far
            return [rounds.Prompt(first=0, num_samples=config.proofs)]
        return [_refinement(place, found) for place, found in enumerate(sets)]

    def _filtered(
        self, players: rounds.Players, pool: Pool, written: Sequence[records.Sample]
    ) -> list[records.Sample]:
        """The samples, with what the verifier head thinks of their proofs where it filters."""
        config, readable = self.config, [candidates_lib.readable(s) for s in written]
        places = [place for place, found in enumerate(readable) if found is not None]
        if not config.unverified or not places:
            return list(written)
        tokenizer = players.verifier.tokenizer
        config.require_head(players.first_opinions)
        assert players.first_opinions is not None and tokenizer is not None
        role, statement = players.roles.verifier, pool.problem.statement
        asked = [
            role.prompt(tokenizer, statement=statement, proof=found.proof)
            for found in readable
            if found is not None
        ]
        expected = players.first_opinions(asked) @ np.asarray(records.SCORES)
        order = sorted(range(len(places)), key=lambda at: (expected[at], -places[at]))
        least = {places[at] for at in order[: int(config.unverified * len(places))]}
        samples = list(written)
        for at, place in enumerate(places):
            sample, facts = samples[place], {candidates_lib.FIRST_OPINION: float(expected[at])}
            if place in least:
                chance = np.random.default_rng(roles.seed_for(self._seed, "audit", sample.id))
                facts[candidates_lib.FILTERED] = 1.0
                facts[candidates_lib.AUDITED] = float(chance.random() < config.audited)
            samples[place] = dataclasses.replace(sample, rewards={**sample.rewards, **facts})
        return samples

    def _verify_adaptively(
        self, players: rounds.Players, pools: Sequence[Pool]
    ) -> list[records.Sample]:
        """Waves of votes on those proofs alone whose votes can still change the round's outcome."""
        config, samples = self.config, list[records.Sample]()
        while True:
            ballots = []
            for pool in pools:
                listed = [c for c in pool.candidates if not c.filtered or c.audited]
                for candidate in self._undecided(pool, listed):
                    first = len(candidate.cast)
                    number = min(config.wave, config.verifications - first)
                    ballots.append(rounds.Ballot(pool, candidate, first, number))
            found = rounds.verify(players, self._seed, ballots) if ballots else []
            samples += found
            if not found:  # all is decided, or the budget is spent
                return samples

    def _undecided(self, pool: Pool, listed: Sequence[Candidate]) -> list[Candidate]:
        """Whose votes can still change the next round, or, where there is none, the answer."""
        config = self.config
        best = 1 if pool.rounds >= config.rounds else config.best
        return selection.undecided(listed, best, config.voting)


def _refinement(
    place: int, shown: Sequence[tuple[Candidate, candidates_lib.Cast]]
) -> rounds.Prompt:
    """One refinement's prompt: the first proof with its analysis, then the others, if any."""
    (first, analysis), *others = shown
    text = analysis.text
    for candidate, cast in others:
        text += (
            f"\n\nAnother solution:\n{candidate.proof}\n\nEvaluation of that solution:\n{cast.text}"
        )
    parents = tuple(name for candidate, cast in shown for name in (candidate.id, cast.id))
    return rounds.Prompt(
        first=place, num_samples=1, proof=first.proof, analysis=text, parents=parents
    )
