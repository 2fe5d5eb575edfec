"""How the processes of a run find each other, and how they end.

One of them that dies takes the others with it: those that are in a collective with it fail, or wait
until the coordinator misses its heartbeat. Either way each says so in one line and is gone; the
same command in all of them goes on from the last checkpoint.
"""

import contextlib
import importlib.util
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence

import jax
from absl import flags

from mathv2_jax import processes
from mathv2_jax.cli import shell

AUTO, ALONE = "auto", "none"
HEARTBEAT_SECONDS = 30  # after so long without a sign of life a process counts as dead
_MEETING_SECONDS = 300  # how long processes wait for each other at the start

# Runs beside a process until its pipe ends, and then says what it was told last: JAX ends a process
# that the others do not come to, or that has lost another, by a signal that no Python code sees.
_WATCH = """
import os, sys
last = ""
for line in sys.stdin:
    last = line.strip()
if last:
    os.write(2, (last + "\\n").encode())
"""

_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "Where the processes of a run meet: HOST:PORT of process 0, with --num_processes and "
    "--process_id; auto: as the TPU VM, GKE, Slurm or MPI says; none: one process, whatever they "
    "say. Default: auto on a TPU VM, else none.",
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes the run has.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
_SIGNS_OF_LOSS = ("Gloo", "UNAVAILABLE", "ABORTED", "DEADLINE_EXCEEDED", "CANCELLED")
_GO_ON = "The same command, given to all of them, goes on from the last checkpoint"
FLAGS = (_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID)


@contextlib.contextmanager
def together(program: str) -> Iterator[None]:
    """Around all that a process does: it is one of the run's, as the flags say, until the end.

    Before JAX's first use of a device. Of several processes only the first prints; a lost
    collective ends a process, and that end, as one that no Python code sees, is told in one line.
    ValueError where the flags contradict each other, or name no cluster that this machine is of.
    """
    where, number, own = _asked()
    if where == ALONE:
        yield
        return
    watch = subprocess.Popen(
        [sys.executable, "-c", _WATCH], stdin=subprocess.PIPE, text=True, start_new_session=True
    )
    name = program if own is None else f"{program}: process {own} of {number}"
    try:
        _tell(watch, f"{name} met no others at {where} in {_MEETING_SECONDS} s; start all of them")
        print(f"{name}: waiting for the others at {where}", flush=True)
        _meet(where, number, own)
        name = f"{program}: process {processes.index()} of {processes.count()}"
        _tell(watch, f"{name} was ended, by a signal or because another one is gone. {_GO_ON}")
        with _quiet(not processes.is_first()):
            yield
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        if not any(sign in reason for sign in _SIGNS_OF_LOSS):
            raise
        print(f"{name} stops, as it lost another: {reason:.160}. {_GO_ON}", file=sys.stderr)
        sys.exit(shell.FAILED)
    finally:
        _tell(watch, "")
        watch.communicate()


def _tell(watch: subprocess.Popen, line: str) -> None:
    """What the watch says if this process ends now; nothing where the line is empty."""
    assert watch.stdin is not None
    watch.stdin.write(f"{line}\n")
    watch.stdin.flush()


def _asked() -> tuple[str, int | None, int | None]:
    """Where to meet, how many, and which of them this is; checked."""
    where, number, own = _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
    if where is None:
        where = AUTO if on_tpu_vm() else ALONE
        if (number, own) != (None, None):
            raise ValueError(
                "--num_processes and --process_id are for processes that meet: give "
                "--coordinator=HOST:PORT of process 0 too"
            )
    if where not in (AUTO, ALONE):
        _check(where, number, own)
    return where, number, own


def _meet(where: str, number: int | None, own: int | None) -> None:
    # On CPU devices: collectives between processes; one program at a time, as programs that run at
    # once may hold threads that others wait for, in each process another; and threads enough for
    # every device to wait in a collective, which XLA takes to be this many.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    os.environ.setdefault("NPROC", str(max(16, 4 * (os.cpu_count() or 1))))
    try:
        jax.distributed.initialize(
            None if where == AUTO else where,
            number,
            own,
            initialization_timeout=_MEETING_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"--coordinator={where}: the processes did not meet ({reason}); check that all of "
            "them run, with the same address and different --process_id"
        ) from error


def _check(where: str, number: int | None, own: int | None) -> None:
    host, colon, port = where.rpartition(":")
    if not (host and colon and port.isdigit()):
        raise ValueError(
            f"--coordinator={where!r} is neither HOST:PORT of process 0, nor {AUTO}, nor {ALONE}"
        )
    if number is None or own is None:
        raise ValueError(f"--coordinator={where} needs --num_processes=N and --process_id=I")
    if not 0 <= own < number:
        raise ValueError(
            f"--process_id={own} is none of the {number} of --num_processes: they count from 0"
        )


def on_tpu_vm() -> bool:
    """Whether this machine is one of a TPU's: libtpu is installed, and a chip or a pod is there."""
    asked = (os.environ.get("JAX_PLATFORMS") or "tpu").split(",")
    signs = (
        "TPU_WORKER_HOSTNAMES" in os.environ,
        *map(os.path.exists, ("/dev/accel0", "/dev/vfio/0")),
    )
    return "tpu" in asked and any(signs) and importlib.util.find_spec("libtpu") is not None


@contextlib.contextmanager
def _quiet(silent: bool) -> Iterator[None]:
    if not silent:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def run(main: Callable[[Sequence[str]], int]) -> None:
    """A console script whose processes end with their code, though others may never end."""
    code: int = shell.FAILED
    try:
        shell.run(main)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else shell.FAILED
        if code in (shell.FINISHED, shell.PREEMPTED):
            raise  # as all of them do
    except BaseException:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # JAX would wait for the others, to end together
    sys.exit(code)
