"""The two heads on the trunk: token log-probabilities, and the verifier's P(score)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mathv2_jax import sharding


class TokenLogprobs(NamedTuple):
    """Per target token: its log-probability, and the entropy of the distribution it came from."""

    logprob_BT: Float[Array, "B T"]
    entropy_BT: Float[Array, "B T"]


def logits(hidden_BTD: Float[Array, "B T D"], unembed_DV: Float[Array, "D V"]) -> jax.Array:
    """Generator head: float32 logits, partitioned over the vocabulary."""
    out_BTV = jnp.einsum(
        "BTD,DV->BTV",
        hidden_BTD,
        unembed_DV.astype(hidden_BTD.dtype),
        preferred_element_type=jnp.float32,
    )
    return sharding.constrain(out_BTV, "batch", "time", "vocab")


def token_logprobs(
    hidden_BTD: Float[Array, "B T D"],
    unembed_DV: Float[Array, "D V"],
    targets_BT: Int[Array, "B T"],
    *,
    temperature: float = 1.0,
    chunk: int = 256,
) -> TokenLogprobs:
    """Log-probability of `targets_BT[b, t]` read from `hidden_BTD[b, t]`, at a temperature.

    Works on `chunk` times at once and recomputes logits in the backward pass, so [B, T, V] is
    never held.
    """

    @jax.checkpoint
    def one_chunk(hidden_BcD: jax.Array, targets_Bc: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_BcV = logits(hidden_BcD, unembed_DV) / temperature
        log_z_Bc = jax.nn.logsumexp(logits_BcV, axis=-1)
        picked_Bc = jnp.take_along_axis(logits_BcV, targets_Bc[..., None], axis=-1)[..., 0]
        mean_Bc = jnp.sum(jax.nn.softmax(logits_BcV, axis=-1) * logits_BcV, axis=-1)
        return picked_Bc - log_z_Bc, log_z_Bc - mean_Bc

    batch, length, width = hidden_BTD.shape
    size = min(chunk, length)
    padding = -length % size
    hidden = jnp.pad(hidden_BTD, ((0, 0), (0, padding), (0, 0)))
    targets = jnp.pad(targets_BT, ((0, 0), (0, padding)))
    hidden_nBcD = hidden.reshape(batch, -1, size, width).swapaxes(0, 1)
    targets_nBc = targets.reshape(batch, -1, size).swapaxes(0, 1)
    logprob, entropy = jax.lax.map(lambda pair: one_chunk(*pair), (hidden_nBcD, targets_nBc))

    def joined(x_nBc: jax.Array) -> jax.Array:
        return x_nBc.swapaxes(0, 1).reshape(batch, -1)[:, :length]

    return TokenLogprobs(joined(logprob), joined(entropy))


def score_logits(
    hidden_PD: Float[Array, "P D"], kernel_DX: Float[Array, "D 3"], bias_X: Float[Array, "3"]
) -> Float[Array, "P 3"]:
    """Verifier head: logits of the scores 0, 0.5, 1 in float32; no gradient into the trunk."""
    hidden = jax.lax.stop_gradient(hidden_PD).astype(jnp.float32)
    return hidden @ kernel_DX + bias_X[None, :]
