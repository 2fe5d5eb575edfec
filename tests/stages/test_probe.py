"""The drift probe: a worse verifier never becomes a reward."""

import pytest

from mathv2_jax import records
from mathv2_jax.cli import inputs
from mathv2_jax.stages import probe
from tests import scripted
from tests.by_hand import NOISE, VERDICTS, proof

NUMBER = 40


def says(**shares):
    names = {"right": VERDICTS[1.0], "half": VERDICTS[0.5], "wrong": VERDICTS[0.0], "noise": NOISE}
    return {scripted.VERIFY: {names[name]: share for name, share in shares.items()}}


@pytest.fixture
def probed(make_run):
    def run_both(first, second, **fields):
        run = make_run(first=first, second=second)
        proofs = [proof(f"p{n:02}", text=f"Proof {n}.", score=1.0) for n in range(NUMBER)]
        inputs.write_files(run.workdir, {"probe": proofs})
        before = probe.run_stage(run, probe.ProbeStage(name="probe-1", verifier="first"))
        stage = probe.ProbeStage(name="probe-2", verifier="second", predecessor="probe-1", **fields)
        return run, before, stage

    return run_both


def test_a_worse_verifier_is_refused_with_the_figures_of_both(probed):
    run, before, stage = probed(says(right=0.9, wrong=0.1), says(half=0.2, wrong=0.8))
    with pytest.raises(probe.DriftError) as caught:
        probe.run_stage(run, stage)
    first, second = ([1.0 - s.score for s in run.samples(name)] for name in ("probe-1", "probe-2"))
    assert sum(first) / NUMBER == pytest.approx(before["mean_error"]) and min(second) == 0.5
    for figure in (sum(first) / NUMBER, sum(second) / NUMBER):
        assert f"{figure:.3f}" in str(caught.value)
    assert "'second' is refused" in str(caught.value) and f"{NUMBER} labelled" in str(caught.value)


def test_every_proof_worse_by_the_same_is_beyond_any_noise(probed):
    run, _, stage = probed(says(right=1.0), says(half=1.0))
    with pytest.raises(probe.DriftError, match="is 0.500, that of its predecessor 0.000"):
        probe.run_stage(run, stage)


def test_a_verifier_as_good_or_within_noise_passes(probed):
    run, _, stage = probed(says(right=0.7, half=0.3), says(right=0.6, half=0.4))
    figures = probe.run_stage(run, stage)
    assert figures["rise"] <= 3 * figures["rise_se"]
    assert figures["accuracy"] == sum(s.score == 1.0 for s in run.samples("probe-2")) / NUMBER


def test_the_tolerance_decides(probed):
    run, _, stage = probed(says(right=0.9, wrong=0.1), says(wrong=1.0), tolerance_se=1e6)
    figures = probe.run_stage(run, stage)
    assert figures["mean_error"] == 1.0 and figures["accuracy"] == 0.0
    assert figures["head_mean_error"] == pytest.approx(0.5)  # its head is untrained: even odds


def test_the_error_of_the_best_constant_stands_beside_the_heads(make_run):
    run = make_run(first=says(right=1.0))
    scores = [1.0] * 5 + [0.5] * 2 + [0.0] * 2
    proofs = [proof(f"p{n}", text=f"Proof {n}.", score=s) for n, s in enumerate(scores)]
    inputs.write_files(run.workdir, {"probe": proofs})
    figures = probe.run_stage(run, probe.ProbeStage(name="probe-1", verifier="first"))
    assert figures["constant_mean_error"] == pytest.approx((2 * 0.5 + 2 * 1.0) / 9)  # always 1


def test_an_analysis_that_cannot_be_read_is_as_bad_as_a_wrong_one(probed):
    _, before, _ = probed(says(noise=1.0), says(right=1.0))
    assert (before["mean_error"], before["accuracy"]) == (1.0, 0.0)


def test_a_verifier_is_shown_each_proof(make_run):
    run = make_run(first=says(right=1.0))
    proofs = [proof(f"p{n}", text=f"Proof {n}.", score=1.0) for n in range(2)]
    inputs.write_files(run.workdir, {"probe": proofs})
    probe.run_stage(run, probe.ProbeStage(name="probe-1", verifier="first"))
    verifier = scripted.ROLES.verifier
    shown = [scripted.shown(verifier, statement=p.statement, proof=p.text) for p in proofs]
    assert run.judge.engines[0].asked == shown


@pytest.mark.parametrize(
    ("scores", "complaint"),
    [((), "holds 0 proofs"), ((1.0,), "holds 1 proofs"), ((1.0, None, 0.0), "1 of them without")],
)
def test_a_probe_without_a_standard_error_or_a_label_is_refused(make_run, scores, complaint):
    run = make_run(first=says(right=1.0))
    proofs = [proof(f"p{n}", text=f"Proof {n}.", score=s) for n, s in enumerate(scores)]
    inputs.write_files(run.workdir, {"probe": proofs})
    with pytest.raises(ValueError, match=complaint):
        probe.run_stage(run, probe.ProbeStage(name="probe-1", verifier="first"))


def test_a_tolerance_is_positive():
    with pytest.raises(ValueError, match="tolerance_se = 0.0"):
        probe.ProbeStage(name="p", verifier="v", tolerance_se=0.0)


def test_the_probes_opinions_are_records(probed):
    run, _, _ = probed(says(right=1.0), says(right=1.0))
    found = run.samples("probe-1")
    assert [s.target for s in found] == [f"p{n:02}" for n in range(NUMBER)]
    assert {(s.label, s.checkpoint, s.outcome) for s in found} == {
        (1.0, "first", records.Outcome.PARSED)
    }
