"""Several processes of one program on this machine, each with CPU devices of its own."""

import dataclasses
import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).resolve().parents[1]
PATIENCE_SECONDS = 600.0


@dataclasses.dataclass(frozen=True)
class Started:
    """Processes of one program, and where each one's output goes."""

    processes: tuple[subprocess.Popen, ...]
    logs: tuple[pathlib.Path, ...]

    def wait(self) -> list[int]:
        """The exit codes; the logs are part of the error where one does not end."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        for process in self.processes:
            try:
                process.wait(timeout=max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                for other in self.processes:
                    other.kill()
                raise AssertionError(f"it did not end:\n{self.said()}") from None
        return [process.returncode for process in self.processes]

    def said(self) -> str:
        """The end of every log."""
        return "\n".join(f"{log.name}:\n{log.read_text()[-3000:]}" for log in self.logs)


def start(  # noqa: PLR0913 - a program, and where
    arguments: Sequence[str],
    number: int,
    devices: int,
    folder: pathlib.Path,
    name: str,
    others: Sequence[Sequence[str]] = (),
) -> Started:
    """`python -m ARGUMENTS` in `number` processes of `devices` each; logs are FOLDER/NAME-I.log.

    `others` are the arguments of those after the first, where they differ.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = tuple(folder / f"{name}-{index}.log" for index in range(number))
    processes = []
    for index, log in enumerate(logs):
        meet = (f"--coordinator=127.0.0.1:{port}", f"--num_processes={number}")
        meet = (*meet, f"--process_id={index}") if number > 1 else ()
        given = others[index - 1] if others and index else arguments
        with log.open("w") as out:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", *given, *meet],
                    cwd=ROOT,
                    env={**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)},
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                )
            )
    return Started(tuple(processes), logs)


def run(
    arguments: Sequence[str], number: int, devices: int, folder: pathlib.Path, name: str
) -> Started:
    """As `start`, to its good end."""
    started = start(arguments, number, devices, folder, name)
    codes = started.wait()
    assert codes == [0] * number, f"{codes}\n{started.said()}"
    return started
