"""The trunk: embedding, dense layers, sparse layers, final norm; and its pure functions.

Variables are `{"params": ..., "router": ...}`: parameters and the router bias, which has no
gradient. Layers of a kind are one stacked tree whether or not the scan is unrolled.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mathv2_jax import sharding
from mathv2_jax.model import cache as cache_lib
from mathv2_jax.model import heads, layers, mla, moe
from mathv2_jax.model.config import ModelConfig

Variables = dict[str, Any]


class DecodeInputs(NamedTuple):
    """One decoding step's past: prompts' and rows' latents by kind of layer, and what counts."""

    dense: cache_lib.LayerCache | None
    sparse: cache_lib.LayerCache | None
    view: cache_lib.DecodeView


class Latents(NamedTuple):
    """New cache entries, stacked over the layers of a kind; None where there is none."""

    dense: cache_lib.LatentPair | None
    sparse: cache_lib.LatentPair | None


class TrunkOutput(NamedTuple):
    """What one pass over tokens gives."""

    hidden_BTD: Float[Array, "B T D"]
    latents: Latents
    routing: moe.Routing | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernels:
    """The functions chosen once per platform: expanded attention and grouped experts."""

    attend: mla.Attend = mla.attend_densely
    experts: moe.Experts = moe.sorted_blocks


class Block(nn.Module):
    """Attention and feed-forward, both pre-normed with residuals."""

    config: ModelConfig
    kernels: Kernels
    sparse: bool

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        cached: cache_lib.LayerCache | None,
        kept_BTA: Int[Array, "B T A"] | None,
        layout: cache_lib.Layout,
        view: cache_lib.DecodeView | None,
    ) -> tuple[Float[Array, "B T D"], tuple[cache_lib.LatentPair, moe.Routing | None]]:
        c = self.config
        x_BTD = sharding.constrain(x_BTD, "batch", "time", None)
        attention = mla.LatentAttention(c, self.kernels.attend, name="attention")
        normed_BTD = layers.RMSNorm(c.norm_eps, name="attention_norm")(x_BTD)
        if cached is None or view is None:
            out_BTD, latents = attention.expanded(normed_BTD, layout)
        else:
            out_BTD, latents = attention.absorbed(normed_BTD, layout.positions_BT, cached, view)
        x_BTD = x_BTD + out_BTD
        normed_BTD = layers.RMSNorm(c.norm_eps, name="mlp_norm")(x_BTD)
        if not self.sparse:
            return x_BTD + layers.GatedMlp(c.dense_width, name="mlp")(normed_BTD), (latents, None)
        real_BT = layout.segments_BT > 0
        mlp = moe.SparseMlp(c, self.kernels.experts, name="mlp")
        out_BTD, routing = mlp(normed_BTD, real_BT, kept_BTA)
        return x_BTD + out_BTD, (latents, routing)


class Trunk(nn.Module):
    """Tokens to normed hidden states, and the parameters of both heads."""

    config: ModelConfig
    kernels: Kernels

    @nn.compact
    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        layout: cache_lib.Layout,
        past: DecodeInputs | None = None,
        kept_LBTA: Int[Array, "L B T A"] | None = None,
        previous_BTW: Int[Array, "B T W"] | None = None,
    ) -> TrunkOutput:
        c = self.config
        normal, zeros = nn.initializers.normal, nn.initializers.zeros
        embed_VD = layers.parameter(
            self, "embed", normal(1.0), (c.vocab_size, c.width), ("vocab", "embed")
        )
        layers.weight(self, "unembed", (c.width, c.vocab_size), ("embed", "vocab"), c.width)
        layers.parameter(self, "verifier_head_kernel", zeros, (c.width, 3), ("embed", "score"))
        layers.parameter(self, "verifier_head_bias", zeros, (3,), ("score",))
        x_BTD = embed_VD.astype(c.compute_dtype)[tokens_BT]
        if c.embedding_taps:
            assert previous_BTW is not None, "a model with embedding taps is given previous tokens"
            taps_WD = layers.parameter(
                self, "taps", normal(0.5), (c.embedding_taps, c.width), ("norm", "norm")
            )
            before_BTWD = embed_VD.astype(c.compute_dtype)[previous_BTW]
            x_BTD += jnp.einsum("BTWD,WD->BTD", before_BTWD, taps_WD.astype(x_BTD.dtype))
        x_BTD, dense, _ = self._stack(x_BTD, layout, past, None, sparse=False)
        x_BTD, sparse, routing = self._stack(x_BTD, layout, past, kept_LBTA, sparse=True)
        hidden_BTD = layers.RMSNorm(c.norm_eps, name="final_norm")(x_BTD)
        return TrunkOutput(hidden_BTD, Latents(dense, sparse), routing)

    def _stack(
        self,
        x_BTD: jax.Array,
        layout: cache_lib.Layout,
        past: DecodeInputs | None,
        kept_LBTA: jax.Array | None,
        *,
        sparse: bool,
    ) -> tuple[jax.Array, cache_lib.LatentPair | None, moe.Routing | None]:
        c = self.config
        length = c.num_sparse_layers if sparse else c.num_dense_layers
        if not length:
            return x_BTD, None, None
        cached = None
        if past is not None:
            cached = past.sparse if sparse else past.dense
        scanned = nn.scan(
            Block,
            variable_axes={"params": 0, "router": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType] - flax types one int, takes one an argument
            out_axes=0,
            length=length,
            unroll=length if c.scan_unroll else 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        block = scanned(c, self.kernels, sparse, name="sparse" if sparse else "dense")
        view = None if past is None else past.view
        x_BTD, (latents, routing) = block(x_BTD, cached, kept_LBTA, layout, view)
        return x_BTD, latents, routing


def boxed_abstract(config: ModelConfig, kernels: Kernels | None = None) -> Any:
    """The variables' shapes and logical axes, without making an array."""
    trunk = Trunk(config, kernels or Kernels())
    return jax.eval_shape(trunk.init, jax.random.key(0), *_example(config))


def unboxed(tree: Any) -> Any:
    """The tree of arrays (or their shapes) without logical axes."""
    return nn.unbox(tree)


def init(config: ModelConfig, key: jax.Array, kernels: Kernels | None = None) -> Variables:
    """Fresh float32 variables, unboxed."""
    trunk = Trunk(config, kernels or Kernels())
    return nn.unbox(trunk.init(key, *_example(config)))


def _example(config: ModelConfig) -> tuple[Any, ...]:
    tokens_BT = jnp.zeros((1, 2), jnp.int32)
    previous_BTW = jnp.zeros((1, 2, config.embedding_taps), jnp.int32)
    layout = cache_lib.plain_layout(jnp.full((1,), 2), 2)
    return tokens_BT, layout, None, None, previous_BTW


def apply(
    config: ModelConfig,
    variables: Variables,
    tokens_BT: Int[Array, "B T"],
    layout: cache_lib.Layout,
    *,
    past: DecodeInputs | None = None,
    kept_LBTA: Int[Array, "L B T A"] | None = None,
    previous_BTW: Int[Array, "B T W"] | None = None,
    kernels: Kernels | None = None,
) -> TrunkOutput:
    """One pass. With `past`, T is 1 and `layout.positions_BT` are the new tokens' positions.

    `previous_BTW` (cache.previous_tokens) is for models with embedding taps.
    """
    trunk = Trunk(config, kernels or Kernels())
    out = trunk.apply(variables, tokens_BT, layout, past, kept_LBTA, previous_BTW)
    assert isinstance(out, TrunkOutput)
    return out


def forward(
    config: ModelConfig, variables: Variables, tokens_BT: Int[Array, "B T"]
) -> Float[Array, "B T V"]:
    """Logits of every next token of unpadded rows, for inspection and parity tests."""
    lengths_B = jnp.full((tokens_BT.shape[0],), tokens_BT.shape[1])
    layout = cache_lib.plain_layout(lengths_B, tokens_BT.shape[1])
    sources_BT = cache_lib.plain_sources(tokens_BT)
    previous_BTW = cache_lib.previous_tokens(tokens_BT, sources_BT, config.embedding_taps)
    out = apply(config, variables, tokens_BT, layout, previous_BTW=previous_BTW)
    hidden_BTD = out.hidden_BTD
    return heads.logits(hidden_BTD, variables["params"]["unembed"])


def num_parameters(tree: Any) -> int:
    """How many numbers a tree of arrays (abstract ones too) holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(nn.unbox(tree)))
