"""The stage list: its errors, and the whole recipe end to end on configs/smoke.py."""

import hashlib
import json

import pytest
from etils import epath

from mathv2_jax import records
from mathv2_jax.cli import config as config_lib
from mathv2_jax.cli import overrides
from mathv2_jax.rl import optimizer
from mathv2_jax.stages import answer, autolabel, iterate, probe, rejection, rl, sft
from tests import smoke

METRICS = {
    "verifier_accuracy",
    "verifier_mean_error",
    "analysis_faithfulness",
    "meta_accuracy",
    "generator_true_score",
    "overclaim_rate",
    "verifier_minus_true",
    "autolabel_precision",
    "autolabel_coverage",
}
CONFIG = config_lib.build(overrides.load(str(smoke.CONFIG)))
NAMES = [stage.name for stage in CONFIG.stages]


# The order of stages.

ADAM = optimizer.OptimizerConfig(learning_rate=1e-3)
SFT = sft.SftConfig(steps=1, rows=1, row_length=8, optimizer=ADAM)
RL = rl.RlConfig(steps=1, optimizer=ADAM)
COLD = sft.SftStage(name="cold", sft=SFT)
PROVE = {"generator": 1.0}


@pytest.mark.parametrize(
    ("stage", "complaint"),
    [
        (sft.SftStage(name="cold", sft=SFT), "two stages are named 'cold'"),
        (sft.SftStage(name="fresh", sft=SFT), "two stages are named 'fresh'"),
        (sft.SftStage(name="a", init="b", sft=SFT), "stage 'a' uses 'b'"),
        (sft.SftStage(name="a", init="a", sft=SFT), "stage 'a' uses 'a'"),
        (rl.RlStage(name="a", init="cold", judge="b", mixture=PROVE, rl=RL), "uses 'b'"),
        (
            rl.RlStage(
                name="a", init="cold", mixture={"verifier": 1.0}, proofs=("proofs", "b"), rl=RL
            ),
            "uses 'b'",
        ),
        (
            autolabel.AutolabelStage(
                name="a", proofs_from="b", judge="cold", num_candidates=1, num_proofs=1
            ),
            "uses 'b'",
        ),
        (
            rejection.RejectionStage(name="a", init="cold", samples_from=("cold", "b"), sft=SFT),
            "uses 'b'",
        ),
        (probe.ProbeStage(name="a", verifier="cold", predecessor="b"), "uses 'b'"),
        (answer.AnswerStage(name="a", verifier="cold", generator="b"), "uses 'b'"),
    ],
)
def test_a_stage_uses_only_what_stands_before_it_and_names_are_unique(stage, complaint):
    with pytest.raises(ValueError, match=complaint):
        iterate.check_stages([COLD, stage])
    iterate.check_stages([COLD])


# The recipe end to end.


@pytest.fixture(scope="module")
def summary(smoke_workdir):
    return json.loads((smoke_workdir / "summary.json").read_text())


def sampled(workdir, stage):
    lines = []
    for path in sorted((workdir / "records" / stage).glob("part-*.jsonl")):
        lines += [s for s in path.read_text().splitlines() if '"kind": "Sample"' in s]
    return [records.from_json(records.Sample, line) for line in lines]


def test_every_listed_stage_leaves_its_figures(smoke_workdir, summary):
    assert list(sorted(summary["stages"])) == sorted(NAMES)
    for name in NAMES:
        figures = json.loads((smoke_workdir / "records" / name / "stage.json").read_text())
        assert figures == summary["stages"][name] and figures


def test_the_summary_holds_the_stated_metrics_and_nothing_of_the_clock(summary):
    assert set(summary) == {"schema", "seed", "metrics", "stages"}
    assert set(summary["metrics"]) == METRICS
    for row in summary["metrics"].values():
        assert set(row) == {"before", "after", "difference"}
        for side in ("before", "after"):
            assert set(row[side]) == {"mean", "se", "n"}
    same = ("verifier_accuracy", "verifier_mean_error", "meta_accuracy", "generator_true_score")
    for name in same:  # on all held-out items, however they were answered
        assert summary["metrics"][name]["before"]["n"] == CONFIG.world.num_test
        assert summary["metrics"][name]["after"]["n"] == CONFIG.world.num_test


def test_the_config_of_a_run_is_written_down(smoke_workdir):
    saved = json.loads((smoke_workdir / "config.json").read_text())
    assert saved["identity"] == config_lib.identity(CONFIG)
    assert saved["runtime"] == config_lib.runtime(CONFIG)


def test_every_training_step_is_one_line_of_metrics(smoke_workdir):
    lines = (smoke_workdir / "metrics.jsonl").read_text().splitlines()
    found = [(row["stage"], row["step"]) for row in map(json.loads, lines)]
    expected = [
        (stage.name, step)
        for stage in CONFIG.stages
        for loop in [getattr(stage, "rl", None) or getattr(stage, "sft", None)]
        if loop is not None
        for step in range(1, loop.steps + 1)
    ]
    assert found == expected


@pytest.mark.parametrize("stage", [s for s in CONFIG.stages if isinstance(s, rl.RlStage)])
def test_every_answer_of_a_training_stage_is_recorded_with_its_reward(smoke_workdir, stage):
    own = [s for s in sampled(smoke_workdir, stage.name) if s.rewards or s.advantage is not None]
    config = stage.rl
    answers = [s for s in sampled(smoke_workdir, stage.name) if s.id.count("/") == 3]
    assert len(answers) == config.steps * config.groups * config.samples
    assert {s.role for s in answers} <= set(stage.mixture)
    assert {s.checkpoint for s in answers} == {f"{stage.name}@{n}" for n in range(config.steps)}
    assert [s.id for s in own] == [s.id for s in answers if s.rewards]
    judged = [s for s in sampled(smoke_workdir, stage.name) if s.id.count("/") > 3]
    assert bool(judged) == (stage.judge is not None)
    assert {s.checkpoint for s in judged} <= {stage.judge}


def test_the_smoke_run_is_alive(summary):
    trained = [s.name for s in CONFIG.stages if isinstance(s, rl.RlStage)]
    for name in trained:  # most answers are read, and rewards differ inside groups
        figures = summary["stages"][name]
        assert figures["outcome/parsed"] > 0.4, name
        assert figures["gradient_norm"] > 0.0, name
    assert sum(summary["stages"][n]["zero_signal"] for n in trained) / len(trained) < 0.7
    assert summary["stages"]["autolabel-1"]["labelled"] > 0
    assert summary["stages"]["rejection-1"]["chosen/generator"] > 0


def contents(workdir):
    changing = ("timing.json", "lease.json")
    return {
        str(path.relative_to(workdir)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(workdir.rglob("*"))
        if path.is_file() and path.name not in changing and "tensorboard" not in path.parts
    }


def test_the_command_of_a_finished_run_changes_nothing_and_says_so(smoke_workdir):
    before = contents(smoke_workdir)
    said = smoke.run(smoke.command(smoke_workdir))
    assert "this run is finished; nothing was changed" in said
    assert "verifier: score equals the true one" in said
    assert contents(smoke_workdir) == before


def test_finished_stages_are_read_and_not_run_again(smoke_workdir, make_run, capsys):
    run = make_run()
    run.workdir = epath.Path(smoke_workdir)
    before = contents(smoke_workdir)
    assert list(iterate.run_all(run, CONFIG.stages)) == NAMES
    assert f"{NAMES[0]}: finished before (1 of {len(NAMES)})" in capsys.readouterr().out
    assert contents(smoke_workdir) == before
