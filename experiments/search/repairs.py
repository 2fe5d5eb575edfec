"""What a search's refinements made of what they refined, by the exact judge: a table, from records.

python -m experiments.search.repairs --search=runs/search/pool-sft

A proof is right, stops short (all its steps hold, the goal is missing), or has a fault.
"""

import collections
import sys
from collections.abc import Mapping, Sequence

from absl import flags

from mathv2_jax import records, roles
from mathv2_jax.cli import searched, shell
from mathv2_jax.search import candidates
from mathv2_jax.world import judge

_FLAGS = flags.FlagValues()
flags.DEFINE_string(
    "search", None, "A search's workdir, of problems of the world.", flag_values=_FLAGS
)

STATES = ("stops short", "fault", "right")
OUTCOMES = ("copy", "right", "stops short", "fault")
Counts = Mapping[str, Mapping[str, int]]


def state(statement: str, proof: str) -> str:
    """One of STATES."""
    verdict = judge.judge_proof(statement, proof)
    faults = {issue.fault for issue in verdict.issues}
    if verdict.steps is None or faults - {judge.Fault.NO_GOAL}:
        return "fault"
    return "stops short" if faults else "right"


def count(samples: Sequence[records.Sample]) -> tuple[Counts, int]:
    """Refinements by the state of what they refined and by outcome; how many cannot be read."""
    counts = {name: collections.Counter[str]() for name in STATES}
    unreadable = 0
    for sample in samples:
        if sample.role != roles.GENERATOR or not sample.step:
            continue
        found = candidates.readable(sample)
        if found is None:
            unreadable += 1
            continue
        before = state(sample.statement, sample.proof)
        copied = found.proof == sample.proof.strip()
        counts[before]["copy" if copied else state(sample.statement, found.proof)] += 1
    return counts, unreadable


def table(counts: Counts, unreadable: int, with_right: int, number: int) -> str:
    """Markdown."""
    lines = [
        f"{with_right} of {number} problems have a right proof; {unreadable} refinements cannot be "
        "read",
        "",
        f"| what is refined | n | {' | '.join(OUTCOMES)} |",
        f"|---|--:|{'--:|' * len(OUTCOMES)}",
    ]
    for name in STATES:
        cells = " | ".join(f"{counts[name].get(outcome, 0)}" for outcome in OUTCOMES)
        lines.append(f"| {name} | {sum(counts[name].values())} | {cells} |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Usage errors, and folders that are no search, are one line and exit code 2."""
    try:
        if not shell.read_flags(_FLAGS, argv, __doc__, ("search",)):
            return shell.FINISHED
        found = searched.read("search", _FLAGS.search)
        samples = [sample for _, own in found.written for sample in own]
        right = [
            any(state(p.statement, c.proof) == "right" for c in pool.candidates)
            for (p, _), pool in zip(found.written, found.pools(), strict=True)
        ]
        text = table(*count(samples), sum(right), len(right))
    except (ValueError, FileNotFoundError, flags.Error) as error:
        print(f"repairs: {error}", file=sys.stderr)
        return shell.BAD_INPUT
    print(text)
    return shell.FINISHED


if __name__ == "__main__":
    sys.exit(main(sys.argv))
