"""The tool that compares sampler and trainer finds what it should, and what is planted."""

import dataclasses

import numpy as np
import pytest

from configs.models import tiny_v32
from mathv2_jax.text import tokenizer as tokenizer_lib
from tools import check_sampler


@pytest.fixture(scope="module")
def model():
    made = tokenizer_lib.train(["Prove that 1 + 1 = 2."], vocab_size=280)
    tokenizer = tokenizer_lib.SentencePieceTokenizer.from_bytes(made)
    return check_sampler.make_model(tiny_v32, "float32", tokenizer)


@pytest.fixture(scope="module")
def asked(model):
    return check_sampler.make_requests(model, 3, 3)


def table():
    return check_sampler.Table("tiny", exact=True)


def test_a_model_of_sparse_attention_samples_what_its_trainer_means(model, asked):
    found = table()
    check_sampler.compare_logprobs(found, model, asked)
    assert found.faults == []
    assert found.found["routing replayed"]["tokens"] > 200
    assert found.found["another router, routing chosen anew"]["mean"] > 0.1


def test_a_log_probability_that_no_rounding_explains_is_no_near_tie(model, asked, monkeypatch):
    monkeypatch.setattr(check_sampler, "MOVES", 3)
    drawn = model.engine(model.variables).generate(asked)
    placed = model.placed(model.variables)
    trainer, sampler = model.score(asked, drawn, placed)
    forged = (trainer, sampler + 0.05 * (np.arange(len(sampler)) == 7))
    ties = check_sampler.near_ties(model, asked, drawn, placed, forged)
    assert list(ties) == []
    found = table()
    found.gap("forged", forged, ties)
    found.gap("as if it were one", forged, [7])
    assert found.faults == ["tiny: forged"]
    assert found.found["as if it were one"]["near_ties"] == [pytest.approx(0.05, abs=1e-4)]


def test_other_variables_than_the_samplers_are_a_fault(model, asked):
    drawn = model.engine(model.variables).generate(asked)
    found = table()
    other = check_sampler.rerouted(model.variables)
    found.gap("other", model.score(asked, drawn, model.placed(other)))
    assert found.faults == ["tiny: other"]


def test_answers_that_part_far_from_an_edge_are_a_fault(model, asked):
    """The place where two answers part is given the distance of its number from the edge."""
    (first, *_), *_ = model.engine(model.variables).generate(asked[:1])
    size = model.config.vocab_size
    forged = (first.token_ids[0] + size // 2) % size
    other = dataclasses.replace(first, token_ids=(forged, *first.token_ids[1:]))
    distance = check_sampler._distance(model, asked[0], first, other, 0)
    probabilities = model.probabilities(asked[0].prompt)
    low, high = sorted((first.token_ids[0], forged))
    between = probabilities[low + 1 : high].sum()
    assert distance > between > 0.05
    assert check_sampler._first_difference((1, 2), (1, 2, 3)) == 2
    ended = dataclasses.replace(first, token_ids=first.token_ids[:4])
    assert check_sampler._distance(model, asked[0], first, ended, 4) == float("inf")


@pytest.mark.parametrize(("mean", "faults"), [(1.0005, 0), (1.002, 1)])
def test_a_ratio_is_held_to_what_is_wanted(mean, faults):
    found = table()
    found.ratio("ratio", (np.full(1000, np.log(mean)), np.zeros(1000)), 1.0)
    assert len(found.faults) == faults
