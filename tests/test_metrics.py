import json
import math
import re
import struct

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


def test_a_progress_line_shows_what_is_asked_for(tmp_path, capsys):
    config = metrics.MetricsConfig(tensorboard=False, shown=("reward", "kl", "loss"))
    writer = metrics.MetricWriter(tmp_path, "rl", total_steps=10, config=config)
    writer.write(0, {"loss": 1.23456789, "reward": 0.5, "hidden": 7.0})
    writer.write(1, {"loss": 12345.678, "reward": 0.5, "tokens": 1000.0})
    first, second = capsys.readouterr().out.splitlines()
    assert first == "rl 0/10  reward 0.5  loss 1.235"  # no pace is known yet
    assert re.fullmatch(
        r"rl 1/10  reward 0\.5  loss 1\.235e\+04  [\d,]+ tokens/s  \d+s left", second
    )
    metrics.MetricWriter(tmp_path, "sft", config=config).write(3, {})
    assert capsys.readouterr().out == "sft 3\n"


def test_the_time_left_follows_the_pace_of_all_steps_but_the_first(tmp_path, capsys, monkeypatch):
    clock = iter([0.0, 100.0, 110.0, 140.0])  # made; then steps 4, 5 and 7
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
    config = metrics.MetricsConfig(tensorboard=False, shown=())
    writer = metrics.MetricWriter(tmp_path, "rl", total_steps=27, resume_from=3, config=config)
    for step in (4, 5, 7):
        writer.write(step, {"tokens": 60.0})
    assert capsys.readouterr().out.splitlines() == [
        "rl 4/27  1 tokens/s",
        "rl 5/27  6 tokens/s  3m40s left",
        "rl 7/27  2 tokens/s  4m27s left",
    ]


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
        (step, tag)
        for step in range(2)
        for tag in ("loss", "reward", "tokens", "time/sample", "time/tokens_per_second")
    }
    assert [value for _, tag, value in found if tag == "reward"] == [0.0, 0.25]


def test_a_writer_that_never_flushes_is_refused():
    with pytest.raises(ValueError, match="flush_every=0"):
        metrics.MetricsConfig(flush_every=0)
