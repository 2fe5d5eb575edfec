"""One token from logits: temperature, top-p, and its log-probability under what was sampled."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Sampled(NamedTuple):
    """A token a row and its log-probability under the (tempered, truncated) distribution."""

    token_B: Int[Array, "B"]
    logprob_B: Float[Array, "B"]


def kept_by_top_p(logits_BV: Float[Array, "B V"], top_p_B: Float[Array, "B"]) -> Bool[Array, "B V"]:
    """The smallest set of most likely tokens whose mass reaches top_p (at least the likeliest)."""
    order_BV = jnp.argsort(-logits_BV, axis=-1)
    sorted_BV = jnp.take_along_axis(jax.nn.softmax(logits_BV, axis=-1), order_BV, axis=-1)
    before_BV = jnp.cumsum(sorted_BV, axis=-1) - sorted_BV
    keep_BV = before_BV < top_p_B[:, None]
    inverse_BV = jnp.argsort(order_BV, axis=-1)
    return jnp.take_along_axis(keep_BV, inverse_BV, axis=-1)


def sample(
    logits_BV: Float[Array, "B V"],
    uniform_B: Float[Array, "B"],
    temperature_B: Float[Array, "B"],
    top_p_B: Float[Array, "B"],
    *,
    truncate: bool,
) -> Sampled:
    """Inverse-CDF sampling with one uniform number in [0, 1) a row; temperature 0 is greedy.

    `truncate` False promises that every top_p is 1 and saves the sort. A greedy row's
    log-probability is that of temperature 1.
    """
    greedy_B = temperature_B <= 0.0
    tempered_BV = logits_BV / jnp.where(greedy_B, 1.0, temperature_B)[:, None]
    if truncate:
        keep_BV = kept_by_top_p(tempered_BV, jnp.where(greedy_B, 1.0, top_p_B))
        tempered_BV = jnp.where(keep_BV, tempered_BV, -jnp.inf)
    logprob_BV = jax.nn.log_softmax(tempered_BV, axis=-1)
    cdf_BV = jnp.cumsum(jnp.exp(logprob_BV), axis=-1)
    below_BV = cdf_BV <= uniform_B[:, None] * cdf_BV[:, -1:]
    drawn_B = jnp.minimum(jnp.sum(below_BV, axis=-1), logits_BV.shape[-1] - 1)
    token_B = jnp.where(greedy_B, jnp.argmax(logits_BV, axis=-1), drawn_B).astype(jnp.int32)
    picked_B = jnp.take_along_axis(logprob_BV, token_B[:, None], axis=-1)[:, 0]
    return Sampled(token_B, picked_B)
