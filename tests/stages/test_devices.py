"""The first step of every kind of training stage on eight devices is the one on a single device.

The batches are made of what the smoke run wrote down, packed as its stages pack them.
"""

import dataclasses

import jax
import numpy as np
import pytest
from etils import epath

from mathv2_jax import records, roles, sharding
from mathv2_jax.cli import config as config_lib
from mathv2_jax.cli import overrides, train
from mathv2_jax.data import packing
from mathv2_jax.rl import grpo, optimizer
from mathv2_jax.stages import groups, rl, scoring, sft, updates
from mathv2_jax.stages import tasks as tasks_lib
from tests import smoke

CONFIG = config_lib.build(overrides.load(str(smoke.CONFIG)))
STAGES = {stage.name: stage for stage in CONFIG.stages}
MESH = sharding.MeshConfig(data=2, fsdp=2, tensor=2)


@pytest.fixture(scope="module")
def runs(smoke_workdir):
    """The same run on one device and on eight."""
    runtime = dataclasses.replace(CONFIG.runtime, mesh=MESH)
    config = dataclasses.replace(CONFIG, runtime=runtime)
    spread = train.make_run(epath.Path(smoke_workdir), config, lambda: False)
    one = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    return dataclasses.replace(spread, mesh=one), spread


def conversations(run, config):
    """A packed batch of the stage's demonstrations."""
    packer = packing.Packer(config.rows, config.row_length)
    for demonstration in run.input("demonstrations", records.Demonstration):
        item = sft.supervised_item(run.tokenizer, demonstration, config.prompt_weight, think=False)
        if not packer.add(item):
            return packer.batch
    raise AssertionError("the demonstrations do not fill a batch")


def answered(run, sample):
    """A recorded answer as its stage saw it, its text encoded again."""
    role = run.roles.named(sample.role)
    fields = dict(statement=sample.statement, proof=sample.proof, analysis=sample.analysis)
    task = tasks_lib.Task(
        role=role,
        problem_id=sample.problem_id,
        target=sample.target,
        label=sample.label,
        prompt=role.prompt(run.tokenizer, **fields),
        **fields,
    )
    response = records.Response(
        request_id=sample.id,
        index=sample.index,
        token_ids=(*run.tokenizer.encode_text(sample.text), run.tokenizer.eos_id),
        logprobs=(0.0,) * (len(run.tokenizer.encode_text(sample.text)) + 1),
        text=sample.text,
        final_text=sample.text,
        thinking_text="",
        finish=sample.finish,
        parameter_version=sample.checkpoint,
    )
    return scoring.Answered(task, roles.understand(role, response))


def rollouts(run, stage):
    """The first packed batch of the stage's recorded groups that hold a signal."""
    by_group = {}
    for sample in run.samples(stage.name):
        if sample.id.count("/") == 3:  # an answer, not an opinion on one
            by_group.setdefault(sample.id.rsplit("/", 1)[0], []).append(sample)
    found = [
        groups.make_group(
            [answered(run, s) for s in samples],
            [scoring.Scored(dict(s.rewards) or None) for s in samples],
            stage.rl.grpo.advantage,
        )
        for samples in by_group.values()
    ]
    batch, *_ = updates.pack(stage.rl, [groups.summarise(g) for g in found if g.has_signal])
    return batch


def require_equal(single, spread, terms=0.0):
    """Equal to 1e-5, relative. A policy's loss is what is left of `terms` that cancel, since a
    group's advantages sum to 0, and float32 rounds the terms: 1e-6 of them is allowed beside."""
    assert single["gradient_norm"] > 1e-3 and abs(single["loss"]) > 1e-5
    for name in ("loss", "gradient_norm", "head_loss"):
        rounding = 1e-6 * terms if name == "loss" else 0.0
        assert spread[name] == pytest.approx(single[name], rel=1e-5, abs=rounding), name
    assert spread["finite"] == single["finite"] == 1.0


def test_supervised_training(runs):
    config = STAGES["sft"].sft
    rate = optimizer.learning_rate(config.optimizer, 0, config.steps)
    batch = conversations(runs[0], config)
    found = []
    for run in runs:
        learner = sft._make_learner(run, config)
        state = learner.start(run.variables(STAGES["sft"].init))
        found.append(learner.step(state, [learner.put(batch)], [None], rate)[1])
    require_equal(*({name: float(x) for name, x in m.items()} for m in found))


@pytest.fixture(scope="module")
def learners(runs):
    """One for all stages: they differ in their batches only."""
    config = STAGES["verifier-0"].rl
    return [rl._make_learner(run, config, 1.0) for run in runs]


@pytest.mark.parametrize(
    "name",
    ["verifier-0", "meta", "verifier-1", "generator-1"],  # score; D_mv; R_meta; the generator
)
def test_reinforcement_learning(runs, learners, name):
    stage = STAGES[name]
    assert stage.rl.grpo == STAGES["verifier-0"].rl.grpo
    batch = rollouts(runs[0], stage)
    on_one = learners[0].logprobs(runs[0].variables(stage.init), learners[0].put(batch))
    noise_BT = np.random.default_rng(0).normal(0.0, 0.2, on_one.shape)
    old_BT = (np.asarray(on_one) + noise_BT).astype(np.float32)  # a sampler a little off
    batch = batch._replace(old_logprobs_BT=old_BT)
    found = []
    for run, learner in zip(runs, learners, strict=True):
        state = learner.start(run.variables(stage.init))
        put = learner.put(batch)
        reference_BT = learner.logprobs(state.variables, put)
        found.append(learner.step(state, [put], [grpo.Anchors(reference_BT)], 1e-3)[1])
    terms = float(np.sum(batch.weights_BT * np.abs(batch.advantages_BT)))
    require_equal(*({key: float(x) for key, x in m.items()} for m in found), terms)
