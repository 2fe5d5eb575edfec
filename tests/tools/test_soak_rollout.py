"""The soak of the engine for a few seconds, and that its counters would see what it looks for."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "tools" / "soak_rollout.py"


@pytest.fixture(scope="module")
def soak():
    spec = importlib.util.spec_from_file_location("soak_rollout", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_requests_end_as_they_should_and_every_page_comes_back():
    command = [sys.executable, str(PROGRAM), "--minutes=0.1", "--bound=0.3"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["failures"] == [] and done.returncode == 0
    assert found["pages"]["taken"] == found["pages"]["given"] > 0
    assert found["prompts"]["leased"] == found["prompts"]["released"] > 0
    assert min(found["answers"][end] for end in ("stop", "length", "lost", "cancelled")) > 0
    assert found["restarted"] > 0


def test_a_page_that_is_kept_or_given_twice_is_seen(soak):
    pool = soak.CountedPool(4, 2)
    pages = pool.take_all(2)
    assert pool.complaints() == ["2 pages taken, 0 given back", "2 of 4 pages can be had"]
    pool.give_all(pages)
    assert pool.complaints() == []
    pool.give_all(pages[:1])
    assert "came back that nobody had" in pool.complaints()[0]
    pool.take_all(5)  # of four
    assert "were taken while they were held" in pool.complaints()[0]


def test_a_prompt_that_is_not_released_is_seen(soak):
    pool = soak.CountedPool(4, 2)
    lease = pool.lease((1, 2, 3))
    assert pool.complaints() == ["1 prompts leased, 0 released", "2 of 4 pages can be had"]
    pool.release(lease)
    assert pool.complaints() == []


def test_growth_is_of_the_last_two_thirds_and_of_the_line_through_them(soak):
    seconds = [float(at) for at in range(91)]
    begun = [1000 if at < 30 else 2000 for at in range(91)]
    assert soak.growth(seconds, begun) == pytest.approx(0.0)
    rising = [2000 + 10 * at for at in range(91)]
    assert soak.growth(seconds, rising) == pytest.approx(600 / 2600)
