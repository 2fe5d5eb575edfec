"""configs/smoke.py, run once by subprocess for all tests that look at its files."""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "smoke.py"


def command(workdir: pathlib.Path, *overrides: str) -> list[str]:
    """The command line of a run in `workdir` whose programs the tests' cache holds."""
    return [
        sys.executable,
        "-m",
        "mathv2_jax.cli.train",
        f"--config={CONFIG}",
        f"--workdir={workdir}",
        f"--compilation_cache={os.environ['JAX_COMPILATION_CACHE_DIR']}",
        *overrides,
    ]


def run(arguments: Sequence[str]) -> str:
    """What a run prints; its errors, too, where it does not end well."""
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The folder that all test workers share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def finished(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The workdir of the finished run, which no test changes; made once for all workers."""
    shared = folder(tmp_path_factory)
    workdir = shared / "smoke"
    with alone(shared / "smoke.lock"):
        if not (workdir / "summary.json").exists():
            (shared / "smoke.log").write_text(run(command(workdir)))
    return workdir


def begun(done: pathlib.Path, workdir: pathlib.Path, without: Sequence[str]) -> None:
    """A copy of the finished run `done` as it was before the stages `without`, its last ones."""
    shutil.copytree(done, workdir)
    for stage in without:
        assert (workdir / "records" / stage).is_dir()
        for kind in ("records", "checkpoints", "metrics", "tensorboard"):
            shutil.rmtree(workdir / kind / stage, ignore_errors=True)
    (workdir / "summary.json").unlink()
    lines = (workdir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["stage"] not in without]
    (workdir / "metrics.jsonl").write_bytes(b"".join(kept))


@contextlib.contextmanager
def alone(path: pathlib.Path) -> Iterator[None]:
    """For the block no other test worker is in one of the same path."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
