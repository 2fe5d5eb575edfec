import json
import math
import sys

import pytest

from experiments import curves
from mathv2_jax import records, roles, storage
from mathv2_jax.cli import shell
from mathv2_jax.records import Finish, Outcome
from mathv2_jax.text import parse

STATEMENT = "Given: A. Rules: (1) A implies B (2) B implies C. Show: C."
RIGHT = "Step 1: A implies B\nStep 2: B implies C"
SKIPS = "Step 1: B implies C"  # true score 0.5
WRONG = "Step 1: A implies C"  # 0


def sample(place, proof, self_score=1.0, votes=(), **fields):
    """A generator's sample at `place` = step/prompt/index of a stage."""
    analysis = parse.write_analysis("Goal: reached", self_score)
    values = dict(
        id=f"gen/{place}",
        role=roles.GENERATOR,
        stage="gen",
        step=int(place.split("/")[0]),
        problem_id="p",
        target="p",
        index=int(place.split("/")[2]),
        statement=STATEMENT,
        proof="",
        analysis="",
        text=parse.write_generation(proof, analysis),
        outcome=Outcome.PARSED,
        finish=Finish.STOP,
        num_tokens=9,
        checkpoint="gen@0",
        score=self_score,
        votes=votes,
    )
    return records.Sample(**{**values, **fields})


def means(row):
    return {name: row[name]["mean"] for name in curves.CURVES}


def test_a_row_holds_the_means_over_the_proofs_that_can_be_read():
    cut = sample("0/1/2", RIGHT, text="## Solution\nStep 1", outcome=Outcome.LENGTH, score=None)
    (row,) = curves.curves(
        [
            sample("0/0/0", RIGHT, 1.0, (1.0, 0.5)),
            sample("0/0/1", WRONG, 0.5, (1.0,)),
            sample("0/1/0", SKIPS, 0.0, (0.0, 0.5)),
            sample("0/1/1", WRONG, 1.0),  # its votes were lost
            cut,
        ]
    )
    assert (row["step"], row["n"]) == (0, 5)
    assert means(row) == pytest.approx(
        {
            "parsed": 4 / 5,
            "true_score": (1.0 + 0.0 + 0.5 + 0.0) / 4,
            "self_score": (1.0 + 0.5 + 0.0 + 1.0) / 4,
            "verifier_score": (0.75 + 1.0 + 0.25) / 3,
            "verifier_minus_true": (-0.25 + 1.0 - 0.25) / 3,
            "proof_characters": (len(RIGHT) + len(SKIPS) + 2 * len(WRONG)) / 4,
        }
    )


def test_errors_are_over_prompts_since_answers_to_one_prompt_are_alike():
    def alike(proofs, times):
        return [
            sample(f"0/{prompt}/{index}", proof, votes=(1.0,))
            for prompt, proof in enumerate(proofs)
            for index in range(times)
        ]

    proofs = [RIGHT, WRONG, WRONG, RIGHT]
    (once,), (often,) = (curves.curves(alike(proofs, times)) for times in (1, 8))
    # Four values 0 or 1 of mean 1/2: a sample deviation of sqrt(1/3), over sqrt(4).
    for row in (once, often):
        assert row["true_score"]["se"] == pytest.approx(math.sqrt(1 / 3) / 2)
        assert row["verifier_minus_true"]["se"] == pytest.approx(math.sqrt(1 / 3) / 2)
        assert row["verifier_score"]["se"] == 0.0


def test_steps_stand_in_order_whatever_the_order_of_the_records():
    rows = curves.curves(sample(f"{step}/0/0", WRONG) for step in (10, 2, 1))
    assert [row["step"] for row in rows] == [1, 2, 10]


def test_a_step_without_proofs_or_votes_has_no_figure():
    lost = sample("0/0/0", WRONG, text="", outcome=Outcome.LOST)
    (row,) = curves.curves([lost, sample("0/1/0", RIGHT, text="no headings")])
    assert means(row) == {**dict.fromkeys(curves.CURVES), "parsed": 0.0}
    assert all(row[name]["se"] is None for name in curves.SCORES)
    assert curves.render([row]).splitlines()[1].split() == ["0", "2", "0.000", *"-----"]


@pytest.fixture
def workdir(tmp_path):
    """Two stages: a generator's with the judge's opinions among its records, and a verifier's."""
    parts = storage.Parts(tmp_path / "records" / "gen")
    for step, (proof, vote) in enumerate([(RIGHT, 0.5), (WRONG, 1.0)]):
        made = sample(f"{step}/0/0", proof, votes=(vote,))
        opinion = sample(f"{step}/0/0/0", WRONG, role=roles.VERIFIER, step=step)
        label = records.Problem(id="p", statement=STATEMENT, source="world", cluster="c")
        parts.write_part(storage.part_name(step + 1), records.to_lines([made, opinion, label]))
    parts.commit(2)
    parts = storage.Parts(tmp_path / "records" / "ver")
    parts.write_part(storage.part_name(1), records.to_lines([opinion]))
    parts.commit(1)
    return tmp_path


def test_the_curves_of_a_stage_are_read_from_its_records(workdir, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as where it is not installed
    out = workdir / "curve.json"
    flags = [f"--workdir={workdir}", "--stages=gen", f"--out={out}"]
    assert curves.main(["", *flags]) == shell.FINISHED
    rows = json.loads(out.read_text())["stages"]["gen"]
    assert [row["n"] for row in rows] == [1, 1]
    assert [row["true_score"]["mean"] for row in rows] == [1.0, 0.0]
    assert [row["verifier_minus_true"]["mean"] for row in rows] == [-0.5, 1.0]
    assert rows[0]["true_score"]["se"] is None  # one prompt
    printed = capsys.readouterr().out
    assert "matplotlib is missing" in printed
    assert not out.with_suffix(".png").exists()


@pytest.mark.parametrize(
    ("stages", "out", "message"),
    [
        ("ver", "a.json", "holds no proofs: is 'ver' a generator's stage"),
        ("gen,none", "a.json", "is 'none' a generator's stage that ran"),
        ("gen", "a.png", "name a file .json"),
        ("", "a.json", "must be given"),
    ],
)
def test_stages_without_proofs_and_bad_usage_are_one_line(workdir, capsys, stages, out, message):
    flags = [f"--workdir={workdir}", f"--stages={stages}", f"--out={workdir / out}"]
    assert curves.main(["", *flags]) == shell.BAD_INPUT
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (workdir / out).exists()
