"""What a folder of records holds: counts, scores, lengths and duplicates, by source."""

import collections
import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath

from mathv2_jax import records, storage
from mathv2_jax.data import clusters as clusters_lib
from mathv2_jax.data import store as store_lib
from mathv2_jax.text import tokenizer as tokenizer_lib
from mathv2_jax.text import tokenizer_files

_NEAR_PROOF = 0.9  # of the shorter one's shingles: two proofs that are nearly the same
CHARACTERS, TOKENS = "characters", "tokens"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """Records of one kind and source. `scores` counts labels by their score, `None` none.

    `lengths` are of what is theirs: a statement, a proof, an analysis. `shared` are records whose
    problem another source has too, `near` proofs that are nearly those of an earlier record.
    """

    kind: str
    source: str
    evaluation: bool
    scores: collections.Counter[float | None]
    lengths: list[int]
    clusters: int
    shared: int
    near: int
    left_out: collections.Counter[str]


@dataclasses.dataclass(frozen=True)
class Found:
    """All rows, and what lengths count."""

    rows: list[Row]
    unit: str


def counter(tokenizer: str | None) -> tuple[str, Callable[[str], int]]:
    """What lengths count, and how: tokens of a tokenizer's folder or .model, else characters."""
    if not tokenizer:
        return CHARACTERS, len
    path = epath.Path(tokenizer)
    loaded = (
        tokenizer_files.load(path)
        if path.is_dir()
        else tokenizer_lib.SentencePieceTokenizer.from_bytes(storage.read_bytes(path))
    )
    return TOKENS, lambda text: len(loaded.encode_text(text))


def of(store: store_lib.Store, counting: tuple[str, Callable[[str], int]]) -> Found:
    """The rows, by kind and source; rows left out count for the source of their file's records."""
    unit, length = counting
    imports, latest = store.imports(), store.latest()
    statements = clusters_lib.Clusters(0.8)
    proofs = clusters_lib.Clusters(_NEAR_PROOF)
    groups: dict[tuple[str, str, bool], list[Any]] = collections.defaultdict(list)
    cluster_of: dict[str, str] = {}
    sources: dict[str, set[str]] = collections.defaultdict(set)
    source_of_file: dict[str, tuple[str, str, bool]] = {}
    for record in latest:
        if isinstance(record, store_lib.Import | records.Demonstration):
            continue
        came_by = imports[store_lib.import_of(record)[0]]
        key = type(record).__name__, record.source, came_by.evaluation
        groups[key].append(record)
        source_of_file.setdefault(came_by.file, key)
        cluster = statements.of(record.statement)
        cluster_of[record.id] = cluster
        sources[cluster].add(record.source)
    left_out: dict[tuple[str, str, bool], collections.Counter[str]] = collections.defaultdict(
        collections.Counter
    )
    for reject in store.of(store_lib.Reject):
        key = source_of_file.get(reject.file, ("Reject", os.path.basename(reject.file), False))
        left_out[key][reject.rule] += 1
    rows = []
    for key in sorted({*groups, *left_out}):
        kind, source, evaluation = key
        found = groups.get(key, [])
        near = 0
        for record in found:
            if isinstance(record, records.Proof):
                text = f"{cluster_of[record.id]} {record.text}"
                own = records.content_id("cluster", clusters_lib.normalise(text) or text)
                near += proofs.of(text) != own
        rows.append(
            Row(
                kind=kind,
                source=source,
                evaluation=evaluation,
                scores=collections.Counter(map(_score, found)),
                lengths=[length(_text(record)) for record in found],
                clusters=len({cluster_of[r.id] for r in found}),
                shared=sum(len(sources[cluster_of[r.id]]) > 1 for r in found),
                near=near,
                left_out=left_out[key],
            )
        )
    return Found(rows, unit)


def _score(record: Any) -> float | None:
    label = getattr(record, "label", None)
    return None if label is None else label.score


def _text(record: Any) -> str:
    return record.statement if isinstance(record, records.Problem) else record.text


def _quantiles(lengths: Sequence[int]) -> list[int]:
    return [round(float(x)) for x in np.quantile(lengths, (0.5, 0.95, 1.0))] if lengths else []


def table(found: Found) -> str:
    """Columns for people."""
    head = [
        *("kind", "source", "records", "0", "0.5", "1", "no label"),
        *(f"median {found.unit}", "p95", "longest", "clusters", "shared", "near", "left out"),
    ]
    lines = [head]
    for row in found.rows:
        quantiles = [f"{x:,}" for x in _quantiles(row.lengths)] or ["", "", ""]
        left_out = ", ".join(f"{n} {rule}" for rule, n in sorted(row.left_out.items()))
        lines.append(
            [
                row.kind.lower() + (" (evaluation)" if row.evaluation else ""),
                row.source,
                f"{sum(row.scores.values()):,}",
                *(f"{row.scores[score] or ''}" for score in (*records.SCORES, None)),
                *quantiles,
                *(f"{x:,}" for x in (row.clusters, row.shared, row.near)),
                left_out,
            ]
        )
    widths = [max(len(line[at]) for line in lines) for at in range(len(head))]
    text = [
        "  ".join(
            cell.ljust(width) if at in (0, 1, len(head) - 1) else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join(text)


def to_json(found: Found) -> bytes:
    """The figures of the table."""
    rows = []
    for row in found.rows:
        names = ("median", "p95", "longest")
        body = {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
        body["lengths"] = dict(zip(names, _quantiles(row.lengths), strict=False))
        body["scores"] = {"none" if s is None else f"{s:g}": n for s, n in row.scores.items()}
        rows.append(body | {"left_out": dict(row.left_out)})
    return (json.dumps({"unit": found.unit, "rows": rows}, indent=1) + "\n").encode()


def draw(found: Found, path: epath.Path) -> None:
    """Lengths and scores by source, as a .png; ValueError without matplotlib."""
    try:
        from matplotlib import figure  # pyright: ignore[reportMissingImports] - an extra
    except ImportError as error:
        raise ValueError(
            '--figure needs matplotlib: pip install -e ".[experiments]", or leave it out'
        ) from error
    rows = [row for row in found.rows if row.lengths]
    names = [
        f"{row.source}, {row.kind.lower()}{' (evaluation)' if row.evaluation else ''}"
        for row in rows
    ]
    made = figure.Figure(figsize=(11, 1.5 + 0.35 * len(rows)), layout="constrained")
    lengths, scores = made.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    lengths.boxplot(
        [row.lengths for row in rows], orientation="horizontal", whis=(5, 95), showfliers=False
    )
    lengths.set_xscale("log")
    lengths.set_xlabel(f"{found.unit} (box: quartiles, whiskers: 5 to 95 %)")
    lengths.set_yticks(range(1, len(rows) + 1), names)
    lengths.invert_yaxis()
    left = np.zeros(len(rows))
    for score, colour in zip((*records.SCORES, None), _COLOURS, strict=True):
        share = np.array([row.scores[score] / sum(row.scores.values()) for row in rows])
        name = "no label" if score is None else f"score {score:g}"
        scores.barh(range(1, len(rows) + 1), share, left=left, color=colour, label=name)
        left += share
    for place, row in enumerate(rows, start=1):
        scores.text(1.01, place, f"{sum(row.scores.values()):,}", va="center")
    scores.set_xlabel("share of the records, and how many they are")
    scores.set_xlim(0, 1.15)
    made.legend(loc="outside upper right", ncols=4)
    made.savefig(path, dpi=120)


_COLOURS = ("#b2413b", "#d9a441", "#4b8b5a", "#b8b8b8")
