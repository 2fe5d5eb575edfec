"""What has been imported, in one folder: records of every kind, and where each comes from.

It is one table (`data/table.py`), so an import counts whole or not at all. Every import is a record
itself, `Import`; the rows that it could not use are `Reject` records, and stand in `rejects.jsonl`
too, for people.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from etils import epath

from mathv2_jax import leases, records, storage
from mathv2_jax.data import table

REJECTS = "rejects.jsonl"
ADJUDICATE = "adjudicate"  # the one setting of an import of ratings
ROW = "row:"  # before a row's own id among a record's parents
_LEASE = "lease.json"
_LEASE_SECONDS = 600


@dataclasses.dataclass(frozen=True, kw_only=True)
class Import:
    """One file, imported with one set of settings. Records that came of it name it as a parent,
    `ID:LINE`.

    `evaluation`: its problems are for evaluation, and nothing that shares a cluster with them is
    learned from. `withdraws`: evaluation problems that share a cluster with it are given up. A file
    of people's ratings has tasks for lines.
    """

    id: str
    file: str
    sha256: str
    settings: str  # JSON
    rows: int
    evaluation: bool = False
    withdraws: bool = False

    @property
    def of_ratings(self) -> bool:
        """Whether the file is one of people's ratings, which were made labels of."""
        return ADJUDICATE in json.loads(self.settings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reject:
    """A row that is not used, or not for what its file is for. `rule` is a word to count by.

    `line` counts from 1; `id` is empty where none was read.
    """

    file: str
    line: int
    id: str
    rule: str
    reason: str


KINDS: Mapping[str, type] = {
    kind.__name__: kind
    for kind in (
        records.Problem,
        records.Proof,
        records.Analysis,
        records.Demonstration,
        Import,
        Reject,
    )
}


def parse(line: str) -> Any:
    """The record of any kind in a line; ValueError where it is none."""
    body = storage.parse_json(line)
    name = body.get("kind", "") if isinstance(body, dict) else ""
    if name not in KINDS:
        raise ValueError(f"a line of kind {name!r:.40}; known are {', '.join(KINDS)}")
    return records.from_json(KINDS[name], line)


class Store:
    """The folder. What is read is what counted when it was opened, or last written to."""

    def __init__(self, folder: epath.PathLike):
        self.folder = epath.Path(folder)
        self._open()

    def _open(self) -> None:
        self.table = table.Table(self.folder, parse)
        self._records: list[Any] | None = None

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """The right to write, for the block; ValueError names another process that has it."""
        new = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        lease = leases.Lease(self.folder / _LEASE, "mathv2-records", _LEASE_SECONDS)
        try:
            with lease:
                self._open()
                yield
        except BaseException:
            if new and not any(self.folder.iterdir()):
                storage.remove_folder(self.folder)
            raise

    def append(self, items: Iterable[Any]) -> int:
        """Adds records, which count all at once; how many. Within `writing`."""
        number = table.write(self.folder, items)
        self._open()
        rejects = [item for item in self if isinstance(item, Reject)]
        storage.write_whole(self.folder / REJECTS, records.to_lines(rejects))
        return number

    def __iter__(self) -> Iterator[Any]:
        """All records, in the order of their imports; they are read once."""
        if self._records is None:
            self._records = list(self.table)
        return iter(self._records)

    def of(self, kind: type[records.T]) -> list[records.T]:
        """All records of a kind."""
        return [item for item in self if isinstance(item, kind)]

    def latest(self) -> list[Any]:
        """Every record once, of the versions of one id that with the better label.

        People's labels come before machines', any before none, later ones before earlier.
        """
        found: dict[tuple[type, str], Any] = {}
        for record in self:
            if isinstance(record, Reject):
                continue
            key = type(record), record.id
            if key not in found or trust(record) >= trust(found[key]):
                found[key] = record
        return list(found.values())

    def marked(self, use: str) -> set[tuple[type, str]]:
        """The records, by kind and id, any version of which came by an import for that use:
        `evaluation` or `withdraws`."""
        imports = self.imports()
        return {
            (type(record), record.id)
            for record in self
            if not isinstance(record, Import | Reject)
            and getattr(imports[import_of(record)[0]], use)
        }

    def imports(self) -> dict[str, Import]:
        """By id."""
        return {found.id: found for found in self.of(Import)}


def trust(record: Any) -> int:
    """How much a record's label counts beside another of the same text."""
    label = getattr(record, "label", None)
    return 0 if label is None else ("auto", "world", "human").index(label.source) + 1


def import_of(record: Any) -> tuple[str, int]:
    """The id of the import that a record came by, and its line there; ("", 0) of any other."""
    for parent in getattr(record, "parents", ()):
        name, colon, line = parent.rpartition(":")
        if colon and line.isdigit():
            return name, int(line)
    return "", 0


def require(folder: epath.Path) -> Store:
    """The store in a folder; ValueError, with the way out, where there is none."""
    if not storage.list_names(folder, "manifest-*.json"):
        raise ValueError(
            f"{folder} holds no imported records: make them with mathv2-records --from=FILE "
            f"--records={folder}"
        )
    return Store(folder)
