"""Figures are drawn of what an evaluation holds; without matplotlib that is said, once."""

import sys
import types

import pytest
from etils import epath

from mathv2_jax.evaluation import figures

POINT = dict(
    limit=1,
    tokens=100,
    score=dict(value=0.2, low=0.1, high=0.3, items=5),
    solved=dict(value=0.4, low=None, high=None, items=1),
)
AGREEMENT = dict(items=4, calibration=[dict(rating=0.5, score=0.25, items=4)])


class Axes:
    """Remembers what was drawn, and writes it where a picture would be written."""

    def __init__(self):
        self.drawn, self.figure = [], self

    def errorbar(self, x, y, spread, **settings):
        self.drawn.append((settings["label"], list(x), list(y), [list(s) for s in spread]))

    def scatter(self, x, y, **_):
        self.drawn.append(("scatter", list(x), list(y)))

    def savefig(self, file, **_):
        file.write(repr(self.drawn).encode())

    def __getattr__(self, name):
        return lambda *_, **__: None


@pytest.fixture
def axes(monkeypatch):
    made = Axes()
    figure = types.SimpleNamespace(Figure=lambda **_: types.SimpleNamespace(subplots=lambda: made))
    monkeypatch.setitem(sys.modules, "matplotlib", types.SimpleNamespace(figure=figure))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", figure)
    return made


def test_scores_are_drawn_over_attempts_and_shares_solved_over_tokens(axes, tmp_path):
    out = epath.Path(tmp_path)
    unread = POINT | dict(limit=2, score=dict(value=None, low=None, high=None, items=0))
    assert figures.draw_curves(dict(pass_at_1=[POINT, unread], best_at_n=[]), out)
    (label, x, y, ((low,), (high,))) = axes.drawn.pop()
    assert (label, x, y) == ("Pass@1", [1], [0.2])
    assert (low, high) == pytest.approx((0.1, 0.1))
    assert figures.draw_curves(dict(pool=[POINT], one_shot=[POINT]), out)
    assert [(d[0], d[1], d[2]) for d in axes.drawn] == [
        ("pool search", [100], [0.4]),
        ("best of N, no refinement", [100], [0.4]),
    ]
    assert axes.drawn[0][3] == [[0.0], [0.0]]  # of one problem there is no interval
    assert "pool search" in (tmp_path / "curves.png").read_text()


def test_peoples_scores_are_drawn_over_ratings(axes, tmp_path):
    assert figures.draw_agreement(AGREEMENT, epath.Path(tmp_path))
    assert axes.drawn == [("scatter", [0.5], [0.25])] and (tmp_path / "calibration.png").exists()


def test_without_matplotlib_or_curves_no_figure_is_drawn(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = epath.Path(tmp_path)
    assert not figures.draw_curves({}, out) and capsys.readouterr().out == ""
    assert not figures.draw_curves(dict(pool=[POINT]), out)
    assert "matplotlib is missing, pip install" in capsys.readouterr().out
    assert not figures.draw_agreement(AGREEMENT, out) and not list(tmp_path.iterdir())
