"""Interrupted equals uninterrupted: configs/smoke.py under SIGKILL and under SIGTERM."""

import pathlib
import signal
import subprocess
import time

import pytest

from configs import smoke as smoke_config
from tests import smoke
from tools import check_resume

PATIENCE_SECONDS = 240.0


def stop_when(workdir: pathlib.Path, seen: str, number: int) -> int:
    """Start or continue a run, send a signal once a file exists; the exit code."""
    log = workdir.with_suffix(".log")
    with log.open("ab") as out:
        process = subprocess.Popen(smoke.command(workdir), cwd=smoke.ROOT, stdout=out, stderr=out)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not list(workdir.glob(seen)):
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, f"{seen} never appeared"
            time.sleep(0.02)
        process.send_signal(number)
        return process.wait(timeout=PATIENCE_SECONDS)


@pytest.fixture(scope="module")
def expected(smoke_workdir):
    return check_resume.digests(smoke_workdir)


def test_a_run_killed_and_asked_to_stop_ends_as_if_it_had_not_been(
    tmp_path, smoke_workdir, expected
):
    """From its first generator on; tools/check_resume.py kills it anywhere."""
    workdir = tmp_path / "stopped"
    stages = smoke_config.get_config().stages
    smoke.begun(smoke_workdir, workdir, stages[stages.index("generator-1") :])
    after_second_step = "checkpoints/generator-1/steps/2"
    assert stop_when(workdir, after_second_step, signal.SIGKILL) == -signal.SIGKILL
    assert not (workdir / "records" / "generator-1" / "stage.json").exists()
    in_next_round = "records/verifier-2/part-000001.jsonl"
    assert stop_when(workdir, in_next_round, signal.SIGTERM) == 75
    assert list((workdir / "checkpoints" / "verifier-2" / "steps").iterdir())  # saved
    assert "generator-1: goes on at step 2 of 3" in workdir.with_suffix(".log").read_text()
    smoke.run(smoke.command(workdir))
    found = check_resume.digests(workdir)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
