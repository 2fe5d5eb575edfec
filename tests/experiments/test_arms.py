import json
import math

import pytest

from experiments import arms
from mathv2_jax import records, storage
from mathv2_jax.evaluation import held_out
from mathv2_jax.records import Finish, Outcome
from mathv2_jax.text import parse

STATEMENT = "Given: A. Rules: (1) A implies B (2) B implies C. Show: C."
PROOFS = {
    "right": ("Step 1: A implies B\nStep 2: B implies C", 1.0),
    "skips": ("Step 1: B implies C", 0.5),
    "wrong": ("Step 1: A implies C", 0.0),
}


def write_arm(workdir, stage, said, role=held_out.VERIFY):
    """An answer stage whose verifier said these scores of the three proofs."""
    samples = [
        records.Sample(
            id=f"{stage}/{name}",
            role=role,
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


def write_config(workdir, seed, **fields):
    """What a run says of itself: a seed and, here, a few other fields."""
    workdir.mkdir(exist_ok=True)
    identity = {"seed": seed, "world": {"num_test": 3}, **fields}
    (workdir / "config.json").write_text(json.dumps({"identity": identity}))


def test_differences_are_paired_within_a_seed_and_pooled_over_seeds(tmp_path, capsys):
    truth = {name: score for name, (_, score) in PROOFS.items()}
    for seed, wrong in (("0", {"wrong": 1.0}), ("1", {"wrong": 1.0, "skips": 1.0})):
        write_config(tmp_path / seed, int(seed))
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
        (["--workdirs=nowhere", "--arms=old"], "nowhere is no run, it has no config.json"),
        (["--workdirs=a", "--arms=odl"], "is 'odl' an answer stage that ran?"),
        (["--workdirs=a", "--arms=rl"], "is 'rl' an answer stage that ran?"),
        (["--workdirs=a", "--arms=old,other"], "the items measured before and after"),
        (["--workdirs=a", "--arms=old,old"], "name each arm once"),
        (["--workdirs=a,b,a", "--arms=old"], "a and a both have seed 0"),
        (["--workdirs=a,same", "--arms=old"], "a and same both have seed 0"),
        (["--workdirs=a,c", "--arms=old"], "a and c differ in more than the seed, in config.world"),
        (["--workdirs=a", "--arms=old", "more"], "unexpected argument 'more'"),
        (["--workdir=x"], "Unknown command line flag 'workdir'"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(asked, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, seed, fields in (("a", 0, {}), ("b", 1, {}), ("same", 0, {}), ("c", 2, {"world": 1})):
        write_config(tmp_path / name, seed, **fields)
    write_arm(tmp_path / "a", "old", {"right": 1.0})
    write_arm(tmp_path / "a", "other", {"wrong": 1.0})
    write_arm(tmp_path / "a", "rl", {"right": 1.0}, role="verifier")
    assert arms.main(["arms.py", *asked]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_help_says_what_the_program_does(capsys):
    assert arms.main(["arms.py", "--help"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Compare what several arms") and "--arms" in said
