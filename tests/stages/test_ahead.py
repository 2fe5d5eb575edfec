"""Batches drawn one step ahead, and steps whose sampling was cut short: the same run in the end."""

import dataclasses
import logging

import jax
import numpy as np
import pytest

from mathv2_jax import metrics
from mathv2_jax.cli import inputs
from mathv2_jax.rl import grpo, optimizer, placement
from mathv2_jax.stages import rl
from mathv2_jax.stages import run as run_lib
from tests import scripted
from tests.by_hand import VERDICTS, proof

PROOFS = [proof(f"h{n}", text=f"H{n}", score=1.0) for n in range(9)]
TORN = {scripted.VERIFY: {VERDICTS[0.0]: 0.3, VERDICTS[1.0]: 0.7}}
NAME = "learned"
PER_STEP = 4 * 8


def stage(steps=4, **fields):
    adam = optimizer.OptimizerConfig(learning_rate=0.05, warmup_steps=0, final_share=0.1)
    config = rl.RlConfig(
        steps=steps, groups=4, samples=8, rows=2, row_length=400, optimizer=adam, **fields
    )
    return rl.RlStage(name=NAME, init="torn", mixture={"verifier": 1.0}, rl=config)


@pytest.fixture(scope="module")
def prepare(make_run_in, tmp_path_factory):
    """A run in a folder of its own, which writes responses at once."""

    def made(**runtime):
        run = make_run_in(tmp_path_factory.mktemp("ahead"), torn=TORN)
        run.runtime = run_lib.RuntimeConfig(save_every=1, responses_every=0.0, **runtime)
        inputs.write_files(run.workdir, {"proofs": PROOFS})
        return run

    return made


@pytest.fixture(scope="module")
def in_turn(prepare):
    run = prepare()
    rl.run_stage(run, stage())
    return run


@pytest.fixture(scope="module")
def ahead(prepare):
    run = prepare()
    rl.run_stage(run, stage(ahead=True))
    return run


def rows(run):
    return [
        {n: x for n, x in row.items() if not n.startswith(metrics.TIME_PREFIX)}
        for row in metrics.read(run.workdir, NAME)
    ]


def drawn(run):
    """By step: whose variables answered, and which proofs were asked about."""
    found = {}
    for sample in run.samples(NAME):
        found.setdefault(sample.step, set()).add((sample.checkpoint, sample.proof))
    return found


def assert_same(run, expected):
    assert rows(run) == rows(expected)
    jax.tree.map(np.testing.assert_array_equal, run.variables(NAME), expected.variables(NAME))
    assert list(run.samples(NAME)) == list(expected.samples(NAME))


class Killed(Exception):
    pass


def kill_after(run, most):
    """The run dies when its policy has given so many more answers."""
    (engine,) = run.policy.engines.values()
    generate, left = engine.generate, iter(range(most))

    def dying(requests, on_answer=None, **asked):
        def one(place, response):
            if next(left, None) is None:
                raise Killed
            on_answer(place, response)

        return generate(requests, one, **asked)

    engine.generate = dying


def answers_drawn(run):
    """A list that grows with each answer that the policy draws for a step, and not for the gate."""
    (engine,) = run.policy.engines.values()
    generate, found = engine.generate, []

    def counting(requests, on_answer=None, **asked):
        def one(place, response):
            found.append(response)
            on_answer(place, response)

        return generate(requests, one if on_answer else None, **asked)

    engine.generate = counting
    return found


def test_each_batch_but_the_first_is_of_the_variables_before(ahead, in_turn):
    assert [row["staleness"] for row in rows(ahead)] == [0.0, 1.0, 1.0, 1.0]
    whose = [{name for name, _ in drawn(ahead)[step]} for step in range(4)]
    assert whose == [{f"{NAME}@{n}"} for n in (0, 0, 1, 2)]
    assert all("staleness" not in row for row in rows(in_turn))
    whose = [{name for name, _ in drawn(in_turn)[step]} for step in range(4)]
    assert whose == [{f"{NAME}@{n}"} for n in range(4)]
    assert {"staleness"} <= set(metrics.NAMES)


def test_the_trainer_knows_that_a_batch_is_stale(ahead, in_turn):
    """The importance ratio leaves 1, where a step has moved the policy since."""
    assert all(row["ratio"] == pytest.approx(1.0, abs=1e-4) for row in rows(in_turn))
    first, *later = (row["ratio"] for row in rows(ahead))
    assert first == pytest.approx(1.0, abs=1e-4)
    assert all(abs(ratio - 1.0) > 1e-3 for ratio in later)


def test_tasks_are_those_of_the_stream_in_its_order_ahead_or_not(ahead, in_turn):
    asked = [[{text for _, text in drawn(run)[n]} for n in range(4)] for run in (ahead, in_turn)]
    assert asked[0] == asked[1]
    assert len(set(map(frozenset, asked[0]))) > 1


def test_a_stage_that_has_ended_leaves_no_responses(ahead, in_turn):
    for run in (ahead, in_turn):
        assert (run.workdir / "checkpoints" / NAME / "final").exists()
        assert not (run.workdir / "checkpoints" / NAME / "responses").exists()


@pytest.mark.parametrize("stop", range(1, 4))
def test_a_stop_between_steps_changes_nothing_ahead(prepare, ahead, stop, capsys):
    run = prepare()
    asked = iter(range(stop + 1))
    run.should_stop = lambda: next(asked, 0) == stop
    with pytest.raises(run_lib.Preempted):
        rl.run_stage(run, stage(ahead=True))
    run.should_stop = lambda: False
    found = answers_drawn(run)
    rl.run_stage(run, stage(ahead=True))
    said = f"{PER_STEP} responses of step {stop + 1} were finished before"
    assert said in capsys.readouterr().out
    assert len(found) == (4 - stop - 1) * PER_STEP
    assert_same(run, ahead)


@pytest.mark.parametrize("killed_at", [5, PER_STEP + 5, 2 * PER_STEP + 31])
@pytest.mark.parametrize("is_ahead", [False, True])
def test_a_step_cut_short_is_finished_from_the_answers_that_are_on_disk(
    prepare, in_turn, ahead, killed_at, is_ahead
):
    run = prepare()
    kill_after(run, killed_at)
    with pytest.raises(Killed):
        rl.run_stage(run, stage(ahead=is_ahead))
    (engine,) = run.policy.engines.values()
    del engine.generate
    found = answers_drawn(run)
    rl.run_stage(run, stage(ahead=is_ahead))
    saved = killed_at // PER_STEP - is_ahead  # a checkpoint follows the draw ahead of it
    assert len(found) >= 4 * PER_STEP - killed_at
    if saved >= 0:
        assert len(found) == 4 * PER_STEP - killed_at
    assert_same(run, ahead if is_ahead else in_turn)


def test_a_batch_ahead_that_is_gone_is_told_and_drawn_anew(prepare, caplog):
    run = prepare()
    asked = iter(range(3))
    run.should_stop = lambda: next(asked, 0) == 2
    with pytest.raises(run_lib.Preempted):
        rl.run_stage(run, stage(ahead=True))
    run.should_stop = lambda: False
    (run.workdir / "checkpoints" / NAME / "responses" / "000002" / "complete.json").unlink()
    with caplog.at_level(logging.WARNING):
        rl.run_stage(run, stage(ahead=True))
    assert "the batch of step 2 that was drawn ahead is not there" in caplog.text
    assert [row["staleness"] for row in rows(run)] == [0.0, 1.0, 0.0, 1.0]
    assert {name for name, _ in drawn(run)[2]} == {f"{NAME}@2"}


def test_the_gate_looks_at_answers_of_the_variables_of_now(prepare, ahead, capsys):
    """A stale batch differs from the trainer rightly: a stage that goes on draws a few more."""
    run = prepare()
    asked = iter(range(3))
    run.should_stop = lambda: next(asked, 0) == 2
    with pytest.raises(run_lib.Preempted):
        rl.run_stage(run, stage(ahead=True))
    assert "trainer and sampler differ by" in capsys.readouterr().out
    run.should_stop = lambda: False
    rl.run_stage(run, stage(ahead=True))
    said = capsys.readouterr().out
    assert "trainer and sampler differ by" in said and "0.00% of tokens" in said
    assert_same(run, ahead)


def test_other_variables_at_the_same_step_do_not_take_each_others_answers(prepare, caplog):
    """A run that goes on with more steps has another rate, and so another policy at each step."""
    run = prepare()
    run.runtime = dataclasses.replace(run.runtime, save_every=2)
    kill_after(run, 3 * PER_STEP + 5)  # in the step of index 3; saved was that of index 2
    with pytest.raises(Killed):
        rl.run_stage(run, stage(steps=4))
    (engine,) = run.policy.engines.values()
    del engine.generate
    found = answers_drawn(run)
    rl.run_stage(run, stage(steps=8))
    # The step of index 2 has all its answers; the five of the next are another policy's.
    assert len(found) == 5 * PER_STEP
    other = prepare()
    asked = iter(range(3))
    other.should_stop = lambda: next(asked, 0) == 2
    with pytest.raises(run_lib.Preempted):
        rl.run_stage(other, stage(steps=4))
    other.should_stop = lambda: False
    rl.run_stage(other, stage(steps=8))
    assert_same(run, other)


@pytest.mark.parametrize(
    "fields",
    [
        dict(updates=2, grpo=grpo.GrpoConfig(off_policy_delta=0.1)),
        dict(keep_routing=True, max_refills=1),
        dict(grpo=grpo.GrpoConfig(kl_coefficient=0.1, importance_cap=2.0)),
    ],
    ids=["updates", "routing, refills", "KL, importance"],
)
def test_a_stop_changes_nothing_ahead_with(prepare, fields):
    whole, run = prepare(), prepare()
    rl.run_stage(whole, stage(steps=3, ahead=True, **fields))
    asked = iter(range(3))
    run.should_stop = lambda: next(asked, 0) == 2
    with pytest.raises(run_lib.Preempted):
        rl.run_stage(run, stage(steps=3, ahead=True, **fields))
    run.should_stop = lambda: False
    rl.run_stage(run, stage(steps=3, ahead=True, **fields))
    assert_same(run, whole)


def test_ahead_needs_an_optimizer_that_stays(prepare):
    run = prepare(placement=placement.PlacementConfig(optimizer=placement.HOST))
    with pytest.raises(ValueError, match=r"rl.ahead .*runtime.placement.optimizer = 'resident'"):
        rl.run_stage(run, stage(ahead=True))


def test_ahead_is_not_for_a_stages_last_step(prepare):
    run = prepare()
    found = answers_drawn(run)
    rl.run_stage(run, stage(steps=1, ahead=True))
    assert len(found) == PER_STEP
