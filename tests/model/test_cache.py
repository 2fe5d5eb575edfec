import jax.numpy as jnp
import numpy as np

from mathv2_jax.model import cache

# Two prompts with two answers each and one without, then padding; and a row of padding only.
SEGMENTS = [[1, 1, 1, 2, 2, 3, 4, 4, 5, 6, 6, 0, 0], [0] * 13]
PREFIXES = [[1, 1, 1, 1, 1, 1, 4, 4, 4, 6, 6, 0, 0], [0] * 13]
SOURCES = [[0, 0, 1, 2, 3, 2, 6, 6, 7, 9, 9, 11, 12], list(range(13))]


def test_a_token_sees_its_segment_and_its_prefix_up_to_itself():
    segments, prefixes = np.array(SEGMENTS), np.array(PREFIXES)
    layout = cache.Layout(
        jnp.zeros(segments.shape, jnp.int32), jnp.asarray(segments), jnp.asarray(prefixes)
    )
    expected = np.zeros((2, 13, 13), bool)
    for b in range(2):
        for t in range(13):
            for s in range(t + 1):
                expected[b, t, s] = segments[b, s] in (segments[b, t], prefixes[b, t])
    np.testing.assert_array_equal(cache.visible(layout), expected)
    seen_by_second_answer = np.flatnonzero(expected[0, 5])
    assert seen_by_second_answer.tolist() == [0, 1, 2, 5]


def test_padding_and_real_tokens_never_see_each_other():
    layout = cache.plain_layout(jnp.asarray([4, 0, 6]), 6)
    seen = np.asarray(cache.visible(layout))
    real = np.arange(6)[None, :] < np.array([4, 0, 6])[:, None]
    assert not seen[real[:, :, None] & ~real[:, None, :]].any()
    assert not seen[~real[:, :, None] & real[:, None, :]].any()
    assert seen[:, np.arange(6), np.arange(6)].all()  # no softmax over nothing


def test_previous_tokens_follow_each_sequence_back_and_repeat_its_first():
    tokens = np.random.default_rng(0).integers(0, 99, (2, 13))
    got = cache.previous_tokens(jnp.asarray(tokens), jnp.asarray(SOURCES), 3)
    expected = np.zeros((2, 13, 3), int)
    for b in range(2):
        for t in range(13):
            at = t
            for w in range(3):
                at = SOURCES[b][at]
                expected[b, t, w] = tokens[b, at]
    np.testing.assert_array_equal(got, expected)
    second_answer, last, middle = tokens[0, 5], tokens[0, 2], tokens[0, 1]
    assert second_answer != last
    assert got[0, 5].tolist() == [last, middle, tokens[0, 0]]


def test_no_taps_ask_for_no_tokens():
    tokens = jnp.ones((2, 4), jnp.int32)
    assert cache.previous_tokens(tokens, cache.plain_sources(tokens), 0).shape == (2, 4, 0)


def test_a_plain_row_is_one_sequence_from_position_zero():
    layout = cache.plain_layout(jnp.asarray([2, 4]), 4)
    assert layout.positions_BT.tolist() == [[0, 1, 2, 3]] * 2
    assert layout.segments_BT.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert layout.prefixes_BT.tolist() == layout.segments_BT.tolist()
    assert cache.plain_sources(layout.segments_BT).tolist() == [[0, 0, 1, 2]] * 2
