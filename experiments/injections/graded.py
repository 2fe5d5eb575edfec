"""A finished run's held-out proofs and analyses, with the exact judge's scores: to be measured on.

python experiments/injections/graded.py --workdir=runs/refine --out=runs/injections [--number=200]

Writes proofs.jsonl and analyses.jsonl, the first so many of the test set. No run is given them:
mathv2-evaluate reads and does not import.
"""

import dataclasses
import os
import sys
from collections.abc import Sequence

from absl import flags
from etils import epath

from mathv2_jax import records, storage
from mathv2_jax.cli import shell
from mathv2_jax.data import sources
from mathv2_jax.world import corpus, judge

_FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "A finished run in the world.", flag_values=_FLAGS)
flags.DEFINE_string("out", None, "The folder for the files.", flag_values=_FLAGS)
flags.DEFINE_integer("number", 200, "Of items in each.", flag_values=_FLAGS)


def proofs(workdir: epath.Path, number: int) -> list[records.Proof]:
    """Test proofs with s."""
    found = sources.read(workdir / "records/input/test_proofs.jsonl", records.Proof)[:number]
    exact = [judge.judge_proof(proof.statement, proof.text).score for proof in found]
    return [
        dataclasses.replace(p, label=_label(s, "I_v")) for p, s in zip(found, exact, strict=True)
    ]


def analyses(workdir: epath.Path, number: int) -> list[records.Analysis]:
    """Test analyses with ms."""
    found = sources.read(workdir / "records/input/test_analyses.jsonl", records.Analysis)[:number]
    exact = [corpus.true_quality(analysis).quality for analysis in found]
    return [
        dataclasses.replace(a, label=_label(s, "I_mv")) for a, s in zip(found, exact, strict=True)
    ]


def _label(score: float, rubric: str) -> records.Label:
    return records.Label(score=score, source="world", rater="exact judge", rubric=rubric)


def main(argv: Sequence[str]) -> int:
    """Usage errors, and runs that lack the files, are one line and exit code 2."""
    try:
        if not shell.read_flags(_FLAGS, argv, __doc__, ("workdir", "out")):
            return shell.FINISHED
        workdir, out = shell.absolute(_FLAGS.workdir), shell.absolute(_FLAGS.out)
        made = [(make.__name__, make(workdir, _FLAGS.number)) for make in (proofs, analyses)]
    except (ValueError, FileNotFoundError, flags.Error) as error:
        print(f"graded: {error}", file=sys.stderr)
        return shell.BAD_INPUT
    for name, found in made:
        storage.write_whole(out / f"{name}.jsonl", records.to_lines(found))
    print(f"in {os.fspath(out)}")
    return shell.FINISHED


if __name__ == "__main__":
    sys.exit(main(sys.argv))
