"""The trunk: embedding, dense layers, sparse layers, final norm; and its pure functions.

Variables are `{"params": ..., "router": ...}`: parameters and the router bias, which has no
gradient. Layers of a kind are one stacked tree whether or not the scan is unrolled.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mathv2_jax import sharding
from mathv2_jax.model import block, heads, layers, moe, mtp
from mathv2_jax.model import cache as cache_lib
from mathv2_jax.model.block import Kernels, Signals
from mathv2_jax.model.config import ModelConfig
from mathv2_jax.model.mtp import Further

Variables = dict[str, Any]


class Cache(NamedTuple):
    """The pages of all sequences by kind of layer; None where a model has none of a kind."""

    dense: cache_lib.Pages | None
    sparse: cache_lib.Pages | None


class Past(NamedTuple):
    """What the tokens of a call come after, and where they stand in it."""

    cache: Cache
    view: cache_lib.PageView


class TrunkOutput(NamedTuple):
    """What one pass over tokens gives. Losses are sums over real tokens, where asked for."""

    hidden_BTD: Float[Array, "B T D"]
    cache: Cache
    routing: moe.Routing | None
    alignment_L: Float[Array, "L"] | None = None
    further: Further | None = None


class Trunk(nn.Module):
    """Tokens to normed hidden states, and the parameters of both heads."""

    config: ModelConfig
    kernels: Kernels
    signals: Signals

    @nn.compact
    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        layout: cache_lib.Layout,
        past: Past | None = None,
        kept_LBTA: Int[Array, "L B T A"] | None = None,
        previous_BTW: Int[Array, "B T W"] | None = None,
        sources_BT: Int[Array, "B T"] | None = None,
    ) -> TrunkOutput:
        c, dtype = self.config, self.config.param_dtype
        normal, zeros = nn.initializers.normal, nn.initializers.zeros
        embed_VD = layers.parameter(
            self, "embed", normal(1.0), (c.vocab_size, c.width), ("vocab", "embed"), dtype
        )
        layers.weight(self, "unembed", (c.width, c.vocab_size), ("embed", "vocab"), c.width, dtype)
        layers.parameter(self, "verifier_head_kernel", zeros, (c.width, 3), ("embed", "score"))
        layers.parameter(self, "verifier_head_bias", zeros, (3,), ("score",))
        embed_VD = sharding.gathered(embed_VD.astype(c.compute_dtype), "vocab", "embed")
        x_BTD = embed_VD[tokens_BT]
        if c.embedding_taps:
            assert previous_BTW is not None, "a model with embedding taps is given previous tokens"
            taps_WD = layers.parameter(
                self, "taps", normal(0.5), (c.embedding_taps, c.width), ("norm", "norm"), dtype
            )
            before_BTWD = embed_VD[previous_BTW]
            x_BTD += jnp.einsum("BTWD,WD->BTD", before_BTWD, taps_WD.astype(x_BTD.dtype))
        embedded_BTD = x_BTD
        x_BTD, dense_pages, dense = self._stack(x_BTD, layout, past, None, sparse=False)
        x_BTD, sparse_pages, sparse = self._stack(x_BTD, layout, past, kept_LBTA, sparse=True)
        hidden_BTD = layers.RMSNorm(c.norm_eps, dtype, name="final_norm")(x_BTD)
        further = None
        if c.num_mtp_layers and (self.signals.mtp != "off" or self.is_initializing()):
            assert sources_BT is not None, "predicting further needs each token's predecessor"
            layer = _scanned(mtp.MtpLayer, c, c.num_mtp_layers, nn.broadcast)
            layer = layer(c, self.kernels, self.signals, name="mtp")
            further = mtp.run(layer, hidden_BTD, embedded_BTD, layout, sources_BT)
        alignments = [k.alignment for k in (dense, sparse) if k and k.alignment is not None]
        return TrunkOutput(
            hidden_BTD,
            Cache(dense_pages, sparse_pages),
            sparse and sparse.routing,
            jnp.concatenate(alignments) if alignments else None,
            further,
        )

    def _stack(
        self,
        x_BTD: jax.Array,
        layout: cache_lib.Layout,
        past: Past | None,
        kept_LBTA: jax.Array | None,
        *,
        sparse: bool,
    ) -> tuple[jax.Array, cache_lib.Pages | None, block.Passed | None]:
        c = self.config
        length = c.num_sparse_layers if sparse else c.num_dense_layers
        if not length:
            return x_BTD, None, None
        pages, view, layers = None, None, None
        if past is not None:
            pages, view = past.cache[sparse], past.view
            layers = jnp.arange(length)
        scanned = _scanned(block.rematted(c), c, length, 0, 0)
        name = "sparse" if sparse else "dense"
        stack = scanned(c, self.kernels, self.signals, sparse, name=name)
        (x_BTD, pages), passed = stack((x_BTD, pages), layers, kept_LBTA, layout, view)
        return x_BTD, pages, passed


def _scanned(layer: Any, config: ModelConfig, length: int, *first_axes: Any) -> Any:
    """A scan over layers of stacked variables; inputs by `first_axes`, and two shared ones."""
    return nn.scan(
        layer,
        variable_axes={"params": 0, "router": 0},
        split_rngs={"params": True},
        in_axes=(*first_axes, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType] - flax types one int, takes one an argument
        out_axes=0,
        length=length,
        unroll=length if config.scan_unroll else 1,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def empty_cache(config: ModelConfig, number: int, page: int) -> Cache:
    """Pools of `number` pages of `page` slots."""
    kinds = (config.num_dense_layers, config.num_sparse_layers)
    return Cache(*(cache_lib.empty_pages(config, layers, number, page) for layers in kinds))


def boxed_abstract(config: ModelConfig, kernels: Kernels | None = None) -> Any:
    """The variables' shapes and logical axes, without making an array."""
    trunk = Trunk(config, kernels or Kernels(), Signals())
    return jax.eval_shape(trunk.init, jax.random.key(0), *_example(config))


def unboxed(tree: Any) -> Any:
    """The tree of arrays (or their shapes) without logical axes."""
    return nn.unbox(tree)


def init(config: ModelConfig, key: jax.Array, kernels: Kernels | None = None) -> Variables:
    """Fresh variables, unboxed: parameters in `param_dtype`, router bias and head in float32."""
    trunk = Trunk(config, kernels or Kernels(), Signals())
    return nn.unbox(trunk.init(key, *_example(config)))


def _example(config: ModelConfig) -> tuple[Any, ...]:
    tokens_BT = jnp.zeros((1, 2), jnp.int32)
    previous_BTW = jnp.zeros((1, 2, config.embedding_taps), jnp.int32)
    layout = cache_lib.plain_layout(jnp.full((1,), 2), 2)
    return tokens_BT, layout, None, None, previous_BTW, cache_lib.plain_sources(tokens_BT)


def apply(  # noqa: PLR0913 - the one way into the trunk; all but four have defaults
    config: ModelConfig,
    variables: Variables,
    tokens_BT: Int[Array, "B T"],
    layout: cache_lib.Layout,
    *,
    past: Past | None = None,
    kept_LBTA: Int[Array, "L B T A"] | None = None,
    previous_BTW: Int[Array, "B T W"] | None = None,
    sources_BT: Int[Array, "B T"] | None = None,
    kernels: Kernels | None = None,
    signals: Signals | None = None,
) -> TrunkOutput:
    """One pass. With `past` its view says what tokens see, and the cache comes back with them.

    `previous_BTW` (cache.previous_tokens) is for models with embedding taps, `sources_BT` (each
    token's predecessor in its row) for the further predictions that `signals` may ask for.
    """
    trunk = Trunk(config, kernels or Kernels(), signals or Signals())
    out = trunk.apply(variables, tokens_BT, layout, past, kept_LBTA, previous_BTW, sources_BT)
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
