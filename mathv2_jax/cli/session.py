"""A session of a command in its folder: nobody else writes there, and signals end it in order."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from absl import flags
from etils import epath

from mathv2_jax import leases
from mathv2_jax.cli import shell
from mathv2_jax.rollout import remote

LEASE_SECONDS = 600.0
_RENEW_SECONDS = 60.0


class Stopped(BaseException):
    """A signal asks the command to stop."""


def ended(program: str, work: Callable[[], int]) -> int:
    """The exit code of a command that engines answer; what went wrong is one line.

    What is a bug keeps its traceback.
    """
    try:
        return work()
    except Stopped:
        print(f"{program}: stopped; the same command goes on from here", file=sys.stderr)
        return shell.PREEMPTED
    except remote.RemoteError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return shell.FAILED
    except (ValueError, FileNotFoundError, ImportError, flags.Error) as error:
        if not shell.is_of_input(error):
            raise
        print(f"{program}: {error}", file=sys.stderr)
        return shell.BAD_INPUT
    except BrokenPipeError:
        raise
    except OSError as error:  # a full disk, a file where a folder should be: no bug of ours
        print(f"{program}: {error}", file=sys.stderr)
        return shell.FAILED


@contextlib.contextmanager
def holding(folder: epath.Path, program: str) -> Iterator[None]:
    """The right to write into a folder, which is made; a thread renews it.

    ValueError names the process that has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lease = leases.Lease(folder / "lease.json", program, LEASE_SECONDS)
    over = threading.Event()

    def keep() -> None:
        while not over.wait(_RENEW_SECONDS):
            try:
                lease.renew()
            except leases.LeaseHeldError as error:
                print(f"{program}: {error}", file=sys.stderr, flush=True)
                signal.raise_signal(signal.SIGTERM)
                return

    with lease:
        thread = threading.Thread(target=keep, name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


@contextlib.contextmanager
def signals_stop() -> Iterator[None]:
    """Within, SIGTERM and Ctrl-C raise Stopped where the command is; a second one ends it."""

    def stop(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Stopped

    numbers = [n for n in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
