"""One token from logits: temperature, truncation, and its log-probability under both."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Truncation(NamedTuple):
    """What of a row's tempered distribution is left: tokens that every rule keeps.

    Each rule looks at the whole distribution: the likeliest tokens whose mass reaches `top_p` (1:
    all), the `top_k` likeliest (0: all), and those at least `min_p` times as likely as the
    likeliest (0: all). The likeliest stays in any case.
    """

    top_p_B: Float[Array, "B"]
    top_k_B: Int[Array, "B"]
    min_p_B: Float[Array, "B"]


class Sampled(NamedTuple):
    """A token a row and its log-probability: under what was sampled, and without truncation.

    `kept_BV` are the tokens that could have been drawn, None where none was left out.
    """

    token_B: Int[Array, "B"]
    logprob_B: Float[Array, "B"]
    policy_logprob_B: Float[Array, "B"]
    kept_BV: Bool[Array, "B V"] | None


def kept(logits_BV: Float[Array, "B V"], rules: Truncation) -> Bool[Array, "B V"]:
    """The tokens that all rules keep, of equals the earlier one first."""
    order_BV = jnp.argsort(-logits_BV, axis=-1)
    sorted_BV = jnp.take_along_axis(jax.nn.softmax(logits_BV, axis=-1), order_BV, axis=-1)
    before_BV = jnp.cumsum(sorted_BV, axis=-1) - sorted_BV
    rank_1V = jnp.arange(logits_BV.shape[-1])[None]
    keep_BV = (before_BV < rules.top_p_B[:, None]) | (rules.top_p_B[:, None] >= 1.0)
    keep_BV &= (rank_1V < rules.top_k_B[:, None]) | (rules.top_k_B[:, None] <= 0)
    keep_BV &= sorted_BV >= rules.min_p_B[:, None] * sorted_BV[:, :1]
    keep_BV |= rank_1V == 0
    inverse_BV = jnp.argsort(order_BV, axis=-1)
    return jnp.take_along_axis(keep_BV, inverse_BV, axis=-1)


def sample(
    logits_BV: Float[Array, "B V"],
    uniform_B: Float[Array, "B"],
    temperature_B: Float[Array, "B"],
    rules: Truncation | None = None,
) -> Sampled:
    """Inverse-CDF sampling with one uniform number in [0, 1) a row; temperature 0 is greedy.

    Without `rules` no row is truncated, which saves a sort. A greedy row's log-probabilities are
    those of temperature 1, and nothing of it is truncated.
    """
    greedy_B = temperature_B <= 0.0
    tempered_BV = logits_BV / jnp.where(greedy_B, 1.0, temperature_B)[:, None]
    policy_BV = jax.nn.log_softmax(tempered_BV, axis=-1)
    logprob_BV, kept_BV = policy_BV, None
    if rules is not None:
        kept_BV = kept(tempered_BV, rules) | greedy_B[:, None]
        logprob_BV = jax.nn.log_softmax(jnp.where(kept_BV, tempered_BV, -jnp.inf), axis=-1)
    cdf_BV = jnp.cumsum(jnp.exp(logprob_BV), axis=-1)
    below_BV = cdf_BV <= uniform_B[:, None] * cdf_BV[:, -1:]
    drawn_B = jnp.minimum(jnp.sum(below_BV, axis=-1), logits_BV.shape[-1] - 1)
    token_B = jnp.where(greedy_B, jnp.argmax(logits_BV, axis=-1), drawn_B).astype(jnp.int32)
    own_B, policy_B = (
        jnp.take_along_axis(x_BV, token_B[:, None], axis=-1)[:, 0]
        for x_BV in (logprob_BV, policy_BV)
    )
    return Sampled(token_B, own_B, policy_B, kept_BV)


def kept_ids(kept_BV: Bool[Array, "B V"], most: int) -> tuple[Int[Array, "B Y"], Int[Array, "B"]]:
    """The ids of kept tokens, ascending, at most `most` and -1 after them; and their number."""
    place_BV = jnp.cumsum(kept_BV, axis=-1) - 1
    number_B = place_BV[:, -1] + 1
    wanted_Y = jnp.arange(most)
    # The y-th kept token is the first whose place reaches y.
    id_BY = jax.vmap(lambda place_V: jnp.searchsorted(place_V, wanted_Y, side="left"))(place_BV)
    return jnp.where(wanted_Y[None] < number_B[:, None], id_BY, -1).astype(jnp.int32), number_B
