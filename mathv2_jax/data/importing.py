"""Files of others into a store: every row becomes records, or a reject that says why.

Texts are met once: the same proof again is a duplicate, with another score a conflict. Statements
that read nearly the same share a cluster, and nothing in the cluster of an evaluation problem is
taken for training (`data/clusters.py`). Where too many rows are bad, nothing is written.
"""

import collections
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from mathv2_jax import records, storage
from mathv2_jax.data import clusters as clusters_lib
from mathv2_jax.data import graded, raw_files
from mathv2_jax.data import store as store_lib

BAD = ("malformed", "too-long", "duplicate-id", "conflicting-label")
KINDS = ("auto", "problem", "proof", "analysis")
FIELDS = (
    *("id", "source", "scale", "rater", "problem", "proof", "model", "score", "human_score"),
    *("human_max", "analysis", "analyst", "issues", "verdict", "human_agrees_with_analyst"),
    *("human_comments", "answer", "reference_solution", "grading_guidelines", "false_variant"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """How rows become records.

    `fields` maps names of ours to columns of the files. `kind` auto: a row with an analysis is one,
    else one with a proof, else a problem. `source` names the source of rows that do not; without
    either it is the file's name. `scale` names how their labels were made. `evaluation` and
    `withdraw` are Import's. `near` is the share of a statement that makes two of them one cluster.
    """

    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    kind: str = "auto"
    source: str = ""
    scale: str = ""
    score_map: graded.ScoreMap | None = None
    evaluation: bool = False
    withdraw: bool = False
    max_bad_share: float = 0.05
    max_text_bytes: int = 1_000_000
    near: float = 0.8

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"--kind={self.kind}: one of {', '.join(KINDS)}")
        if not 0.0 <= self.max_bad_share <= 1.0:
            raise ValueError(f"--max_bad_share={self.max_bad_share}: must lie in 0..1")
        if self.max_text_bytes < 1:
            raise ValueError(f"--max_text_bytes={self.max_text_bytes}: must be at least 1")
        if not 0.5 <= self.near <= 1.0:
            raise ValueError(f"--near={self.near}: must lie in 0.5..1")
        if self.evaluation and self.withdraw:
            raise ValueError("--evaluation and --withdraw exclude each other")

    def settings(self) -> str:
        """What records are made by, as a line of JSON."""
        body = dataclasses.asdict(self)
        del body["max_bad_share"]  # whether they are made, not how
        return json.dumps(body, sort_keys=True)

    def require_none_of_rows(self, kind: str) -> None:
        """ValueError where settings speak of rows of others, and the row is a record of ours."""
        given = [n for n in ("score_map", "fields") if getattr(self, n)]
        if given or self.kind not in ("auto", kind.lower()):
            raise ValueError(
                f"a record of ours, a {kind}, which says itself what it is: import it without "
                f"--{given[0] if given else 'kind'}"
            )


@dataclasses.dataclass
class Report:
    """What came of a command: rows, records by kind, and the rows that were left out."""

    rows: int = 0
    own: int = 0  # records of ours among them
    marked: int = 0  # that were there, and are for evaluation, or given up by it, from now on
    kept: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    rejects: list[store_lib.Reject] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def num_bad(self) -> int:
        """Rows with a fault of their own: duplicates and evaluation problems have none."""
        return sum(reject.rule in BAD for reject in self.rejects)


class TooManyBadError(ValueError):
    """More rows are bad than may be; nothing was written."""


class Importer:
    """What a store holds, by text, id and cluster, and rows on their way into it."""

    def __init__(self, store: store_lib.Store, config: ImportConfig):
        self._config = config
        self._imports = store.imports()
        self._clusters = clusters_lib.Clusters(config.near)
        self._known: dict[str, tuple[str, Any]] = {}  # where, and itself, by id
        # Where, and the text's id; by kind, source and the row's id.
        self._rows: dict[tuple[type, str, str], tuple[str, str]] = {}
        # By the names of clusters when they were noted: `_guard` has them by those of now.
        self._evaluated: dict[str, str] = {}  # where
        self._withdrawn: set[str] = set()
        self._trained: collections.Counter[str] = collections.Counter()
        self._guard: tuple[tuple[int, ...], dict[str, str]] = ((), {})
        self._marked: set[tuple[str, str]] = set()  # (use, id): see _uses
        self.made: list[Any] = []
        self.report = Report()
        for record in store:
            if not isinstance(record, store_lib.Import | store_lib.Reject):
                number, line = store_lib.import_of(record)
                came_by = self._imports[number]
                self._note(record, came_by, f"{came_by.file}, line {line}")

    def read(self, path: epath.Path) -> None:
        """Every row of a file; one that was imported with the same settings is left out."""
        raws = raw_files.read(path)
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist")
        settings, data = self._config.settings(), storage.read_bytes(path)
        digest = hashlib.sha256(data).hexdigest()
        # After a withdrawal rows are taken that were refused before.
        given_up = sorted(i.id for i in self._imports.values() if i.withdraws)
        number = records.content_id("import", digest, settings, *given_up)
        if number in self._imports:
            self.report.notes.append(f"{path} was imported before, with the same settings")
            return
        came_by = store_lib.Import(
            id=number,
            file=os.fspath(path),
            sha256=digest,
            settings=settings,
            rows=0,
            evaluation=self._config.evaluation,
            withdraws=self._config.withdraw,
        )
        self._imports[number] = came_by
        rows, at, columns = 0, len(self.made), set[str]()
        for raw in raws:
            rows += 1
            columns.update(raw.fields)
            self._row(raw, came_by)
        for ours, theirs in self._config.fields.items():
            if rows and theirs not in columns:
                raise ValueError(
                    f"--field={ours}={theirs}: no row of {path} has a column {theirs!r}; there are "
                    f"{', '.join(sorted(columns))}"
                )
        self.made.insert(at, dataclasses.replace(came_by, rows=rows))
        self.report.rows += rows

    def _row(self, raw: raw_files.Raw, came_by: store_lib.Import) -> None:
        config = self._config
        fields = dict(raw.fields)
        fields |= {ours: raw.fields.get(theirs) for ours, theirs in config.fields.items()}
        row = graded.Row(
            file=came_by.file, line=raw.line, fields=fields, most=config.max_text_bytes
        )
        try:
            if raw.fault:
                raise ValueError(raw.fault)
            own = [f"{store_lib.ROW}{row.id}"] if row.id else []
            made = self._records(row, (f"{came_by.id}:{row.line}", *own))
        except graded.TooLongError as error:
            self._reject(row, "too-long", str(error))
            return
        except ValueError as error:
            self._reject(row, "malformed", str(error))
            return
        self._take(row, made, came_by)

    def _records(self, row: graded.Row, parents: tuple[str, ...]) -> list[Any]:
        config, fields = self._config, row.fields
        named = fields.get("kind")
        if isinstance(named, str) and named in _OURS and "schema" in fields:
            config.require_none_of_rows(named)
            self.report.own += 1
            return [_ours(row, parents)]
        kind = config.kind
        if kind == "auto":
            kind = next((k for k in ("analysis", "proof") if fields.get(k) is not None), "problem")
            if kind == "problem" and any(fields.get(n) is not None for n in _GRADES):
                raise ValueError(
                    "it has a score, and no proof or analysis that it could be of: name the column "
                    "with --field=proof=COLUMN, or say --kind=problem"
                )
        source = config.source or row.optional_text("source") or _stem(row.file)
        if kind == "problem":
            cluster = self._clusters.of(row.text("problem"))
            return graded.problems_of(row, source, cluster, parents)
        if kind == "analysis":
            return graded.analysis_of(row, source, config, parents)
        label = graded.label_of(row, source, config)
        return [graded.proof_of(row, source, label, parents)]

    def _take(self, row: graded.Row, made: list[Any], came_by: store_lib.Import) -> None:
        """Into the store, unless something there says otherwise."""
        first, where = made[0], f"{row.file}, line {row.line}"
        cluster = self._clusters.of(first.statement)
        held = self._held_back(cluster)
        if held is not None and not (came_by.evaluation or came_by.withdraws):
            reason = f"its problem reads as that of {held}, kept for evaluation"
            self._reject(row, "evaluation", reason)
            return
        if row.id:
            key, text = (type(first), first.source, row.id), first.id
            before, held = self._rows.setdefault(key, (where, text))
            if held != text:
                self._reject(row, "duplicate-id", f"id {row.id!r} is that of {before}, another row")
                return
        kept = 0
        for record in made:
            fault = self._fault(record)
            if fault is None:
                kept += 1
                self._keep(record, came_by, where)
                self.report.kept[type(record).__name__] += 1
                continue
            if self._marks(record, came_by):
                # Another version, which says for what the text is, and takes no label's place.
                self._keep(_unlabelled(record), came_by, where)
                self.report.marked += 1
                kept += 1
            if fault[0] != "duplicate":
                self._reject(row, *fault)
        if not kept and (fault := self._fault(first)) is not None and fault[0] == "duplicate":
            self._reject(row, *fault)

    def _keep(self, record: Any, came_by: store_lib.Import, where: str) -> None:
        self._note(record, came_by, where)
        self.made.append(record)

    def _marks(self, record: Any, came_by: store_lib.Import) -> bool:
        """Whether the import says of a text that is there what none before it has said: that it is
        for evaluation, or that evaluation gives it up."""
        return any((use, record.id) not in self._marked for use in _uses(came_by))

    def _fault(self, record: Any) -> tuple[str, str] | None:
        """Why a record is not taken, a rule and a reason; None where it is.

        A text that was met before is taken where its label now takes the place of the old one.
        Otherwise the labels tell a duplicate from a conflict.
        """
        label = getattr(record, "label", None)
        if isinstance(record, records.Proof) and label is not None and label.score > 0.0:
            _, problem = self._known.get(record.problem_id, ("", None))
            if getattr(problem, "false_variant_of", None):
                reason = "its statement is a false variant, of which no proof is more than a 0"
                return "conflicting-label", reason
        if record.id not in self._known:
            return None
        where, old = self._known[record.id]
        if _texts(old) != _texts(record):
            return "duplicate-id", f"id {record.id!r} is that of {where}, another text"
        if store_lib.trust(record) > store_lib.trust(old):
            return None
        before = getattr(old, "label", None)
        if before is None or label is None or before.score == label.score:
            return "duplicate", f"the same text as {where}"
        reason = (
            f"the same text as {where}, which is a {before.score:g} ({before.scale}); here it is a "
            f"{label.score:g} ({label.scale})"
        )
        return "conflicting-label", reason

    def _reject(self, row: graded.Row, rule: str, reason: str) -> None:
        reject = row.reject(rule, reason)
        self.report.rejects.append(reject)
        self.made.append(reject)

    def _held_back(self, cluster: str) -> str | None:
        """Where the evaluation problem stands whose cluster this is; None where there is none that
        was not given up."""
        state = (self._clusters.joined, len(self._evaluated), len(self._withdrawn))
        if self._guard[0] != state:
            current = self._clusters.current
            given_up = {current(name) for name in self._withdrawn}
            held: dict[str, str] = {}
            for name, where in self._evaluated.items():
                if current(name) not in given_up:
                    held.setdefault(current(name), where)
            self._guard = state, held
        return self._guard[1].get(self._clusters.current(cluster))

    def _note(self, record: Any, came_by: store_lib.Import, where: str) -> None:
        if record.id not in self._known or store_lib.trust(record) >= store_lib.trust(
            self._known[record.id][1]
        ):
            self._known[record.id] = where, record
        row = next((p for p in record.parents if p.startswith(store_lib.ROW)), "")
        if row and not getattr(record, "false_variant_of", None):
            key = type(record), record.source, row.removeprefix(store_lib.ROW)
            self._rows.setdefault(key, (where, record.id))
        self._marked |= {(use, record.id) for use in _uses(came_by)}
        cluster = self._clusters.of(record.statement)
        if came_by.evaluation:
            self._evaluated.setdefault(cluster, where)
        elif came_by.withdraws:
            self._withdrawn.add(cluster)
        if not came_by.evaluation:
            self._trained[cluster] += 1

    def contaminated(self) -> int:
        """Training records whose problem is one of evaluation: a run leaves them out."""
        return sum(n for cluster, n in self._trained.items() if self._held_back(cluster))


_OURS = {kind.__name__: kind for kind in (records.Problem, records.Proof, records.Analysis)}


def _ours(row: graded.Row, parents: tuple[str, ...]) -> Any:
    """A record that this program wrote, as it is, with the import among its parents."""
    for name in ("statement", "text", "proof"):
        if name in row.fields:
            row.text(name)
    try:
        line = json.dumps(row.fields)
    except TypeError as error:  # a Parquet file has more types than JSON
        raise ValueError(f"a field of another type than JSON's: {error}") from error
    record = records.from_json(_OURS[row.fields["kind"]], line)
    given = [p for p in record.parents if not _IMPORT.fullmatch(p)]
    return dataclasses.replace(record, parents=(parents[0], *given))


_IMPORT = re.compile(r"[0-9a-f]{16}:\d+")
_GRADES = ("score", "human_score")


def _uses(came_by: store_lib.Import) -> list[str]:
    """What an import says of its texts."""
    return [use for use in ("evaluation", "withdraws") if getattr(came_by, use)]


def _texts(record: Any) -> tuple[str, ...]:
    """What makes a record what it is."""
    names = ("statement", "proof", "text")
    return tuple(getattr(record, name) for name in names if hasattr(record, name))


def _unlabelled(record: Any) -> Any:
    return dataclasses.replace(record, label=None) if hasattr(record, "label") else record


def _stem(file: str) -> str:
    return os.path.basename(file).partition(".")[0]


def import_files(
    store: store_lib.Store, paths: Sequence[epath.Path], config: ImportConfig
) -> Report:
    """All files at once, or none of them: TooManyBadError where too large a share of rows is bad.

    ValueError and FileNotFoundError name a file that cannot be read.
    """
    with store.writing():
        importer = Importer(store, config)
        for path in paths:
            importer.read(path)
        report = importer.report
        if report.num_bad > config.max_bad_share * report.rows:
            raise TooManyBadError(
                f"{report.num_bad} of {report.rows} rows are bad, and --max_bad_share is "
                f"{config.max_bad_share:g}; nothing was imported. By file and rule:\n"
                f"{describe(report.rejects)}"
            )
        store.append(importer.made)
        if report.own and (config.source or config.scale):
            report.notes.append(f"{report.own} records of ours keep their own source and scale")
        if report.marked:
            use = "for evaluation" if config.evaluation else "withdrawn from evaluation"
            report.notes.append(f"{report.marked} records that were there are {use} from now on")
        found = importer.contaminated()
        if found:
            report.notes.append(
                f"{found} records for training are about problems that are kept for evaluation: "
                "runs leave them out"
            )
        return report


def import_labels(
    store: store_lib.Store, path: epath.Path, rule: str, made: Sequence[tuple[int, Any]]
) -> None:
    """Labelled versions of a store's records, which came from people's ratings in a file.

    `rule` is the one by which they were decided; each record has the place of its task in the file
    beside it, from 1. The same file may come again, with other labels by another rule.
    """
    digest = hashlib.sha256(storage.read_bytes(path)).hexdigest()
    settings = json.dumps({store_lib.ADJUDICATE: rule})
    with store.writing():
        before = sum(came_by.sha256 == digest for came_by in store.imports().values())
        came_by = store_lib.Import(
            id=records.content_id("import", digest, settings, str(before)),
            file=os.fspath(path),
            sha256=digest,
            settings=settings,
            rows=len(made),
        )
        traced = [
            dataclasses.replace(record, parents=(*record.parents, f"{came_by.id}:{place}"))
            for place, record in made
        ]
        store.append([came_by, *traced])


def describe(rejects: Sequence[store_lib.Reject]) -> str:
    """How many rows each rule left out of each file, with one example of a reason."""
    counted: dict[tuple[str, str], list[store_lib.Reject]] = {}
    for reject in rejects:
        counted.setdefault((reject.file, reject.rule), []).append(reject)
    return "\n".join(
        f"{file}: {len(found)} {rule} (line {found[0].line}: {found[0].reason:.160})"
        for (file, rule), found in sorted(counted.items())
    )
