"""The experiment on a short prompt: what it counts, by pages that can be counted by hand."""

import importlib
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROMPT, ANSWER = 40, 20  # 3 pages of 16 tokens, and 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("cost") / "found.json"
    sizes = [f"--prompt={PROMPT}", f"--answer={ANSWER}", "--samples=3", "--repeats=1"]
    subprocess.run(
        [sys.executable, "experiments/cost_of_n/measure.py", f"--out={out}", *sizes],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
    )
    return json.loads(out.read_text())["runs"]


@pytest.mark.parametrize("way", ["shared", "apart"])
def test_a_prompt_is_computed_and_held_once_however_many_answers_it_gets(runs, way):
    n, prompts = 3, 1 if way == "shared" else 3
    (run,) = runs[way][str(n)]
    assert (run["answers"], run["tokens"]) == (n, n * ANSWER)
    assert run["computed_tokens"] == prompts * (PROMPT - 1)
    assert run["pages"] == prompts * 3 + n * 2


def test_the_median_is_given_with_the_least_and_the_largest(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    measure = importlib.import_module("experiments.cost_of_n.measure")
    runs = [{"pages": 3.0}, {"pages": 9.0}, {"pages": 4.0}]
    assert measure.spread(runs, "pages") == (4.0, 3.0, 9.0)
