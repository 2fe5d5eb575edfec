"""Every file of a run: local folders and gs:// alike, through etils.epath.

Durable data are whole, immutable, small files. Nothing is appended in place or locked by the
file system, so the same code runs on an object store. `write_whole` is the one way to write,
`Parts` a growing table of JSON lines, `Lease` the right to write into a folder.
"""

import dataclasses
import fnmatch
import hashlib
import json
import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from absl import logging
from etils import epath

MANIFEST_SCHEMA = 1
_PART_NAME = re.compile(r"part-(\d{6,})\.jsonl")
_MANIFEST_NAME = re.compile(r"manifest-(\d{6,})\.json")


def is_local(path: epath.PathLike) -> bool:
    """Whether `path` lies in this machine's file system."""
    return "://" not in os.fspath(path)


def parse_json(data: bytes | str) -> Any:
    """What JSON says; ValueError for whatever is wrong with it, absurdly deep nesting included."""
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def write_whole(path: epath.PathLike, data: bytes) -> None:
    """Puts `data` at `path`, making its folder; a reader finds all of it, or what was before.

    Locally the file and its folder are synced to disk; elsewhere it is one put.
    """
    target = epath.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if not is_local(target):
        target.write_bytes(data)
        return
    draft = os.fspath(target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.draft")
    try:
        _write_synced(draft, data)
        os.replace(draft, target)
    except OSError:
        if os.path.exists(draft):
            os.remove(draft)
        raise
    sync_folder(target.parent)


def _write_synced(path: str, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: epath.PathLike) -> None:
    """Makes the names in a local folder durable."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_bytes(path: epath.PathLike) -> bytes:
    """The whole file; FileNotFoundError names it where there is none."""
    return epath.Path(path).read_bytes()


def exists(path: epath.PathLike) -> bool:
    """Whether a file or folder is there."""
    return epath.Path(path).exists()


def remove(path: epath.PathLike) -> None:
    """Deletes a file; one that is gone already is no error."""
    epath.Path(path).unlink(missing_ok=True)


def remove_folder(path: epath.PathLike) -> None:
    """Deletes a folder with all that is in it; one that is gone already is no error."""
    epath.Path(path).rmtree(missing_ok=True)


def list_names(directory: epath.PathLike, pattern: str = "*") -> list[str]:
    """Sorted names in `directory` that match the glob `pattern`, without hidden ones and drafts.

    A folder that does not exist has no names.
    """
    folder = epath.Path(directory)
    if not folder.exists():
        return []
    names = (path.name for path in folder.iterdir())
    return sorted(n for n in names if fnmatch.fnmatchcase(n, pattern) and not n.startswith("."))


def part_name(step: int) -> str:
    """The name of a step's part, `part-000012.jsonl`; names sort like steps up to a million."""
    if step < 0:
        raise ValueError(f"step {step} of a part is negative; steps count from 0")
    return f"part-{step:06d}.jsonl"


def part_step(name: str) -> int:
    """The step in a part's name; ValueError for any other name."""
    match = _PART_NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is not the name of a part; use storage.part_name(step)")
    return int(match[1])


@dataclasses.dataclass(frozen=True)
class _Digest:
    size: int
    sha256: str

    @classmethod
    def of(cls, data: bytes) -> "_Digest":
        return cls(len(data), hashlib.sha256(data).hexdigest())


class Parts:
    """A table of JSON lines that grows by a part per step, written by one process.

    A part counts once a manifest names it: `commit` writes the next numbered manifest, the two
    newest are kept. A process killed between any two writes leaves the table as the last commit
    made it; writing the same steps again gives the same bytes. On resuming at a checkpoint call
    `discard_after` with its step before anything else.
    """

    def __init__(self, directory: epath.PathLike):
        self._directory = epath.Path(directory)
        self._number, self._committed = self._newest_manifest()
        self._pending: dict[str, _Digest] = {}

    def write_part(self, name: str, data: bytes) -> None:
        """Writes a step's lines; they count from the next `commit` on.

        ValueError where the name is not `part_name(step)`, the last line has no end, or a
        committed part of that name holds other bytes: parts are immutable.
        """
        part_step(name)
        if data and not data.endswith(b"\n"):
            raise ValueError(f"{name}: its last line does not end; end every line with a newline")
        digest = _Digest.of(data)
        before = self._committed.get(name)
        if before is not None and before != digest:
            raise ValueError(
                f"{self._directory / name} is committed with other bytes; call discard_after with "
                "the step to resume from before writing its successors again"
            )
        write_whole(self._directory / name, data)
        self._pending[name] = digest

    def write_only(self, data: bytes) -> None:
        """Makes `data` the whole table, as the part of step 1, in place of what counted before.

        For a table that is a function of what stands elsewhere, and follows it when it changes.
        """
        name = part_name(1)
        if self._committed not in ({}, {name: _Digest.of(data)}):
            self.discard_after(0)
        self.write_part(name, data)
        self.commit(1)

    def commit(self, upto_step: int) -> None:
        """Makes every part written so far with a step <= `upto_step` count, at once.

        ValueError where parts beyond `upto_step` count already.
        """
        beyond = [name for name in self._committed if part_step(name) > upto_step]
        if beyond:
            raise ValueError(
                f"commit up to step {upto_step} in {self._directory}, but {max(beyond)} counts "
                "already; call discard_after first to go back"
            )
        self._write_manifest(upto_step)

    def discard_after(self, step: int) -> None:
        """Forgets every part beyond `step`; parts written up to it count from now on."""
        self._write_manifest(step)
        for name in [n for n in self._pending if part_step(n) > step]:
            del self._pending[name]
        for name in list_names(self._directory, "part-*.jsonl"):
            if _PART_NAME.fullmatch(name) and part_step(name) > step:
                remove(self._directory / name)

    def names(self) -> list[str]:
        """The parts that count, by step."""
        return sorted(self._committed, key=part_step)

    def read(self) -> Iterator[str]:
        """The lines of the parts that count, by step, without their ends.

        ValueError names a part that is gone or whose bytes are not those committed.
        """
        for name in self.names():
            path = self._directory / name
            want = self._committed[name]
            if not path.exists():
                raise ValueError(f"{path} is missing, though it was committed; restore the file")
            data = read_bytes(path)
            found = _Digest.of(data)
            if found != want:
                raise ValueError(
                    f"{path} is damaged: {found.size} bytes with sha256 {found.sha256[:16]}, "
                    f"committed were {want.size} with {want.sha256[:16]}; restore the file"
                )
            yield from data.decode("utf-8").split("\n")[:-1]

    def _write_manifest(self, upto_step: int) -> None:
        merged = {**self._committed, **self._pending}
        parts = {n: merged[n] for n in sorted(merged, key=part_step) if part_step(n) <= upto_step}
        if parts == self._committed and self._number >= 0:
            return
        number = max([self._number, *map(_manifest_number, self._manifests())]) + 1
        body = {
            "schema": MANIFEST_SCHEMA,
            "parts": {name: dataclasses.asdict(digest) for name, digest in parts.items()},
        }
        write_whole(self._directory / f"manifest-{number:06d}.json", seal(body))
        for name in self._manifests():
            if _manifest_number(name) not in (self._number, number):
                remove(self._directory / name)
        self._number, self._committed = number, parts
        self._pending = {n: d for n, d in self._pending.items() if n not in parts}

    def _newest_manifest(self) -> tuple[int, dict[str, _Digest]]:
        complaints = []
        for name in sorted(self._manifests(), key=_manifest_number, reverse=True):
            path = self._directory / name
            try:
                body = unseal(read_bytes(path))
            except ValueError as error:
                complaints.append(f"{path} is damaged ({error})")
                continue
            if body.get("schema") != MANIFEST_SCHEMA:
                raise ValueError(
                    f"{path} has schema {body.get('schema')!r}; this program reads "
                    f"{MANIFEST_SCHEMA}: use the program that wrote it"
                )
            for complaint in complaints:
                logging.warning("%s; falling back to %s", complaint, name)
            return _manifest_number(name), {n: _Digest(**d) for n, d in body["parts"].items()}
        if complaints:
            raise ValueError(f"no readable manifest in {self._directory}: {'; '.join(complaints)}")
        return -1, {}

    def _manifests(self) -> list[str]:
        names = list_names(self._directory, "manifest-*.json")
        return [name for name in names if _MANIFEST_NAME.fullmatch(name)]


def _manifest_number(name: str) -> int:
    match = _MANIFEST_NAME.fullmatch(name)
    assert match is not None, name
    return int(match[1])


def seal(body: Mapping[str, Any]) -> bytes:
    """`body` as JSON with its own sha256 inside, for `unseal`; the same body, the same bytes."""
    text = json.dumps(body, sort_keys=True, allow_nan=False)
    return json.dumps(
        {"body": body, "sha256": hashlib.sha256(text.encode()).hexdigest()},
        sort_keys=True,
        allow_nan=False,
    ).encode()


def unseal(data: bytes) -> dict[str, Any]:
    """The body that was sealed; ValueError says how the bytes differ from what was written."""
    try:
        sealed = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{len(data)} bytes that are no JSON: {error}") from error
    if not isinstance(sealed, dict) or set(sealed) != {"body", "sha256"}:
        raise ValueError("JSON without a body and its sha256")
    text = json.dumps(sealed["body"], sort_keys=True)
    if hashlib.sha256(text.encode()).hexdigest() != sealed["sha256"]:
        raise ValueError("its sha256 is not that of its body")
    return sealed["body"]


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
            remove(self._path)
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
            data = read_bytes(self._path)
        except FileNotFoundError:
            return None
        try:
            return _Holder(**unseal(data))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"the lease {self._path} cannot be read ({error}); delete it once no other "
                "process writes here"
            ) from error

    def _write(self, mine: _Holder) -> None:
        write_whole(self._path, seal(dataclasses.asdict(mine)))


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
