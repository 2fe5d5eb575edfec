"""Auxiliary losses: their closed forms on a tiny model, and their way through a step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mathv2_jax import sharding
from mathv2_jax.data import packing
from mathv2_jax.model import config as model_config
from mathv2_jax.model import transformer
from mathv2_jax.rl import auxiliary, grpo
from mathv2_jax.rl import learner as learner_lib
from mathv2_jax.rl import optimizer as optimizer_lib

MODEL = model_config.ModelConfig(
    vocab_size=24,
    width=12,
    num_layers=2,
    num_heads=2,
    q_latent_width=8,
    kv_latent_width=8,
    head_key_width=4,
    head_rope_width=4,
    head_value_width=4,
    dense_width=16,
    expert_width=8,
    num_experts=4,
    experts_per_token=2,
    index_topk=3,
    index_heads=2,
    index_head_width=6,
    num_mtp_layers=1,
    logprob_chunk=8,
)
ROWS, LENGTH, RATE = 2, 16, 1e-2
WEIGHTS = auxiliary.AuxiliaryConfig(balance=0.5, indexer=0.25, mtp=0.125)
WARM_UP = auxiliary.AuxiliaryConfig(indexer=1.0, indexer_stage="dense", only_indexer=True)


def drawn(seed=3):
    draw = np.random.default_rng(seed)
    shapes = transformer.unboxed(transformer.boxed_abstract(MODEL))
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: ((path[-1].key == "scale") + 0.4 * draw.normal(size=leaf.shape)).astype(
            np.float32
        ),
        shapes,
    )


def items():
    """Two prompts, one with two answers and one with one."""
    draw, found = np.random.default_rng(4), []
    for sizes in ([4, 3], [5]):
        answers = tuple(
            packing.Answer(
                tokens=draw.integers(0, 24, n).tolist(),
                weights=[0.1] * n,
                old_logprobs=[-3.0] * n,
                advantage=float(a),
            )
            for n, a in zip(sizes, (1.0, -0.5), strict=False)
        )
        found.append(packing.Item(prompt=draw.integers(1, 24, 3).tolist(), answers=answers))
    return found


def learner(loss, config):
    trunk = learner_lib.Trunk(config=MODEL, kernels=transformer.Kernels(), auxiliary=config)
    return learner_lib.Learner(
        trunk,
        functools.partial(loss, trunk),
        optimizer_lib.make_optimizer(optimizer_lib.OptimizerConfig(learning_rate=RATE)),
        sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1]),
        router_bias_rate=0.01,
    )


def policy(trunk, *args):
    return learner_lib.policy_gradient(trunk, grpo.GrpoConfig(), 1.0, *args)


def stepped(made, batches):
    state = made.start(drawn())
    state, metrics = made.step(state, [made.put(b) for b in batches], [None] * len(batches), RATE)
    return jax.device_get((state.variables, metrics))


@pytest.fixture(scope="module")
def whole():
    """An RL step with every loss: variables and metrics."""
    made = learner(policy, WEIGHTS)
    return made, *stepped(made, packing.pack_all(items(), ROWS, LENGTH))


def test_the_losses_reported_are_the_trunks_sums_a_token(whole):
    _, _, metrics = whole
    (batch,) = packing.pack_all(items(), ROWS, LENGTH)
    trunk = learner_lib.Trunk(config=MODEL, kernels=transformer.Kernels(), auxiliary=WEIGHTS)
    variables = drawn()

    @jax.jit
    def read(variables):
        return trunk.read(variables["params"], variables, batch, WEIGHTS.signals())[1]

    out, tokens = jax.device_get(read(variables)), (batch.segments_BT > 0).sum()
    assert tokens == float(metrics["tokens"])
    balance = out.routing.balance.sum() + out.further.routing.balance.sum()
    assert float(metrics["balance_loss"]) == pytest.approx(balance / tokens, rel=1e-5)
    indexer = out.alignment_L.sum() + out.further.alignment.sum()
    assert float(metrics["indexer_loss"]) == pytest.approx(indexer / tokens, rel=1e-4)
    mtp = 0.0
    for row, at in zip(*np.nonzero(batch.weights_BT), strict=True):
        source = batch.sources_BT[row, at]
        if batch.sources_BT[row, source] == source:
            continue  # the second token of a row of its own has one hidden state before it
        logit_V = out.further.hidden_BTD[0, row, source] @ variables["params"]["unembed"]
        logprob_V = logit_V - np.log(np.exp(logit_V - logit_V.max()).sum()) - logit_V.max()
        mtp -= batch.weights_BT[row, at] * logprob_V[batch.tokens_BT[row, at]]
    assert float(metrics["mtp_loss"]) == pytest.approx(mtp, rel=1e-4)


def test_micro_batches_are_one_batch_cut_up(whole):
    made, variables, metrics = whole
    parts = [packing.pack_all([item], ROWS, LENGTH)[0] for item in items()]
    other_variables, other = stepped(made, parts)
    for name, value in metrics.items():
        assert float(other[name]) == pytest.approx(float(value), rel=2e-4), name
    for one, two in zip(*map(jax.tree.leaves, (variables, other_variables)), strict=True):
        np.testing.assert_allclose(one, two, atol=2e-3)  # Adam's first step is of size RATE


def test_every_part_of_the_model_learns_and_every_bias_moves(whole):
    _, variables, _ = whole
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max() > 0, drawn(), variables)
    still = {
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(moved)
        if not leaf
    }
    assert still == {"['params']['verifier_head_kernel']", "['params']['verifier_head_bias']"}


def test_a_dense_warm_up_moves_the_indexers_and_nothing_else():
    made = learner(functools.partial(learner_lib.supervised, mean=True), WARM_UP)
    (batch,) = packing.pack_all(items(), ROWS, LENGTH)
    state, losses = made.start(drawn()), []
    put = made.put(batch)
    for _ in range(20):
        state, metrics = made.step(state, [put], [None], RATE)
        losses.append(float(metrics["indexer_loss"]))
    moved = jax.tree.map(
        lambda a, b: np.abs(a - b).max() > 0, drawn(), jax.device_get(state.variables)
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(moved):
        name = jax.tree_util.keystr(path)
        assert leaf == ("indexer" in name and "mtp" not in name), name
    assert losses[-1] < 0.7 * losses[0]
    assert "mtp_loss" not in metrics and "balance_loss" not in metrics


@pytest.mark.parametrize(
    ("loss", "lacking", "reason"),
    [
        ("indexer", dict(index_topk=0, index_heads=0, index_head_width=0), "index_topk is 0"),
        ("mtp", dict(num_mtp_layers=0), "num_mtp_layers is 0"),
        ("balance", dict(num_mtp_layers=0, num_dense_layers=2), "no layer with experts"),
    ],
)
def test_a_loss_whose_part_the_model_lacks_is_refused(loss, lacking, reason):
    config, model = auxiliary.AuxiliaryConfig(**{loss: 0.1}), dataclasses.replace(MODEL, **lacking)
    config.require(MODEL, "config.stage.a.sft.auxiliary")
    with pytest.raises(ValueError, match=rf"^config\.stage\.a\.sft\.auxiliary\.{loss} = 0\.1: .*"):
        config.require(model, "config.stage.a.sft.auxiliary")
    with pytest.raises(ValueError, match=reason):
        learner_lib.Trunk(config=model, kernels=transformer.Kernels(), auxiliary=config)


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        (dict(balance=-1.0), "balance = -1.0: must not be negative"),
        (dict(indexer_stage="warm"), "indexer_stage = 'warm': must be one of"),
        (dict(only_indexer=True), "indexer is 0"),
    ],
)
def test_wrong_settings_are_refused(fields, rule):
    with pytest.raises(ValueError, match=rule):
        auxiliary.AuxiliaryConfig(**fields)


def test_nothing_is_computed_that_is_not_asked_for():
    assert auxiliary.AuxiliaryConfig().signals() == transformer.Signals()
    assert auxiliary.AuxiliaryConfig(mtp=0.1).signals(detached=True).mtp == "detached"


def test_the_further_loss_reads_each_tokens_predecessor_where_it_has_a_state():
    (batch,) = packing.pack_all(items(), ROWS, LENGTH)
    draw = np.random.default_rng(5)
    hidden = draw.normal(size=(2, ROWS, LENGTH, 12)).astype(np.float32)
    unembed = draw.normal(size=(12, 24)).astype(np.float32)
    real = draw.random((2, ROWS, LENGTH)) < 0.6
    further = transformer.Further(jnp.asarray(hidden), jnp.asarray(real), None, None, None, None)
    weights_BT = draw.random((ROWS, LENGTH)).astype(np.float32)  # first tokens and padding too
    got = auxiliary.further_loss(
        MODEL, jnp.asarray(unembed), batch, further, jnp.asarray(weights_BT)
    )
    wanted = 0.0
    for depth, row, at in np.ndindex(2, ROWS, LENGTH):
        source = batch.sources_BT[row, at]
        if source != at and real[depth, row, source]:
            logit_V = hidden[depth, row, source] @ unembed
            logprob_V = logit_V - np.log(np.exp(logit_V).sum())
            token = batch.tokens_BT[row, at]
            wanted -= weights_BT[row, at] * logprob_V[token] / 2
    assert float(got) == pytest.approx(wanted, rel=1e-5) and wanted > 0.5
