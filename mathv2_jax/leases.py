"""The right of one process to write into a folder, local or gs://, as a file that can expire."""

import dataclasses
import os
import socket
import time
import uuid
from collections.abc import Callable

from absl import logging
from etils import epath

from mathv2_jax import storage


class LeaseHeldError(ValueError):
    """Another process holds the lease."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Holder:
    owner: str
    token: str  # one per acquisition
    host: str
    pid: int
    started: str  # tells a process from a later one with the same pid; "" where unknown
    expires: float  # seconds since the epoch

    def is_dead(self) -> bool:
        """Whether it is known to have ended: only a process of this host can be known so."""
        if self.host != _host():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False  # alive, another user's
        started = _started(self.pid)
        return "" not in (started, self.started) and started != self.started

    def __str__(self) -> str:
        until = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.expires))
        return f"{self.owner} (process {self.pid} on {self.host}) until {until}"


class Lease:
    """The right of one process to write into a folder: a file with an owner and an expiry.

    `with Lease(...)` acquires and releases. The holder calls `renew` more often than every
    `seconds`; it writes only once a third of the time is gone. A lease past its expiry may be
    taken, as may one whose process is known to have ended, which is logged. `now` is the wall
    clock in seconds; `settle_seconds` how long a taker waits to see whether another took it too.
    """

    def __init__(
        self,
        path: epath.PathLike,
        owner: str,
        seconds: float | int,
        *,
        now: Callable[[], float] = time.time,
        settle_seconds: float | int = 0.2,
    ):
        if seconds <= 0:
            raise ValueError(f"a lease of {seconds} seconds is over at once; give a positive time")
        self._path = epath.Path(path)
        self._owner = owner
        self._seconds = seconds
        self._now = now
        self._settle_seconds = settle_seconds
        self._mine: _Holder | None = None

    def acquire(self) -> None:
        """Takes the lease; LeaseHeldError names who holds it and until when."""
        holder = self._holder()
        if holder is not None and self._mine is not None and holder.token == self._mine.token:
            return self.renew()
        if holder is not None and holder.expires > self._now():
            if not holder.is_dead():
                raise self._held(holder)
            logging.warning("%s: taking over from %s, which has ended", self._path, holder)
        elif holder is not None:
            logging.warning("%s: taking over from %s, which is past", self._path, holder)
        mine = _Holder(
            owner=self._owner,
            token=uuid.uuid4().hex,
            host=_host(),
            pid=os.getpid(),
            started=_started(os.getpid()),
            expires=self._now() + self._seconds,
        )
        self._mine = mine
        self._write(mine)
        time.sleep(self._settle_seconds)  # of several takers the last to write has it
        self._require_mine()

    def renew(self) -> None:
        """Keeps the lease for `seconds` from now; LeaseHeldError where another has taken it."""
        mine = self._require_mine()
        if mine.expires - self._now() > self._seconds * 2 / 3:
            return
        self._mine = dataclasses.replace(mine, expires=self._now() + self._seconds)
        self._write(self._mine)

    def release(self) -> None:
        """Gives the lease back; one that another has taken, or that is not held, is left."""
        holder = self._holder()
        if self._mine is not None and holder is not None and holder.token == self._mine.token:
            storage.remove(self._path)
        self._mine = None

    def __enter__(self) -> "Lease":
        self.acquire()
        return self

    def __exit__(self, *unused: object) -> None:
        self.release()

    def _require_mine(self) -> _Holder:
        if self._mine is None:
            raise ValueError(f"the lease {self._path} is not held; acquire it first")
        holder = self._holder()
        if holder is None or holder.token != self._mine.token:
            self._mine = None
            raise self._held(holder)
        return self._mine

    def _held(self, holder: _Holder | None) -> LeaseHeldError:
        if holder is None:
            return LeaseHeldError(f"the lease {self._path} was deleted under {self._owner}")
        return LeaseHeldError(
            f"the lease {self._path} is held by {holder}; wait, stop that process, or use "
            "another folder"
        )

    def _holder(self) -> _Holder | None:
        try:
            data = storage.read_bytes(self._path)
        except FileNotFoundError:
            return None
        try:
            return _Holder(**storage.unseal(data))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"the lease {self._path} cannot be read ({error}); delete it once no other "
                "process writes here"
            ) from error

    def _write(self, mine: _Holder) -> None:
        storage.write_whole(self._path, storage.seal(dataclasses.asdict(mine)))


def _host() -> str:
    """This host and its process table: equal names in two containers are two hosts."""
    try:
        table = str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:
        table = ""
    return f"{socket.gethostname()}/{table}"


def _started(pid: int) -> str:
    """When the system started `pid`, in its own unit; "" where that cannot be told."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[19]
    except OSError:
        return ""
