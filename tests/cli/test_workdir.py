"""How a run begins in a workdir, is stopped, goes on, and goes back."""

import json
import os
import pathlib
import signal
import threading

import jax
import pytest
from etils import epath

from mathv2_jax import storage
from mathv2_jax.cli import config as config_lib
from mathv2_jax.cli import machine, overrides, shell, train
from mathv2_jax.cli import workdir as workdir_lib

CONFIG = pathlib.Path(__file__).resolve().parents[2] / "configs" / "smoke.py"


def smoke(*changes: tuple[str, str]) -> config_lib.RunConfig:
    return config_lib.build(
        overrides.load(str(CONFIG)), [(f"config.{path}", value) for path, value in changes]
    )


@pytest.fixture
def workdir(tmp_path):
    return epath.Path(tmp_path / "run")


def leave(workdir, stage, *, done=True):
    """What a stage leaves, in small."""
    parts = storage.Parts(workdir / "records" / stage)
    parts.write_part(storage.part_name(1), b"{}\n")
    parts.commit(1)
    storage.write_whole(workdir / "checkpoints" / stage / "final" / "1" / "seal", b"")
    if done:
        storage.write_whole(workdir / "records" / stage / "stage.json", b"{}")


def begun(workdir, upto, *, done=True):
    """A run of the smoke config whose stages before `upto` are done."""
    workdir_lib.write_config(workdir, smoke())
    names = [s.name for s in smoke().stages]
    for name in names[: names.index(upto)]:
        leave(workdir, name)
    leave(workdir, upto, done=done)
    return names


def test_a_start_that_was_interrupted_leaves_the_next_one_no_tokenizer(workdir):
    stale = workdir / "records" / "input" / "tokenizer.model"
    storage.write_whole(stale, b"of other settings")
    workdir_lib.begin(workdir, smoke(("world.num_demonstrations", "40")))
    assert not storage.exists(stale)
    assert storage.exists(workdir / "records" / "input" / "demonstrations.jsonl")


def test_stages_without_their_config_are_refused(workdir):
    leave(workdir, "sft")
    with pytest.raises(ValueError, match=r"config\.json is missing, though .*sft is there"):
        workdir_lib.begin(workdir, smoke())


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"schema": 9, "identity": {}, "runtime": {}}'])
def test_a_config_that_cannot_be_used_is_named(workdir, text):
    storage.write_whole(workdir / "config.json", text.encode())
    with pytest.raises(ValueError, match=r"config\.json (is damaged|has schema 9)"):
        workdir_lib.begin(workdir, smoke())


def test_what_a_session_changes_in_how_it_runs_is_said_and_kept(workdir, capsys):
    workdir_lib.write_config(workdir, smoke())
    assert capsys.readouterr().out == ""
    workdir_lib.write_config(workdir, smoke(("runtime.save_every", "7")))
    said = "goes on with another runtime.save_every: it was 2, now 7\n"
    assert capsys.readouterr().out == said
    saved = json.loads((workdir / "config.json").read_text())
    assert saved["runtime"]["save_every"] == 7
    assert saved["commit"] == workdir_lib.code_commit() != ""


def test_a_session_that_changes_what_is_computed_says_so_and_is_remembered(workdir, capsys):
    workdir_lib.write_config(workdir, smoke())
    longer = smoke(("stage.verifier-1.rl.steps", "9"))
    workdir_lib.write_config(workdir, longer)
    workdir_lib.write_config(workdir, longer)
    change = "identity.stages.verifier-1.rl.steps: it was 3, now 9"
    assert capsys.readouterr().out == f"goes on with another {change}\n"
    assert json.loads((workdir / "config.json").read_text())["changes"] == [[change]]


def test_a_config_of_another_version_of_the_program_is_refused_by_the_field(workdir):
    workdir_lib.write_config(workdir, smoke())
    body = json.loads((workdir / "config.json").read_text())
    body["identity"]["world"]["an_older_field"] = None
    storage.write_whole(workdir / "config.json", json.dumps(body).encode())
    with pytest.raises(ValueError, match=r"world\.an_older_field was None, now absent \(that was"):
        workdir_lib.begin(workdir, smoke())


@pytest.mark.parametrize("how", ["shorter", "gone"])
def test_an_input_file_that_changed_under_a_run_is_named(workdir, how):
    config = smoke(("world.num_demonstrations", "40"))
    workdir_lib.begin(workdir, config)
    workdir_lib.begin(workdir, config)
    storage.write_whole(workdir / "records" / "input" / "experts" / "x.jsonl", b"may come later")
    path = workdir / "records" / "input" / "proofs.jsonl"
    whole = storage.read_bytes(path)
    storage.remove(path)
    if how == "shorter":
        storage.write_whole(path, b"".join(whole.splitlines(keepends=True)[:-1]))
    state = "differs from what the run began with" if how == "shorter" else "is missing"
    with pytest.raises(ValueError, match=f"proofs.jsonl {state}"):
        workdir_lib.begin(workdir, config)


def test_a_refused_probe_may_change_and_forgets_its_scores(workdir):
    begun(workdir, "probe-1", done=False)
    workdir_lib.begin(workdir, smoke(("stage.probe-1.tolerance_se", "5.0")))
    assert not storage.exists(workdir / "records" / "probe-1")
    assert storage.exists(workdir / "records" / "verifier-1" / "stage.json")


def test_a_stage_that_broke_runs_anew_with_other_settings_once_it_is_restarted(workdir):
    names = begun(workdir, "verifier-1", done=False)
    for beside in ("-undecided", "-wanted", "-chosen"):
        leave(workdir, f"verifier-1{beside}", done=False)
    storage.write_whole(workdir / "checkpoints" / "verifier-1" / "steps" / "2" / "seal", b"")
    rows = "".join(json.dumps({"stage": n, "step": 1}) + "\n" for n in ("meta", "verifier-1"))
    storage.write_whole(workdir / "metrics.jsonl", rows.encode())
    slower = smoke(("stage.verifier-1.rl.optimizer.learning_rate", "1e-5"))
    with pytest.raises(ValueError, match="--restart_stage=verifier-1, which deletes"):
        workdir_lib.begin(workdir, slower)
    workdir_lib.restart(workdir, "verifier-1")
    workdir_lib.begin(workdir, slower)
    left = set(storage.list_names(workdir / "records"))
    assert left == set(names[: names.index("verifier-1")])
    assert (workdir / "metrics.jsonl").read_text() == '{"stage": "meta", "step": 1}\n'


def test_restarting_a_finished_stage_takes_those_after_it_along(workdir):
    begun(workdir, "meta")
    workdir_lib.restart(workdir, "before")
    assert storage.list_names(workdir / "records") == ["rule-drills", "sft", "source-drills"]
    assert storage.list_names(workdir / "checkpoints") == ["rule-drills", "sft", "source-drills"]
    with pytest.raises(ValueError, match=r"no stage of the run .*did you mean 'before'\?"):
        workdir_lib.restart(workdir, "befor")


def test_the_first_interrupt_asks_and_the_second_ends_at_once():
    # A shell starts what runs in its background with SIGINT ignored; so may these tests have been.
    outside = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with train._asked_to_stop() as asked:
            os.kill(os.getpid(), signal.SIGINT)
            assert asked == [signal.SIGINT]
            assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, outside)


def test_a_run_that_is_asked_to_stop_while_it_writes_its_input_leaves_with_75_and_no_lease(workdir):
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    pause = threading.Event()

    def ask():
        while not storage.exists(workdir / "lease.json"):
            pause.wait(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    asking = threading.Thread(target=ask)
    asking.start()
    flags = [f"--config={CONFIG}", f"--workdir={workdir}", "--config.runtime.mesh.data=8"]
    flags += [f"--config.stage.{s}.rl.rows=8" for s in RL] + ["--config.engine.rows=32"]
    try:
        assert train.main(["mathv2-train", *flags]) == shell.PREEMPTED
    finally:
        asking.join()
        for name, value in before.items():
            jax.config.update(name, value)
    assert not storage.exists(workdir / "lease.json")
    assert storage.exists(workdir / "config.json")  # so the same command goes on


RL = ("verifier-0", "meta", "verifier-1", "generator-1", "verifier-2", "generator-2")


def test_rows_that_the_mesh_does_not_divide_are_named_before_anything_is_written():
    changes = [(f"stage.{s}.rl.rows", "8") for s in RL if s != "meta"]
    config = smoke(("runtime.mesh.data", "8"), *changes)
    with pytest.raises(ValueError, match=r"config\.stage\.meta\.rl\.rows = 4 .* 8 ways"):
        machine.make_mesh(config.runtime.mesh, config.stages)


@pytest.mark.parametrize("flag", ["--workdir=", "--workdir= "])
def test_an_empty_workdir_is_refused(flag, capsys):
    assert train.main(["mathv2-train", f"--config={CONFIG}", flag]) == shell.BAD_INPUT
    assert "--workdir=DIR must be given" in capsys.readouterr().err


def test_a_workdir_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(ValueError, match=r"--workdir=.*file: nothing can be written there"),
        train._lease(epath.Path(tmp_path / "file")),
    ):
        raise AssertionError("the lease was given")


def test_help_is_no_failure(capsys):
    assert train.main(["mathv2-train", "--help"]) == shell.FINISHED
    assert "--restart_stage: Delete what this stage" in capsys.readouterr().out


def test_the_ways_out_of_a_drift_refusal_are_settings_that_may_still_change(workdir):
    config = smoke()
    refused = next(s for s in config.stages if s.name == "probe-2")
    text = train.ways_out(refused, config.stages)
    assert "--config.stage.probe-2.verifier=verifier-1" in text
    assert "--restart_stage=verifier-2" in text
    begun(workdir, "probe-2", done=False)
    stay = [("stage.probe-2.verifier", "verifier-1")]
    stay += [(f"stage.generator-2.{f}", "verifier-1") for f in ("init", "judge")]
    workdir_lib.begin(workdir, smoke(*stay, ("stage.after.verifier", "verifier-1")))
    other = next(s for s in config.stages if s.name == "sft")
    assert "--restart_stage=sft" in train.ways_out(other, config.stages)


@pytest.mark.parametrize("text", ["3", "a:b", "3:", "-1:2", "1:2:3"])
def test_what_are_no_steps_to_trace_is_an_error(text):
    with pytest.raises(ValueError, match="--profile_steps=.*like 3:5"):
        train._steps_to_trace(text)
    assert train._steps_to_trace("3:5") == (3, 5)
