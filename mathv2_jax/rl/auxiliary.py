"""Losses beside a stage's own, in supervised stages and RL alike: balance, indexer, MTP.

Each is a mean over the step's real tokens, or weighted like the stage's own loss, so a step may be
cut into any number of micro-batches.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mathv2_jax.data import packing
from mathv2_jax.model import heads, transformer
from mathv2_jax.model.config import ModelConfig

INDEXER_STAGES = ("dense", "sparse")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuxiliaryConfig:
    """Weights of the auxiliary losses; 0 turns one off.

    `balance`: sequence-wise balance of the experts' load (DeepSeek-V3: 1e-4), summed over layers.
    `indexer`: alignment of the sparse-attention indexers with attention, summed over layers; at
    `indexer_stage` "dense" attention is left dense (the warm-up), `only_indexer` then keeps every
    other parameter as it is. `mtp`: cross-entropy of the tokens after the next (DeepSeek-V3: 0.3,
    later 0.1), a mean over depths.
    """

    balance: float = 0.0
    indexer: float = 0.0
    indexer_stage: str = "sparse"
    only_indexer: bool = False
    mtp: float = 0.0

    def __post_init__(self):
        for name in ("balance", "indexer", "mtp"):
            if getattr(self, name) < 0.0:
                raise ValueError(f"auxiliary.{name} = {getattr(self, name)}: must not be negative")
        if self.indexer_stage not in INDEXER_STAGES:
            raise ValueError(
                f"auxiliary.indexer_stage = {self.indexer_stage!r}: must be one of {INDEXER_STAGES}"
            )
        if self.only_indexer and not self.indexer:
            raise ValueError("auxiliary.only_indexer: nothing would be trained, indexer is 0")

    def require(self, model: ModelConfig, where: str) -> None:
        """ValueError where a loss is asked for whose part the model lacks; `where` is its path."""
        lacking = {
            "balance": (model.has_experts, "has no layer with experts (num_dense_layers)"),
            "indexer": (model.index_topk > 0, "has no indexer (index_topk is 0)"),
            "mtp": (model.num_mtp_layers > 0, "has no further layers (num_mtp_layers is 0)"),
        }
        for name, (there, lack) in lacking.items():
            if getattr(self, name) and not there:
                raise ValueError(f"{where}.{name} = {getattr(self, name)}: the model {lack}")

    def signals(self, *, detached: bool = False) -> transformer.Signals:
        """What a pass has to compute. `detached`: MTP trains its own layers only."""
        return transformer.Signals(
            balance=self.balance > 0.0,
            align=self.indexer_stage if self.indexer else "off",
            mtp=("detached" if detached else "on") if self.mtp else "off",
        )


class AuxiliaryLosses(NamedTuple):
    """Each loss without its weight, a share of the step's; None where not asked for."""

    balance: Float[Array, ""] | None
    indexer: Float[Array, ""] | None
    mtp: Float[Array, ""] | None


def losses(
    config: AuxiliaryConfig,
    out: transformer.TrunkOutput,
    tokens: jax.Array | None,
    mtp: jax.Array | None,
) -> tuple[jax.Array, AuxiliaryLosses]:
    """Their weighted sum, and each. `tokens` is the step's number of real tokens."""
    found = AuxiliaryLosses(
        _total(config.balance, tokens, *(r.balance for r in _routings(out))),
        _total(config.indexer, tokens, out.alignment_L, out.further and out.further.alignment),
        mtp,
    )
    parts = zip((config.balance, config.indexer, config.mtp), found, strict=True)
    return sum((w * x for w, x in parts if x is not None), jnp.zeros(())), found


def _routings(out: transformer.TrunkOutput) -> list[Any]:
    both = (out.routing, out.further and out.further.routing)
    return [routing for routing in both if routing is not None]


def _total(weight: float, tokens: jax.Array | None, *sums: jax.Array | None) -> jax.Array | None:
    if not weight:
        return None
    assert tokens is not None, "a mean over the step's tokens needs their number"
    return sum((jnp.sum(x) for x in sums if x is not None), jnp.zeros(())) / tokens


def further_loss(
    model: ModelConfig,
    unembed_DV: jax.Array,
    batch: packing.Batch,
    further: transformer.Further | None,
    weights_BT: jax.Array,
) -> Float[Array, ""] | None:
    """Weighted cross-entropy of every token from the further states at its predecessor.

    A depth's state there was made of the hidden state one token before, and of that predecessor;
    tokens too near their sequence's start for it do not count. A mean over depths.
    """
    if further is None:
        return None
    tokens_BT, sources_BT = jnp.asarray(batch.tokens_BT), jnp.asarray(batch.sources_BT)
    follows_BT = sources_BT != jnp.arange(sources_BT.shape[1], dtype=sources_BT.dtype)[None, :]

    def one(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden_BTD, real_BT = state
        hidden_BTD = jnp.take_along_axis(hidden_BTD, sources_BT[..., None], axis=1)
        counts_BT = follows_BT & jnp.take_along_axis(real_BT, sources_BT, axis=1)
        found = heads.token_logprobs(hidden_BTD, unembed_DV, tokens_BT, chunk=model.logprob_chunk)
        weight_BT = jnp.where(counts_BT, weights_BT, 0.0)
        return -jnp.sum(jnp.where(weight_BT > 0.0, found.logprob_BT, 0.0) * weight_BT)

    return jnp.mean(jax.lax.map(one, (further.hidden_BTD, further.real_BT)))
