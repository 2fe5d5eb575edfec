"""Attention of new tokens over the pages of their sequences, theirs among them.

A sequence's slots are gone through in blocks of a fixed size. So in calls of one shape what a token
gets is a function of its sequence alone, to the last bit: not of the other rows, nor of how long
they are, nor of where its own tokens were cut into calls.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mathv2_jax import sharding
from mathv2_jax.model import cache as cache_lib
from mathv2_jax.model import dsa, layers

_PICKING = 32  # queries at once, each with a copy of what it picks

_scores = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def pages_together(slots: int, size: int, pages_a_row: int) -> int:
    """Pages of a block of about `slots` slots, of which a page has `size`."""
    return min(max(1, slots // size), pages_a_row)


def rows_together(rows: int, most: int) -> int:
    """Of so many rows those that are attended to at once: a divisor, `most` or near it, or all.

    Rows of one part of a mesh alone are divided.
    """
    if not most or sharding.ways("batch") > 1:
        return rows
    divisor = next(each for each in range(min(most, rows), 0, -1) if rows % each == 0)
    return divisor if 2 * divisor > most else rows


class Held(NamedTuple):
    """A layer's pages, and who stands where in them.

    `slots` of a row are looked at together, and of rows that get one new token `rows` (0: all).
    """

    pages: cache_lib.Pages
    layer: jax.Array
    view: cache_lib.PageView
    slots: int
    rows: int = 0

    @property
    def together(self) -> int:
        """Pages of a block."""
        size, pages_a_row = self.pages.lines_LNZX.shape[2], self.view.table_BM.shape[1]
        return pages_together(self.slots, size, pages_a_row)

    @property
    def span(self) -> int:
        """Slots of a block."""
        return self.together * self.pages.lines_LNZX.shape[2]

    @property
    def number(self) -> jax.Array:
        """Blocks that the longest sequence reaches into."""
        return jnp.max(self.view.slots_BT) // self.span + 1

    def read(self, pool_LNZX: jax.Array, block: jax.Array, width: int) -> Float[Array, "B s W"]:
        """What a pool's lines begin with, of a block of each row; beyond the table's end page 0."""
        table_BM = self.view.table_BM
        at_m = block * self.together + jnp.arange(self.together)
        inside_m = at_m < table_BM.shape[1]
        pages_Bm = table_BM[:, jnp.where(inside_m, at_m, 0)]
        pages_Bm = jnp.where(inside_m[None], pages_Bm, 0)
        found_BsW = cache_lib.read(pool_LNZX, self.layer, pages_Bm, width)
        # Else the CPU's compiler would gather inside its products, several times as slowly.
        return jax.lax.optimization_barrier(found_BsW)


def attend(
    q_BTHK: Float[Array, "B T H K"],
    q_BTHR: Float[Array, "B T H R"],
    kv_b_CHX: Float[Array, "C H X"],
    held: Held,
    scale: float,
    index: dsa.IndexQueries | None = None,
    topk: int = 0,
) -> Float[Array, "B T H U"]:
    """Values by head. `kv_b_CHX` expands a latent to keys (K) and values (U).

    With an index, of the `topk` slots that it picks; in the absorbed form, on latents, wherever
    that takes fewer products.
    """
    latent, heads_width = kv_b_CHX.shape[0], kv_b_CHX.shape[2]
    key_CHK, value_CHU = jnp.split(kv_b_CHX, [q_BTHK.shape[-1]], axis=-1)
    length, turned = q_BTHK.shape[1], q_BTHR.shape[-1]
    expanded = heads_width * (latent + length) + turned * length
    if index is None and expanded < (2 * latent + turned) * length:
        return _expanded(q_BTHK, q_BTHR, kv_b_CHX, held, scale)
    q_BTHC = jnp.einsum("BTHK,CHK->BTHC", q_BTHK, key_CHK)
    q_BTHX = jnp.concatenate([q_BTHC, q_BTHR], axis=-1)
    if index is None:
        mixed_BTHC = _by_rows(q_BTHX, latent, held, scale)
    else:
        mixed_BTHC = _picked(q_BTHX, latent, held, scale, index, topk)
    return jnp.einsum("BTHC,CHU->BTHU", mixed_BTHC.astype(q_BTHK.dtype), value_CHU)


def _by_rows(q_BTHX: jax.Array, latent: int, held: Held, scale: float) -> jax.Array:
    """Some rows after the others: what they look at stays in a CPU's cache, and of rows that stand
    by their length the short ones do not wait for the long.
    """
    rows, length = q_BTHX.shape[:2]
    some = rows_together(rows, held.rows) if length == 1 else rows
    if some == rows:
        return _absorbed(q_BTHX, latent, held, scale)

    def one(given: tuple[jax.Array, cache_lib.PageView]) -> jax.Array:
        return _absorbed(given[0], latent, held._replace(view=given[1]), scale)

    parts = jax.tree.map(lambda x: x.reshape(-1, some, *x.shape[1:]), (q_BTHX, held.view))
    found = jax.lax.map(one, parts)
    return found.reshape(rows, *found.shape[2:])


def _absorbed(
    q_BTHX: jax.Array,
    latent: int,
    held: Held,
    scale: float,
) -> jax.Array:
    def block(lines_BsX: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _scores("BTHX,BsX->BTHs", q_BTHX, lines_BsX), lines_BsX

    def mix(weight_BTHs: jax.Array, lines_BsX: jax.Array) -> jax.Array:
        # Of whole lines: CPUs would copy the latents out of them, for longer than the product.
        return _scores("BTHs,BsX->BTHX", weight_BTHs, lines_BsX)

    return _over_blocks(q_BTHX.shape, q_BTHX.shape[-1], held, scale, block, mix)[..., :latent]


def _expanded(
    q_BTHK: jax.Array,
    q_BTHR: jax.Array,
    kv_b_CHX: jax.Array,
    held: Held,
    scale: float,
) -> jax.Array:
    latent, width = kv_b_CHX.shape[0], q_BTHK.shape[-1]

    def block(lines_BsX: jax.Array) -> tuple[jax.Array, jax.Array]:
        latent_BsC, key_BsR = jnp.split(lines_BsX, [latent], axis=-1)
        both_BsHX = jnp.einsum("BsC,CHX->BsHX", latent_BsC, kv_b_CHX)
        key_BsHK, value_BsHU = jnp.split(both_BsHX, [width], axis=-1)
        score_BTHs = _scores("BTHK,BsHK->BTHs", q_BTHK, key_BsHK)
        return score_BTHs + _scores("BTHR,BsR->BTHs", q_BTHR, key_BsR), value_BsHU

    def mix(weight_BTHs: jax.Array, value_BsHU: jax.Array) -> jax.Array:
        return _scores("BTHs,BsHU->BTHU", weight_BTHs, value_BsHU)

    shape = (*q_BTHK.shape[:-1], kv_b_CHX.shape[2] - width)
    line = latent + q_BTHR.shape[-1]
    return _over_blocks(shape, line, held, scale, block, mix).astype(q_BTHK.dtype)


def _over_blocks(
    shape: tuple[int, ...],
    line: int,
    held: Held,
    scale: float,
    block: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    mix: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """Softmax attention block by block: a running maximum, sum and mix, in float32.

    `shape` is that of what is mixed, `line` the width of what a slot holds.
    """

    def one(at: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        best_BTH, total_BTH, mixed_BTHC = carry
        score_BTHs, values = block(held.read(held.pages.lines_LNZX, at, line))
        seen_BTs = cache_lib.seen_slots(held.view, at * held.span + jnp.arange(held.span))
        score_BTHs = jnp.where(seen_BTs[:, :, None], score_BTHs * scale, layers.MASKED)
        new_BTH = jnp.maximum(best_BTH, jnp.max(score_BTHs, axis=-1))
        weight_BTHs = jnp.exp(score_BTHs - new_BTH[..., None])
        kept_BTH = jnp.exp(best_BTH - new_BTH)
        mixed = mix(weight_BTHs.astype(values.dtype), values)
        return (
            new_BTH,
            total_BTH * kept_BTH + jnp.sum(weight_BTHs, axis=-1),
            mixed_BTHC * kept_BTH[..., None] + mixed,
        )

    start = (
        jnp.full(shape[:-1], layers.MASKED, jnp.float32),
        jnp.zeros(shape[:-1], jnp.float32),
        jnp.zeros(shape, jnp.float32),
    )
    with jax.named_scope("attend"):
        _, total_BTH, mixed_BTHC = jax.lax.fori_loop(0, held.number, one, start)
    # The largest weighs 1. Of rows that are not in use there may be no block: theirs are zeros, for
    # what is not finite would travel to others by the page that nobody owns.
    return mixed_BTHC / jnp.maximum(total_BTH, 1.0)[..., None]


def _picked(
    q_BTHX: jax.Array,
    latent: int,
    held: Held,
    scale: float,
    index: dsa.IndexQueries,
    topk: int,
) -> jax.Array:
    keys, view = held.pages.keys_LNZW, held.view
    assert keys is not None, "a model with an indexer keeps its keys"
    turns = -(-view.table_BM.shape[1] // held.together)

    def one(at: jax.Array, score_BTS: jax.Array) -> jax.Array:
        found_BTs = dsa.scores(index, held.read(keys, at, index.heads_BTJW.shape[-1]))
        return jax.lax.dynamic_update_slice_in_dim(score_BTS, found_BTs, at * held.span, axis=2)

    with jax.named_scope("index"):
        empty_BTS = jnp.zeros((*q_BTHX.shape[:2], turns * held.span), jnp.float32)
        score_BTS = jax.lax.fori_loop(0, held.number, one, empty_BTS)

    def of_some(some: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q_BtHX, score_BtS, slots_Bt = some
        with jax.named_scope("index"):
            seen_BtS = cache_lib.seen_slots(
                view._replace(slots_BT=slots_Bt), jnp.arange(score_BtS.shape[-1])
            )
            slots_BtY, count_Bt1 = dsa.pick(score_BtS, seen_BtS, topk)
        lines_BtYX = cache_lib.read_slots(
            held.pages.lines_LNZX, held.layer, view.table_BM, slots_BtY, q_BtHX.shape[-1]
        )
        lines_BtYX = jax.lax.optimization_barrier(lines_BtYX)
        score_BtHY = _scores("BtHX,BtYX->BtHY", q_BtHX, lines_BtYX) * scale
        kept_BtY = jnp.arange(slots_BtY.shape[-1])[None, None] < count_Bt1
        score_BtHY = jnp.where(kept_BtY[:, :, None], score_BtHY, layers.MASKED)
        weight_BtHY = jax.nn.softmax(score_BtHY, axis=-1).astype(lines_BtYX.dtype)
        return _scores("BtHY,BtYC->BtHC", weight_BtHY, lines_BtYX[..., :latent])

    asked = (q_BTHX, score_BTS, view.slots_BT)
    with jax.named_scope("attend"):
        length = q_BTHX.shape[1]
        if length <= _PICKING or length % _PICKING:
            return of_some(asked)
        parts = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(x.shape[0], -1, _PICKING, *x.shape[2:]), 1, 0), asked
        )
        found = jnp.moveaxis(jax.lax.map(of_some, parts), 0, 1)
        return found.reshape(found.shape[0], length, *found.shape[3:])
