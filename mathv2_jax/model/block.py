"""One layer of the trunk: attention and feed-forward, and how a stack of them is run."""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
from jaxtyping import Array, Float, Int

from mathv2_jax import sharding
from mathv2_jax.model import attention, blocks, grouped, layers, mla, moe, picked
from mathv2_jax.model import cache as cache_lib
from mathv2_jax.model import exchange as exchange_lib
from mathv2_jax.model.config import ModelConfig

# What a layer keeps for its backward pass, by ModelConfig.remat; "none" keeps everything.
_or = jax.checkpoint_policies.save_from_both_policies
REMAT = {
    "full": blocks.keep,
    "dots": _or(blocks.keep, jax.checkpoint_policies.dots_saveable),
    "dots_no_batch": _or(blocks.keep, jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
}
MTP_NAMES = ("off", "on", "detached")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernels:
    """Chosen once per platform: attention, grouped experts, and how tokens reach them.

    `slots` of a sampler's pages are attended to together, in `rows` of its rows (0: in all of them;
    model/paged.py).
    """

    attend: attention.Attend = attention.attend_densely
    gathers: picked.Gathers = picked.never
    slots: int = 64
    rows: int = 8
    experts: grouped.Experts = grouped.sorted_blocks
    exchange: exchange_lib.Exchange = exchange_lib.Exchange()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Signals:
    """Which sums for auxiliary losses a pass computes; each costs memory and time.

    `align`: the indexer's loss against sparse attention ("sparse") or, with attention left dense,
    against all of it ("dense", the warm-up). `mtp`: run the extra layers ("on"); "detached" keeps
    their gradient out of the trunk and the embedding.
    """

    balance: bool = False
    align: str = "off"
    mtp: str = "off"

    def __post_init__(self):
        if self.align not in mla.ALIGN_NAMES:
            raise ValueError(f"align = {self.align!r}: must be one of {mla.ALIGN_NAMES}")
        if self.mtp not in MTP_NAMES:
            raise ValueError(f"mtp = {self.mtp!r}: must be one of {MTP_NAMES}")


class Passed(NamedTuple):
    """What a layer gives beside the stream; `alignment` is dsa.alignment's sum, if asked for."""

    routing: moe.Routing | None
    alignment: Float[Array, "..."] | None


class Block(nn.Module):
    """Attention and feed-forward, both pre-normed with residuals."""

    config: ModelConfig
    kernels: Kernels
    signals: Signals
    sparse: bool

    @nn.compact
    def __call__(
        self,
        carry: tuple[Float[Array, "B T D"], cache_lib.Pages | None],
        layer: Int[Array, ""] | None,
        kept_BTA: Int[Array, "B T A"] | None,
        layout: cache_lib.Layout,
        view: cache_lib.PageView | None,
    ) -> tuple[tuple[Float[Array, "B T D"], cache_lib.Pages | None], Passed]:
        """Over pages, `layer` is its place among them, and they come back with the new tokens."""
        c, alignment, (x_BTD, pages) = self.config, None, carry
        x_BTD = sharding.constrain(x_BTD, "batch", "time", None)
        kernels = self.kernels
        latent = mla.LatentAttention(
            c,
            kernels.attend,
            self.signals.align,
            kernels.gathers,
            kernels.slots,
            kernels.rows,
            name="attention",
        )
        normed_BTD = layers.RMSNorm(c.norm_eps, c.param_dtype, name="attention_norm")(x_BTD)
        if pages is None or layer is None or view is None:
            out_BTD, alignment = latent.expanded(normed_BTD, layout)
        else:
            out_BTD, pages = latent.paged(normed_BTD, layout.positions_BT, pages, layer, view)
        x_BTD = x_BTD + out_BTD
        normed_BTD = layers.RMSNorm(c.norm_eps, c.param_dtype, name="mlp_norm")(x_BTD)
        if not self.sparse:
            out_BTD = layers.GatedMlp(c.dense_width, c.param_dtype, name="mlp")(normed_BTD)
            return (x_BTD + out_BTD, pages), Passed(None, alignment)
        mlp = moe.SparseMlp(c, self.kernels.experts, self.kernels.exchange, name="mlp")
        balanced_BT = layout.segments_BT if self.signals.balance else None
        out_BTD, routing = mlp(normed_BTD, layout.segments_BT > 0, kept_BTA, balanced_BT)
        return (x_BTD + out_BTD, pages), Passed(routing, alignment)


def rematted(config: ModelConfig) -> type[Block]:
    """The block, recomputing in its backward pass what `config.remat` does not keep."""
    if config.remat == "none":
        return Block
    # Inside a loop nothing can merge a recomputation with its original; unrolled, it could.
    return nn.remat(Block, policy=REMAT[config.remat], prevent_cse=config.scan_unroll)
