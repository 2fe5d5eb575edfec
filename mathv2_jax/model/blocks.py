"""A row's queries a block at a time, so that no square of scores is in memory."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mathv2_jax import sharding
from mathv2_jax.model import cache as cache_lib

CHUNKS = 8
# The name of what is never computed anew in a backward pass: small, and long to find.
KEPT = "kept"
keep = jax.checkpoint_policies.save_only_these_names(KEPT)
_MOST = 128  # queries of a block
_TILE_BYTES = 2**31


class Cut(NamedTuple):
    """A row of `length` in `chunks` of `loops` turns; in each every device has a block of queries.

    Where the mesh splits time its devices take blocks in turn, so that each has as much to do as
    the others though later queries see more.
    """

    length: int
    chunks: int
    loops: int
    turn: int

    @property
    def travels(self) -> bool:
        """Whether devices hold whole blocks of each turn, which they then send each other.

        Else it is left to the compiler, which gathers whole rows.
        """
        ways, turns = sharding.ways("time"), self.chunks * self.loops
        return ways > 1 and turns % ways == 0 and self.length == turns * self.turn

    def apart(self, tree: Any) -> Any:
        """Each array [B, T, heads or nothing, ...] as [chunks, loops, B, turn, ...].

        Zeros come after a row's end.
        """
        return jax.tree.map(self._sent_apart if self.travels else self._apart, tree)

    def joined(self, x: jax.Array) -> jax.Array:
        """The inverse of `apart`."""
        if self.travels:
            return self._sent_back(x)
        x_BT = jnp.moveaxis(x, 2, 0)
        return x_BT.reshape(x_BT.shape[0], -1, *x.shape[4:])[:, : self.length]

    def _sent_apart(self, x_BT: jax.Array) -> jax.Array:
        ways = sharding.ways("time")

        def send(x_Bt: jax.Array) -> jax.Array:
            """[B, T / ways, ...]: turns of this part of the row, with a block for each device."""
            (axis,) = _time_axes()
            shape = (x_Bt.shape[0], -1, ways, self.turn // ways, *x_Bt.shape[2:])
            x_BLWb = x_Bt.reshape(shape)
            x_BNb = jax.lax.all_to_all(x_BLWb, axis, split_axis=2, concat_axis=1, tiled=True)
            x_NBb = jnp.moveaxis(jnp.squeeze(x_BNb, 2), 1, 0)
            return x_NBb.reshape(self.chunks, self.loops, *x_NBb.shape[1:])

        batch, *heads = _split(x_BT.shape[0], *x_BT.shape[2:3])
        return _mapped(send, (batch, "time", *heads), (None, None, batch, "time", *heads))(x_BT)

    def _sent_back(self, x: jax.Array) -> jax.Array:
        def send(x_CLBb: jax.Array) -> jax.Array:
            (axis,) = _time_axes()
            x_BNb = jnp.moveaxis(x_CLBb.reshape(-1, *x_CLBb.shape[2:]), 0, 1)
            x_BN1b = jnp.expand_dims(x_BNb, 2)
            x_BLWb = jax.lax.all_to_all(x_BN1b, axis, split_axis=1, concat_axis=2, tiled=True)
            return x_BLWb.reshape(x_BLWb.shape[0], -1, *x_BLWb.shape[4:])

        batch, *heads = _split(x.shape[2], *x.shape[4:5])
        return _mapped(send, (None, None, batch, "time", *heads), (batch, "time", *heads))(x)

    def _apart(self, x_BT: jax.Array) -> jax.Array:
        padding = self.chunks * self.loops * self.turn - self.length
        x_BT = jnp.pad(x_BT, ((0, 0), (0, padding), *((0, 0),) * (x_BT.ndim - 2)))
        shape = (x_BT.shape[0], self.chunks, self.loops, self.turn, *x_BT.shape[2:])
        x = jnp.moveaxis(x_BT.reshape(shape), 0, 2)
        free = (sharding.FREE,) * (x.ndim - 4)
        return sharding.constrain(x, None, None, "batch", "time", *free)


def _time_axes() -> tuple[str, ...]:
    return sharding.mesh_axes(("time",), jax.sharding.get_abstract_mesh())


def _split(*sizes: int) -> list[str | None]:
    """The axes of a batch, and of heads, where the mesh divides them; None where it does not."""
    named = zip(("batch", "heads"), sizes, strict=False)
    return [None if size % sharding.ways(axis) else axis for axis, size in named]


def _mapped(one: Callable[..., Any], given: Any, gives: Any) -> Callable[..., Any]:
    """`one` on each device; `given` and `gives` are logical axes of its argument and its result.

    Of all axes of the mesh: what is sent along some of them only the compiler gathers first.
    """
    into, out_of = (sharding.partition_spec(axes, "blocks") for axes in (given, gives))
    return jax.shard_map(one, in_specs=into, out_specs=out_of, check_vma=False)


def cut_for(length: int, heads: int, block: int | None, chunks: int) -> Cut:
    """The cut for `block` queries a device and turn.

    None: 128, or as many as keep the float32 scores of all `heads` over a row below 2 GiB.
    """
    ways = sharding.ways("time")
    if block is None:
        a_query = 4 * length * -(-heads // sharding.ways("heads"))
        block = max(1, min(_MOST, _TILE_BYTES // a_query))
    block = min(block, -(-length // ways))
    turns = -(-length // (ways * block))
    chunks = min(chunks, turns)
    return Cut(length, chunks, -(-turns // chunks), ways * block)


class Where(NamedTuple):
    """What the queries of a block see of the row's first S tokens, and which are no padding."""

    seen: Bool[Array, "B T S"]
    real: Bool[Array, "B T"]


def over(
    cut: Cut,
    layout: cache_lib.Layout,
    asked: Any,
    held: Any,
    attend: Callable[[Any, Any, Where], tuple[jax.Array, jax.Array | None]],
) -> tuple[jax.Array, Float[Array, ""] | None]:
    """`attend` on every block: (its part of `asked`, the keys it may see of `held`, where).

    `asked` is cut apart, `held` are arrays [B, S, ...] of whole rows. Gives [chunks, loops, B,
    turn, ...] and the sum of the losses. What a block computed is computed anew in the backward
    pass, but for what is named KEPT; the keys after the last query of a chunk are left out. Each
    device of the mesh's time axis runs a loop of its own, so that gradients of `held` meet once,
    after it.
    """
    places_BT = jnp.broadcast_to(jnp.arange(cut.length, dtype=jnp.int32), layout.segments_BT.shape)
    marks = cut.apart((places_BT, layout.segments_BT, layout.prefixes_BT))

    def loops(asked: Any, marks: Any, held: Any) -> tuple[jax.Array, jax.Array | None]:
        outs, losses = [], []
        for chunk in range(cut.chunks):
            end = min(cut.length, (chunk + 1) * cut.loops * cut.turn)
            own = jax.tree.map(lambda x_BS, end=end: x_BS[:, :end], held)

            @functools.partial(jax.checkpoint, policy=keep)
            def step(some: Any, own: Any = own) -> tuple[jax.Array, jax.Array | None]:
                asked, (places_Bt, segments_Bt, prefixes_Bt) = some
                (segments_BS, *keys) = own
                seen_BtS = cache_lib.visible_from(segments_Bt, prefixes_Bt, places_Bt, segments_BS)
                return attend(asked, keys[0], Where(seen_BtS, segments_Bt > 0))

            some = jax.tree.map(lambda x, chunk=chunk: x[chunk], (asked, marks))
            out, loss = jax.lax.map(step, some)
            outs.append(out)
            losses.append(loss)
        total = None
        if losses[0] is not None:
            total = functools.reduce(jnp.add, map(jnp.sum, losses))[None]
        return jnp.stack(outs), total

    held = (layout.segments_BT, held)
    if sharding.ways("time") > 1:
        in_turn = sharding.partition_spec((None, None, None, "time"), "queries")
        each = sharding.partition_spec(("time",), "loss")
        loops = jax.shard_map(
            loops,
            in_specs=(in_turn, in_turn, jax.sharding.PartitionSpec()),
            out_specs=(in_turn, each),
            axis_names=set(_time_axes()),
            check_vma=False,
        )
    out, losses = loops(asked, marks, held)
    return out, None if losses is None else jnp.sum(losses)
