"""Multi-token prediction (DeepSeek-V3 report, section 2.2): layers that look one token further.

The state of depth k at a token joins the state of depth k - 1 at its predecessor with the token's
own embedding, and predicts the token after it: at depth 1 the second after the hidden state it
was made of. A state stands at the place of the token that it has read, so answers that share one
copy of their prompt each go on from its last token. The first k tokens of a sequence have none.

Depth 1 starts from the trunk's state after its final norm, as in vLLM, SGLang and transformers.
A further depth starts from the state before that of the head, the report's equations 21 to 23 and
vLLM's reading; SGLang and transformers take it after. No released DeepSeek has a second depth.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mathv2_jax.model import block as block_lib
from mathv2_jax.model import cache as cache_lib
from mathv2_jax.model import layers, moe
from mathv2_jax.model.config import ModelConfig


class Further(NamedTuple):
    """What the extra layers give, stacked over depths: normed states, and where there is one.

    For drafting, `state_BTD` is before that norm, and `pages` hold what it was drafted over.
    """

    hidden_BTD: Float[Array, "... B T D"]
    real_BT: Bool[Array, "... B T"]
    routing: moe.Routing | None
    alignment: Float[Array, "..."] | None
    state_BTD: Float[Array, "... B T D"]
    pages: cache_lib.Pages | None


class Depth(NamedTuple):
    """The state that the next depth starts from, before any norm of its own."""

    hidden_BTD: Float[Array, "B T D"]
    positions_BT: Int[Array, "B T"]
    real_BT: Bool[Array, "B T"]


class MtpLayer(nn.Module):
    """One depth: two norms, a projection of both halves, a sparse block, a norm for the head."""

    config: ModelConfig
    kernels: block_lib.Kernels
    signals: block_lib.Signals

    @nn.compact
    def __call__(
        self,
        before: Depth,
        embedded_BTD: Float[Array, "B T D"],
        layout: cache_lib.Layout,
        sources_BT: Int[Array, "B T"] | None,
        pages: cache_lib.Pages | None = None,
        view: cache_lib.PageView | None = None,
    ) -> tuple[Depth, Further]:
        """`before` is of the row's tokens, or without sources of their predecessors."""
        c = self.config
        project_ED = layers.weight(
            self,
            "project",
            (2 * c.width, c.width),
            ("embed", "norm"),
            2 * c.width,
            c.param_dtype,
            c.compute_dtype,
        )
        if sources_BT is not None:
            before = _of_predecessors(before, sources_BT)
        joined_BTE = jnp.concatenate(
            [
                layers.RMSNorm(c.norm_eps, c.param_dtype, name="embed_norm")(embedded_BTD),
                layers.RMSNorm(c.norm_eps, c.param_dtype, name="hidden_norm")(before.hidden_BTD),
            ],
            axis=-1,
        )
        within = cache_lib.Layout(
            before.positions_BT,
            jnp.where(before.real_BT, layout.segments_BT, 0),
            jnp.where(before.real_BT, layout.prefixes_BT, 0),
        )
        block = block_lib.rematted(c)(c, self.kernels, self.signals, True, name="block")
        joined_BTD = joined_BTE @ project_ED
        layer = None if pages is None else jnp.zeros((), jnp.int32)
        (hidden_BTD, pages), passed = block((joined_BTD, pages), layer, None, within, view)
        normed_BTD = layers.RMSNorm(c.norm_eps, c.param_dtype, name="final_norm")(hidden_BTD)
        found = (passed.routing, passed.alignment, hidden_BTD, pages)
        further = Further(normed_BTD, before.real_BT, *found)
        return before._replace(hidden_BTD=hidden_BTD), further


def _of_predecessors(before: Depth, sources_BT: Int[Array, "B T"]) -> Depth:
    """Each token's predecessor's state; a token that is its own source has none."""
    hidden_BTD = jnp.take_along_axis(before.hidden_BTD, sources_BT[..., None], axis=1)
    follows_BT = sources_BT != jnp.arange(sources_BT.shape[1], dtype=sources_BT.dtype)[None, :]
    return Depth(
        hidden_BTD,
        jnp.take_along_axis(before.positions_BT, sources_BT, axis=1),
        follows_BT & jnp.take_along_axis(before.real_BT, sources_BT, axis=1),
    )


def run(
    layer: nn.Module,
    hidden_BTD: Float[Array, "B T D"],
    embedded_BTD: Float[Array, "B T D"],
    layout: cache_lib.Layout,
    sources_BT: Int[Array, "B T"],
) -> Further:
    """All depths on the trunk's normed states; `layer` is a scan of `MtpLayer`.

    `sources_BT` is each token's predecessor in its row; a first token, or padding, is its own.
    """
    if layer.signals.mtp == "detached":
        hidden_BTD, embedded_BTD = jax.lax.stop_gradient((hidden_BTD, embedded_BTD))
    start = Depth(hidden_BTD, layout.positions_BT, layout.segments_BT > 0)
    return layer(start, embedded_BTD, layout, sources_BT)[1]


def step(
    layer: MtpLayer,
    variables: dict[str, Any],
    before: Depth,
    embedded_BTD: Float[Array, "B T D"],
    pages: cache_lib.Pages,
    view: cache_lib.PageView,
) -> Further:
    """One depth's states of new tokens, over its own pages: what drafts the token after each.

    `variables` are those of the depth alone, without the leading axis. `before` is the depth below
    (at depth 1 the trunk's normed state) at each token's predecessor, `embedded_BTD` the tokens'
    embeddings. The first tokens of a prompt, which have no state at this depth, have no slot.
    """
    segments_BT = before.real_BT.astype(jnp.int32)
    layout = cache_lib.Layout(before.positions_BT, segments_BT, segments_BT)
    further = layer.apply(variables, before, embedded_BTD, layout, None, pages, view)[1]
    assert isinstance(further, Further)
    return further
