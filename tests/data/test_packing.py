import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mathv2_jax.data import packing
from mathv2_jax.model import cache

PROMPT = (11, 12, 13)
FIRST = packing.Answer(
    tokens=(21, 22), weights=(0.5, 0.25), old_logprobs=(-1.0, -2.0), advantage=2.0
)
SECOND = packing.Answer(
    tokens=(31, 32, 33), weights=(1.0, 2.0, 3.0), old_logprobs=(-3.0, -4.0, -5.0), advantage=-1.0
)
GROUP = packing.Item(prompt=PROMPT, answers=(FIRST, SECOND), head_label=0.5, head_weight=0.7)


def answer(size, first=50):
    return packing.Answer(tokens=range(first, first + size), weights=[1.0] * size)


def document(size, prompt=0, first=50):
    prompt_tokens = range(100, 100 + prompt)
    return packing.Item(prompt=tuple(prompt_tokens), answers=(answer(size - prompt, first),))


def packed(*items, rows=1, length=16, **replay):
    packer = packing.Packer(rows, length, packing.Replay(**replay))
    placed = [packer.add(item) for item in items]
    assert all(placed)
    return packer.batch


def real_tokens(batch):
    """How many tokens each row holds."""
    return (batch.segments_BT > 0).sum(axis=1).tolist()


# One group, written out in full.


def test_a_group_is_its_prompt_once_and_its_answers_behind_it():
    b = packed(GROUP, length=10)
    assert b.tokens_BT.tolist() == [[11, 12, 13, 21, 22, 31, 32, 33, 0, 0]]
    assert b.positions_BT.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 0, 0]]
    assert b.segments_BT.tolist() == [[1, 1, 1, 2, 2, 3, 3, 3, 0, 0]]
    assert b.prefixes_BT.tolist() == [[1, 1, 1, 1, 1, 1, 1, 1, 0, 0]]


def test_every_answer_is_predicted_from_the_prompts_last_token_on():
    """The state that predicts a token is the one before it along its own sequence."""
    b = packed(GROUP, length=10)
    assert b.sources_BT.tolist() == [[0, 0, 1, 2, 3, 2, 5, 6, 8, 9]]


def test_weights_advantages_and_old_logprobs_stand_at_the_answers_tokens_only():
    b = packed(GROUP, length=10)
    assert b.weights_BT.tolist() == [[0, 0, 0, 0.5, 0.25, 1, 2, 3, 0, 0]]
    assert b.advantages_BT.tolist() == [[0, 0, 0, 2, 2, -1, -1, -1, 0, 0]]
    assert b.old_logprobs_BT.tolist() == [[0, 0, 0, -1, -2, -3, -4, -5, 0, 0]]


def test_the_heads_target_stands_at_the_prompts_last_token_of_each_item():
    other = dataclasses.replace(GROUP, head_label=1.0, head_weight=0.1)
    b = packed(GROUP, document(2), other, length=20)
    assert b.head_places_BN.tolist() == [[2, 12, 0, 0]]
    assert b.tokens_BT[0, 12] == PROMPT[-1]
    assert b.head_labels_BN.tolist() == [[1, 2, 0, 0]]
    np.testing.assert_allclose(b.head_weights_BN, [[0.7, 0.1, 0, 0]])


def test_a_second_item_of_a_row_shares_nothing_with_the_first():
    b = packed(document(3), dataclasses.replace(GROUP, head_label=None), length=12)
    assert b.segments_BT.tolist() == [[2, 2, 2, 3, 3, 3, 4, 4, 5, 5, 5, 0]]
    assert b.prefixes_BT.tolist() == [[2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3, 0]]
    assert b.positions_BT.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 3, 4, 5, 0]]
    assert b.sources_BT.tolist() == [[0, 0, 1, 3, 3, 4, 5, 6, 5, 8, 9, 11]]
    layout = cache.Layout(*map(jnp.asarray, (b.positions_BT, b.segments_BT, b.prefixes_BT)))
    seen_TS = np.asarray(cache.visible(layout))[0]
    assert not seen_TS[3:11, :3].any() and not seen_TS[:3, 3:].any()  # items
    assert not seen_TS[8:11, 6:8].any() and seen_TS[8:11, 3:6].all()  # siblings, their prompt


def test_a_document_without_a_prompt_trains_on_every_token_but_its_first():
    """Nothing precedes a first token, so nothing can predict it."""
    b = packed(document(4), length=6)
    assert b.weights_BT.tolist() == [[0, 1, 1, 1, 0, 0]]
    assert b.sources_BT.tolist() == [[0, 0, 1, 2, 4, 5]]
    assert b.segments_BT.tolist() == b.prefixes_BT.tolist()


def test_an_end_token_that_is_also_the_padding_token_stays_in_the_loss():
    ends_in_padding = packing.Answer(tokens=(5, 0), weights=(1.0, 1.0), old_logprobs=(-1.0, -2.0))
    b = packed(packing.Item(prompt=(7, 0), answers=(ends_in_padding,)), length=6)
    assert b.tokens_BT.tolist() == [[7, 0, 5, 0, 0, 0]]
    assert b.weights_BT.tolist() == [[0, 0, 1, 1, 0, 0]]
    assert (b.segments_BT > 0).tolist() == [[True] * 4 + [False] * 2]
    assert b.old_logprobs_BT[0, 3] == -2.0


def test_padding_predicts_itself_and_weighs_nothing():
    b = packing.empty_batch(2, 5)
    assert b.sources_BT.tolist() == [[0, 1, 2, 3, 4]] * 2
    no_padding = ("sources_BT", "kept_LBTA", "allowed_BTY")
    assert not any(getattr(b, n).any() for n in b._fields if n not in no_padding)


def test_the_prompts_experts_stand_at_its_tokens():
    experts_NLA = np.arange(len(PROMPT) * 3 * 2).reshape(len(PROMPT), 3, 2)
    item = packing.Item(prompt=PROMPT, answers=(FIRST,), experts_NLA=experts_NLA)
    b = packed(item, length=9, routing=(3, 2))
    found = b.kept_LBTA[:, 0, : len(PROMPT)]
    np.testing.assert_array_equal(found, experts_NLA.swapaxes(0, 1))
    assert (b.kept_LBTA[:, 0, len(PROMPT) :] == -1).all()


def test_the_ids_that_could_be_drawn_stand_at_their_tokens():
    bound = dataclasses.replace(FIRST, allowed=[(3, 5), None])
    b = packed(packing.Item(prompt=PROMPT, answers=(SECOND, bound)), length=9, allowed=3)
    at = len(PROMPT) + len(SECOND.tokens)
    assert b.allowed_BTY[0, at].tolist() == [3, 5, -1]
    assert (np.delete(b.allowed_BTY[0], at, axis=0) == -1).all()


def test_the_rollouts_experts_stand_at_their_tokens_and_minus_one_elsewhere():
    experts_NLA = np.arange(2 * 3 * 2).reshape(2, 3, 2)
    routed = dataclasses.replace(FIRST, experts_NLA=experts_NLA)
    b = packed(packing.Item(prompt=PROMPT, answers=(SECOND, routed)), length=9, routing=(3, 2))
    assert b.kept_LBTA.shape == (3, 1, 9, 2)
    np.testing.assert_array_equal(b.kept_LBTA[:, 0, 6:8], experts_NLA.swapaxes(0, 1))
    assert (b.kept_LBTA[:, 0, [0, 1, 2, 3, 4, 5, 8]] == -1).all()


# Where items go.


def test_an_item_goes_to_the_first_row_that_has_room():
    packer = packing.Packer(3, 10)
    for size, expected in (
        (6, [6, 0, 0]),
        (7, [6, 7, 0]),
        (4, [10, 7, 0]),
        (3, [10, 10, 0]),
        (1, [10, 10, 1]),
    ):
        assert packer.add(document(size))
        assert real_tokens(packer.batch) == expected


def test_an_item_without_room_is_refused_and_leaves_the_batch_as_it_was():
    packer = packing.Packer(2, 8)
    assert packer.add(document(5)) and packer.add(document(6))
    before = [np.copy(x) for x in packer.batch if x is not None]
    assert not packer.add(document(4))
    for old, new in zip(before, (x for x in packer.batch if x is not None), strict=True):
        np.testing.assert_array_equal(old, new)
    assert packer.add(document(3))


def test_a_row_takes_as_many_head_targets_as_it_has_slots():
    item = packing.Item(prompt=(1,), answers=(answer(1),), head_label=1.0, head_weight=1.0)
    packer = packing.Packer(2, 100)
    for _ in range(packing.HEAD_SLOTS + 1):
        assert packer.add(item)
    assert real_tokens(packer.batch) == [2 * packing.HEAD_SLOTS, 2]
    assert packer.add(dataclasses.replace(item, head_label=None))
    assert real_tokens(packer.batch) == [2 * packing.HEAD_SLOTS + 2, 2]
    for _ in range(packing.HEAD_SLOTS - 1):
        assert packer.add(item)
    assert not packer.add(item)
    assert (packer.batch.head_weights_BN == 1.0).all()


def test_an_item_that_no_row_could_ever_hold_is_an_error_with_both_lengths():
    with pytest.raises(ValueError, match="an item of 9 tokens does not fit rows of 8"):
        packing.Packer(4, 8).add(document(9))


def test_a_group_longer_than_a_row_is_split_and_each_part_repeats_the_prompt():
    answers = tuple(answer(size, first=10 * size) for size in (2, 3, 4, 1))
    item = packing.Item(prompt=PROMPT, answers=answers, head_label=1.0, head_weight=0.3)
    parts = packing.split_item(item, 8)
    assert [p.prompt for p in parts] == [PROMPT] * 2
    assert [p.answers for p in parts] == [answers[:2], answers[2:]]
    assert [p.head_label for p in parts] == [1.0, None]


def test_an_item_that_fits_is_not_split():
    assert packing.split_item(GROUP, len(GROUP)) == [GROUP]
    only_head = packing.Item(prompt=PROMPT, answers=(), head_label=0.0)
    assert packing.split_item(only_head, 3) == [only_head]


def test_an_answer_that_fits_no_row_beside_its_prompt_is_an_error_with_its_lengths():
    item = packing.Item(prompt=PROMPT, answers=(answer(2), answer(6)))
    message = "a prompt of 3 tokens with an answer of 6 does not fit rows of 8"
    with pytest.raises(ValueError, match=message):
        packing.split_item(item, 8)


SHAPES = st.lists(
    st.tuples(
        st.integers(1, 4),
        st.lists(st.integers(1, 8), max_size=5),
        st.none() | st.sampled_from([0.0, 0.5, 1.0]),
    ),
    max_size=12,
)


def items_of(shapes):
    """Items from (prompt length, answer lengths, head label); answers differ in their tokens."""
    return [
        packing.Item(
            prompt=range(1, 1 + prompt),
            answers=tuple(answer(size, first=100 * n) for n, size in enumerate(sizes, start=1)),
            head_label=label,
            head_weight=1.0,
        )
        for prompt, sizes, label in shapes
    ]


@given(SHAPES)
def test_packing_loses_no_answer_and_no_head_target_and_overwrites_none(shapes):
    items = items_of(shapes)
    batches = packing.pack_all(items, rows=2, length=12)
    found, labels = [], []
    for b in batches:
        for row in range(2):
            for segment in range(1, b.segments_BT[row].max() + 1):
                at = b.segments_BT[row] == segment
                if b.weights_BT[row, at].any():
                    prefix = b.segments_BT[row] == b.prefixes_BT[row, at][0]
                    found.append((*b.tokens_BT[row, prefix], 0, *b.tokens_BT[row, at]))
        weighed = b.head_weights_BN > 0
        labels += (b.head_labels_BN[weighed] / 2).tolist()
    expected = [(*i.prompt, 0, *a.tokens) for i in items for a in i.answers]
    assert sorted(found) == sorted(expected)
    assert sorted(labels) == sorted(i.head_label for i in items if i.head_label is not None)


@given(SHAPES)
def test_walking_the_sources_back_from_a_token_reads_its_own_sequence(shapes):
    for b in packing.pack_all(items_of(shapes), rows=2, length=12):
        for row, at in zip(*np.nonzero(b.weights_BT), strict=True):
            steps, positions = at, []
            while b.sources_BT[row, steps] != steps:
                steps = b.sources_BT[row, steps]
                positions.append(int(b.positions_BT[row, steps]))
                assert b.segments_BT[row, steps] in (
                    b.segments_BT[row, at],
                    b.prefixes_BT[row, at],
                )
            assert positions == list(range(b.positions_BT[row, at]))[::-1]


def test_full_batches_follow_one_another_in_the_items_order():
    batches = packing.pack_all([document(5), document(6), document(4), document(3)], 1, 9)
    assert [real_tokens(b) for b in batches] == [[5], [6], [7]]


def test_no_items_are_one_batch_of_padding():
    (batch,) = packing.pack_all([], 2, 4)
    assert real_tokens(batch) == [0, 0]
