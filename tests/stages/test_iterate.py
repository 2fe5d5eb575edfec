"""The stage list: its errors, and the whole recipe end to end on configs/smoke.py."""

import dataclasses
import hashlib
import json
import re

import pytest
from etils import epath

from mathv2_jax import metrics, records, roles, storage
from mathv2_jax.cli import config as config_lib
from mathv2_jax.cli import inputs, overrides
from mathv2_jax.rl import optimizer
from mathv2_jax.stages import answer, autolabel, experts, iterate, probe, rejection, rl, sft
from mathv2_jax.stages import run as run_lib
from tests import by_hand, scripted, smoke

METRICS = {
    "verifier_accuracy",
    "verifier_balanced_accuracy",
    "verifier_mean_error",
    "analysis_faithfulness",
    "right_for_wrong_reason",
    "meta_accuracy",
    "meta_balanced_accuracy",
    "meta_caught",
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


JUDGE = rl.RlStage(name="judge", init="cold", mixture={"verifier": 1.0}, rl=RL)
PROBE = probe.ProbeStage(name="probe", verifier="judge")
GENERATOR = rl.RlStage(name="gen", init="judge", judge="judge", mixture=PROVE, rl=RL)
LABELS = autolabel.AutolabelStage(
    name="labels", proofs_from="gen", judge="judge", num_candidates=1, num_proofs=1
)
AGAIN = rejection.RejectionStage(name="again", init="gen", samples_from=("judge", "gen"), sft=SFT)
TEST = answer.AnswerStage(name="test", verifier="judge", generator="gen")
GRADED = experts.ExpertsStage(name="graded", undecided_from="labels", num_proofs=1)
NEXT = rl.RlStage(
    name="next",
    init="again",
    mixture={"verifier": 1.0},
    proofs=("proofs", "labels", "graded"),
    rl=RL,
)
DRIFT = probe.ProbeStage(name="drift", verifier="next", predecessor="probe")
RECIPE = [COLD, JUDGE, PROBE, GENERATOR, LABELS, AGAIN, TEST, GRADED, NEXT, DRIFT]


def changed(which, **fields):
    return [dataclasses.replace(s, **fields) if s.name == which else s for s in RECIPE]


@pytest.mark.parametrize(
    ("stages", "complaint"),
    [
        (changed("drift", name="cold"), "stages[9]: the name 'cold' is another stage's"),
        (changed("drift", name="fresh"), "the name 'fresh' is taken"),
        (changed("drift", name="input"), "the name 'input' is taken"),
        (changed("judge", init="colt"), "stage.judge.init = 'colt': no stage in the list has that"),
        (changed("judge", init="colt"), "did you mean 'cold'?; before it ['fresh', 'cold'] leave"),
        (changed("judge", init="judge"), "stage.judge.init = 'judge': a stage cannot use itself"),
        (changed("judge", init="gen"), "stage.judge.init = 'gen': that stage comes after 'judge'"),
        (
            changed("next", judge="test"),
            "stage.next.judge = 'test': it leaves answers to the test set; this field takes "
            "variables",
        ),
        (changed("drift", predecessor="judge"), "stage.drift.predecessor = 'judge': it leaves"),
        (changed("labels", proofs_from="judge"), "this field takes a generator's proofs"),
        (changed("again", samples_from=("gen", "cold")), "takes responses with rewards"),
        (
            changed("gen", mixture={"refiner": 1.0}, attempts_from=("cold",)),
            "stage.gen.attempts_from = 'cold': it leaves variables; this field takes proofs with",
        ),
        (
            changed("next", proofs=("proofs", "gen")),
            "before it ['proofs', 'labels', 'graded'] leave labelled",
        ),
        (changed("graded", undecided_from="gen"), "this field takes undecided proofs"),
        (changed("test", generator="probe"), "stage.test.generator = 'probe': it leaves a probe's"),
        (changed("probe", verifier="proofs"), "it leaves labelled proofs; this field takes"),
        (changed("gen", judge="cold"), "stage.gen.judge = 'cold': no probe stage before 'gen'"),
        (changed("drift", predecessor=None), "stage.drift.predecessor is not given, and without"),
        ([COLD, JUDGE, GENERATOR, PROBE], "list a stage of kind 'probe' with verifier = 'judge'"),
    ],
)
def test_a_stage_takes_what_stages_before_it_leave_and_a_reward_is_probed_first(stages, complaint):
    iterate.check_stages(RECIPE)
    iterate.check_stages(changed("drift", predecessor="none"))
    iterate.check_stages(changed("gen", mixture={"refiner": 1.0}, attempts_from=("judge",)))
    with pytest.raises(ValueError, match=re.escape(complaint)):
        iterate.check_stages(stages)


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        (("config.stage.sft.demonstrations", "rule_drill"), "did you mean 'rule_drills'?"),
        (("config.roles.verifier.top_p", "0.9"), "top_p = {'verifier': 0.9}"),
    ],
)
def test_a_stage_that_could_not_run_is_named_before_the_first_one_runs(override, complaint):
    with pytest.raises(ValueError, match=re.escape(complaint)):
        config_lib.build(overrides.load(str(smoke.CONFIG)), [override])


def test_a_stages_time_is_added_to_what_stopped_sessions_spent(make_run):
    run = make_run(judge={scripted.VERIFY: {by_hand.NOISE: 1.0}})
    storage.write_whole(run.report_path("judge"), b"{}")  # finished before
    metrics.write_timing(run.workdir, "stage/probe", {"seconds": 1000.0, "compile_seconds": 9.0})
    proofs = [by_hand.proof(f"p{n}", score=1.0) for n in range(2)]
    inputs.write_files(run.workdir, {"probe": proofs})
    stages = [sft.SftStage(name="judge", sft=SFT), PROBE]
    run.should_stop = lambda: True
    with pytest.raises(run_lib.Preempted):
        iterate.run_all(run, stages)
    stopped = metrics.read_timing(run.workdir)["stage/probe"]
    run.should_stop = lambda: False
    iterate.run_all(run, stages)
    ended = metrics.read_timing(run.workdir)["stage/probe"]
    assert 1000.0 < stopped["seconds"] < ended["seconds"] < 1500.0
    assert 9.0 <= stopped["compile_seconds"] <= ended["compile_seconds"] < 500.0


def test_a_finished_stage_whose_records_went_back_a_manifest_is_not_read(make_run):
    run = make_run(judge={scripted.VERIFY: {by_hand.NOISE: 1.0}})
    inputs.write_files(run.workdir, {"probe": [by_hand.proof(f"p{n}", score=1.0) for n in "ab"]})
    storage.write_whole(run.report_path("judge"), b"{}")
    iterate.run_all(run, [sft.SftStage(name="judge", sft=SFT), PROBE])
    assert len(run.samples("probe")) == 2
    for path in (run.workdir / "records" / "probe").glob("manifest-*"):
        path.unlink()
    with pytest.raises(ValueError, match="holds 0 of the 1 parts that the stage wrote: restore"):
        run.samples("probe")
    storage.write_whole(run.report_path("judge"), b"{")
    with pytest.raises(ValueError, match="stage.json is damaged .*--restart_stage=judge"):
        iterate.run_all(run, [sft.SftStage(name="judge", sft=SFT), PROBE])


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
    tables = {"metrics", "constants", "labels", "stages"}
    assert set(summary) == {"schema", "seed", "compared", *tables}
    assert {name: row["n"] for name, row in summary["labels"].items()} == {
        name: summary["stages"][name]["labelled"] for name in ("autolabel-1", "experts-1")
    }
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
    assert sum(summary["stages"]["rejection-1"][f"chosen/{name}"] for name in roles.NAMES) > 0


def test_of_each_group_the_best_that_reach_the_bar_are_chosen_in_every_role(smoke_workdir, summary):
    (stage,) = (s for s in CONFIG.stages if isinstance(s, rejection.RejectionStage))
    groups: dict[str, list[records.Sample]] = {}
    for source in stage.samples_from:
        for s in sampled(smoke_workdir, source):
            if s.rewards.get("total", 0.0) >= stage.min_reward:
                groups.setdefault(s.id.rsplit("/", 1)[0], []).append(s)
    for name in roles.NAMES:
        own = [g for g in groups.values() if g[0].role == name]
        expected = sum(min(len(g), stage.per_group) for g in own)
        assert summary["stages"][stage.name][f"chosen/{name}"] == expected


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
