"""The order in which a stage meets its records."""

import collections
import pickle

import numpy as np
import pytest

from mathv2_jax.data import mixture

SOURCES = {"auto": [f"a{i}" for i in range(50)], "human": [f"h{i}" for i in range(7)]}


def phases(*given):
    return [mixture.Phase(begin=begin, weights=weights) for begin, weights in given]


def take(stream, number, begin=0):
    return [stream[at] for at in range(begin, begin + number)]


@pytest.mark.parametrize(
    "weights", [(0.7, 0.3), (1.0, 1.0, 1.0), (0.05, 0.9, 0.05), (3.0, 0.0, 1.0)]
)
def test_each_source_is_drawn_by_its_weight_at_every_moment(weights):
    sources = {f"s{i}": [(i, n) for n in range(11)] for i in range(len(weights))}
    stream = mixture.stream(sources, phases((0, {f"s{i}": w for i, w in enumerate(weights)})), 3)
    found = np.array([element[0] for element in take(stream, 10_000)])
    for number in (10, 100, 1_000, 10_000):
        for source, weight in enumerate(weights):
            share = number * weight / sum(weights)
            assert abs((found[:number] == source).sum() - share) < len(weights)


def test_every_record_of_a_source_comes_once_an_epoch_in_another_order_each():
    stream = mixture.stream(SOURCES, phases((0, {"human": 1.0})), 0)
    first, second = take(stream, 7), take(stream, 7, 7)
    assert sorted(first) == sorted(second) == SOURCES["human"]
    assert first != second


def test_the_order_depends_on_the_seed():
    drawn = [take(mixture.stream(SOURCES, phases((0, {"auto": 1.0})), s), 50) for s in (0, 1, 0)]
    assert drawn[0] == drawn[2] != drawn[1]


def test_a_schedule_changes_the_weights_and_no_record_is_met_twice_in_an_epoch():
    scheduled = phases((0, {"auto": 1.0}), (20, {"auto": 0.5, "human": 0.5}), (34, {"human": 1.0}))
    drawn = take(mixture.stream(SOURCES, scheduled, 0), 41)
    kinds = [
        "".join(element[0] for element in drawn[a:b]) for a, b in ((0, 20), (20, 34), (34, 41))
    ]
    assert kinds[0] == "a" * 20 and kinds[2] == "h" * 7
    assert collections.Counter(kinds[1]) == {"a": 7, "h": 7}
    autos = [element for element in drawn if element[0] == "a"]
    assert len(set(autos)) == len(autos) == 27
    humans = [element for element in drawn if element[0] == "h"]
    assert sorted(humans[:7]) == sorted(humans[7:]) == SOURCES["human"]


def test_a_source_that_is_used_up_leaves_its_share_to_the_others():
    stream = mixture.stream(
        SOURCES, phases((0, {"auto": 0.5, "human": 0.5})), 0, exhausted=mixture.DROP
    )
    assert len(stream) == 57
    drawn = take(stream, 57)
    assert sorted(drawn) == sorted(SOURCES["auto"] + SOURCES["human"])
    assert {element[0] for element in drawn[14:]} == {"a"}
    with pytest.raises(IndexError, match="element 57 of a mixture of 57"):
        stream[57]


def test_a_source_that_is_used_up_ends_the_stream():
    stream = mixture.stream(
        SOURCES, phases((0, {"auto": 0.5, "human": 0.5})), 0, exhausted=mixture.STOP
    )
    assert len(stream) in (13, 14)
    assert sorted(e for e in take(stream, len(stream)) if e[0] == "h") == SOURCES["human"]


def test_dropping_goes_on_with_the_sources_of_the_next_phase():
    scheduled = phases((0, {"human": 1.0}), (20, {"auto": 1.0}))
    stream = mixture.stream(SOURCES, scheduled, 0, exhausted=mixture.DROP)
    assert "".join(e[0] for e in take(stream, len(stream))) == "h" * 7 + "a" * 50


def test_hard_records_are_drawn_by_their_weight():
    hardness = np.array([0.0, 0.25, 1.0, 0.0])
    weights = mixture.draw_weights(hardness, 3.0)
    np.testing.assert_allclose(weights, [1.0, 1.75, 4.0, 1.0])
    stream = mixture.stream({"s": [0, 1, 2, 3]}, phases((0, {"s": 1.0})), 5, weights={"s": weights})
    found = np.bincount(take(stream, 10_000)) / 10_000
    np.testing.assert_allclose(found, weights / weights.sum(), atol=0.01)
    for epoch in range(100):  # systematic: never more than one off
        often = np.bincount(take(stream, 4, 4 * epoch), minlength=4)
        assert (np.abs(often - 4 * weights / weights.sum()) < 1).all()


def test_weights_that_are_all_alike_are_no_weights():
    assert mixture.draw_weights(np.array([0.3, 0.3]), 2.0) is None
    assert mixture.draw_weights(np.array([0.3, 0.0]), 0.0) is None


def test_buckets_hold_elements_of_like_length_and_lose_none():
    source = [(i, length) for i, length in enumerate([5, 90, 7, 80, 6, 85, 88, 4] * 4)]
    stream = mixture.stream({"s": source}, phases((0, {"s": 1.0})), 0)
    bucketed = mixture.Bucketed(stream, lambda e: e[1], size=4, window=16, seed=1)
    drawn = take(bucketed, 32)
    assert sorted(drawn) == sorted(source) and drawn != take(stream, 32)
    for window in (drawn[:16], drawn[16:]):
        buckets = [[e[1] for e in window[at : at + 4]] for at in range(0, 16, 4)]
        wide = [max(lengths) - min(lengths) > 20 for lengths in buckets]
        assert sum(wide) <= 1  # where the short ones end
        assert [sorted(lengths) for lengths in buckets] == buckets


def test_a_stream_that_travelled_to_another_process_is_the_same():
    weights = {"auto": mixture.draw_weights(np.arange(50) / 50, 1.0)}
    stream = mixture.stream(SOURCES, phases((0, {"auto": 0.6, "human": 0.4})), 0, weights=weights)
    bucketed = mixture.Bucketed(stream, len, size=2, window=4, seed=1)
    assert take(pickle.loads(pickle.dumps(bucketed)), 100) == take(bucketed, 100)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (phases((0, {"auto": -1.0})), "source 'auto' has weight -1.0: give it 0 or more"),
        (phases((0, {"auto": float("nan")})), "has weight nan"),
        (phases((0, {"automatic": 1.0})), "'automatic' has a weight, but there are"),
        (phases((0, {"none": 1.0})), "source 'none' is empty"),
        (phases((0, {"auto": 0.0})), "no source has a positive weight"),
        (phases((1, {"auto": 1.0})), r"phases begin at \[1\]: the first at 0"),
        (phases((0, {"auto": 1.0}), (0, {"auto": 1.0})), "each after the one before"),
    ],
)
def test_what_cannot_be_mixed_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        mixture.stream(SOURCES | {"none": []}, given, 0)


def test_elements_may_be_asked_for_in_any_order():
    mixed = phases((0, {"auto": 0.3, "human": 0.7}))
    in_order = take(mixture.stream(SOURCES, mixed, 5), 60)
    stream = mixture.stream(SOURCES, mixed, 5)
    assert [stream[at] for at in reversed(range(60))] == in_order[::-1]


def test_equal_sources_are_shuffled_apart():
    numbers = {"a": list(range(20)), "b": list(range(100, 120))}
    drawn = take(mixture.stream(numbers, phases((0, {"a": 1.0, "b": 1.0})), 3), 40)
    assert [x for x in drawn if x < 100] != [x - 100 for x in drawn if x >= 100]


def test_an_empty_source_without_a_weight_is_no_error():
    stream = mixture.stream(SOURCES | {"none": []}, phases((0, {"human": 1.0, "none": 0.0})), 0)
    assert stream[3][0] == "h"
