"""A run's folder as a folder of files that a browser opens from disk."""

import dataclasses
import html
import importlib.resources
from collections.abc import Iterator, Mapping
from importlib.resources.abc import Traversable
from typing import Any

from etils import epath

from mathv2_jax import storage
from mathv2_jax.data import lineage
from mathv2_jax.report import cases, curves, scripts, tables

_ASSETS = importlib.resources.files("mathv2_jax.report") / "assets"
_PAGE = "index.html"
_TITLE = "TITLE_OF_THE_RUN"  # stands in the page where the name comes


@dataclasses.dataclass(frozen=True)
class Written:
    """What a site shows."""

    problems: int
    proofs: int
    remarks: int
    stages: int
    page: epath.Path


def write(workdir: epath.Path, out: epath.Path) -> Written:
    """Writes the site of a training or a search run; the same records give the same bytes.

    A site that is there is replaced: texts first and the page's index after them, so that a page
    that is open meanwhile is of one state or the other. ValueError or FileNotFoundError names what
    is missing or damaged.
    """
    items = _read(workdir)
    training, search = curves.of_training(workdir), curves.of_search(workdir, items)
    if not items and not training:
        raise ValueError(
            f"--workdir={workdir} holds neither records nor metrics: give the folder of a run of "
            "mathv2-train or mathv2-search"
        )
    chapters = cases.gather(items, [stage.name for stage in training])
    made = tables.make(chapters)
    name = workdir.name or str(workdir)
    for path, data in _assets():
        storage.write_whole(out / "assets" / path, data)
    for chunk, data in made.chunks.items():
        storage.write_whole(out / "data" / f"{chunk}.js", data)
    drawn = {
        "training": [_drawn(each) for each in training],
        "search": None if search is None else _drawn(search),
    }
    storage.write_whole(out / "data" / "curves.js", scripts.script("curves", "", drawn))
    index = {"name": name, **made.index}
    storage.write_whole(out / "data" / "index.js", scripts.script("index", "", index))
    page = (_ASSETS / _PAGE).read_text(encoding="utf-8").replace(_TITLE, html.escape(name))
    storage.write_whole(out / _PAGE, page.encode())
    for stale in storage.list_names(out / "data", "texts-*.js"):
        if stale.removesuffix(".js") not in made.chunks:
            storage.remove(out / "data" / stale)
    return Written(
        problems=len(chapters),
        proofs=sum(len(chapter.cases) for chapter in chapters),
        remarks=sum(_remarks(case) for chapter in chapters for case in chapter.cases),
        stages=len(training) + (search is not None),
        page=out / _PAGE,
    )


def _read(workdir: epath.Path) -> list[Any]:
    """The records of a run; none where it has written none yet."""
    if not storage.exists(workdir):
        raise FileNotFoundError(f"--workdir={workdir}: there is no such folder")
    folder = workdir / "records"
    return list(lineage.read(folder)) if storage.exists(folder) else []


def _remarks(case: cases.Case) -> int:
    return len(case.metas) + sum(1 + len(remark.metas) for remark in case.remarks)


def _drawn(drawn: curves.Curves) -> Mapping[str, Any]:
    return {
        "name": drawn.name,
        "steps": drawn.steps,
        "every": drawn.every,
        "scalars": list(drawn.scalars.items()),
    }


def _assets() -> Iterator[tuple[str, bytes]]:
    """Path and content of everything that pages share."""

    def walk(folder: Traversable, path: str) -> Iterator[tuple[str, bytes]]:
        for item in sorted(folder.iterdir(), key=lambda item: item.name):
            if item.is_dir():
                yield from walk(item, f"{path}{item.name}/")
            elif path or item.name != _PAGE:
                yield f"{path}{item.name}", item.read_bytes()

    return walk(_ASSETS, "")
