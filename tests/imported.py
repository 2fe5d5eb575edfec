"""Files in the layout of the real data, imported as tools/import_real.sh does it."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from etils import epath

from mathv2_jax.data import graded, importing
from mathv2_jax.data import store as store_lib

EVALUATION = (
    "problems/proofbench.jsonl",
    "problems/usamo2025.jsonl",
    "graded/deepseek_math_v2.jsonl",
)
Rows = dict[str, list[dict[str, Any]]]
_LOOSE = importing.ImportConfig(max_bad_share=1.0, score_map=graded.ScoreMap(marks=True))


def write(folder: pathlib.Path, rows: Rows) -> epath.Path:
    """The files as JSON lines."""
    for name, items in rows.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return epath.Path(folder)


def store_of(
    files: epath.Path, names: Sequence[str], folder: pathlib.Path, withdraw: Sequence[str] = ()
) -> store_lib.Store:
    """A store of the named files; those that are in `withdraw` give up evaluation problems."""
    store = store_lib.Store(folder)

    def add(chosen: Sequence[str], **how: bool) -> None:
        config = dataclasses.replace(_LOOSE, **how)
        importing.import_files(store, [files / name for name in chosen], config)

    add([name for name in names if name in EVALUATION], evaluation=True)
    add(list(withdraw), withdraw=True)
    add([name for name in names if name not in (*EVALUATION, *withdraw)])
    return store
