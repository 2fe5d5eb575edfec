"""Figures of an evaluation, where matplotlib is installed."""

import io
from collections.abc import Mapping
from typing import Any

from etils import epath

from mathv2_jax import storage

_SIZE = (6.0, 4.0)
_MISSING = 'no figures: matplotlib is missing, pip install -e ".[experiments]" brings it'
_TITLES = {
    "pass_at_1": "Pass@1",
    "best_at_n": "best by self-score",
    "pool": "pool search",
    "one_shot": "best of N, no refinement",
}


def draw_agreement(body: Mapping[str, Any], out: epath.Path) -> bool:
    """Calibration: people's mean score over a verifier's; False, and a word, without matplotlib."""
    axes = _axes()
    if axes is None:
        return False
    rows = body["calibration"]
    sizes = [20 + 200 * row["items"] / body["items"] for row in rows]
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    axes.scatter([r["rating"] for r in rows], [r["score"] for r in rows], s=sizes, alpha=0.8)
    for row in rows:
        axes.annotate(
            f"n = {row['items']}",
            (row["rating"], row["score"]),
            textcoords="offset points",
            xytext=(0, 12),
            horizontalalignment="center",
        )
    axes.set_xlabel("rating: the verifier's mean score")
    axes.set_ylabel("people's mean score")
    axes.set_xlim(-0.1, 1.1)
    axes.set_ylim(-0.1, 1.1)
    _save(axes, out / "calibration.png")
    return True


def draw_curves(body: Mapping[str, Any], out: epath.Path) -> bool:
    """Scores over attempts, or over tokens; False without curves, or matplotlib, which is said."""
    if not any(body.get(name) for name in _TITLES):
        return False
    axes = _axes()
    if axes is None:
        return False
    by_tokens = "pool" in body
    for name, title in _TITLES.items():
        points = body.get(name)
        if not points:
            continue
        points = [p for p in points if p["score"]["value"] is not None]
        x = [p["tokens"] if by_tokens else p["limit"] for p in points]
        y = [p["solved" if by_tokens else "score"] for p in points]
        low = [f["value"] - (f["value"] if f["low"] is None else f["low"]) for f in y]
        high = [(f["value"] if f["high"] is None else f["high"]) - f["value"] for f in y]
        axes.errorbar(x, [f["value"] for f in y], (low, high), marker="o", capsize=3, label=title)
    if by_tokens:
        axes.set_xscale("log")
        axes.set_xlabel("generated tokens of a problem")
        axes.set_ylabel("share of problems solved")
    else:
        axes.set_xlabel("limit of attempts")
        axes.set_ylabel("mean score")
    axes.legend(frameon=False)
    _save(axes, out / "curves.png")
    return True


def _axes() -> Any:
    try:
        from matplotlib import figure  # pyright: ignore[reportMissingImports] - an extra
    except ImportError:
        print(_MISSING)
        return None
    return figure.Figure(figsize=_SIZE, layout="constrained").subplots()


def _save(axes: Any, path: epath.Path) -> None:
    data = io.BytesIO()
    axes.figure.savefig(data, format="png", dpi=120)
    storage.write_whole(path, data.getvalue())
