"""The loop that all training stages share, where a step goes wrong."""

import dataclasses

import jax
import numpy as np
import pytest

from mathv2_jax import records, storage
from mathv2_jax.rl import learner, optimizer
from mathv2_jax.stages import run as run_lib
from mathv2_jax.stages import sft, steps

TAUGHT = [
    records.Demonstration(
        id=f"d{n}", role="generator", problem_id="p", user="Prove it.", assistant="I do not know."
    )
    for n in range(3)
]


def config(rate, num_steps=4):
    adam = optimizer.OptimizerConfig(learning_rate=rate)
    return sft.SftConfig(steps=num_steps, rows=1, row_length=16, optimizer=adam)


def test_a_step_that_is_not_finite_ends_the_run_with_its_batch_and_the_last_good_state(make_run):
    run = make_run(start={})
    with pytest.raises(
        steps.NotFiniteError, match=r"cold, step 2: .*not finite.*inspect/cold-"
    ) as e:
        sft.train(run, "cold", "start", config(1e38), TAUGHT)  # one step, and nothing is finite
    assert "The state before this step is kept" in str(e.value)
    folder = run.workdir / "inspect" / "cold-000002"
    saved = {path.name: np.load(path) for path in folder.iterdir()}
    tokens_BT, weights_BT = saved["0-tokens_BT.npy"], saved["0-weights_BT.npy"]
    assert tokens_BT.shape == (1, 16) and weights_BT.sum() > 0
    assert "I do not know." in run.tokenizer.decode(tokens_BT[weights_BT > 0].tolist()[:-1])
    with run.checkpoints("cold") as kept:
        assert kept.latest_step() == 1
    with pytest.raises(
        ValueError, match="the variables that stage 'cold' left in .* cannot be had: it holds none"
    ):
        run.variables("cold")


def test_assignments_to_experts_that_found_no_room_are_told_once(make_run, monkeypatch, caplog):
    run, step = make_run(start={}), learner.Learner.step

    def crowded(self, state, *args):
        at = int(jax.device_get(state.step))
        after, measured = step(self, state, *args)
        return after, {**measured, "expert_overflow": jax.numpy.asarray(5.0 * at)}

    monkeypatch.setattr(learner.Learner, "step", crowded)
    sft.train(run, "crowded", "start", config(1e-2, num_steps=3), TAUGHT)
    assert caplog.text.count("assignments of tokens to experts found no room") == 1
    assert "crowded, step 2: 5 assig" in caplog.text
    assert "runtime.expert_buffer = None" in caplog.text


@pytest.mark.parametrize(("asked", "num_steps"), [((2, 3), 4), ((4, 9), 4)])
def test_the_steps_asked_for_are_traced_with_the_models_scopes(make_run, asked, num_steps):
    run = make_run(start={})
    run.runtime = dataclasses.replace(run.runtime, profile_steps=asked)
    sft.train(run, "traced", "start", config(1e-2, num_steps), TAUGHT)
    (trace,) = (run.workdir / "profile" / "traced").glob("plugins/profile/*/*.xplane.pb")
    text = trace.read_bytes()
    for name in (b"gradients", b"guarded_update", b"attend", b"experts", b"unembed"):
        assert name in text, name


@pytest.mark.parametrize("asked", [(0, 2), (3, 2), (1,)])
def test_steps_to_trace_count_from_1_and_ascend(asked):
    with pytest.raises(ValueError, match="profile_steps = .*from 1 on"):
        run_lib.RuntimeConfig(profile_steps=asked)


def test_steps_that_are_never_reached_are_not_traced(make_run):
    run = make_run(start={})
    run.runtime = dataclasses.replace(run.runtime, profile_steps=(7, 9))
    sft.train(run, "short", "start", config(1e-2), TAUGHT)
    assert not (run.workdir / "profile").exists()


def test_a_stage_that_is_asked_to_stop_saves_and_goes_on_to_the_same_end(make_run):
    run = make_run(start={})
    stops = iter([False, False, True])
    run.should_stop = lambda: next(stops, False)
    with pytest.raises(run_lib.Preempted):
        sft.train(run, "stopped", "start", config(1e-2), TAUGHT)
    with run.checkpoints("stopped") as kept:
        assert kept.latest_step() == 2
    sft.train(run, "stopped", "start", config(1e-2), TAUGHT)
    # The same name draws the same data; a fresh folder holds the run that nothing interrupted.
    first = run.variables("stopped")
    (run.workdir / "checkpoints").rename(run.workdir / "elsewhere")
    (run.workdir / "elsewhere" / "start").rename(run.workdir / "start")
    (run.workdir / "checkpoints").mkdir()
    (run.workdir / "start").rename(run.workdir / "checkpoints" / "start")
    sft.train(run, "stopped", "start", config(1e-2), TAUGHT)
    jax.tree.map(np.testing.assert_array_equal, run.variables("stopped"), first)


def test_a_run_killed_as_it_leaves_its_variables_gets_the_same_figures_again(make_run):
    run = make_run(start={})
    figures = sft.train(run, "cold", "start", config(1e-2, num_steps=2), TAUGHT)
    assert figures["loss"] > 0.0
    # What is on disk when keep_variables begins, the last act of a loop but its metrics.jsonl.
    (run.workdir / "checkpoints" / "cold" / "final").rmtree()
    (run.workdir / "metrics.jsonl").unlink()
    assert sft.train(run, "cold", "start", config(1e-2, num_steps=2), TAUGHT) == figures
    assert len((run.workdir / "metrics.jsonl").read_text().splitlines()) == 2
    run.variables("cold")


def test_a_stage_cannot_end_before_where_it_stands(make_run):
    run = make_run(start={})
    sft.train(run, "cold", "start", config(1e-2, num_steps=2), TAUGHT)
    with pytest.raises(ValueError, match="cold has taken 2 steps and is now to have 1: .*restart"):
        sft.train(run, "cold", "start", config(1e-2, num_steps=1), TAUGHT)


@pytest.mark.parametrize("how", ["gone", "damaged"])
def test_variables_that_are_lost_come_back_from_the_stages_own_checkpoints(make_run, how):
    run = make_run(start={})
    sft.train(run, "cold", "start", config(1e-2, num_steps=2), TAUGHT)
    before, final = run.variables("cold"), run.workdir / "checkpoints" / "cold" / "final"
    if how == "gone":
        final.rmtree()
    else:
        for path in (final / "2" / "seal").iterdir():
            path.write_bytes(b"{")
    with pytest.raises(ValueError, match="Delete that folder and .*records/cold/stage.json: the"):
        run.variables("cold")
    storage.remove_folder(final)
    sft.train(run, "cold", "start", config(1e-2, num_steps=2), TAUGHT)
    jax.tree.map(np.testing.assert_array_equal, run.variables("cold"), before)


def test_conversations_that_no_row_holds_are_counted_or_refused(caplog):
    steps.report_left_out("s", 0, 5, "rows of 16 tokens")
    assert not caplog.text
    steps.report_left_out("s", 2, 5, "rows of 16 tokens")
    assert "2 of 5 items do not fit rows of 16 tokens, and are left out" in caplog.text
    with pytest.raises(ValueError, match="none of 5 items fits rows of 16 tokens: raise that"):
        steps.report_left_out("s", 5, 5, "rows of 16 tokens")
    with pytest.raises(ValueError, match="its source is empty"):
        steps.report_left_out("s", 0, 0, "rows of 16 tokens")
