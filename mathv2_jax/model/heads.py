"""The two heads on the trunk: token log-probabilities, and the verifier's P(score)."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mathv2_jax import sharding

_LEFT_OUT = -1e30  # the logit of a token that could not be drawn


class TokenLogprobs(NamedTuple):
    """Per target token: its log-probability, and the entropy of the distribution it came from."""

    logprob_BT: Float[Array, "B T"]
    entropy_BT: Float[Array, "B T"]


def logits(hidden_BTD: Float[Array, "B T D"], unembed_DV: Float[Array, "D V"]) -> jax.Array:
    """Generator head: float32 logits, partitioned over the vocabulary."""
    unembed_DV = sharding.gathered(unembed_DV.astype(hidden_BTD.dtype), "embed", "vocab")
    out_BTV = _product(hidden_BTD, unembed_DV)
    return sharding.constrain(out_BTV, "batch", "time", "vocab")


def _product(hidden_BTD: jax.Array, unembed_DV: jax.Array) -> jax.Array:
    with jax.named_scope("unembed"):
        return jnp.einsum("BTD,DV->BTV", hidden_BTD, unembed_DV, preferred_element_type=jnp.float32)


def token_logprobs(
    hidden_BTD: Float[Array, "B T D"],
    unembed_DV: Float[Array, "D V"],
    targets_BT: Int[Array, "B T"],
    allowed_BTY: Int[Array, "B T Y"] | None = None,
    *,
    temperature: float = 1.0,
    chunk: int = 256,
) -> TokenLogprobs:
    """Log-probability of `targets_BT[b, t]` read from `hidden_BTD[b, t]`, at a temperature.

    Of a token with `allowed_BTY` it is that among these ids alone (-1: none; all -1: no bounds).
    Works on `chunk` times at once and recomputes logits in the backward pass, so [B, T, V] is
    never held. On a mesh each device does so with its tokens and its part of the vocabulary.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return TokenLogprobs(
            *_in_chunks(hidden_BTD, unembed_DV, targets_BT, allowed_BTY, temperature, chunk)
        )
    # The gradient of the unembedding is summed over the chunks on each device, and once over all.
    unembed_DV = sharding.gathered(unembed_DV.astype(hidden_BTD.dtype), "embed", "vocab")
    time = sharding.time_axis(hidden_BTD.shape[1])
    tokens = sharding.partition_spec(("batch", time), "tokens")
    (split,) = sharding.mesh_axes(("vocab",), mesh) or (None,)
    found = jax.shard_map(
        functools.partial(_in_chunks, temperature=temperature, chunk=chunk, split=split),
        in_specs=(
            sharding.partition_spec(("batch", time, None), "hidden"),
            sharding.partition_spec((None, "vocab"), "unembed"),
            tokens,
            sharding.partition_spec(("batch", time, None), "allowed"),
        ),
        out_specs=(tokens, tokens),
        check_vma=False,
    )(hidden_BTD, unembed_DV, targets_BT, allowed_BTY)
    return TokenLogprobs(*found)


def _in_chunks(
    hidden_BTD: jax.Array,
    unembed_DV: jax.Array,
    targets_BT: jax.Array,
    allowed_BTY: jax.Array | None,
    temperature: float,
    chunk: int,
    split: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One device's part; where mesh axis `split` splits the vocabulary, the parts' sums meet."""

    @jax.checkpoint
    def one_chunk(
        hidden_BcD: jax.Array, targets_Bc: jax.Array, allowed_BcY: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        logits_BcV = _product(hidden_BcD, unembed_DV.astype(hidden_BcD.dtype)) / temperature
        first = 0 if split is None else jax.lax.axis_index(split) * logits_BcV.shape[-1]
        if allowed_BcY is not None:
            logits_BcV = _among(logits_BcV, allowed_BcY, first)
        if split is not None:
            return _over_parts(logits_BcV, targets_Bc - first, split)
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
    allowed_nBcY = None
    if allowed_BTY is not None:
        allowed = jnp.pad(allowed_BTY, ((0, 0), (0, padding), (0, 0)), constant_values=-1)
        allowed_nBcY = allowed.reshape(batch, -1, size, allowed.shape[-1]).swapaxes(0, 1)
    chunks = (hidden_nBcD, targets_nBc, allowed_nBcY)
    logprob, entropy = jax.lax.map(lambda each: one_chunk(*each), chunks)

    def joined(x_nBc: jax.Array) -> jax.Array:
        return x_nBc.swapaxes(0, 1).reshape(batch, -1)[:, :length]

    return joined(logprob), joined(entropy)


def _among(logits_Bcv: jax.Array, allowed_BcY: jax.Array, first: jax.Array | int) -> jax.Array:
    """Logits of the allowed ids, of a part of the vocabulary that begins with id `first`."""
    size = logits_Bcv.shape[-1]
    places_BcY = allowed_BcY - first
    places_BcY = jnp.where((places_BcY >= 0) & (places_BcY < size), places_BcY, size)
    may_Bcv = jnp.zeros((*logits_Bcv.shape[:-1], size), bool)
    may_Bcv = jax.vmap(jax.vmap(lambda may_v, at_Y: may_v.at[at_Y].set(True, mode="drop")))(
        may_Bcv, places_BcY
    )
    unbound_Bc1 = (allowed_BcY < 0).all(axis=-1, keepdims=True)
    return jnp.where(may_Bcv | unbound_Bc1, logits_Bcv, _LEFT_OUT)


def _over_parts(
    logits_Bcv: jax.Array, places_Bc: jax.Array, split: str
) -> tuple[jax.Array, jax.Array]:
    """Log-probability and entropy from one device's part of the vocabulary and the others' sums.

    `places_Bc` are the targets' places in this part; outside it where they are in another.
    """
    top_Bc1 = jax.lax.stop_gradient(jnp.max(logits_Bcv, axis=-1, keepdims=True))
    top_Bc1 = jax.lax.pmax(top_Bc1, split)
    weight_Bcv = jnp.exp(logits_Bcv - top_Bc1)
    is_target_Bcv = jnp.arange(logits_Bcv.shape[-1])[None, None, :] == places_Bc[..., None]
    picked_Bcv = jnp.where(is_target_Bcv, logits_Bcv, 0.0)
    parts = (jnp.sum(x, axis=-1) for x in (weight_Bcv, weight_Bcv * logits_Bcv, picked_Bcv))
    z_Bc, moment_Bc, picked_Bc = jax.lax.psum(tuple(parts), split)
    log_z_Bc = jnp.log(z_Bc) + top_Bc1[..., 0]
    return picked_Bc - log_z_Bc, log_z_Bc - moment_Bc / z_Bc


def score_logits(
    hidden_PD: Float[Array, "P D"], kernel_DX: Float[Array, "D 3"], bias_X: Float[Array, "3"]
) -> Float[Array, "P 3"]:
    """Verifier head: logits of the scores 0, 0.5, 1 in float32; no gradient into the trunk."""
    hidden = jax.lax.stop_gradient(hidden_PD).astype(jnp.float32)
    return hidden @ kernel_DX + bias_X[None, :]
