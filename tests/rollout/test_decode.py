"""Prefill and decode themselves, at the one shape that the engine's tests compile too."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from mathv2_jax import sharding
from mathv2_jax.rollout import decode, engine

PROMPTS = [[3, 40, 41, 42, 7], [3]]  # as long as no bucket, and shorter than the embedding taps
P, S, G, N = 2, 8, 3, 6
NEVER = -1  # no token has this id


class Run(NamedTuple):
    """A prefill and the decoding that follows it, as NumPy arrays."""

    prefilled: Any
    decoded: Any

    def answers(self) -> list[list[int]]:
        """The tokens of every row up to its length."""
        rows = zip(self.decoded.tokens_BN, self.decoded.length_B, strict=True)
        return [tokens[:length].tolist() for tokens, length in rows]


@pytest.fixture(scope="module")
def run(programs, variables, mesh, place) -> Callable[..., Run]:
    """Answers every prompt G times; settings are a value, or one for each of the P * G rows."""

    def both(
        prompts=PROMPTS, given=None, stop_id=NEVER, seeds=range(P * G), limit=N, **sampled
    ) -> Run:
        put = sharding.batch_sharding(mesh)
        ids, lengths = np.zeros((P, S), np.int32), np.array([len(p) for p in prompts], np.int32)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
        settings = decode.RowSettings(
            np.array([engine.row_key(seed, 0) for seed in seeds]),
            *(
                np.broadcast_to(np.asarray(x, kind), (P * G,))
                for x, kind in (
                    (sampled.get("temperature", 1.0), np.float32),
                    (1.0, np.float32),
                    (limit, np.int32),
                )
            ),
        )
        given = place(variables if given is None else given)
        ids, lengths, settings = jax.device_put((ids, lengths, settings), put)
        with jax.set_mesh(mesh):
            prefilled = programs.prefill(given, ids, lengths)
            decoded = programs.decode(
                given,
                prefilled,
                lengths,
                settings,
                np.asarray([stop_id], np.int32),
                slots=N,
                truncate=False,
            )
        return Run(*jax.device_get((prefilled, decoded)))

    return both


@pytest.fixture(scope="module")
def even(variables):
    """Variables whose next token is always uniform: answers then show the noise itself."""
    params = variables["params"] | {"unembed": 0.0 * variables["params"]["unembed"]}
    return variables | {"params": params}


def log_softmax(logits_V, temperature):
    scaled_V = logits_V / temperature
    return scaled_V - scaled_V.max() - np.log(np.sum(np.exp(scaled_V - scaled_V.max())))


def test_prefill_leaves_the_logits_after_each_prompts_last_token(run, forward):
    prefilled = run().prefilled
    for place, prompt in enumerate(PROMPTS):
        np.testing.assert_allclose(prefilled.logits_PV[place], forward(prompt)[-1], atol=1e-5)
    assert prefilled.tail_PW.tolist() == [[7, 42], [3, 3]]


def test_greedy_decoding_with_a_cache_is_the_argmax_of_plain_passes(run, forward):
    greedy = run(temperature=0.0)
    for row, answer in enumerate(greedy.answers()):
        prompt = PROMPTS[row // G]
        assert len(answer) == N
        for at, token in enumerate(answer):
            logits_V = forward([*prompt, *answer[:at]])[-1]
            assert token == np.argmax(logits_V)
            expected = log_softmax(logits_V, 1.0)[token]
            assert greedy.decoded.logprobs_BN[row, at] == pytest.approx(expected, abs=1e-5)


def test_sampled_log_probabilities_are_the_tempered_ones_of_a_plain_pass(run, forward):
    temperatures = [0.5, 1.0, 1.5, 0.7, 1.3, 0.9]
    sampled = run(temperature=temperatures)
    for row, answer in enumerate(sampled.answers()):
        prompt = PROMPTS[row // G]
        logits_TV = forward([*prompt, *answer])
        for at, token in enumerate(answer):
            expected = log_softmax(logits_TV[len(prompt) - 1 + at], temperatures[row])[token]
            assert sampled.decoded.logprobs_BN[row, at] == pytest.approx(expected, abs=1e-5)


def test_a_rows_answer_follows_its_key_wherever_the_row_stands(run):
    order = [2, 0, 1, 5, 4, 3]
    straight, turned = run(seeds=range(6)), run(seeds=order)
    assert turned.answers() == [straight.answers()[i] for i in order]
    swapped = run(prompts=PROMPTS[::-1], seeds=[3, 4, 5, 0, 1, 2])
    assert swapped.answers() == straight.answers()[3:] + straight.answers()[:3]


def test_every_key_and_every_step_has_noise_of_its_own(run, even, config):
    """One noise for all steps, or for all rows, would repeat its token."""
    tokens = []
    for first in range(0, 60, 6):
        tokens += run(given=even, seeds=range(first, first + 6)).answers()
    noise_BN = (np.array(tokens) + 0.5) / config.vocab_size
    assert len({tuple(t) for t in tokens}) == 60
    correlation_NN = np.corrcoef(noise_BN.T)
    assert np.abs(correlation_NN - np.eye(N)).max() < 0.45  # 3.5 standard errors at 60 rows
    assert abs(noise_BN.mean() - 0.5) < 4 * np.sqrt(1 / 12 / noise_BN.size)
    assert abs(noise_BN.std() - np.sqrt(1 / 12)) < 0.04


def test_a_row_ends_with_the_stop_token_and_nothing_follows_it(run):
    free = run()
    stop = free.answers()[0][2]
    stopped = run(stop_id=stop)
    for row, answer in enumerate(free.answers()):
        ends = stop in answer
        expected = answer[: answer.index(stop) + 1] if ends else answer
        assert stopped.answers()[row] == expected
        assert bool(stopped.decoded.stopped_B[row]) == ends
        length = len(expected)
        np.testing.assert_allclose(
            stopped.decoded.logprobs_BN[row, :length],
            free.decoded.logprobs_BN[row, :length],
            atol=1e-5,
        )
        assert not stopped.decoded.logprobs_BN[row, length:].any()
        assert not stopped.decoded.tokens_BN[row, length:].any()
    assert stopped.decoded.stopped_B[0] and not free.decoded.stopped_B.any()


def test_each_row_keeps_its_own_limit_and_zero_means_not_in_use(run):
    limits = [0, 1, 2, 3, 6, 5]
    limited = run(limit=limits)
    assert limited.decoded.length_B.tolist() == limits
    assert limited.answers() == [a[:n] for a, n in zip(run().answers(), limits, strict=True)]
    assert not limited.decoded.stopped_B.any()
