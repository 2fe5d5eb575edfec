"""The two programs through a worker: answers in rows of its own choosing, over pages."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from mathv2_jax import records
from mathv2_jax.rollout import answers as answers_lib
from mathv2_jax.rollout import decode, schedule, worker

PROMPTS = ((3, 40, 41, 42, 7), (3,))  # over a page's end, and shorter than the embedding taps
LIMITS = schedule.EngineConfig(rows=6, context=16, page=4, chunk=4, chunks=2, steps=6)
N = LIMITS.steps


@pytest.fixture(scope="module")
def make(programs, mesh, place, variables) -> Callable[..., worker.Worker]:
    def one(given: Any = None, config: schedule.EngineConfig = LIMITS) -> worker.Worker:
        made = worker.Worker(programs, config, mesh, pad_id=0)
        made.load(place(variables if given is None else given))
        return made

    return one


@pytest.fixture(scope="module")
def run(make) -> Callable[..., decode.Drawn]:
    """Both prompts three times; settings are a value, or one for each of the six rows."""

    def one(
        order: Sequence[int] = range(6),
        given: Any = None,
        seeds: Sequence[int] = range(6),
        least: int = 1,
        stop_id: int | None = None,
        **settings: Any,
    ) -> decode.Drawn:
        own, pool = make(given), schedule.Pool(24, LIMITS.page)
        rows: list[answers_lib.Answer | None] = [None] * 6
        queue: list[schedule.Piece] = []
        for row, place in enumerate(order):
            fields = dict(max_tokens=N) | {
                name: values[place] if isinstance(values, list) else values
                for name, values in settings.items()
            }
            prompt = PROMPTS[place // 3]
            asked = records.Request(
                id="a", prompt=prompt, num_samples=1, seed=seeds[place], **fields
            )
            lease = pool.lease(prompt[:-1])
            assert lease is not None
            queue += schedule.pieces(prompt[:-1], lease.pages, lease.start, LIMITS.chunk)
            stops = () if stop_id is None else (stop_id,)
            key = answers_lib.row_key(asked.seed, 0)
            rows[row] = answers_lib.Answer(row, 0, asked, stops, 0, lease, key)
            rows[row].own = pool.take_all(2)
        list(own.compute([queue]))
        return own.advance(rows, least)

    return one


def answers(drawn: decode.Drawn) -> list[list[int]]:
    rows = zip(drawn.tokens_BK, drawn.count_B, strict=True)
    return [tokens[:count].tolist() for tokens, count in rows]


@pytest.fixture(scope="module")
def even(variables):
    """Variables whose next token is always uniform: answers then show the noise itself."""
    params = variables["params"] | {"unembed": 0.0 * variables["params"]["unembed"]}
    return variables | {"params": params}


def log_softmax(logits_V, temperature):
    scaled_V = logits_V / temperature
    return scaled_V - scaled_V.max() - np.log(np.sum(np.exp(scaled_V - scaled_V.max())))


def test_greedy_decoding_over_pages_is_the_argmax_of_plain_passes(run, forward):
    greedy = run(temperature=0.0)
    for row, answer in enumerate(answers(greedy)):
        prompt = PROMPTS[row // 3]
        assert len(answer) == N
        for at, token in enumerate(answer):
            logits_V = forward([*prompt, *answer[:at]])[-1]
            assert token == np.argmax(logits_V)
            expected = log_softmax(logits_V, 1.0)[token]
            assert greedy.logprobs_BK[row, at] == pytest.approx(expected, abs=1e-5)


def test_sampled_log_probabilities_are_the_tempered_ones_of_a_plain_pass(run, forward):
    temperatures = [0.5, 1.0, 1.5, 0.7, 1.3, 0.9]
    sampled = run(temperature=temperatures)
    for row, answer in enumerate(answers(sampled)):
        prompt = PROMPTS[row // 3]
        logits_TV = forward([*prompt, *answer])
        for at, token in enumerate(answer):
            expected = log_softmax(logits_TV[len(prompt) - 1 + at], temperatures[row])[token]
            assert sampled.logprobs_BK[row, at] == pytest.approx(expected, abs=1e-5)
            assert sampled.policy_logprobs_BK[row, at] == pytest.approx(expected, abs=1e-5)


def test_a_rows_answer_follows_its_key_wherever_the_row_stands(run):
    order = [5, 2, 0, 1, 4, 3]
    straight, turned = run(), run(order=order)
    assert answers(turned) == [answers(straight)[i] for i in order]


def test_every_key_and_every_step_has_noise_of_its_own(run, even, config):
    """One noise for all steps, or for all rows, would repeat its token."""
    tokens = []
    for first in range(0, 60, 6):
        tokens += answers(run(given=even, seeds=range(first, first + 6)))
    noise_BN = (np.array(tokens) + 0.5) / config.vocab_size
    assert len({tuple(t) for t in tokens}) == 60
    correlation_NN = np.corrcoef(noise_BN.T)
    assert np.abs(correlation_NN - np.eye(N)).max() < 0.45  # 3.5 standard errors at 60 rows
    assert abs(noise_BN.mean() - 0.5) < 4 * np.sqrt(1 / 12 / noise_BN.size)
    assert abs(noise_BN.std() - np.sqrt(1 / 12)) < 0.04


def test_a_row_ends_with_the_stop_token_and_nothing_follows_it(run):
    free = run()
    stop = answers(free)[0][2]
    stopped = run(stop_id=stop)
    for row, answer in enumerate(answers(free)):
        ends = stop in answer
        expected = answer[: answer.index(stop) + 1] if ends else answer
        assert answers(stopped)[row] == expected
        assert bool(stopped.stopped_B[row]) == ends
        length = len(expected)
        np.testing.assert_array_equal(
            stopped.logprobs_BK[row, :length], free.logprobs_BK[row, :length]
        )
        assert not stopped.logprobs_BK[row, length:].any()
        assert not stopped.tokens_BK[row, length:].any()
    assert stopped.stopped_B[0] and not free.stopped_B.any()


def test_each_row_keeps_its_own_limit_and_zero_means_not_in_use(run):
    limits = [0, 1, 2, 3, 6, 5]
    limited = run(max_tokens=limits)
    assert limited.count_B.tolist() == limits
    assert answers(limited) == [a[:n] for a, n in zip(answers(run()), limits, strict=True)]
    assert not limited.stopped_B.any()


def test_decoding_pauses_when_fewer_rows_are_left_than_are_worth_it(run):
    limited = run(max_tokens=[0, 1, 2, 3, 6, 5], least=4)
    assert limited.count_B.tolist() == [0, 1, 2, 2, 2, 2]
