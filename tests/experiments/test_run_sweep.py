import json
import os
import shlex
import signal
import sys
import threading

import pytest

from experiments import run_sweep
from mathv2_jax.cli import config as config_lib
from mathv2_jax.cli import overrides, shell
from mathv2_jax.evaluation import held_out

SMOKE = "configs/smoke.py"
SEEDS = str(run_sweep.ROOT / "configs" / "sweeps" / "seeds.py")


@pytest.fixture
def write_sweep(tmp_path):
    def write(entries, config=SMOKE):
        path = tmp_path / "sweep.py"
        path.write_text(f"CONFIG = {config!r}\n\n\ndef get_sweep():\n    return {entries!r}\n")
        return str(path)

    return write


# The sweep's file.


def test_the_committed_sweep_is_one_config_at_three_seeds():
    entries = run_sweep.load(SEEDS)
    assert [e.name for e in entries] == ["quick-seed0", "quick-seed1", "quick-seed2"]
    assert [e.config.seed for e in entries] == [0, 1, 2]


def test_a_typo_in_the_last_entry_is_found_before_anything_runs(write_sweep, tmp_path, capsys):
    path = write_sweep({"good": [], "bad": ["config.stage.sft.sft.stepps=3"]})
    workdir = tmp_path / "runs"
    assert run_sweep.main(["", f"--sweep={path}", f"--workdir={workdir}"]) == shell.BAD_INPUT
    error = capsys.readouterr().err
    assert "entry 'bad'" in error and "did you mean config.stage.sft.sft.steps?" in error
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, "names with lists of overrides"),
        ({"a/b": []}, "entry 'a/b': a name becomes a folder"),
        ({"a": "config.seed=1"}, "entry 'a': overrides are a list"),
        ({"a": ["seed=1"]}, "entry 'a': override 'seed=1' does not begin with 'config.'"),
        ({"a": ["config.seed"]}, "entry 'a': --config.seed has no value"),
        ({"a": ["config.seed=one"]}, "entry 'a': config.seed must be of type int"),
    ],
)
def test_a_sweep_that_cannot_be_run_names_the_entry_and_the_rule(write_sweep, entries, message):
    with pytest.raises(ValueError, match=message):
        run_sweep.load(write_sweep(entries))


def test_a_name_that_no_entry_has_is_answered_with_the_nearest(capsys):
    flags = [f"--sweep={SEEDS}", "--workdir=runs", "--only=quick-seed0,quick-sed1"]
    assert run_sweep.main(["", *flags]) == shell.BAD_INPUT
    assert "did you mean 'quick-seed1'?" in capsys.readouterr().err


# Commands.


def test_printed_commands_are_quoted_for_a_shell_and_follow_the_order_of_the_sweep(
    write_sweep, tmp_path, capsys
):
    data = "config.world.dials.depth=(1, 3)"
    path = write_sweep({"b": [data], "a": ["config.seed=7"], "c": []})
    workdir = tmp_path / "two words"
    flags = [f"--sweep={path}", f"--workdir={workdir}", "--only=a,b", "--print"]
    assert run_sweep.main(["", *flags]) == shell.FINISHED
    program = ["python", "-m", "mathv2_jax.cli.train", f"--config={SMOKE}"]
    assert [shlex.split(line) for line in capsys.readouterr().out.splitlines()] == [
        [*program, f"--workdir={workdir}/b", f"--{data}"],
        [*program, f"--workdir={workdir}/a", "--config.seed=7"],
    ]
    assert not workdir.exists()


def exits(code):
    return [sys.executable, "-c", f"raise SystemExit({code})"]


def test_a_failure_stops_nothing_and_a_preemption_stops_the_rest(capfd):
    commands = {"a": exits(3), "b": exits(0), "c": exits(75), "d": exits(0)}
    assert run_sweep.run_commands(commands) == {"a": 3, "b": 0, "c": 75}
    assert "a: exit code 3" in capfd.readouterr().err


def test_sigterm_reaches_the_run_and_ends_the_sweep(tmp_path):
    saves = f"""
import pathlib, signal, sys, time
folder = pathlib.Path({str(tmp_path)!r})
def save(*unused):
    (folder / "saved").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
(folder / "ready").touch()
time.sleep(20)
"""

    def ask():
        while not (tmp_path / "ready").exists():
            pause.wait(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    pause = threading.Event()
    asking = threading.Thread(target=ask)
    asking.start()
    handler = signal.getsignal(signal.SIGTERM)
    codes = run_sweep.run_commands({"a": [sys.executable, "-c", saves], "b": exits(0)})
    asking.join()
    assert codes == {"a": shell.PREEMPTED}
    assert (tmp_path / "saved").exists()
    assert signal.getsignal(signal.SIGTERM) is handler


def test_an_entry_that_fails_is_named_with_its_exit_code(write_sweep, tmp_path, capfd):
    overrides = [f"config.data={tmp_path / 'none'}"]
    path = write_sweep({"real": overrides}, config="configs/olympiad.py")
    workdir = tmp_path / "runs"
    assert run_sweep.main(["", f"--sweep={path}", f"--workdir={workdir}"]) == shell.FAILED
    assert "failed: real with exit code 2" in capfd.readouterr().err
    assert json.loads((workdir / "results.json").read_text())["entries"] == {}


# Results.


def summary(mean, se):
    figures = {"before": (0.25, 0.1), "after": (0.25 + mean, 0.1), "difference": (mean, se)}
    metric = {side: {"mean": m, "se": s, "n": 9} for side, (m, s) in figures.items()}
    constants = {"verifier_accuracy": {"before": 0.4, "after": 0.4 + mean}}
    metrics = {name: metric for name in held_out.METRICS}
    return {"metrics": metrics, "constants": constants, "stages": {}}


def test_finished_runs_of_the_same_config_are_collected(write_sweep, tmp_path, capsys):
    entries = run_sweep.load(
        write_sweep({n: ["config.seed=4"] for n in ("done", "other", "stopped", "waiting")})
    )
    seeds = {"done": 4, "other": 5, "stopped": 4}  # `other` was run before the sweep was changed
    for name, seed in seeds.items():
        config = overrides.load(str(run_sweep.ROOT / SMOKE))
        made = config_lib.build(config, [("config.seed", str(seed))])
        (tmp_path / name).mkdir()
        identity = config_lib.identity(made)
        body = json.dumps({"schema": config_lib.SCHEMA, "identity": identity, "runtime": {}})
        (tmp_path / name / "config.json").write_text(body)
        if name != "stopped":
            (tmp_path / name / "summary.json").write_text(json.dumps(summary(0.5, 0.1)))
    assert run_sweep.collect(entries, str(tmp_path)) == {"done": summary(0.5, 0.1)}
    assert "other: left out" in capsys.readouterr().err
    run_sweep.report(entries, str(tmp_path), "sweep.py")
    assert "1 of 4 entries have finished" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["entries"] == {"done": summary(0.5, 0.1)}


def test_entries_that_differ_in_the_seed_are_pooled_by_the_mean_of_their_changes():
    summaries = {
        "long-seed0": summary(0.1, 0.03),
        "long-seed1": summary(0.2, 0.04),
        "long-seed12": summary(0.6, 0.12),
        "short-seed0": summary(0.5, 0.07),  # one run is no pool
        "short": summary(0.9, 0.01),
    }
    pooled = run_sweep.pool(summaries)
    assert set(pooled) == {"long"}
    assert pooled["long"]["entries"] == ["long-seed0", "long-seed1", "long-seed12"]
    for metric in held_out.METRICS:
        change = pooled["long"]["metrics"][metric]["difference"]
        assert change["mean"] == pytest.approx(0.3)
        assert change["se"] == pytest.approx(0.13 / 3)  # 3, 4, 12, 13


def test_a_summary_of_an_older_version_is_left_out_and_says_so(write_sweep, tmp_path, capsys):
    (entry,) = run_sweep.load(write_sweep({"old": ["config.seed=4"]}))
    (tmp_path / "old").mkdir()
    identity = config_lib.identity(entry.config)
    body = json.dumps({"schema": config_lib.SCHEMA, "identity": identity, "runtime": {}})
    (tmp_path / "old" / "config.json").write_text(body)
    old = summary(0.5, 0.1) | {"stages": {}}
    del old["metrics"]["meta_caught"]
    (tmp_path / "old" / "summary.json").write_text(json.dumps(old))
    assert run_sweep.collect([entry], str(tmp_path)) == {}
    assert "old: left out, an older version" in capsys.readouterr().err


def test_a_seed_without_a_figure_leaves_the_pooled_one_open():
    summaries = {"a-seed0": summary(0.1, 0.1), "a-seed1": summary(0.3, 0.1)}
    summaries["a-seed1"]["metrics"]["meta_accuracy"] = {
        side: {"mean": None, "se": None, "n": 0} for side in run_sweep.SIDES
    }
    found = run_sweep.pool(summaries)["a"]["metrics"]["meta_accuracy"]
    assert found == {side: {"mean": None, "se": None} for side in run_sweep.SIDES}


def test_the_table_shows_every_entry_and_how_many_standard_errors_the_pooled_change_is():
    entries = {"a-seed0": summary(0.1, 0.03), "a-seed1": summary(0.2, 0.04)}
    text = run_sweep.render({"entries": entries, "pooled": run_sweep.pool(entries)})
    first, second, pooled = text.splitlines()[1:4]
    assert " ".join(first.split()) == (
        "verifier_accuracy a-seed0 0.250 ±0.100 0.350 ±0.100 0.100 ±0.030"
    )
    assert " ".join(second.split()) == "a-seed1 0.250 ±0.100 0.450 ±0.100 0.200 ±0.040"
    assert pooled.split()[:3] == ["a,", "2", "pooled"]
    assert pooled.split()[-6:-2] == ["0.150", "±0.025", "+6.0", "se"]  # 0.15 / (0.05 / 2)
    assert pooled.split()[-2:] == ["constant", "0.550"]  # the mean of 0.5 and 0.6


def test_entries_without_an_exact_judge_have_no_table():
    entries = {"a-seed0": {"metrics": None}}
    pooled = run_sweep.pool(entries)
    assert pooled == {}
    assert "no entry" in run_sweep.render({"entries": entries, "pooled": pooled})
