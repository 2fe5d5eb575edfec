import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mathv2_jax.model import heads

BATCH, LENGTH, WIDTH, VOCAB = 2, 7, 6, 11


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.fixture(scope="module")
def inputs():
    targets_BT = np.random.default_rng(2).integers(0, VOCAB, (BATCH, LENGTH))
    return draw(0, BATCH, LENGTH, WIDTH), 2 * draw(1, WIDTH, VOCAB), jnp.asarray(targets_BT)


def at_once(hidden_BTD, unembed_DV, targets_BT, temperature):
    """Log-probabilities and entropies from the whole [B, T, V]."""
    logp_BTV = jax.nn.log_softmax(heads.logits(hidden_BTD, unembed_DV) / temperature, axis=-1)
    picked_BT = jnp.take_along_axis(logp_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return picked_BT, -jnp.sum(jnp.exp(logp_BTV) * logp_BTV, axis=-1)


@pytest.mark.parametrize("chunk", [1, 3, 7, 256])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunks_give_the_log_softmax_and_the_entropy_at_a_temperature(inputs, chunk, temperature):
    got = heads.token_logprobs(*inputs, temperature=temperature, chunk=chunk)
    hidden_BTD, unembed_DV, targets_BT = inputs
    logprob_BT, entropy_BT = at_once(hidden_BTD, unembed_DV, targets_BT, temperature)
    np.testing.assert_allclose(got.logprob_BT, logprob_BT, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got.entropy_BT, entropy_BT, rtol=1e-5, atol=1e-5)


def test_temperature_is_the_exponent_of_the_distribution(inputs):
    hidden_BTD, unembed_DV, targets_BT = inputs
    logits_BTV = np.asarray(hidden_BTD, np.float64) @ np.asarray(unembed_DV, np.float64)
    power_BTV = np.exp(logits_BTV) ** (1 / 0.5)
    p_BTV = power_BTV / power_BTV.sum(-1, keepdims=True)
    got = heads.token_logprobs(*inputs, temperature=0.5, chunk=4)
    picked_BT = np.take_along_axis(p_BTV, np.asarray(targets_BT)[..., None], -1)[..., 0]
    np.testing.assert_allclose(np.exp(got.logprob_BT), picked_BT, rtol=1e-4)
    np.testing.assert_allclose(got.entropy_BT, -(p_BTV * np.log(p_BTV)).sum(-1), atol=1e-5)


def test_a_uniform_distribution_has_the_entropy_of_its_size():
    hidden_BTD, targets_BT = jnp.zeros((1, 4, WIDTH)), jnp.zeros((1, 4), jnp.int32)
    got = heads.token_logprobs(hidden_BTD, draw(1, WIDTH, VOCAB), targets_BT, chunk=3)
    np.testing.assert_allclose(got.entropy_BT, np.log(VOCAB), rtol=1e-6)
    np.testing.assert_allclose(got.logprob_BT, -np.log(VOCAB), rtol=1e-6)


def test_gradients_through_chunks_equal_those_of_the_whole(inputs):
    hidden_BTD, unembed_DV, targets_BT = inputs
    weight_BT, mix_BT = draw(3, BATCH, LENGTH), draw(4, BATCH, LENGTH)

    def chunked(hidden_BTD, unembed_DV):
        found = heads.token_logprobs(hidden_BTD, unembed_DV, targets_BT, temperature=0.8, chunk=3)
        return jnp.sum(weight_BT * found.logprob_BT + mix_BT * found.entropy_BT)

    def whole(hidden_BTD, unembed_DV):
        logprob_BT, entropy_BT = at_once(hidden_BTD, unembed_DV, targets_BT, 0.8)
        return jnp.sum(weight_BT * logprob_BT + mix_BT * entropy_BT)

    got = jax.grad(chunked, argnums=(0, 1))(hidden_BTD, unembed_DV)
    wanted = jax.grad(whole, argnums=(0, 1))(hidden_BTD, unembed_DV)
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_memory_does_not_grow_with_length_times_vocabulary():
    """Bytes that XLA sets aside for value and gradient, at lengths 256 and 2048, chunks of 64."""
    vocab, width = 4096, 8

    def temp_bytes(length):
        def loss(hidden_BTD, unembed_DV):
            targets_BT = jnp.zeros((1, length), jnp.int32)
            return jnp.sum(heads.token_logprobs(hidden_BTD, unembed_DV, targets_BT, chunk=64)[0])

        args = (jnp.zeros((1, length, width)), jnp.zeros((width, vocab)))
        compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temp_bytes(256), temp_bytes(2048)
    logits = 4 * (2048 - 256) * vocab
    assert long - short < logits / 50
    assert short > 4 * 64 * vocab  # one chunk of logits: what is measured is the whole program


def test_logits_of_a_bfloat16_stream_are_summed_in_float32():
    hidden_BTD, unembed_DV = draw(5, 1, 4, 64).astype(jnp.bfloat16), draw(6, 64, VOCAB)
    got = heads.logits(hidden_BTD, unembed_DV)
    exact_BTV = np.asarray(hidden_BTD, np.float64) @ np.asarray(
        unembed_DV.astype(jnp.bfloat16), np.float64
    )
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, exact_BTV, rtol=1e-5, atol=1e-4)  # bfloat16 rounds by 4e-3


def test_verifier_head_is_affine_in_float32_and_leaves_the_trunk_alone():
    hidden_PD = draw(7, 5, WIDTH).astype(jnp.bfloat16)
    kernel_DX, bias_X = draw(8, WIDTH, 3), draw(9, 3)
    labels_P = jnp.asarray([0, 1, 2, 2, 0])

    def loss(hidden_PD, kernel_DX, bias_X):
        logits_P3 = heads.score_logits(hidden_PD, kernel_DX, bias_X)
        each_P = jnp.take_along_axis(
            jax.nn.log_softmax(logits_P3, axis=-1), labels_P[:, None], axis=1
        )
        return -jnp.sum(each_P), logits_P3

    grads, logits_P3 = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(hidden_PD, kernel_DX, bias_X)
    hidden = np.asarray(hidden_PD, np.float64)
    wanted_P3 = hidden @ np.asarray(kernel_DX, np.float64) + np.asarray(bias_X, np.float64)
    assert logits_P3.dtype == jnp.float32
    np.testing.assert_allclose(logits_P3, wanted_P3, rtol=1e-5, atol=1e-5)
    into_trunk, into_kernel, into_bias = grads
    assert not np.asarray(into_trunk, np.float32).any()
    error_P3 = np.exp(wanted_P3) / np.exp(wanted_P3).sum(-1, keepdims=True)
    error_P3 -= np.eye(3)[np.asarray(labels_P)]
    np.testing.assert_allclose(into_kernel, hidden.T @ error_P3, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(into_bias, error_P3.sum(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_among_allowed_ids_the_softmax_is_over_these_alone(inputs, chunk):
    """Of one id, of three, of all by name, and without bounds; the gradient too."""
    hidden_BTD, unembed_DV, targets_BT = inputs
    rng = np.random.default_rng(5)
    allowed_BTY = np.full((BATCH, LENGTH, VOCAB), -1)
    may_BTV = np.ones((BATCH, LENGTH, VOCAB), bool)
    for row, time in np.ndindex(BATCH, LENGTH):
        size = (1, 3, VOCAB, 0)[(row * LENGTH + time) % 4]
        if not size:
            continue
        target = int(targets_BT[row, time])
        others = [v for v in rng.permutation(VOCAB).tolist() if v != target]
        ids = sorted([target, *others[: size - 1]])
        allowed_BTY[row, time, :size] = ids
        may_BTV[row, time] = np.isin(np.arange(VOCAB), ids)
    weight_BT, mix_BT = draw(3, BATCH, LENGTH), draw(4, BATCH, LENGTH)

    def total(found):
        return jnp.sum(weight_BT * found[0] + mix_BT * found[1])

    def chunked(hidden_BTD, unembed_DV):
        allowed = jnp.asarray(allowed_BTY)
        return total(heads.token_logprobs(hidden_BTD, unembed_DV, targets_BT, allowed, chunk=chunk))

    def whole(hidden_BTD, unembed_DV):
        logits_BTV = jnp.where(may_BTV, heads.logits(hidden_BTD, unembed_DV), -jnp.inf)
        logp_BTV = jax.nn.log_softmax(logits_BTV, axis=-1)
        picked_BT = jnp.take_along_axis(logp_BTV, targets_BT[..., None], axis=-1)[..., 0]
        safe_BTV = jnp.where(may_BTV, logp_BTV, 0.0)
        return total(
            (picked_BT, -jnp.sum(jnp.where(may_BTV, jnp.exp(safe_BTV), 0.0) * safe_BTV, -1))
        )

    got, got_grads = jax.value_and_grad(chunked, argnums=(0, 1))(hidden_BTD, unembed_DV)
    expected, grads = jax.value_and_grad(whole, argnums=(0, 1))(hidden_BTD, unembed_DV)
    assert float(got) == pytest.approx(float(expected), abs=1e-5)
    for one, other in zip(got_grads, grads, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
