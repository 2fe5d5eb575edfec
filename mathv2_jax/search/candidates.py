"""The proofs of one problem that a search has written, and what verifiers have said of each.

A pool is a function of the samples that it has absorbed, in their order, so that a search goes on
from its records as if it had never stopped.
"""

import dataclasses
from collections.abc import Iterable

from mathv2_jax import records, reward, roles
from mathv2_jax.text import parse


@dataclasses.dataclass(frozen=True)
class Cast:
    """One verification: a vote with its analysis, or one that was lost (None)."""

    id: str
    score: float | None
    text: str


@dataclasses.dataclass(eq=False, kw_only=True)
class Candidate:
    """A proof, known by its text, with the first sample that wrote it and the votes on it.

    `place` counts the pool's candidates from 0. `first_opinion` is the verifier head's expected
    score; `filtered` says that it was left without verification for it, or, where `audited`,
    verified nevertheless to measure the filter.
    """

    id: str
    place: int
    round: int
    proof: str
    self_analysis: str
    self_score: float
    cast: list[Cast] = dataclasses.field(default_factory=list)
    first_opinion: float | None = None
    filtered: bool = False
    audited: bool = False

    @property
    def votes(self) -> list[float]:
        """The parsed scores; lost votes are left out, never counted as 0."""
        return [c.score for c in self.cast if c.score is not None]

    @property
    def mean(self) -> float | None:
        """The mean vote, None without any."""
        return reward.mean(self.votes) if self.votes else None

    @property
    def majority(self) -> float | None:
        """The score with most votes, the lowest of several; None without any."""
        return reward.majority(self.votes) if self.votes else None


@dataclasses.dataclass(frozen=True)
class Attempt:
    """A sample of a generator that can be read, the `index`-th of its round.

    Others may have written the same proof (`candidate`), and have thought otherwise of it.
    """

    id: str
    round: int
    index: int
    candidate: Candidate
    self_analysis: str
    self_score: float


class Pool:
    """The candidates of one problem."""

    def __init__(self, problem: records.Problem):
        self.problem = problem
        self.candidates: list[Candidate] = []
        self.rounds = 0  # that are complete
        self.tokens = 0  # that were generated, proofs and analyses
        # By the generator, unreadable ones and duplicates too; what it thought is left to records.
        self.written: list[records.Sample] = []
        self.attempts: list[Attempt] = []  # those of them that can be read
        self._by_text: dict[str, Candidate] = {}
        self._by_sample: dict[str, Candidate] = {}

    def absorb(self, samples: Iterable[records.Sample]) -> None:
        """Take in what a generator wrote and what verifiers said of it, in their order.

        ValueError names a vote on a proof that the pool does not have.
        """
        for sample in samples:
            self.tokens += sample.num_tokens
            if sample.role == roles.GENERATOR:
                self._write(sample)
            else:
                self._vote(sample)

    def end_round(self, samples: Iterable[records.Sample] = ()) -> None:
        """Take in what is left of a round, or all of it, which then is complete."""
        self.absorb(samples)
        self.rounds += 1

    def _write(self, sample: records.Sample) -> None:
        self.written.append(dataclasses.replace(sample, thinking=None))
        found = readable(sample)
        if found is None:
            return
        known = self._by_text.get(found.proof)
        if known is None:
            known = Candidate(
                id=sample.id,
                place=len(self.candidates),
                round=sample.step,
                proof=found.proof,
                self_analysis=found.self_analysis,
                self_score=found.self_score,
                first_opinion=sample.rewards.get(FIRST_OPINION),
                filtered=bool(sample.rewards.get(FILTERED)),
                audited=bool(sample.rewards.get(AUDITED)),
            )
            self.candidates.append(known)
            self._by_text[found.proof] = known
        self._by_sample[sample.id] = known
        self.attempts.append(
            Attempt(
                id=sample.id,
                round=sample.step,
                index=sample.index,
                candidate=known,
                self_analysis=found.self_analysis,
                self_score=found.self_score,
            )
        )

    def _vote(self, sample: records.Sample) -> None:
        candidate = self._by_sample.get(sample.target)
        if candidate is None:
            raise ValueError(
                f"sample {sample.id} judges {sample.target}, which is no proof of problem "
                f"{self.problem.id}: records of the search are missing"
            )
        candidate.cast.append(Cast(sample.id, sample.score, sample.text))


FIRST_OPINION, FILTERED, AUDITED = "first_opinion", "filtered", "audited"


def readable(sample: records.Sample) -> parse.ParsedGeneration | None:
    """What a generator's sample holds; None where it was cut or breaks the format."""
    if sample.outcome is not records.Outcome.PARSED:
        return None
    return parse.parse_generation(sample.text)
