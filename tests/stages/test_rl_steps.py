"""Steps of reinforcement learning on a real model: whose weights speak, and what is compared."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mathv2_jax import metrics, roles
from mathv2_jax.cli import inputs
from mathv2_jax.data import packing
from mathv2_jax.rl import grpo, optimizer
from mathv2_jax.stages import gate, rl, updates
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
    assert set(updates.OF_ANSWERS) <= set(figures["learned"])
    assert not set(updates.OF_ANSWERS) & set(figures["flat"])
    assert (figures["flat"]["zero_signal"], figures["flat"]["reward"]) == (1.0, 0.0)
    assert math.isfinite(figures["flat"]["loss"])


def test_stages_that_differ_in_their_rate_alone_share_a_compiled_step(trained):
    assert len(trained[0]._learners) == 1


def small(name="s", groups=4, **fields):
    adam = optimizer.OptimizerConfig(learning_rate=0.05, warmup_steps=0)
    values = dict(steps=1, samples=8, rows=2, row_length=400, optimizer=adam)
    config = rl.RlConfig(groups=groups, **{**values, **fields})
    return rl.RlStage(name=name, init="torn", mixture={"verifier": 1.0}, rl=config)


@pytest.fixture
def ready(make_run):
    torn = {scripted.VERIFY: {VERDICTS[0.0]: 0.3, VERDICTS[1.0]: 0.7}}
    run = make_run(torn=torn)
    inputs.write_files(run.workdir, {"proofs": PROOFS})
    return run


def test_a_sampler_that_is_not_the_trainer_stops_the_stage_before_its_first_step(ready, house):
    """The sampler's weights are another model's: as if a hand-over had gone wrong."""
    wrong = {scripted.VERIFY: {VERDICTS[0.0]: 0.6, VERDICTS[1.0]: 0.4}}
    ready.keep_variables("wrong", house.variables(wrong), 0)
    other = ready.variables("wrong")
    load = ready.policy.load
    ready.policy.load = lambda variables, version: load(other, version)
    with pytest.raises(gate.GateError) as caught:
        rl.run_stage(ready, small())
    message = str(caught.value)
    assert "at most 1.00% may" in message and "They part most at token 1 of an answer" in message
    assert "sampler -0." in message and "rl.gate = 0 trains all the same" in message
    assert (ready.workdir / "inspect" / "s-gate" / "0-tokens_BT.npy").exists()
    assert not (ready.workdir / "checkpoints" / "s" / "final").exists()
    rl.run_stage(ready, small("t", gate=0.0))
    rl.run_stage(ready, small("u", gate=2.0))


def test_the_gate_says_what_it_found(ready, capsys):
    rl.run_stage(ready, small())
    assert "s: trainer and sampler differ by" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gates_bound_is_that_of_the_less_precise(ready, dtype):
    ready.engine_config = dataclasses.replace(ready.engine_config, param_dtype=dtype)
    bound = gate.bound_of(ready, small())
    assert bound == {"float32": gate.FLOAT32, "bfloat16": gate.BFLOAT16}[dtype]
    assert gate.bound_of(ready, small(gate=0.3)) == 0.3


def test_several_updates_of_a_rollout_are_those_of_its_parts_in_their_order(ready):
    """Each on its own groups, against the log-probabilities of before the first."""
    once = rl.run_stage(ready, small("once"))
    twice = rl.run_stage(ready, small("twice", updates=2))
    assert once["ratio"] == pytest.approx(1.0, abs=1e-4)
    assert abs(twice["ratio"] - 1.0) > 1e-3  # the second update's policy has moved
    assert twice["tokens"] == once["tokens"]
    found = [ready.variables(name)["params"]["unembed"] for name in ("once", "twice")]
    assert np.abs(np.subtract(*found)).max() > 1e-3


class Measured:
    """A learner that has measured these, update by update."""

    def __init__(self, *found):
        self.found = iter(found)

    def put(self, batch):
        return batch

    def step(self, state, batches, anchors, rate):
        values = dict(tokens=2.0, expert_overflow=1.0, finite=1.0, head_loss=0.0) | next(self.found)
        return state, {name: jnp.float32(value) for name, value in values.items()}


@pytest.mark.parametrize(
    ("weights", "ratio"), [((0.0, 1.0, 1.0), 1.5), ((1.0, 1.0, 1.0), 1.0), ((0.0, 0.0, 0.0), 1.0)]
)
def test_an_update_without_answers_has_no_part_in_what_is_said_of_answers(weights, ratio):
    empty = packing.empty_batch(1, 4)
    packed = [[empty._replace(weights_BT=empty.weights_BT + weight)] for weight in weights]
    learner = Measured(*(dict(ratio=r, head_loss=h) for r, h in ((0, 3), (1, 0), (2, 0))))
    config = small(updates=3).rl
    _, found = updates.update(config, learner, None, None, packed, 0.1)
    assert found["ratio"] == ratio and found["head_loss"] == 1.0
    assert (found["tokens"], found["expert_overflow"], found["finite"]) == (6.0, 3.0, 1.0)


def test_with_an_importance_cap_the_ratio_is_against_the_policy_before_the_first_update(ready):
    capped = grpo.GrpoConfig(importance_cap=2.0)
    found = rl.run_stage(ready, small(updates=2, grpo=capped))
    assert found["importance"] == pytest.approx(1.0, abs=1e-4)  # the sampler is the trainer
    assert abs(found["ratio"] - 1.0) > 1e-3


def test_a_mask_for_drifted_sequences_shows_in_the_second_update(ready):
    """Answers that the first update made rarer leave the clipped term where they earned less."""
    masked = grpo.GrpoConfig(off_policy_delta=1e-4)
    assert rl.run_stage(ready, small("one", grpo=masked))["dropped"] == 0.0
    assert rl.run_stage(ready, small("two", grpo=masked, updates=2))["dropped"] > 0.0


def test_roles_that_truncate_are_trained_with_what_could_be_drawn(ready):
    ready.roles = roles.make_roles(
        roles.RolesConfig(
            templates="world",
            **{
                name: dataclasses.replace(ready.roles.named(name).sampling, top_p=0.99)
                for name in roles.NAMES
            },
        )
    )
    with pytest.raises(ValueError, match="rl.keep_sampling_mask = True"):
        rl.run_stage(ready, small())
    figures = rl.run_stage(ready, small(keep_sampling_mask=True))
    assert figures["ratio"] == pytest.approx(1.0, abs=1e-4)
    assert figures["kept_unknown"] == 0.0
