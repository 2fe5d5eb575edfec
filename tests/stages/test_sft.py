"""What a supervised conversation teaches."""

import dataclasses

import pytest

from mathv2_jax import records
from mathv2_jax.data import sources
from mathv2_jax.rl import optimizer
from mathv2_jax.stages import sft
from mathv2_jax.text import tokenizer as tokenizer_lib

RECITAL = "Step 1: A implies B (2) and A from the facts"
SPANS = ((19, 23), (29, 44))


def item(tokenizer, learned=(), prompt_weight=0.0, think=False):
    demonstration = records.Demonstration(
        id="d", role="drill", problem_id="p", user="Recite.", assistant=RECITAL, learned=learned
    )
    return sft.supervised_item(tokenizer, demonstration, prompt_weight, think=think)


def test_the_whole_answer_and_its_end_weigh_the_same(house):
    made = item(house.tokenizer)
    (answer,) = made.answers
    assert house.tokenizer.decode(answer.tokens[:-1]) == RECITAL
    assert answer.tokens[-1] == house.tokenizer.eos_id
    assert answer.weights == [1.0] * len(answer.tokens)
    user = tokenizer_lib.Message("user", "Recite.")
    assert list(made.prompt) == house.tokenizer.encode([user], think=False)


def test_of_learned_spans_these_tokens_weigh_and_no_others_nor_the_end(house):
    (answer,) = item(house.tokenizer, SPANS).answers
    assert house.tokenizer.decode(answer.tokens[:-1]) == RECITAL
    assert answer.tokens[-1] == house.tokenizer.eos_id and answer.weights[-1] == 0.0
    kept = [t for t, w in zip(answer.tokens, answer.weights, strict=True) if w]
    assert house.tokenizer.decode(kept) == " (2) from the facts"
    assert set(answer.weights) == {0.0, 1.0}
    left_out = [t for t, w in zip(answer.tokens[:-1], answer.weights[:-1], strict=True) if not w]
    assert house.tokenizer.decode(left_out) == "Step 1: A implies B and A"


def test_a_role_that_thinks_learns_to_end_its_thinking_where_all_is_learned(house):
    for learned, weight in (((), 1.0), (SPANS, 0.0)):
        (answer,) = item(house.tokenizer, learned, think=True).answers
        assert answer.tokens[0] == house.tokenizer.end_think_id
        assert answer.weights[0] == weight
        assert len(answer.weights) == len(answer.tokens)


def test_what_was_thought_is_learned_before_the_end_of_thinking(house):
    thought = records.Demonstration(
        id="d", role="r", problem_id="p", user="Recite.", assistant=RECITAL, thinking="A (1)."
    )
    (answer,) = sft.supervised_item(house.tokenizer, thought, 0.0, think=True).answers
    thinking, final = house.tokenizer.split_thinking(answer.tokens[:-1], think=True)
    assert house.tokenizer.decode(thinking) == "A (1)."
    assert house.tokenizer.decode(final) == RECITAL
    assert answer.weights == [1.0] * len(answer.tokens)


def test_a_prompt_weight_teaches_the_prompt_too(house):
    plain, weighted = item(house.tokenizer), item(house.tokenizer, prompt_weight=0.25)
    assert weighted.prompt == ()
    (answer,) = weighted.answers
    assert answer.tokens == [*plain.prompt, *plain.answers[0].tokens]
    assert answer.weights == [0.25] * len(plain.prompt) + plain.answers[0].weights


def test_cutting_at_the_spans_gives_the_tokens_of_the_whole_text(smoke_workdir):
    folder = smoke_workdir / "records" / "input"
    tokenizer = tokenizer_lib.SentencePieceTokenizer.from_bytes(
        (folder / "tokenizer.model").read_bytes()
    )
    drills = [
        drill
        for name in ("rule_drills", "source_drills")
        for drill in sources.read(folder / f"{name}.jsonl", records.Demonstration)
    ]
    for drill in drills:
        (answer,) = sft.supervised_item(tokenizer, drill, 0.0, think=False).answers
        whole = dataclasses.replace(drill, learned=())
        (expected,) = sft.supervised_item(tokenizer, whole, 0.0, think=False).answers
        assert answer.tokens == expected.tokens
        # A citation is one piece: it is all that the drill asks for.
        assert sum(answer.weights) == len(drill.learned)


@pytest.mark.parametrize(
    ("fields", "named"),
    [(dict(steps=0), "sft.steps = 0"), (dict(prompt_weight=1.5), "sft.prompt_weight = 1.5")],
)
def test_an_impossible_setting_is_named(fields, named):
    adam = optimizer.OptimizerConfig(learning_rate=1e-3)
    with pytest.raises(ValueError, match=named):
        sft.SftConfig(**{**dict(steps=1, rows=1, row_length=8, optimizer=adam), **fields})
