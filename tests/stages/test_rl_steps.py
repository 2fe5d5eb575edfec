"""Steps of reinforcement learning on a real model: whose weights speak, and what is compared."""

import math

import jax
import numpy as np
import pytest

from mathv2_jax import metrics, roles
from mathv2_jax.cli import inputs
from mathv2_jax.rl import optimizer
from mathv2_jax.stages import rl
from tests import scripted
from tests.by_hand import STATEMENT, VERDICTS, proof

TEMPERATURE = 0.7
SOFTER = roles.Sampling(max_tokens=4, temperature=TEMPERATURE)
PROOFS = [proof(f"h{n}", text=f"H{n}", score=1.0) for n in range(3)]


def stage(name, init, rate, steps):
    adam = optimizer.OptimizerConfig(learning_rate=rate, warmup_steps=0)
    config = rl.RlConfig(
        steps=steps, groups=2, samples=8, rows=2, row_length=400, optimizer=adam, max_refills=1
    )
    return rl.RlStage(name=name, init=init, mixture={"verifier": 1.0}, rl=config)


@pytest.fixture(scope="module")
def trained(house, tmp_path_factory, make_run_in):
    """Three steps at a high rate, then one of a policy that always says the same."""
    torn = {scripted.VERIFY: {VERDICTS[0.0]: 0.3, VERDICTS[1.0]: 0.7}}
    sure = {scripted.VERIFY: {VERDICTS[0.0]: 1.0}}
    run = make_run_in(tmp_path_factory.mktemp("rl"), torn=torn, sure=sure)
    run.router_bias_rate = 0.25
    run.roles = roles.make_roles(
        roles.RolesConfig(
            templates="world", generator=SOFTER, verifier=SOFTER, meta_verifier=SOFTER
        )
    )
    inputs.write_files(run.workdir, {"proofs": PROOFS})
    figures = {
        "learned": rl.run_stage(run, stage("learned", "torn", 0.05, 3)),
        "flat": rl.run_stage(run, stage("flat", "sure", 0.01, 1)),
    }
    return run, figures


def rows(trained):
    return list(metrics.read(trained[0].workdir, "learned"))


def test_the_reference_is_the_policy_that_the_stage_began_with(trained):
    first, *later = (row["kl"] for row in rows(trained))
    assert abs(first) < 1e-8
    assert all(kl > 1e-4 for kl in later)


def test_the_policy_is_sampled_at_its_newest_weights_and_at_the_trained_temperature(trained):
    for row in rows(trained):
        assert row["ratio"] == pytest.approx(1.0, abs=1e-4)
        assert row["clipped"] == 0.0
    assert {s.checkpoint for s in trained[0].samples("learned")} == {
        f"learned@{n}" for n in range(3)
    }


def test_the_router_bias_moves_against_the_load(trained):
    bias = trained[0].variables("learned")["router"]
    moved = [np.ptp(np.asarray(leaf)) for leaf in jax.tree.leaves(bias)]
    assert max(moved) > 0.1


def test_the_policy_is_asked_what_the_tasks_say(trained):
    verifier = scripted.ROLES.verifier
    shown = {scripted.shown(verifier, statement=STATEMENT, proof=p.text) for p in PROOFS}
    assert set(trained[0].policy.engines[0].asked) == shown


def test_without_a_group_of_signal_there_is_no_figure_of_its_answers(trained):
    run, figures = trained
    assert set(rl.OF_ANSWERS) <= set(figures["learned"])
    assert not set(rl.OF_ANSWERS) & set(figures["flat"])
    assert (figures["flat"]["zero_signal"], figures["flat"]["reward"]) == (1.0, 0.0)
    assert math.isfinite(figures["flat"]["loss"])


def test_stages_that_differ_in_their_rate_alone_share_a_compiled_step(trained):
    assert len(trained[0]._learners) == 1
