"""Gradients and bfloat16 rounding beside the reference library's, on random weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from configs.models import tiny_v3, tiny_v32
from mathv2_jax.model import heads, transformer
from mathv2_jax.model.config import ModelConfig
from tests.hf import parity

LENGTH = 24
REAL_BT = np.ones((5, LENGTH), bool)
SEEDS = 20
V3, V32 = (ModelConfig(**tiny.model()) for tiny in (tiny_v3, tiny_v32))
# The indexer's choices are held fixed by letting it choose every token.
V32_ALL = dataclasses.replace(V32, index_topk=LENGTH)


def draw_tokens(config: ModelConfig, seed: int) -> np.ndarray:
    rng = np.random.default_rng(100 + seed)
    return rng.integers(1, config.vocab_size, REAL_BT.shape).astype(np.int32)


def kind_of(config: ModelConfig) -> str:
    return "v32" if config.index_topk else "v3"


@pytest.mark.parametrize("config", [V3, V32], ids=kind_of)
def test_gradients_of_the_cross_entropy_are_those_of_autograd(config, record_property):
    """Of every parameter; the reference has none for the indexer, and ours is zero."""
    model = parity.drawn_reference(config, seed=7)
    tokens_BT = draw_tokens(config, 1)
    seen = parity.TopK(REAL_BT)
    with seen:
        logits = model(input_ids=torch.from_numpy(tokens_BT).long(), use_cache=False).logits
    targets = torch.from_numpy(tokens_BT[:, 1:]).long().reshape(-1)
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets).backward()
    wanted = parity.gradients_as_ours(model)

    @jax.jit
    @jax.grad
    def slope(params, router, tokens_BT):
        variables = {"params": params, **router}
        out = transformer.apply(config, variables, tokens_BT, parity.layout_of(REAL_BT))
        found = heads.token_logprobs(
            out.hidden_BTD[:, :-1], params["unembed"], tokens_BT[:, 1:], chunk=9
        )
        return -jnp.mean(found.logprob_BT)

    _, variables = parity.as_ours(model)
    got = slope(variables.pop("params"), variables, jnp.asarray(tokens_BT))
    assert not seen.ties, seen.report()
    worst, where = 0.0, ""
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True
    ):
        name, largest = jax.tree_util.keystr(path), float(jnp.abs(other).max())
        if "indexer" in name or "verifier_head" in name:
            assert not np.asarray(one).any() and not largest, name
            continue
        assert largest > 0, name
        relative = float(jnp.abs(one - other).max()) / largest
        if relative > worst:
            worst, where = relative, name
    found = f"gradients, {kind_of(config)}: at most {worst:.1e} of a tensor's largest, in {where}"
    record_property("parity", found)
    assert worst < 1e-4, found


@pytest.mark.parametrize("config", [V3, V32_ALL], ids=kind_of)
def test_bfloat16_is_as_near_to_float32_as_the_reference_in_bfloat16(config, record_property):
    """Weights are bfloat16 values, so that only computing rounds; routing is float32's in both."""
    halved = dataclasses.replace(config, compute_dtype="bfloat16")
    run = jax.jit(functools.partial(parity.our_logits, halved))
    ours, theirs = [], []
    for seed in range(SEEDS):
        tokens_BT = draw_tokens(config, seed)
        model = parity.drawn_reference(config, seed, halved=True)
        _, variables = parity.as_ours(model)
        seen = parity.TopK(REAL_BT)
        exact_BTV = parity.reference_logits(model, tokens_BT, REAL_BT, seen)
        replay = parity.TopK(REAL_BT, replayed=seen.chosen)
        reference_BTV = parity.reference_logits(
            parity.in_bfloat16(model), tokens_BT, REAL_BT, replay
        )
        got_BTV = run(
            variables,
            jnp.asarray(tokens_BT),
            parity.layout_of(REAL_BT),
            jnp.asarray(seen.experts_LBTA()),
        )
        ours.append(np.sqrt(np.mean(np.square(np.asarray(got_BTV) - exact_BTV))))
        theirs.append(np.sqrt(np.mean(np.square(reference_BTV - exact_BTV))))
    ratio = float(np.median(np.array(ours) / np.array(theirs)))
    found = (
        f"bfloat16, {kind_of(config)}: error {np.median(ours):.4f}, the reference's "
        f"{np.median(theirs):.4f}, median ratio {ratio:.3f} of {SEEDS} seeds"
    )
    record_property("parity", found)
    assert ratio < 1.2, found
