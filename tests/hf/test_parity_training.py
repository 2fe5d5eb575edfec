"""Gradients and bfloat16 rounding beside the reference library's, on random weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from configs.models import tiny_v3, tiny_v32
from mathv2_jax.data import packing
from mathv2_jax.model import heads, transformer
from mathv2_jax.model.config import ModelConfig
from mathv2_jax.rl import auxiliary
from tests.hf import parity

LENGTH = 24
REAL_BT = np.ones((5, LENGTH), bool)
SEEDS = 20
V3, V32 = (ModelConfig(**tiny.model()) for tiny in (tiny_v3, tiny_v32))


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
    require_near(got, wanted, f"gradients, {kind_of(config)}", record_property)


def require_near(got, wanted, said, record_property):
    """Every parameter's gradient, beside the largest of its tensor; the untrained ones are zero."""
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
    found = f"{said}: at most {worst:.1e} of a tensor's largest, in {where}"
    record_property("parity", found)
    assert worst < 1e-4, found


class TorchMtp(torch.nn.Module):
    """What depth 1 has beside a decoder layer of the reference."""

    def __init__(self, width: int, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def drawn(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(shape, generator=generator))

        norms = (torch.nn.Parameter(1.0 + 0.3 * drawn(width).detach()) for _ in range(3))
        self.enorm, self.hnorm, self.head_norm = norms
        self.eh_proj = torch.nn.Parameter(drawn(width, 2 * width).detach() * (2 * width) ** -0.5)

    def as_ours(self, *, of_gradient: bool = False):
        """By our names, with the axis of depths."""

        def ours(parameter):
            found = parameter.grad if of_gradient else parameter.detach()
            return jnp.asarray(found.numpy())[None]

        return {
            "embed_norm": {"scale": ours(self.enorm)},
            "hidden_norm": {"scale": ours(self.hnorm)},
            "final_norm": {"scale": ours(self.head_norm)},
            "project": ours(self.eh_proj).swapaxes(1, 2),
        }


def last_as_mtp(tree, further):
    """The last sparse layer moved out of the trunk, to be the block of depth 1."""
    kept = jax.tree.map(lambda x: x[:-1], tree["sparse"])
    block = jax.tree.map(lambda x: x[-1:], tree["sparse"])
    return {**tree, "sparse": kept, "mtp": {"block": block, **further}}


@pytest.mark.parametrize("config", [V3, V32], ids=kind_of)
def test_gradients_of_the_mtp_loss_are_those_of_autograd(config, record_property):
    """A layer more of the reference is the block of depth 1; it joins what the layers below give,
    after the final norm, with the embedding of the next token, and predicts the one after."""
    model = parity.drawn_reference(dataclasses.replace(config, num_layers=config.num_layers + 1), 8)
    extra, tokens_BT, eps = TorchMtp(config.width, 9), draw_tokens(config, 2), config.norm_eps
    _, variables = parity.as_ours(model)
    *_, layer = model.model.layers
    held = []
    hook = layer.register_forward_pre_hook(lambda _, *call: held.append(call), with_kwargs=True)
    tokens = torch.from_numpy(tokens_BT).long()
    model.model(input_ids=tokens, use_cache=False)
    hook.remove()
    (((trunk,), call),) = held

    def normed(x, scale):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * scale

    following = model.model.embed_tokens(tokens.roll(-1, dims=1))  # the last place is not read
    both = (normed(following, extra.enorm), normed(model.model.norm(trunk), extra.hnorm))
    seen = parity.TopK(REAL_BT)
    with seen:
        state = layer(torch.cat(both, dim=-1) @ extra.eh_proj.T, **call)
    logits = model.lm_head(normed(state, extra.head_norm))[:, :-2]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 2:].flatten()).backward()
    wanted = last_as_mtp(parity.gradients_as_ours(model), extra.as_ours(of_gradient=True))

    ours = dataclasses.replace(config, num_mtp_layers=1)
    rows, length = REAL_BT.shape
    sources_BT = np.tile(np.maximum(np.arange(length, dtype=np.int32) - 1, 0), (rows, 1))
    batch = packing.empty_batch(rows, length)._replace(tokens_BT=tokens_BT, sources_BT=sources_BT)
    weights_BT = jnp.asarray(REAL_BT / (rows * (length - 2.0)), jnp.float32)
    signals = transformer.Signals(mtp="on")

    @jax.jit
    @jax.grad
    def slope(params, router):
        out = transformer.apply(
            ours,
            {"params": params, **router},
            jnp.asarray(tokens_BT),
            parity.layout_of(REAL_BT),
            sources_BT=jnp.asarray(sources_BT),
            signals=signals,
        )
        return auxiliary.further_loss(ours, params["unembed"], batch, out.further, weights_BT)

    params = last_as_mtp(variables["params"], extra.as_ours())
    got = slope(params, {"router": last_as_mtp(variables["router"], {})})
    assert not seen.ties, seen.report()
    require_near(got, wanted, f"gradients of MTP, {kind_of(config)}", record_property)


def test_layers_with_given_picks_are_the_model():
    """The indexer's own picks, given: what the next test rests on."""
    model, tokens_BT = parity.drawn_reference(V32, seed=3), draw_tokens(V32, 3)
    _, variables = parity.as_ours(model)
    seen = parity.TopK(REAL_BT)
    parity.reference_logits(model, tokens_BT, REAL_BT, seen)
    layout = parity.layout_of(REAL_BT)
    given = (jnp.asarray(x) for x in (seen.experts_LBTA(), seen.picked_LBTS()))
    one = parity.our_logits_with_picks(V32, variables, jnp.asarray(tokens_BT), layout, *given)
    other = parity.our_logits(V32, variables, jnp.asarray(tokens_BT), layout)
    assert not seen.ties
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [V3, V32], ids=kind_of)
def test_bfloat16_is_as_near_to_float32_as_the_reference_in_bfloat16(config, record_property):
    """Weights are bfloat16 values, so that only computing rounds; experts, and the tokens that an
    indexer picks, are those of the reference in float32 on both sides."""
    halved = dataclasses.replace(config, compute_dtype="bfloat16")
    logits = parity.our_logits_with_picks if config.index_topk else parity.our_logits
    run = jax.jit(functools.partial(logits, halved))
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
        choices = [jnp.asarray(seen.experts_LBTA())]
        if config.index_topk:
            picked_LBTS = seen.picked_LBTS()
            assert picked_LBTS.sum(-1).max() == config.index_topk < LENGTH
            choices.append(jnp.asarray(picked_LBTS))
        got_BTV = run(variables, jnp.asarray(tokens_BT), parity.layout_of(REAL_BT), *choices)
        ours.append(np.sqrt(np.mean(np.square(np.asarray(got_BTV) - exact_BTV))))
        theirs.append(np.sqrt(np.mean(np.square(reference_BTV - exact_BTV))))
    ratio = float(np.median(np.array(ours) / np.array(theirs)))
    found = (
        f"bfloat16, {kind_of(config)}: error {np.median(ours):.4f}, the reference's "
        f"{np.median(theirs):.4f}, median ratio {ratio:.3f} of {SEEDS} seeds"
    )
    record_property("parity", found)
    assert ratio < 1.2, found
