import json
import math
import re
import struct
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from mathv2_jax import metrics

QUIET = metrics.MetricsConfig(tensorboard=False, flush_every=3)


def scalars(step):
    return {"loss": 1.0 / (step + 1), "reward": 0.25 * step, "tokens": 100.0}


def run(workdir, steps, *, resume_from=None, stage="sft", finish=True, config=QUIET):
    writer = metrics.MetricWriter(workdir, stage, resume_from=resume_from, config=config)
    for step in steps:
        writer.write(step, scalars(step) | {"time/sample": 0.5})
    if finish:
        writer.finish()
    else:
        writer.close()
    return writer


def lines(workdir):
    text = (workdir / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


# JSON lines.


def test_a_stage_leaves_one_line_a_step(tmp_path):
    run(tmp_path, range(5))
    assert lines(tmp_path) == [{"stage": "sft", "step": n, **scalars(n)} for n in range(5)]
    assert list(metrics.read(tmp_path, "sft")) == lines(tmp_path)


def test_the_lines_hold_nothing_of_the_clock_and_do_not_depend_on_flushing(tmp_path):
    files = []
    for number, every in enumerate((1, 3, 50)):
        config = metrics.MetricsConfig(tensorboard=False, flush_every=every)
        run(tmp_path / str(number), range(7), config=config)
        files.append((tmp_path / str(number) / "metrics.jsonl").read_bytes())
    assert files[0] == files[1] == files[2]
    assert b"time/" not in files[0]


@pytest.mark.parametrize("saved", [-1, 0, 2, 3, 5])
def test_a_resumed_stage_drops_later_steps_and_ends_like_one_that_was_not_stopped(tmp_path, saved):
    run(tmp_path / "whole", range(9))
    run(tmp_path / "cut", range(8), finish=False)  # of these, steps 0 to 5 are on disk
    resume_from = None if saved < 0 else saved
    run(tmp_path / "cut", [], resume_from=resume_from, finish=False)
    found = [row["step"] for row in metrics.read(tmp_path / "cut", "sft")]
    assert found == list(range(saved + 1))
    run(tmp_path / "cut", range(saved + 1, 9), resume_from=resume_from)
    whole, cut = ((tmp_path / n / "metrics.jsonl").read_bytes() for n in ("whole", "cut"))
    assert cut == whole


def test_flushed_steps_are_on_disk_before_the_stage_ends(tmp_path):
    writer = metrics.MetricWriter(tmp_path, "sft", config=metrics.MetricsConfig(tensorboard=False))
    writer.write(0, {"loss": 1.0})
    assert list(metrics.read(tmp_path, "sft")) == []
    writer.flush()
    assert list(metrics.read(tmp_path, "sft")) == [{"stage": "sft", "step": 0, "loss": 1.0}]


def test_stages_stand_in_the_order_in_which_they_first_ended(tmp_path):
    run(tmp_path, range(2), stage="sft")
    run(tmp_path, range(2), stage="rl")
    assert [row["stage"] for row in lines(tmp_path)] == ["sft", "sft", "rl", "rl"]
    run(tmp_path, range(3), stage="sft")  # again, and longer: in its own place
    assert [row["stage"] for row in lines(tmp_path)] == ["sft"] * 3 + ["rl"] * 2
    assert [row["step"] for row in lines(tmp_path)] == [0, 1, 2, 0, 1]


def test_numbers_that_are_not_finite_are_kept_as_valid_json(tmp_path):
    writer = metrics.MetricWriter(tmp_path, "rl", config=QUIET)
    writer.write(0, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5})
    writer.finish()

    def refuse(constant):
        raise AssertionError(constant)

    text = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(text, parse_constant=refuse)
    assert row == {"stage": "rl", "step": 0, "a": "nan", "b": "inf", "c": "-inf", "d": 1.5}
    (read,) = metrics.read(tmp_path, "rl")
    assert math.isnan(read["a"]) and (read["b"], read["c"]) == (math.inf, -math.inf)


def test_numbers_of_the_device_are_written_as_floats(tmp_path):
    writer = metrics.MetricWriter(tmp_path, "rl", config=QUIET)
    writer.write(0, {"device": jnp.float32(0.5), "host": np.float64(0.25), "count": 3})
    writer.finish()
    assert lines(tmp_path) == [
        {"stage": "rl", "step": 0, "device": 0.5, "host": 0.25, "count": 3.0}
    ]


def test_a_step_that_does_not_grow_is_refused(tmp_path):
    writer = metrics.MetricWriter(tmp_path, "rl", resume_from=4, config=QUIET)
    for step in (3, 4):
        with pytest.raises(ValueError, match=f"step {step} of rl comes after step 4"):
            writer.write(step, {"loss": 1.0})
    writer.write(5, {"loss": 1.0})
    with pytest.raises(ValueError, match="step 5 of rl comes after step 5"):
        writer.write(5, {"loss": 1.0})


@pytest.mark.parametrize("name", ["step", "stage"])
def test_a_scalar_may_not_take_the_name_of_a_column(tmp_path, name):
    writer = metrics.MetricWriter(tmp_path, "rl", config=QUIET)
    with pytest.raises(ValueError, match=f"scalar name '{name}' is taken"):
        writer.write(0, {name: 1.0})


# Progress.


def shown(tmp_path, capsys, scalars, **config):
    config = metrics.MetricsConfig(tensorboard=False, **config)
    metrics.MetricWriter(tmp_path, "rl", total_steps=10, config=config).write(0, scalars)
    return capsys.readouterr().out.removesuffix("\n")


def test_a_progress_line_shows_what_is_asked_for(tmp_path, capsys):
    scalars = {"loss": 1.23456789, "reward": 0.5, "hidden": 7.0, "tokens": 12345.678}
    line = shown(tmp_path, capsys, scalars, shown=("reward", "tokens", "loss", "kl"))
    assert line == "rl 0/10  rew .50  tokens 1.235e+04 loss 1.235"
    metrics.MetricWriter(tmp_path, "sft", config=QUIET).write(3, {})
    assert capsys.readouterr().out == "sft 3\n"


HEALTHY = {"outcome/parsed": 1.0, "outcome/unparseable": 0.0, "outcome/length": 0.0}
HEALTHY |= {"outcome/lost": 0.0, "lost_votes": 0.0, "left_group": 0.0}
REWARDS = {"reward": 0.4923, "reward/format": 1.0, "reward/proof": 0.4478, "reward/self": 0.878}
REWARDS |= {"reward/meta": 0.9, "reward/honesty": 0.79}
UPDATE = {"loss": 3.9e-9, "gradient_norm": 0.066, "entropy": 0.2984, "kl": 1.24e-4}
RL = {**REWARDS, **HEALTHY, **UPDATE, "zero_signal": 0.1875, "length": 112.4}


def test_a_step_with_a_reward_shows_its_components_and_its_health(tmp_path, capsys):
    assert shown(tmp_path, capsys, RL) == (
        "rl 0/10  rew .49 proof .45 self .88 meta .90  ent .30 kl 1e-4 zero .19 len 112 ok 1.00"
    )


def test_answers_that_were_cut_or_lost_are_shown_where_there_are_any(tmp_path, capsys):
    some = {"outcome/parsed": 0.9, "outcome/length": 0.07, "outcome/lost": 0.03}
    assert shown(tmp_path, capsys, RL | some).endswith("ok .90 cut .07 lost .03")


def test_a_step_in_which_nothing_was_rewarded_still_shows_its_health(tmp_path, capsys):
    scalars = {"loss": 0.0, "gradient_norm": 0.0, "zero_signal": 1.0, "length": 56.0}
    line = shown(tmp_path, capsys, scalars | {"outcome/parsed": 0.25, "outcome/length": 0.75})
    assert line == "rl 0/10  zero 1.00 len 56 ok .25 cut .75"


def test_a_supervised_step_shows_loss_and_gradient_norm(tmp_path, capsys):
    scalars = {"loss": 0.38496, "gradient_norm": 1.7102, "head_loss": 0.0, "learning_rate": 1e-3}
    assert shown(tmp_path, capsys, scalars) == "rl 0/10  loss .385 grad 1.710"


def test_the_longest_line_of_a_healthy_step_fits_120_columns(tmp_path, capsys, monkeypatch):
    clock = iter([0.0, 100.0, 147.0])
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
    config = metrics.MetricsConfig(tensorboard=False)
    writer = metrics.MetricWriter(tmp_path, "generator-1", total_steps=40, config=config)
    for step in (10, 11):
        writer.write(step, RL | {"tokens": 57_400.0})
    line = capsys.readouterr().out.splitlines()[1]
    assert line.endswith("  1.2k tok/s 22m43s left")
    assert len(line) <= 120


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("kl", 0.0, "kl 0"),
        ("kl", 2.6e-12, "kl 3e-12"),
        ("kl", -0.03, "kl -3e-2"),
        ("kl", 14.0, "kl 1e+1"),
        ("kl", math.nan, "kl nan"),
        ("entropy", -0.25, "ent -.25"),
        ("entropy", 10.04, "ent 10.04"),
        ("length", 0.4, "len 0"),
    ],
)
def test_figures_are_short(tmp_path, capsys, name, value, text):
    assert shown(tmp_path, capsys, {"reward": 0.0, name: value}) == f"rl 0/10  rew .00  {text}"


@pytest.mark.parametrize(
    ("tokens", "text"), [(999.0, "999"), (1000.0, "1.0k"), (9949.0, "9.9k"), (31_415.0, "31k")]
)
def test_tokens_a_second_are_short(tmp_path, capsys, tokens, text):
    config = metrics.MetricsConfig(tensorboard=False)
    writer = metrics.MetricWriter(tmp_path, "rl", config=config)
    writer.write(0, {"tokens": 5.0}, at=3.0)
    writer.write(1, {"tokens": tokens}, at=4.0)
    assert capsys.readouterr().out.splitlines() == ["rl 0", f"rl 1  {text} tok/s"]


def test_the_speed_and_the_time_left_follow_the_steps_moments_and_leave_the_first_one_out(
    tmp_path, capsys
):
    config = metrics.MetricsConfig(tensorboard=False, shown=())
    writer = metrics.MetricWriter(tmp_path, "rl", total_steps=27, resume_from=3, config=config)
    # Written all at once, as before a checkpoint; what counts is when the steps were taken.
    for step, tokens, moment in ((4, 9e9, 100.0), (5, 60.0, 110.0), (7, 60.0, 140.0)):
        writer.write(step, {"tokens": tokens}, at=moment)
    assert capsys.readouterr().out.splitlines() == [
        "rl 4/27",
        "rl 5/27  6 tok/s 3m40s left",
        "rl 7/27  3 tok/s 4m27s left",
    ]


def test_the_speed_is_that_of_the_last_steps(tmp_path, capsys):
    config = metrics.MetricsConfig(tensorboard=False)
    writer = metrics.MetricWriter(tmp_path, "rl", config=config)
    moments = [*range(0, 300, 10), *range(291, 321)]  # thirty slow steps, thirty quick ones
    for step, moment in enumerate(moments):
        writer.write(step, {"tokens": 100.0}, at=float(moment))
    rates = [line.split()[2] for line in capsys.readouterr().out.splitlines()[1:]]
    assert rates[28] == "10" and rates[-1] == "100"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (187.0, "3m07s"),
        (3599.4, "59m59s"),
        (3599.6, "1h00m"),
        (7500.0, "2h05m"),
        (360000.0, "100h00m"),
    ],
)
def test_a_duration_is_easy_to_read(seconds, text):
    assert metrics.duration(seconds) == text


# What depends on the clock.


def timing(workdir):
    return json.loads((workdir / "timing.json").read_text())["sections"]


def test_times_add_up_over_the_parts_of_a_stage(tmp_path):
    run(tmp_path, range(4))
    once = timing(tmp_path)["sft"]
    assert (once["steps"], once["tokens"], once["time/sample"]) == (4.0, 400.0, 2.0)
    run(tmp_path, range(4, 6), resume_from=3)
    twice = timing(tmp_path)["sft"]
    assert (twice["steps"], twice["tokens"], twice["time/sample"]) == (6.0, 600.0, 3.0)
    assert twice["seconds"] > once["seconds"] > 0.0


def test_flushing_twice_counts_no_time_twice(tmp_path):
    writer = metrics.MetricWriter(tmp_path, "sft", config=QUIET)
    writer.write(0, {"tokens": 10.0})
    writer.flush()
    writer.flush()
    assert timing(tmp_path)["sft"]["tokens"] == 10.0


def test_other_sections_of_the_timing_stay(tmp_path):
    metrics.write_timing(tmp_path, "compile", {"seconds": 7.0})
    run(tmp_path, range(2))
    metrics.write_timing(tmp_path, "compile", {"seconds": 8})
    assert timing(tmp_path)["compile"] == {"seconds": 8.0}
    assert timing(tmp_path)["sft"]["steps"] == 2.0


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 2, "sections": {}}', '{"schema": 1}'])
def test_a_timing_file_that_cannot_be_read_is_named(tmp_path, text):
    (tmp_path / "timing.json").write_text(text)
    with pytest.raises(ValueError, match="timing.json cannot be read .*delete it"):
        metrics.write_timing(tmp_path, "sft", {"seconds": 1.0})


# What a run waits for.


def compile_fresh(name, depth=1):
    """Compile a function that JAX has not seen, named `name`."""

    def function(x):
        for _ in range(depth):
            x = jnp.sin(x) @ x
        return x

    function.__name__ = name
    jax.jit(function).lower(jnp.ones((4, 4))).compile()


def test_compiling_is_timed_apart_from_everything_else(capsys):
    with metrics.CompileTime() as compiling:
        before = compiling.seconds
        time.sleep(0.2)
        assert compiling.seconds == before
        began = time.monotonic()
        compile_fresh("timed")
        assert 0.0 < compiling.seconds <= time.monotonic() - began
    seconds = compiling.seconds
    compile_fresh("not_timed", depth=2)
    assert compiling.seconds == seconds
    assert capsys.readouterr().out == ""  # nothing took long


def test_a_program_that_takes_long_to_compile_is_named_while_it_is_waited_for(capsys):
    before = set(threading.enumerate())
    with metrics.CompileTime(patience=1e-4):
        compile_fresh("deep", depth=20)
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=1.0)
        assert not thread.is_alive()  # nobody waits any more
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 25  # each wait is twice the last
    assert lines[0] == "compiling jit(deep): 0s so far"
    assert sum(bool(re.fullmatch(r"compiled jit\(deep\) in \d+s", line)) for line in lines) == 1


def test_parts_are_reported_no_more_often_than_asked(capsys, monkeypatch):
    clock = iter([0.0, 4.0, 11.0, 19.0, 21.5])
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
    progress = metrics.PartProgress("before", 9)
    for number in (1, 2, 3, 4):
        progress.done(number)
    assert capsys.readouterr().out.splitlines() == ["before: 2 of 9 parts", "before: 4 of 9 parts"]


# TensorBoard.


def events(folder):
    """(step, tag, value) of every scalar in a folder's event files, in the order of writing."""
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            for value in event.summary.value:
                yield event.step, value.tag, value.simple_value
            data = data[12 + length + 4 :]


def test_tensorboard_gets_every_scalar_and_the_speed(tmp_path):
    config = metrics.MetricsConfig()
    run(tmp_path, range(2), config=config)
    found = list(events(tmp_path / "tensorboard" / "sft"))
    assert {(step, tag) for step, tag, _ in found} == {
        (step, tag) for step in range(2) for tag in ("loss", "reward", "tokens", "time/sample")
    } | {(1, "time/tokens_per_second")}  # a rate needs two steps
    assert [value for _, tag, value in found if tag == "reward"] == [0.0, 0.25]


def test_a_writer_that_never_flushes_is_refused():
    with pytest.raises(ValueError, match="flush_every=0"):
        metrics.MetricsConfig(flush_every=0)


@pytest.mark.parametrize("field", ["shown", "shown_supervised"])
def test_a_scalar_that_no_stage_reports_is_answered_with_the_nearest(field):
    with pytest.raises(ValueError, match=rf"{field}: .* 'entropi'; did you mean 'entropy'\?"):
        metrics.MetricsConfig(**{field: ("loss", "entropi")})


def test_the_scalars_that_may_be_shown_are_those_that_stages_report(smoke_workdir):
    rows = [json.loads(line) for line in (smoke_workdir / "metrics.jsonl").read_text().splitlines()]
    reported = {name for row in rows for name in row} - {"stage", "step"}
    of_options = {"staleness", "kept_unknown"}  # rl.ahead, rl.keep_sampling_mask
    assert reported == set(metrics.NAMES) - of_options


def test_a_damaged_line_of_metrics_is_named_with_a_way_out(tmp_path):
    lines = ['{"stage": "sft", "step": 1}', "{"]
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is damaged .*take the line out"):
        metrics.stages_of(lines, tmp_path / "metrics.jsonl")
