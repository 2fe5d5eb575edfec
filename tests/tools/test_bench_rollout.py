"""The benchmark of rollouts, at its tiny size: all three sides run, on the same model."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SIDES = {"ours", "generate", "continuous"}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the last line says."""
    out = tmp_path_factory.mktemp("bench") / "all.json"
    command = [sys.executable, "tools/bench_rollout.py", "--small", "--repeats=1", f"--out={out}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == json.loads(out.read_text())
    return found


def test_every_side_gives_each_answer_exactly_its_forced_length(found):
    assert found["lengths_kept"] == dict.fromkeys(SIDES, True)
    assert found["tokens"] == dict.fromkeys(SIDES, found["tokens_forced"])


def test_both_libraries_compute_the_same_model(found):
    assert found["logits_apart"] < 2e-5 and found["greedy_equal"]


def test_ratios_are_those_of_the_medians(found):
    median = found["median"]
    for name in ("generate", "continuous"):
        assert found[f"ratio_{name}"] == pytest.approx(median["ours"] / median[name])
    assert found["continuous_error"] is None
    assert "continuous_as_it_is" in found  # what it says unless it is mended; None once it runs


def test_a_pass_is_filled_by_the_parts_of_the_gap(found):
    (rate,) = found["tokens_per_second"]["ours"]
    assert sum(found["gap"].values()) == pytest.approx(found["tokens_forced"] / rate)
    at_limit = found["gap"]["the limit: matrix products of what counts"]
    assert at_limit * rate / found["tokens_forced"] == pytest.approx(found["share_of_limit"])


def test_each_prompt_is_computed_once_for_all_its_answers(found):
    """All of it but its last token, which the first step of each answer is fed."""
    stats, samples = found["stats"], 3
    prompts = found["requests"] // samples
    assert stats["computed_tokens"] == stats["prompt_tokens"] / samples - prompts
