"""Several processes are one run: what they answer, learn and write, and how they end."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from etils import epath

from mathv2_jax import metrics, records, storage
from mathv2_jax.cli import launch
from mathv2_jax.stages import groups, run
from tests import cluster, smoke

# Three stages of smoke: a cold start, answers to the test set, and a verifier whose analyses are
# judged.
SHORT = (
    "--config.stage.sft.init=fresh",
    "--config.stage.sft.sft.steps=40",
    "--config.stage.verifier-1.init=sft",
    "--config.stage.verifier-1.judge=sft",
    "--config.before=",
    "--config.after=",
    "--config.runtime.mesh.data=2",
    "--config.runtime.mesh.fsdp=2",
    "--config.runtime.sampling.replicas=2",
)
flags.FLAGS(["tests"])


def training(workdir, stages="sft,before,verifier-1"):
    return smoke.command(workdir, f"--config.stages={stages}", *SHORT)[2:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return smoke.folder(tmp_path_factory) / "processes"


def made_once(folder, name, number, before=None, without=()):
    """The finished run; it goes on from where `before` was before the stages `without`."""
    workdir = folder / name
    folder.mkdir(exist_ok=True)
    with smoke.alone(folder / f"{name}.lock"):
        if not (workdir / "summary.json").exists():
            if before is not None:
                smoke.begun(before, workdir, without)
            cluster.run(training(workdir), number, 4 // number, folder, name)
    return workdir


@pytest.fixture(scope="module")
def alone(folder):
    """The run of one process with four devices."""
    return made_once(folder, "alone", 1)


@pytest.fixture(scope="module")
def pair(folder, alone):
    """The same run of two processes with two devices each, from the same cold start.

    From its very bits: after forty steps of their own a few of a hundred answers may differ, where
    a rounding decides.
    """
    return made_once(folder, "pair", 2, before=alone, without=("before", "verifier-1"))


# What they say to each other.


def test_two_processes_sample_what_one_does_uneven_lengths_and_a_cancelled_request_too(folder):
    for number in (1, 2):
        cluster.run(
            ["tests.answering", f"--folder={folder}"], number, 4 // number, folder, "sampling"
        )
    one, first, second = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1")
    )
    assert first == second  # every process has heard all
    for number in ("1", "2"):
        answers = one[number]
        lengths = {len(tokens) for request in answers for _, tokens, _ in request}
        finishes = [{finish for finish, _, _ in request} for request in answers]
        assert len(lengths) > 4
        assert finishes[3] == {records.Finish.CANCELLED}
        assert {records.Finish.CANCELLED} not in finishes[:3] + finishes[4:]
        for mine, theirs in zip(answers, first[number], strict=True):
            assert [r[:2] for r in mine] == [r[:2] for r in theirs]
            for (_, _, ours), (_, _, others) in zip(mine, theirs, strict=True):
                np.testing.assert_allclose(ours, others, rtol=0, atol=1e-5)
        np.testing.assert_allclose(one[f"head{number}"], first[f"head{number}"], atol=1e-6)
    assert [r[:2] for r in one["1"][4]] == [r[:2] for r in one["2"][4]]  # however they are split


# What they write.


def rows(workdir, stage):
    return list(metrics.read(workdir, stage))


def require_same_course(found, expected, stages):
    """Losses, gradients and figures of every step to 1e-5, and the same answers."""
    for stage in stages:
        ours, theirs = rows(expected, stage), rows(found, stage)
        assert [row["step"] for row in ours] == [row["step"] for row in theirs]
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.keys() == other.keys()
            for name in mine.keys() - {"stage"}:
                assert other[name] == pytest.approx(mine[name], rel=1e-5, abs=1e-5), (stage, name)
    if "verifier-1" in stages:
        for stage in ("before", "verifier-1"):
            assert samples(found, stage) == samples(expected, stage)


def samples(workdir, stage):
    """What a stage wrote, in the order of one process."""
    parts = storage.Parts(epath.Path(workdir) / "records" / stage)
    found = [records.from_json(records.Sample, x) for x in parts.read() if '"Sample"' in x]
    assert found
    return groups.in_order(found) if stage == "verifier-1" else found


def test_two_processes_learn_supervised_what_one_does(folder, alone):
    workdir = folder / "supervised"
    only = training(workdir, "sft")
    cluster.run(only, 2, 2, folder, "supervised")
    require_same_course(workdir, alone, ["sft"])


def test_two_processes_learn_from_rewards_and_write_what_one_does(alone, pair):
    require_same_course(pair, alone, ["verifier-1"])
    assert rows(pair, "verifier-1")[-1]["zero_signal"] < 1.0  # there was something to learn
    names = storage.list_names(pair / "records" / "verifier-1", "part-*")
    assert names[:2] == ["part-000001.0001.jsonl", "part-000001.jsonl"]  # each its own
    reports = [json.loads((w / "summary.json").read_text())["stages"] for w in (alone, pair)]
    assert reports[0].keys() == reports[1].keys()
    assert reports[0]["before"] == reports[1]["before"] | {
        run.WROTE: reports[0]["before"][run.WROTE]
    }


def test_the_second_process_is_silent(pair):
    first, second = ((pair.parent / f"pair-{i}.log").read_text() for i in range(2))
    assert "verifier-1 3/3" in first
    assert "verifier-1 3/3" not in second and "model:" not in second


# How they end, and go on.


def wait_for(pattern, workdir, started):
    deadline = time.monotonic() + cluster.PATIENCE_SECONDS
    while not list(workdir.glob(pattern)):
        assert time.monotonic() < deadline, started.said()
        assert all(p.poll() is None for p in started.processes), started.said()
        time.sleep(0.02)


def lose(workdir, number, victim, pattern):
    """Start a pair, and kill one of it when a file is there: the other says so and ends."""
    name = f"{workdir.name}-{number}"
    started = cluster.start(training(workdir), 2, 2, workdir.parent, name)
    wait_for(pattern, workdir, started)
    killed = time.monotonic()
    started.processes[victim].send_signal(signal.SIGKILL)
    codes = started.wait()
    assert time.monotonic() - killed < 60
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] != 0
    said = started.logs[1 - victim].read_text()
    program = f"mathv2-train: process {1 - victim} of 2 "
    told = [line for line in said.splitlines() if line.startswith(program)]
    assert len(told) == 1 and "goes on from the last checkpoint" in told[0], said[-3000:]
    assert not (workdir / "summary.json").exists()


def test_a_run_that_lost_either_process_ends_and_its_restart_is_as_if_it_had_not(folder, pair):
    workdir = folder / "lost"
    smoke.begun(pair, workdir, ["verifier-1"])
    lose(workdir, 1, victim=1, pattern="records/verifier-1/part-000001.jsonl")
    lose(workdir, 2, victim=0, pattern="checkpoints/verifier-1/steps/2")
    cluster.run(training(workdir), 2, 2, folder, "lost-3")
    log = (folder / "lost-3-0.log").read_text()
    assert "verifier-1: goes on at step 2 of 3" in log and "sft: finished before" in log
    assert rows(workdir, "verifier-1") == rows(pair, "verifier-1")
    assert seals(workdir, "verifier-1") == seals(pair, "verifier-1")
    assert samples(workdir, "verifier-1") == samples(pair, "verifier-1")


def seals(workdir, stage):
    """What tells the variables that a stage left apart, bit for bit."""
    found = list((workdir / "checkpoints" / stage / "final").glob("*/seal/metadata"))
    assert len(found) == 1
    return found[0].read_bytes()


def test_one_process_asked_to_stop_stops_all_and_one_alone_may_go_on(folder, alone):
    workdir = folder / "stopped"
    smoke.begun(alone, workdir, ["verifier-1"])
    started = cluster.start(training(workdir), 2, 2, folder, "stopped")
    wait_for("records/verifier-1/part-000001.jsonl", workdir, started)
    started.processes[1].send_signal(signal.SIGTERM)
    assert started.wait() == [75, 75], started.said()
    cluster.run(training(workdir), 1, 4, folder, "stopped-again")
    log = (folder / "stopped-again-0.log").read_text()
    assert "verifier-1: goes on at step" in log and "sft: finished before" in log
    require_same_course(workdir, alone, ["verifier-1"])


# What is refused.


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(coordinator="here"), "neither HOST:PORT of process 0, nor auto, nor none"),
        (dict(coordinator="h:1"), "needs --num_processes=N and --process_id=I"),
        (dict(num_processes=2), "give --coordinator=HOST:PORT"),
        (dict(coordinator="h:1", num_processes=2, process_id=2), "none of the 2"),
    ],
)
def test_flags_that_name_no_meeting_place_are_errors(given, message):
    asked = launch.together("mathv2-train")
    with flagsaver.flagsaver(**given), pytest.raises(ValueError, match=message), asked:
        pass


def test_a_process_that_none_comes_to_says_so_in_one_line(folder):
    program = (
        "import sys; from mathv2_jax.cli import launch, train; launch._MEETING_SECONDS = 3; "
        "launch.run(train.main)"
    )
    flag = ["--coordinator=127.0.0.1:1", "--num_processes=2", "--process_id=1"]
    command = [sys.executable, "-c", program, *training(folder / "nobody")[1:], *flag]
    done = subprocess.run(command, cwd=cluster.ROOT, capture_output=True, text=True)
    assert done.returncode not in (0, 75)
    assert "mathv2-train: process 1 of 2: waiting for the others at 127.0.0.1:1" in done.stdout
    told = [x for x in done.stderr.splitlines() if x.startswith("mathv2-train: process 1 of 2")]
    assert told == [
        "mathv2-train: process 1 of 2 met no others at 127.0.0.1:1 in 3 s; start all of them"
    ]


def test_a_machine_of_no_cluster_says_so_in_one_line(folder):
    flag = "--coordinator=auto"
    started = cluster.start([*training(folder / "nowhere"), flag], 1, 1, folder, "nowhere")
    assert started.wait() == [2]
    (line,) = [x for x in started.said().splitlines() if x.startswith("mathv2-train: --")]
    assert "the processes did not meet (coordinator_address should be defined.)" in line


def test_a_folder_that_processes_do_not_share_is_refused(folder):
    mine = [training(folder / f"unshared-{index}") for index in range(2)]
    started = cluster.start(mine[0], 2, 2, folder, "unshared", others=[mine[1]])
    assert started.wait() == [2, 2], started.said()
    assert "name a folder that all processes share" in started.said()
