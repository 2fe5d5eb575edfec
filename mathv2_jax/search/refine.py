"""Sequential refinement: threads that each rewrite their proof until they are satisfied with it.

arXiv 2511.22570, section 3: a thread is shown its previous proof with its own analysis of it, until
it gives itself 1 or the attempts are used. One run has the results of every lower limit: a thread's
answer under a limit is the last of its attempts up to there that can be read (ours).
"""

import dataclasses
from collections.abc import Sequence

from mathv2_jax import records
from mathv2_jax.search import candidates as candidates_lib
from mathv2_jax.search import rounds, selection

Pool = candidates_lib.Pool
Attempt = candidates_lib.Attempt
Candidate = candidates_lib.Candidate


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefineConfig:
    """The paper's numbers. Every proof gets `verifications` votes, 0 for none."""

    threads: int = 32
    attempts: int = 8
    verifications: int = 32

    def __post_init__(self):
        for name in ("threads", "attempts"):
            if getattr(self, name) < 1:
                raise ValueError(f"refine.{name} = {getattr(self, name)}: must be at least 1")
        if self.verifications < 0:
            raise ValueError(f"refine.verifications = {self.verifications}: must not be negative")

    @property
    def most_answers(self) -> int:
        """The most that one problem can take."""
        return self.threads * self.attempts * (1 + self.verifications)


class Refinement:
    """How threads go on by an attempt; see `RefineConfig`."""

    def __init__(self, config: RefineConfig, seed: int):
        self.config, self._seed = config, seed

    def is_done(self, pool: Pool) -> bool:
        """Whether every thread is satisfied, or no attempt is left."""
        begun = pool.rounds > 0
        return pool.rounds >= self.config.attempts or (begun and not self._going(pool))

    def best(self, pool: Pool) -> Candidate | None:
        """Of the threads' answers so far that of the best self-score, ties by mean vote."""
        found = [a for a in answers(pool, self.config.threads, pool.rounds + 1) if a is not None]
        found.sort(key=lambda a: (-a.self_score, -(a.candidate.mean or 0.0), a.candidate.place))
        return found[0].candidate if found else None

    def most_left(self, pool: Pool) -> int:
        """The most answers that the attempts left can take."""
        if self.is_done(pool):
            return 0
        going = len(self._going(pool)) if pool.rounds else self.config.threads
        return going * (self.config.attempts - pool.rounds) * (1 + self.config.verifications)

    def step(self, players: rounds.Players, pools: Sequence[Pool]) -> list[records.Sample]:
        """One attempt of each thread that goes on, which the pools have taken in and are to end:
        the samples, in order."""
        prompts = [(pool, self._prompts(pool)) for pool in pools]
        samples = rounds.take(players, self._seed, prompts)
        if self.config.verifications:
            voting = selection.Voting(verifications=self.config.verifications)
            wave = self.config.verifications
            samples += rounds.verify_all(players, self._seed, pools, voting, wave)
        return samples

    def _going(self, pool: Pool) -> list[tuple[int, Attempt | None]]:
        """Threads that are not satisfied, each with its last attempt that can be read."""
        last = answers(pool, self.config.threads, pool.rounds)
        return [(t, a) for t, a in enumerate(last) if a is None or a.self_score < 1.0]

    def _prompts(self, pool: Pool) -> list[rounds.Prompt]:
        if not pool.rounds:
            return [rounds.Prompt(first=0, num_samples=self.config.threads)]
        return [
            rounds.Prompt(first=thread, num_samples=1)
            if found is None
            else rounds.Prompt(
                first=thread,
                num_samples=1,
                proof=found.candidate.proof,
                analysis=found.self_analysis,
                parents=(found.id,),
            )
            for thread, found in self._going(pool)
        ]


def answers(pool: Pool, threads: int, limit: int) -> list[Attempt | None]:
    """Each thread's answer under a limit of attempts; None where it wrote nothing readable."""
    found: list[Attempt | None] = [None] * threads
    for attempt in pool.attempts:
        if attempt.round < limit:
            found[attempt.index] = attempt
    return found
