"""Which token sees which, and what a sampler keeps of its sequences: latents and keys, in pages."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mathv2_jax import sharding
from mathv2_jax.model.config import ModelConfig

_LANES = 128  # of a TPU's registers


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


class Pages(NamedTuple):
    """The cache of some layers: a pool of N pages of Z slots, each with one token's latents.

    `lines` holds a token's kv latent and its rope key side by side (X = C + R, and what `lanes`
    adds), `keys` the indexer's keys where there is one. Page 0 takes what nobody reads. Where a
    mesh splits rows, N is split alike: each part is a pool of its own, with a page 0.
    """

    lines_LNZX: Float[Array, "L N Z X"]
    keys_LNZW: Float[Array, "L N Z W"] | None = None


class PageView(NamedTuple):
    """Where B rows of T new tokens stand in their pages; the same for every layer.

    Slot s of a row is slot s % Z of page `table_BM[b, s // Z]`, of the pool of the row's own part.
    A token sees the slots up to its own, but for those from `shared_B` to `padded_B`: below lies
    the beginning of a prompt, which other rows may share, and after it what is the row's own.
    """

    table_BM: Int[Array, "B M"]
    slots_BT: Int[Array, "B T"]  # of the new tokens; -1: none
    shared_B: Int[Array, "B"]
    padded_B: Int[Array, "B"]


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


def capacity(pages: Pages, view: PageView) -> int:
    """Slots that a row may have."""
    return view.table_BM.shape[1] * pages.lines_LNZX.shape[2]


def lanes(width: int) -> int:
    """How wide a line is kept: beyond 128 a multiple of that.

    TPUs would keep others in an order of their own, in which nothing can be computed: every call
    made a copy of the pool, as large as itself (libtpu 0.0.42.1).
    """
    return -(-width // _LANES) * _LANES if width > _LANES else width


def empty_pages(config: ModelConfig, layers: int, number: int, page: int) -> Pages | None:
    """A pool for `layers` layers; None for none."""
    if not layers:
        return None
    width, dtype = config.kv_latent_width + config.head_rope_width, config.compute_dtype
    keys = None
    if config.index_topk:
        keys = jnp.zeros((layers, number, page, lanes(config.index_head_width)), dtype)
    return Pages(jnp.zeros((layers, number, page, lanes(width)), dtype), keys)


def _by_part(
    one: Callable[..., jax.Array], given: tuple[str, ...], gives: str
) -> Callable[..., jax.Array]:
    """`one` on each part of the mesh's rows, with that part's own pool; a layer comes last.

    `given` and `gives` say of its other arguments and of its result which are pools and which rows.
    """
    if sharding.ways("batch") == 1:
        return one
    axes = {"pool": (None, "batch"), "rows": ("batch",)}
    into = [sharding.partition_spec(axes[kind], kind) for kind in given]
    return jax.shard_map(
        one,
        in_specs=(*into, jax.sharding.PartitionSpec()),
        out_specs=sharding.partition_spec(axes[gives], gives),
        axis_names=set(sharding.LOGICAL_TO_MESH["batch"]),
        check_vma=False,
    )


def write(pages: Pages, layer: jax.Array, view: PageView, new: LatentPair) -> Pages:
    """The pages with the new tokens of a layer in their slots."""
    size = pages.lines_LNZX.shape[2]
    held_BT = view.slots_BT >= 0
    slots_BT = jnp.maximum(view.slots_BT, 0)
    page_BT = jnp.take_along_axis(view.table_BM, slots_BT // size, axis=1)
    page_BT, place_BT = jnp.where(held_BT, page_BT, 0), slots_BT % size

    def put(pool_LNZX: jax.Array, x_BTX: jax.Array, page_BT: Any, place_BT: Any, layer: Any) -> Any:
        at = pool_LNZX.at[layer, page_BT, place_BT]
        more = pool_LNZX.shape[-1] - x_BTX.shape[-1]
        x_BTX = jnp.pad(x_BTX.astype(pool_LNZX.dtype), ((0, 0), (0, 0), (0, more)))
        return at.set(x_BTX, mode="promise_in_bounds")

    put = _by_part(put, ("pool", "rows", "rows", "rows"), "pool")
    lines_BTX = jnp.concatenate([new.latent, new.rope_key], axis=-1)
    keys = pages.keys_LNZW
    if keys is not None and new.index_key is not None:
        keys = put(keys, new.index_key, page_BT, place_BT, layer)
    return Pages(put(pages.lines_LNZX, lines_BTX, page_BT, place_BT, layer), keys)


def read(
    pool_LNZX: Float[Array, "L N Z X"],
    layer: jax.Array,
    pages_BM: Int[Array, "B m"],
    width: int,
) -> Float[Array, "B S W"]:
    """Whole pages of a layer, one after another, S = m Z: the first `width` of each line."""

    def get(pool_LNZX: jax.Array, pages_BM: jax.Array, layer: jax.Array) -> jax.Array:
        num_pages = pool_LNZX.shape[1]
        flat = pool_LNZX.reshape(-1, *pool_LNZX.shape[2:])
        found = flat.at[layer * num_pages + pages_BM].get(mode="promise_in_bounds")
        return found.reshape(found.shape[0], -1, found.shape[-1])[..., :width]

    return _by_part(get, ("pool", "rows"), "rows")(pool_LNZX, pages_BM, layer)


def read_slots(
    pool_LNZX: Float[Array, "L N Z X"],
    layer: jax.Array,
    table_BM: Int[Array, "B M"],
    slots_BY: Int[Array, "B ..."],
    width: int,
) -> Float[Array, "B ... W"]:
    """What stands in single slots of rows: the first `width` of each line."""

    def get(pool_LNZX: jax.Array, table_BM: Any, slots_BY: Any, layer: jax.Array) -> jax.Array:
        num_pages, size = pool_LNZX.shape[1:3]
        flat_BY = slots_BY.reshape(slots_BY.shape[0], -1)
        pages_BY = jnp.take_along_axis(table_BM, flat_BY // size, axis=1)
        lines = pool_LNZX.reshape(-1, pool_LNZX.shape[-1])
        at_BY = (layer * num_pages + pages_BY) * size + flat_BY % size
        found = lines.at[at_BY].get(mode="promise_in_bounds")
        return found[..., :width].reshape(*slots_BY.shape, width)

    return _by_part(get, ("pool", "rows", "rows"), "rows")(pool_LNZX, table_BM, slots_BY, layer)


def seen_slots(view: PageView, slots_S: Int[Array, "S"]) -> Bool[Array, "B T S"]:
    """Which of these slots, of each row, its new tokens see."""
    slots_1S, slots_11S = slots_S[None], slots_S[None, None]
    empty_BS = (slots_1S >= view.shared_B[:, None]) & (slots_1S < view.padded_B[:, None])
    return (slots_11S <= view.slots_BT[:, :, None]) & ~empty_BS[:, None]
