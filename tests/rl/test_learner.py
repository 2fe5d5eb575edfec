"""The train step on a tiny model: one packed batch of groups, compiled once for each learner."""

import dataclasses
import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mathv2_jax import sharding
from mathv2_jax.data import packing
from mathv2_jax.model import config as model_config
from mathv2_jax.model import transformer
from mathv2_jax.rl import grpo
from mathv2_jax.rl import learner as learner_lib
from mathv2_jax.rl import optimizer as optimizer_lib

MODEL = model_config.ModelConfig(
    vocab_size=24,
    width=16,
    num_layers=2,
    num_heads=2,
    kv_latent_width=8,
    head_key_width=4,
    head_rope_width=4,
    head_value_width=4,
    dense_width=16,
    expert_width=8,
    num_experts=4,
    experts_per_token=2,
    embedding_taps=2,
    logprob_chunk=8,
    scan_unroll=True,
)
TRUNK = learner_lib.Trunk(config=MODEL, kernels=transformer.Kernels())
GRPO = grpo.GrpoConfig(kl_coefficient=0.1, entropy_coefficient=0.01)
TEMPERATURE, BIAS_RATE, RATE, ROWS, LENGTH = 0.7, 0.01, 1e-2, 4, 20
# A large epsilon keeps Adam's first step from turning rounding errors into full-sized moves.
ADAM = optimizer_lib.OptimizerConfig(learning_rate=RATE, epsilon=1e-3, weight_decay=0.1)


class Outcome(NamedTuple):
    """A step's state and metrics on the host."""

    variables: Any
    optimizer: Any
    metrics: Any


def on_host(state, metrics=None):
    return Outcome(*jax.device_get((state.variables, state.optimizer, metrics)))


class Setting(NamedTuple):
    """A learner, fresh variables on the host, a batch, and reference log-probabilities for it."""

    learner: learner_lib.Learner
    variables: Any
    batch: packing.Batch
    reference_BT: np.ndarray

    def step(self, batches=None, rate=RATE, state=None):
        """One step from the fresh variables (or `state`), still on the devices."""
        state = self.learner.start(self.variables) if state is None else state
        put = [self.learner.put(b) for b in (batches or [self.batch])]
        where = sharding.batch_sharding(self.learner.mesh)
        reference_BT = jax.device_put(self.reference_BT, where)
        anchors = grpo.Anchors(reference_BT)
        return self.learner.step(state, put, [anchors] * len(put), rate)

    def step_on_host(self, batches=None, **settings):
        return on_host(*self.step(batches, **settings))

    def logprobs(self, variables):
        """Of the batch's tokens, under variables from anywhere."""
        variables = self.learner.start(variables).variables
        return np.asarray(self.learner.logprobs(variables, self.learner.put(self.batch)))


def policy_learner(mesh):
    return learner_lib.Learner(
        TRUNK,
        functools.partial(learner_lib.policy_gradient, TRUNK, GRPO, TEMPERATURE),
        optimizer_lib.make_optimizer(ADAM),
        mesh,
        router_bias_rate=BIAS_RATE,
        temperature=TEMPERATURE,
    )


def draw_variables(config=MODEL):
    """Every array drawn: no norm scale is one, no router bias and no head is zero."""
    draw = np.random.default_rng(3)

    def one(path, leaf):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return (centre + 0.4 * draw.normal(size=leaf.shape)).astype(np.float32)

    shapes = transformer.unboxed(transformer.boxed_abstract(config))
    return jax.tree_util.tree_map_with_path(one, shapes)


def draw_groups():
    """Four groups of answers of several lengths, two of them with a target for the head."""
    draw = np.random.default_rng(4)
    lengths = [[2, 4, 3], [5, 1], [3, 3], [1, 2, 6]]
    labels, found = [(0.0, 0.3), (None, 0.0), (1.0, 0.7), (None, 0.0)], []
    for sizes, weights, (label, trust) in zip(
        lengths, grpo.token_weights(lengths, GRPO), labels, strict=True
    ):
        advantages = grpo.advantages(draw.uniform(size=len(sizes)).tolist(), "mean")
        answers = tuple(
            packing.Answer(
                tokens=draw.integers(0, MODEL.vocab_size, size).tolist(),
                weights=[weight] * size,
                advantage=float(advantage),
            )
            for size, weight, advantage in zip(sizes, weights, advantages, strict=True)
        )
        prompt = draw.integers(1, MODEL.vocab_size, 4).tolist()
        found.append(
            packing.Item(prompt=prompt, answers=answers, head_label=label, head_weight=trust)
        )
    return found


@pytest.fixture(scope="module")
def single():
    """On one device; sampler and reference lie near the policy."""
    learner = policy_learner(sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1]))
    (batch,) = packing.pack_all(draw_groups(), ROWS, LENGTH)
    variables, draw = draw_variables(), np.random.default_rng(5)
    blank = np.zeros((ROWS, LENGTH), np.float32)
    logprob_BT = Setting(learner, variables, batch, blank).logprobs(variables)
    old_BT, reference_BT = (
        (logprob_BT + draw.normal(0.0, 0.2, logprob_BT.shape)).astype(np.float32) for _ in "ab"
    )
    return Setting(learner, variables, batch._replace(old_logprobs_BT=old_BT), reference_BT)


@pytest.fixture(scope="module")
def stepped(single):
    """What one step makes of the fresh variables."""
    return single.step_on_host()


class Pass(NamedTuple):
    """A forward pass: states as predicting [B, T, D] and as computed, log-probabilities, load."""

    read_BTD: Any
    raw_BTD: Any
    logprob_BT: Any
    entropy_BT: Any
    load_LE: Any


@jax.jit
def _forward(variables, batch):
    read_BTD, out = TRUNK.read(variables["params"], variables, batch)
    found, _ = TRUNK.logprobs(variables["params"], variables, batch, TEMPERATURE)
    return Pass(read_BTD, out.hidden_BTD, *found, out.routing.load_E)


def forward(setting, batch=None):
    return jax.device_get(_forward(setting.variables, batch or setting.batch))


def edited(batch, **places):
    """The batch with single entries changed: `name=(index, value)`."""
    fields = {}
    for name, (index, value) in places.items():
        fields[name] = np.copy(getattr(batch, name))
        fields[name][index] = value
    return batch._replace(**fields)


def log_softmax(logits_V):
    return logits_V - np.log(np.sum(np.exp(logits_V - logits_V.max()))) - logits_V.max()


# What a token is predicted from.


def test_a_token_does_not_enter_its_own_prediction_but_every_later_one_of_its_answer(single):
    """An off-by-one in `sources_BT` would let a state that has read a token predict it."""
    batch = single.batch
    before = forward(single).read_BTD[0]
    for at in (4, 6, 7, 8):
        token = (batch.tokens_BT[0, at] + 1) % MODEL.vocab_size
        after = forward(single, edited(batch, tokens_BT=((0, at), token))).read_BTD[0]
        moved_T = np.abs(after - before).max(axis=-1) > 1e-3
        same_answer_T = batch.segments_BT[0] == batch.segments_BT[0, at]
        np.testing.assert_array_equal(moved_T, same_answer_T & (np.arange(LENGTH) > at))


def test_the_prompts_last_token_enters_the_prediction_of_every_answers_first(single):
    batch = single.batch
    firsts = [4, 6, 10]
    assert [batch.sources_BT[0, at] for at in firsts] == [3, 3, 3]
    changed = edited(batch, tokens_BT=((0, 3), (batch.tokens_BT[0, 3] + 1) % MODEL.vocab_size))
    moved_T = np.abs(forward(single, changed).read_BTD - forward(single).read_BTD)[0].max(axis=-1)
    assert (moved_T[4:13] > 1e-3).all() and (moved_T[:4] < 1e-5).all()


def test_log_probabilities_are_the_tempered_softmax_of_the_preceding_state(single):
    found = forward(single)
    unembed_DV = single.variables["params"]["unembed"]
    logprob_BT = single.logprobs(single.variables)
    for row, at in zip(*np.nonzero(single.batch.weights_BT), strict=True):
        source = single.batch.sources_BT[row, at]
        logprob_V = log_softmax(found.raw_BTD[row, source] @ unembed_DV / TEMPERATURE)
        expected = logprob_V[single.batch.tokens_BT[row, at]]
        np.testing.assert_allclose(found.logprob_BT[row, at], expected, atol=1e-5)
        np.testing.assert_allclose(logprob_BT[row, at], expected, atol=1e-5)
        entropy = -np.sum(np.exp(logprob_V) * logprob_V)
        np.testing.assert_allclose(found.entropy_BT[row, at], entropy, atol=1e-5)


# The step.


def test_the_loss_is_that_of_grpo_on_the_batchs_log_probabilities(single, stepped):
    batch, found = single.batch, forward(single)
    loss, aux = grpo.grpo_loss(
        jnp.asarray(found.logprob_BT),
        jnp.asarray(found.entropy_BT),
        jnp.asarray(batch.old_logprobs_BT),
        grpo.Anchors(jnp.asarray(single.reference_BT)),
        jnp.asarray(batch.advantages_BT),
        jnp.asarray(batch.segments_BT),
        jnp.asarray(batch.weights_BT),
        GRPO,
    )
    metrics = stepped.metrics
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert float(metrics["kl"]) == pytest.approx(float(aux.kl / aux.weight), rel=1e-4)
    assert float(metrics["tokens"]) == (batch.segments_BT > 0).sum()
    assert float(metrics["finite"]) == 1.0


def test_the_heads_loss_is_its_cross_entropy_at_the_prompts_last_tokens(single, stepped):
    raw_BTD, params, total = forward(single).raw_BTD, single.variables["params"], 0.0
    for row, slot in zip(*np.nonzero(single.batch.head_weights_BN), strict=True):
        hidden_D = raw_BTD[row, single.batch.head_places_BN[row, slot]]
        logits_3 = hidden_D @ params["verifier_head_kernel"] + params["verifier_head_bias"]
        label = single.batch.head_labels_BN[row, slot]
        total -= single.batch.head_weights_BN[row, slot] * log_softmax(logits_3)[label]
    assert float(stepped.metrics["head_loss"]) == pytest.approx(total, rel=1e-5)  # weights sum to 1


def test_the_heads_targets_move_the_head_and_nothing_else(single, stepped):
    without = single.batch._replace(head_weights_BN=0.0 * single.batch.head_weights_BN)
    state = single.step_on_host([without])
    with_head, old = stepped.variables["params"], single.variables["params"]
    for name, value in state.variables["params"].items():
        if name.startswith("verifier_head"):
            np.testing.assert_array_equal(value, old[name])
            assert np.abs(with_head[name] - old[name]).min() > 0.0
        else:
            chex.assert_trees_all_equal(value, with_head[name])


def test_the_update_is_proportional_to_the_rate(single, stepped):
    state = single.step_on_host(rate=2 * RATE)
    for old, once, twice in zip(
        *(
            jax.tree.leaves(v["params"])
            for v in (single.variables, stepped.variables, state.variables)
        ),
        strict=True,
    ):
        assert np.abs(once - old).max() > 1e-4
        np.testing.assert_allclose(twice - old, 2 * (once - old), atol=1e-6)


def test_a_step_against_the_advantages_raises_what_was_good(single, stepped):
    """Answers of positive advantage become likelier in sum, those of negative ones rarer."""
    batch = single.batch
    before, after = single.logprobs(single.variables), single.logprobs(stepped.variables)
    assert np.sum(batch.weights_BT * batch.advantages_BT * (after - before)) > 0.0


def test_micro_batches_are_one_batch_cut_up(single, stepped):
    blank = packing.empty_batch(ROWS, LENGTH)
    parts = []
    for rows in (slice(0, 1), slice(1, 4)):
        part = packing.Batch(*(None if x is None else np.copy(x) for x in blank))
        for name, value in single.batch._asdict().items():
            if value is not None:
                getattr(part, name)[rows] = value[rows]
        parts.append(part)
    state = single.step_on_host(parts)
    assert state.metrics.keys() == stepped.metrics.keys()
    for name, value in state.metrics.items():
        assert float(value) == pytest.approx(float(stepped.metrics[name]), rel=1e-5), name
    chex.assert_trees_all_close(state.variables, stepped.variables, atol=1e-5)
    chex.assert_trees_all_close(state.optimizer, stepped.optimizer, atol=1e-5)


def test_what_stands_in_padding_reaches_neither_loss_nor_gradient_nor_router(single, stepped):
    padding_BT = single.batch.segments_BT == 0
    assert padding_BT.any()
    junk_BT = np.random.default_rng(6).integers(1, MODEL.vocab_size, padding_BT.shape)
    tokens_BT = np.where(padding_BT, junk_BT, single.batch.tokens_BT).astype(np.int32)
    junk = dict(advantages_BT=np.inf, old_logprobs_BT=np.nan)
    fields = {n: np.where(padding_BT, v, getattr(single.batch, n)) for n, v in junk.items()}
    fields = {n: v.astype(np.float32) for n, v in fields.items()}
    state = single.step_on_host([single.batch._replace(tokens_BT=tokens_BT, **fields)])
    for name, value in state.metrics.items():
        assert float(value) == pytest.approx(float(stepped.metrics[name]), rel=1e-5), name
    chex.assert_trees_all_close(state.variables, stepped.variables, atol=1e-5)


def test_the_router_bias_moves_a_fixed_step_against_the_load_in_rl_too(single, stepped):
    load_LE = forward(single).load_LE
    per_token = MODEL.experts_per_token
    assert load_LE.sum() == per_token * (single.batch.segments_BT > 0).sum()
    old, new = (v["router"]["sparse"]["mlp"]["bias"] for v in (single.variables, stepped.variables))
    move_LE = BIAS_RATE * np.sign(load_LE.mean(axis=-1, keepdims=True) - load_LE)
    assert np.abs(move_LE).max() > 0.0
    np.testing.assert_allclose(new - old, move_LE, atol=1e-6)
    peak = float(np.max(load_LE.max(axis=-1) / load_LE.mean(axis=-1)))
    assert float(stepped.metrics["router_peak_load"]) == pytest.approx(peak, rel=1e-6)


FIRST = (0, 5)  # a token of the first answer
POISON = {
    "loss": dict(old_logprobs_BT=(FIRST, -np.inf)),
    "not_a_number": dict(old_logprobs_BT=(FIRST, np.nan)),
    "gradient_only": dict(advantages_BT=(FIRST, 1e30)),
    "head": dict(head_weights_BN=((0, 0), np.inf)),
}


@pytest.mark.parametrize("kind", POISON)
def test_a_step_that_is_not_finite_leaves_everything_as_it_was_and_says_so(single, kind):
    state, _ = single.step()
    before = on_host(state)
    after = single.step_on_host([edited(single.batch, **POISON[kind])], state=state)
    assert float(after.metrics["finite"]) == 0.0
    assert bool(np.isfinite(after.metrics["loss"])) == (kind in ("gradient_only", "head"))
    chex.assert_trees_all_equal(after.variables, before.variables)
    chex.assert_trees_all_equal(after.optimizer, before.optimizer)


def test_after_a_refused_step_training_goes_on_as_if_it_had_not_been(single):
    state, _ = single.step([edited(single.batch, **POISON["loss"])])
    after = single.step_on_host(state=state)
    expected = single.step_on_host()
    assert float(after.metrics["finite"]) == 1.0
    chex.assert_trees_all_equal(after.variables, expected.variables)
    chex.assert_trees_all_equal(after.optimizer, expected.optimizer)


def test_a_state_is_consumed_by_its_step_and_the_variables_it_began_with_are_not(single):
    variables = jax.device_put(single.variables, jax.devices()[0])
    state = single.learner.start(variables)
    params = jax.tree.leaves((state.variables, state.optimizer))
    layout = jax.tree.map(lambda x: x.sharding, state)
    state, _ = single.step(state=state)
    assert jax.tree.map(lambda x: x.sharding, state) == layout
    assert all(x.is_deleted() for x in params)
    chex.assert_trees_all_equal(jax.device_get(variables), single.variables)


MESHES = [
    dict(data=2, fsdp=2, tensor=2),
    dict(data=1, expert=2, tensor=2, context=2),
    dict(data=1, expert=4, tensor=2),
    dict(data=1, fsdp=2, context=4),
]


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_a_step_on_eight_devices_is_the_step_on_one(single, stepped, axes):
    mesh = sharding.make_mesh(sharding.MeshConfig(**axes))
    spread = single._replace(learner=policy_learner(mesh))
    state = spread.learner.start(single.variables)
    assert len(state.variables["params"]["unembed"].sharding.device_set) == 8
    assert not state.variables["params"]["unembed"].sharding.is_fully_replicated
    layout = jax.tree.map(lambda x: x.sharding, state)
    state, metrics = spread.step(state=state)
    assert jax.tree.map(lambda x: x.sharding, state) == layout  # or the next step compiles anew
    after = on_host(state, metrics)
    for name in ("loss", "gradient_norm", "head_loss", "kl", "entropy", "ratio"):
        assert float(after.metrics[name]) == pytest.approx(
            float(stepped.metrics[name]), rel=1e-5
        ), name
    chex.assert_trees_all_close(after.variables, stepped.variables, atol=1e-5)


# Supervised.


def test_supervised_training_learns_a_short_text_by_heart_its_end_included():
    """The end token is the padding token here: it is learnt as any other. No layer is sparse."""
    end, text = 0, [5, 9, 5, 2, 9, 9, 7]
    answer = packing.Answer(tokens=[*text, end], weights=[1.0] * 8)
    (batch,) = packing.pack_all([packing.Item(prompt=(1, 2), answers=(answer,))], 1, 12)
    dense = dataclasses.replace(MODEL, num_dense_layers=MODEL.num_layers)
    trunk = learner_lib.Trunk(config=dense, kernels=transformer.Kernels())
    learner = learner_lib.Learner(
        trunk,
        functools.partial(learner_lib.supervised, trunk),
        optimizer_lib.make_optimizer(optimizer_lib.OptimizerConfig(learning_rate=RATE)),
        sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1]),
        router_bias_rate=0.001,
    )
    state, losses, batch = learner.start(draw_variables(dense)), [], learner.put(batch)
    logprob_BT = np.asarray(learner.logprobs(state.variables, batch))
    for _ in range(60):
        state, metrics = learner.step(state, [batch], [None], RATE)
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(-logprob_BT[0, 2:10].sum(), rel=1e-5)
    learnt_BT = np.asarray(learner.logprobs(state.variables, batch))
    assert losses[0] > 10.0 and np.exp(learnt_BT[0, 2:10]).min() > 0.9
