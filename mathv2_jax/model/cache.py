"""Which token sees which, and what a decoder keeps of prompts and answers: latents and keys."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Layout(NamedTuple):
    """Where the tokens of a row stand. Segment 0 is padding.

    A token sees, at or before its own place in the row, the tokens of its own segment and of the
    segment that it continues (`prefixes`; its own where it continues none). So several documents
    share a row, and several answers share one copy of their prompt.
    """

    positions_BT: Int[Array, "B T"]
    segments_BT: Int[Array, "B T"]
    prefixes_BT: Int[Array, "B T"]


class LatentPair(NamedTuple):
    """Per token: the normed kv latent (width C) and the shared rotated rope key (width R).

    With sparse attention the indexer's rotated key (width W) too.
    """

    latent: Float[Array, "... C"]
    rope_key: Float[Array, "... R"]
    index_key: Float[Array, "... W"] | None = None


class LayerCache(NamedTuple):
    """One layer's view while decoding B = P x G rows: P prompts of S slots, N own slots a row."""

    prompt: LatentPair  # [P, S, C], [P, S, R]
    own: LatentPair  # [B, N, C], [B, N, R]


class DecodeView(NamedTuple):
    """Which cached slots count for the token being decoded; the same for every layer."""

    prompt_PS: Bool[Array, "P S"]
    own_N: Bool[Array, "N"]


def visible(layout: Layout) -> Bool[Array, "B T T"]:
    """True at [b, t, s] where token t of row b attends to token s."""
    places_1T = jnp.arange(layout.segments_BT.shape[1])[None, :]
    return visible_from(layout.segments_BT, layout.prefixes_BT, places_1T, layout.segments_BT)


def visible_from(
    segments_BT: Int[Array, "B T"],
    prefixes_BT: Int[Array, "B T"],
    places_BT: Int[Array, "... T"],
    segments_BS: Int[Array, "B S"],
) -> Bool[Array, "B T S"]:
    """As `visible`, of some tokens of a row, at `places_BT` in it, over its first S tokens."""
    own_BTS = segments_BT[:, :, None] == segments_BS[:, None, :]
    prefix_BTS = prefixes_BT[:, :, None] == segments_BS[:, None, :]
    before_BTS = places_BT[:, :, None] >= jnp.arange(segments_BS.shape[1])[None, None, :]
    return (own_BTS | prefix_BTS) & before_BTS


def previous_tokens(
    tokens_BT: Int[Array, "B T"], sources_BT: Int[Array, "B T"], taps: int
) -> Int[Array, "B T W"]:
    """The `taps` tokens before each token along its own sequence, the nearest first.

    `sources_BT` is each token's predecessor in its row; a first token is its own.
    """
    found, at_BT = [], sources_BT
    for _ in range(taps):
        found.append(jnp.take_along_axis(tokens_BT, at_BT, axis=1))
        at_BT = jnp.take_along_axis(sources_BT, at_BT, axis=1)
    return jnp.stack(found, axis=-1) if found else jnp.zeros((*tokens_BT.shape, 0), jnp.int32)


def plain_sources(tokens_BT: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Predecessors where every row is one sequence."""
    before_T = jnp.maximum(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32) - 1, 0)
    return jnp.broadcast_to(before_T[None, :], tokens_BT.shape)


def plain_layout(lengths_B: jax.Array, length: int) -> Layout:
    """One right-padded sequence a row."""
    steps_T = jnp.arange(length, dtype=jnp.int32)
    segments_BT = (steps_T[None, :] < lengths_B[:, None]).astype(jnp.int32)
    positions_BT = jnp.broadcast_to(steps_T[None, :], segments_BT.shape)
    return Layout(positions_BT, segments_BT, segments_BT)
