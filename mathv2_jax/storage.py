"""Every file of a run: local folders and gs:// alike, through etils.epath.

Durable data are whole, immutable, small files. Nothing is appended in place or locked by the
file system, so the same code runs on an object store. `write_whole` is the one way to write,
`Parts` a growing table of JSON lines. The right to write into a folder is in leases.py.
"""

import dataclasses
import fnmatch
import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from absl import logging
from etils import epath

MANIFEST_SCHEMA = 1
_PART_NAME = re.compile(r"part-(\d{6,})(?:\.(\d{4,}))?\.jsonl")
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


def part_name(step: int, process: int = 0) -> str:
    """The name of a step's part, `part-000012.jsonl`; names sort like steps up to a million.

    Of several processes that write a step, those after the first have their number in it, as in
    `part-000012.0003.jsonl`.
    """
    if step < 0:
        raise ValueError(f"step {step} of a part is negative; steps count from 0")
    return f"part-{step:06d}.{process:04d}.jsonl" if process else f"part-{step:06d}.jsonl"


def part_step(name: str) -> int:
    """The step in a part's name; ValueError for any other name."""
    return _place(name)[0]


def is_shared(name: str) -> bool:
    """Whether a part's step was written by several processes, and not by the first alone."""
    return _place(name)[1] > 0


def _place(name: str) -> tuple[int, int]:
    """Step and process in a part's name: the order of parts."""
    match = _PART_NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is not the name of a part; use storage.part_name(step)")
    return int(match[1]), int(match[2] or 0)


@dataclasses.dataclass(frozen=True)
class Digest:
    """What a part's bytes are known by."""

    size: int
    sha256: str

    @classmethod
    def of(cls, data: bytes) -> "Digest":
        """That of `data`."""
        return cls(len(data), hashlib.sha256(data).hexdigest())


class Parts:
    """A table of JSON lines that grows by a part per step and process.

    A part counts once a manifest names it: `commit` writes the next numbered manifest, the two
    newest are kept. A process killed between any two writes leaves the table as the last commit
    made it; writing the same steps again gives the same bytes. On resuming at a checkpoint call
    `discard_after` with its step before anything else.

    Of several processes one is the `keeper`, which alone writes manifests and deletes. Each writes
    its own parts and is told by `adopt` of the others', and they call all else together.
    """

    def __init__(self, directory: epath.PathLike, *, keeper: bool = True):
        self._directory = epath.Path(directory)
        self._keeper = keeper
        self._number, self._committed = self._newest_manifest()
        self._pending: dict[str, Digest] = {}

    def write_part(self, name: str, data: bytes) -> None:
        """Writes a step's lines; they count from the next `commit` on.

        ValueError where the name is not `part_name(step)`, the last line has no end, or a
        committed part of that name holds other bytes: parts are immutable.
        """
        part_step(name)
        if data and not data.endswith(b"\n"):
            raise ValueError(f"{name}: its last line does not end; end every line with a newline")
        digest = Digest.of(data)
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

        For a table that is a function of what stands elsewhere, and follows it when it changes. The
        keeper writes it.
        """
        name, digest = part_name(1), Digest.of(data)
        if self._committed not in ({}, {name: digest}):
            self.discard_after(0)
        if self._keeper:
            self.write_part(name, data)
        self.adopt({name: digest})
        self.commit(1)

    @property
    def pending(self) -> Mapping[str, Digest]:
        """The parts that were written and do not count yet."""
        return dict(self._pending)

    def adopt(self, written: Mapping[str, Digest]) -> None:
        """Parts that other processes wrote: they count from the next `commit` on."""
        self._pending |= written

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
        for name in list_names(self._directory, "part-*.jsonl") if self._keeper else ():
            if _PART_NAME.fullmatch(name) and part_step(name) > step:
                remove(self._directory / name)

    def names(self) -> list[str]:
        """The parts that count, by step and process."""
        return sorted(self._committed, key=_place)

    def digest(self, name: str) -> Digest:
        """What a part that counts was when it was committed."""
        return self._committed[name]

    def read(self) -> Iterator[str]:
        """The lines of the parts that count, by step, without their ends.

        ValueError names a part that is gone or whose bytes are not those committed.
        """
        for name in self.names():
            yield from self.read_part(name).decode("utf-8").split("\n")[:-1]

    def read_part(self, name: str) -> bytes:
        """The bytes of a part that counts; ValueError as in `read`."""
        path, want = self._directory / name, self._committed[name]
        if not path.exists():
            raise ValueError(f"{path} is missing, though it was committed; restore the file")
        data = read_bytes(path)
        found = Digest.of(data)
        if found != want:
            raise ValueError(
                f"{path} is damaged: {found.size} bytes with sha256 {found.sha256[:16]}, "
                f"committed were {want.size} with {want.sha256[:16]}; restore the file"
            )
        return data

    def _write_manifest(self, upto_step: int) -> None:
        merged = {**self._committed, **self._pending}
        parts = {n: merged[n] for n in sorted(merged, key=_place) if part_step(n) <= upto_step}
        if parts == self._committed and self._number >= 0:
            return
        number = max([self._number, *map(_manifest_number, self._manifests())]) + 1
        body = {
            "schema": MANIFEST_SCHEMA,
            "parts": {name: dataclasses.asdict(digest) for name, digest in parts.items()},
        }
        if self._keeper:
            write_whole(self._directory / f"manifest-{number:06d}.json", seal(body))
            for name in self._manifests():
                if _manifest_number(name) not in (self._number, number):
                    remove(self._directory / name)
        self._number, self._committed = number, parts
        self._pending = {n: d for n, d in self._pending.items() if n not in parts}

    def _newest_manifest(self) -> tuple[int, dict[str, Digest]]:
        complaints = []
        for name in sorted(self._manifests(), key=_manifest_number, reverse=True):
            path = self._directory / name
            try:
                body = unseal(read_bytes(path))
            except FileNotFoundError:  # its keeper has just written the next but one
                return self._newest_manifest()
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
            return _manifest_number(name), {n: Digest(**d) for n, d in body["parts"].items()}
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
