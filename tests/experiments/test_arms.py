import json
import math

import pytest

from experiments import arms
from mathv2_jax import evaluation, records, storage
from mathv2_jax.records import Finish, Outcome
from mathv2_jax.text import parse

STATEMENT = "Given: A. Rules: (1) A implies B (2) B implies C. Show: C."
PROOFS = {
    "right": ("Step 1: A implies B\nStep 2: B implies C", 1.0),
    "skips": ("Step 1: B implies C", 0.5),
    "wrong": ("Step 1: A implies C", 0.0),
}


def write_arm(workdir, stage, said):
    """An answer stage whose verifier said these scores of the three proofs."""
    samples = [
        records.Sample(
            id=f"{stage}/{name}",
            role=evaluation.VERIFY,
            stage=stage,
            step=0,
            problem_id="p",
            target=name,
            index=0,
            statement=STATEMENT,
            proof=PROOFS[name][0],
            analysis="",
            text=parse.write_analysis("Goal: reached", score),
            outcome=Outcome.PARSED,
            finish=Finish.STOP,
            num_tokens=9,
            checkpoint="v@0",
            score=score,
        )
        for name, score in said.items()
    ]
    parts = storage.Parts(workdir / "records" / stage)
    parts.write_part(storage.part_name(1), records.to_lines(samples))
    parts.commit(1)


def test_differences_are_paired_within_a_seed_and_pooled_over_seeds(tmp_path, capsys):
    truth = {name: score for name, (_, score) in PROOFS.items()}
    for seed, wrong in (("0", {"wrong": 1.0}), ("1", {"wrong": 1.0, "skips": 1.0})):
        write_arm(tmp_path / seed, "old", truth | wrong)
        write_arm(tmp_path / seed, "new", truth)
    workdirs = f"{tmp_path / '0'},{tmp_path / '1'}"
    out = tmp_path / "out.json"
    asked = [f"--workdirs={workdirs}", "--arms=old,new", f"--out={out}"]
    assert arms.main(["arms.py", *asked]) == 0
    found = json.loads(out.read_text())["metrics"]["verifier_accuracy"]["new"]
    assert found["seeds"] == [1.0, 1.0] and found["n"] == 6
    # One of three items, and two of three, get better: variance p (1 - p) / (n - 1).
    errors = [math.sqrt(p * (1 - p) / 2) for p in (1 / 3, 2 / 3)]
    assert [d["mean"] for d in found["seed_differences"]] == pytest.approx([1 / 3, 2 / 3])
    assert [d["se"] for d in found["seed_differences"]] == pytest.approx(errors)
    assert found["difference"]["mean"] == pytest.approx(0.5)
    assert found["difference"]["se"] == pytest.approx(math.hypot(*errors) / 2)
    assert "(+0.500, +2.1 se)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--arms=old"], "must be given"),
        (["--workdirs=nowhere", "--arms=old"], "did the stage 'old' run"),
        (["--workdir=x"], "Unknown command line flag 'workdir'"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(asked, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert arms.main(["arms.py", *asked]) == 2
    assert said in capsys.readouterr().err
