"""Intervals by bootstrap: over problems, reproducible, as wide as theory says."""

import math

import numpy as np
import pytest

from mathv2_jax.evaluation import intervals


def test_an_interval_is_as_wide_as_the_normal_one_where_problems_are_alone():
    values = np.random.default_rng(0).normal(size=400)
    found = intervals.mean(range(400), values.tolist(), rounds=1000)
    half = 1.96 * values.std() / math.sqrt(400)
    assert found.value == pytest.approx(values.mean())
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)
    assert (found.items, found.problems) == (400, 400)


def test_items_of_one_problem_count_as_one_draw():
    draw = np.random.default_rng(1)
    own = draw.normal(size=40)
    alike = np.repeat(own, 25) + draw.normal(size=1000) / 100
    together = intervals.mean(np.repeat(range(40), 25).tolist(), alike.tolist(), rounds=500)
    apart = intervals.mean(range(1000), alike.tolist(), rounds=500)
    assert together.high - together.low > 4 * (apart.high - apart.low)


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(2).normal(size=30).tolist()
    first, again = (intervals.mean(range(30), values, seed=3) for _ in range(2))
    assert first == again != intervals.mean(range(30), values, seed=4)


def test_what_is_undefined_is_said_to_be():
    assert intervals.mean([], []) == intervals.Figure(None, None, None, 0, 0)
    assert intervals.bootstrap("ab", lambda at: math.nan).value is None
    alone = intervals.mean("aa", [0.0, 1.0])
    assert (alone.value, alone.low, alone.high) == (0.5, None, None)
    assert (str(alone), str(intervals.mean([], []))) == ("0.500", "-")
