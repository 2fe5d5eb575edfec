"""Three tiny models that differ in every optional part, with variables that hide nothing.

Fresh variables have norm scales of one, a router bias of zero and a verifier head of zeros, which
would hide a wrong use of them: here every array is drawn.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mathv2_jax.model import cache, transformer
from mathv2_jax.model.config import ModelConfig

# Widths differ from each other, so that no transposed product passes.
PLAIN = ModelConfig(
    vocab_size=40,
    width=16,
    num_layers=2,
    num_heads=2,
    kv_latent_width=10,
    head_key_width=6,
    head_rope_width=4,
    head_value_width=5,
    dense_width=24,
    expert_width=7,
    num_experts=4,
    experts_per_token=2,
    num_shared_experts=0,
    scan_unroll=True,
)
FULL = ModelConfig(
    vocab_size=40,
    width=16,
    num_layers=3,
    num_heads=2,
    q_latent_width=9,
    kv_latent_width=10,
    head_key_width=6,
    head_rope_width=4,
    head_value_width=5,
    dense_width=24,
    expert_width=7,
    num_experts=6,
    experts_per_token=2,
    num_shared_experts=2,
    num_expert_groups=3,
    expert_groups_per_token=2,
    embedding_taps=2,
)

# Tokens are picked from the fourth of a sequence on; some positions lie beyond YaRN's length.
SPARSE = dataclasses.replace(
    FULL,
    num_expert_groups=1,
    expert_groups_per_token=1,
    embedding_taps=0,
    normalize_expert_weights=False,
    yarn_factor=4.0,
    yarn_original_length=8,
    yarn_beta_fast=1.0,
    yarn_beta_slow=0.1,
    yarn_mscale=0.7,
    index_topk=3,
    index_heads=3,
    index_head_width=6,
    num_mtp_layers=2,
)


class Model(NamedTuple):
    """A config, variables, and one compiled pass: (variables, tokens, layout, sources, kept)."""

    config: ModelConfig
    variables: transformer.Variables
    run: Callable[..., transformer.TrunkOutput]


def drawn(config: ModelConfig) -> transformer.Variables:
    """Norm scales about one, everything else about zero, drawn on the host."""
    rng = np.random.default_rng(7)

    def one(path, leaf):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(centre + 0.3 * rng.standard_normal(leaf.shape), leaf.dtype)

    shapes = transformer.unboxed(transformer.boxed_abstract(config))
    return jax.tree_util.tree_map_with_path(one, shapes)


def run(config, variables, tokens_BT, layout, sources_BT, kept_LBTA):
    previous_BTW = cache.previous_tokens(tokens_BT, sources_BT, config.embedding_taps)
    return transformer.apply(
        config, variables, tokens_BT, layout, kept_LBTA=kept_LBTA, previous_BTW=previous_BTW
    )


@functools.cache
def build(config: ModelConfig) -> Model:
    return Model(config, drawn(config), jax.jit(functools.partial(run, config)))


@pytest.fixture(scope="session")
def full() -> Model:
    """Query latents, expert groups, two shared experts, embedding taps, three layers by scan."""
    return build(FULL)


@pytest.fixture(scope="session")
def sparse_model() -> Model:
    """Sparse attention, YaRN, raw expert weights, two further predictions, three layers by scan."""
    return build(SPARSE)


@pytest.fixture(scope="session", params=[PLAIN, FULL, SPARSE], ids=["plain", "full", "sparse"])
def model(request: pytest.FixtureRequest) -> Model:
    """The models of `full` and `sparse_model`, and one with none of their optional parts."""
    return build(request.param)
