"""What a round of a search is made of: proofs are written, then verified, each as records.

Rounds of several problems go on together, so that engines have much to do at once. The samples are
a function of (seed, problem, round) and of the answers; what was not asked, since a budget was
spent, is in none.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from mathv2_jax import records, roles
from mathv2_jax.search import candidates as candidates_lib
from mathv2_jax.search import selection

Pool = candidates_lib.Pool
Candidate = candidates_lib.Candidate
Respondent = roles.Respondent
STAGE = "search"

# The verifier head's P(0), P(0.5), P(1) at the end of each prompt, [prompts, 3].
FirstOpinions = Callable[[Sequence[Sequence[int]]], np.ndarray]
Moved = Callable[[], None]  # told when pools have changed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Players:
    """Who writes and who verifies. `first_opinions` are the verifier head's, where it has one.

    The three may be one model. Pools take votes in by `call` at a time, or a ballot's, and `moved`
    is told each time.
    """

    roles: roles.Roles
    generator: Respondent
    verifier: Respondent
    first_opinions: FirstOpinions | None = None
    call: int = 4096
    moved: Moved = lambda: None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a generator is asked: how often, and with which earlier attempt, if any.

    Its samples are numbered from `first` on, apart from those of the round's other prompts.
    `parents` are the samples that the prompt shows.
    """

    first: int
    num_samples: int
    proof: str = ""
    analysis: str = ""
    parents: tuple[str, ...] = ()


def write(
    players: Players, seed: int, prompts: Sequence[tuple[Pool, Sequence[Prompt]]]
) -> list[tuple[Pool, list[records.Sample]]]:
    """What the generator answers to each pool's prompts, in order; no pool has changed yet."""
    flat = [(pool, prompt) for pool, each in prompts for prompt in each]
    opinions: dict[int, list[roles.Opinion]] = {}
    # Those that are asked alike go together, in the order of their problems.
    for fresh in (True, False):
        role = players.roles.generator if fresh else players.roles.refiner
        by_number: dict[int, list[int]] = {}
        for place, (_, prompt) in enumerate(flat):
            if (not prompt.parents) is fresh:
                by_number.setdefault(prompt.num_samples, []).append(place)
        for number, places in by_number.items():
            fields = [_fields(*flat[place]) for place in places]
            keys = [
                f"{pool.problem.id}/{pool.rounds}/{prompt.first}"
                for pool, prompt in (flat[place] for place in places)
            ]
            found = roles.ask(players.generator, role, fields, number, (seed, STAGE), keys)
            opinions.update(zip(places, found, strict=True))
    samples: dict[int, list[records.Sample]] = {id(pool): [] for pool, _ in prompts}
    for place, (pool, prompt) in enumerate(flat):
        for index, opinion in enumerate(opinions[place], start=prompt.first):
            if opinion.response.finish is not records.Finish.CANCELLED:
                samples[id(pool)].append(_generated(pool, prompt, opinion, index))
    return [(pool, samples[id(pool)]) for pool, _ in prompts]


def take(
    players: Players,
    seed: int,
    prompts: Sequence[tuple[Pool, Sequence[Prompt]]],
    mark: Callable[[Pool, list[records.Sample]], list[records.Sample]] = lambda _, own: own,
) -> list[records.Sample]:
    """As `write`, and each pool takes its samples in, as `mark` leaves them."""
    samples: list[records.Sample] = []
    for pool, written in write(players, seed, prompts):
        own = mark(pool, written)
        pool.absorb(own)
        samples += own
    players.moved()
    return samples


def _fields(pool: Pool, prompt: Prompt) -> Mapping[str, str]:
    shown = {"proof": prompt.proof, "analysis": prompt.analysis} if prompt.parents else {}
    return {"statement": pool.problem.statement, **shown}


def _generated(pool: Pool, prompt: Prompt, opinion: roles.Opinion, index: int) -> records.Sample:
    problem = pool.problem
    return roles.make_sample(
        opinion,
        id=f"{STAGE}/{problem.id}/{pool.rounds}/{index}",
        role=roles.GENERATOR,
        stage=STAGE,
        step=pool.rounds,
        problem_id=problem.id,
        target=problem.id,
        index=index,
        statement=problem.statement,
        proof=prompt.proof,
        analysis=prompt.analysis,
        parents=prompt.parents or None,
    )


@dataclasses.dataclass(frozen=True)
class Ballot:
    """Votes `first` to `first + number - 1` on a proof."""

    pool: Pool
    candidate: Candidate
    first: int
    number: int


def verify(players: Players, seed: int, ballots: Sequence[Ballot]) -> list[records.Sample]:
    """The verifier's analyses, which their pools have absorbed, in the ballots' order.

    A vote is a function of the seed, the proof's text and its number, whenever it is asked for.
    """
    by_number: dict[int, list[Ballot]] = {}
    for ballot in ballots:
        by_number.setdefault(ballot.number, []).append(ballot)
    samples: list[records.Sample] = []
    for number, alike in _calls(by_number, players.call):
        fields = [
            {"statement": b.pool.problem.statement, "proof": b.candidate.proof} for b in alike
        ]
        keys = [
            f"{records.content_id('proof', *values.values())}/{b.first}"
            for b, values in zip(alike, fields, strict=True)
        ]
        found = roles.ask(
            players.verifier, players.roles.verifier, fields, number, (seed, STAGE), keys
        )
        for ballot, values, opinions in zip(alike, fields, found, strict=True):
            asked = [o for o in opinions if o.response.finish is not records.Finish.CANCELLED]
            own = [
                _analysis(ballot, values, opinion, ballot.first + place)
                for place, opinion in enumerate(asked)
            ]
            ballot.pool.absorb(own)
            samples += own
        players.moved()
    return samples


def _calls(
    by_number: Mapping[int, Sequence[Ballot]], most: int
) -> Iterator[tuple[int, Sequence[Ballot]]]:
    for number, ballots in by_number.items():
        size = max(1, most // number)
        for at in range(0, len(ballots), size):
            yield number, ballots[at : at + size]


def _analysis(
    ballot: Ballot, fields: Mapping[str, str], opinion: roles.Opinion, index: int
) -> records.Sample:
    pool, candidate = ballot.pool, ballot.candidate
    return roles.make_sample(
        opinion,
        id=f"{candidate.id}/{index}",
        role=roles.VERIFIER,
        stage=STAGE,
        step=pool.rounds,
        problem_id=pool.problem.id,
        target=candidate.id,
        index=index,
        analysis="",
        **fields,
    )


def verify_all(
    players: Players, seed: int, pools: Sequence[Pool], voting: selection.Voting, wave: int
) -> list[records.Sample]:
    """Every vote that candidates lack, but of those that are filtered; in waves, asked at once."""
    ballots = []
    for pool in pools:
        for candidate in pool.candidates:
            if candidate.filtered and not candidate.audited:
                continue
            first = len(candidate.cast)
            while first < voting.verifications:
                number = min(wave - first % wave, voting.verifications - first)
                ballots.append(Ballot(pool, candidate, first, number))
                first += number
    return verify(players, seed, ballots) if ballots else []
