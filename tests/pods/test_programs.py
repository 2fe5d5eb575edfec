"""The programs that are compiled ahead are those that a step runs."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from configs.models import tiny_v32
from mathv2_jax import sharding
from mathv2_jax.data import packing
from mathv2_jax.model import transformer
from mathv2_jax.model.config import ModelConfig
from mathv2_jax.pods import chips, phases, programs
from mathv2_jax.rl import grpo, learner, optimizer, placement
from mathv2_jax.rollout import schedule
from mathv2_jax.stages import rl

MODEL = ModelConfig(
    **tiny_v32.model() | dict(num_mtp_layers=0, q_latent_width=12, kv_latent_width=12)
)
CONFIG = rl.RlConfig(
    steps=1,
    rows=8,
    row_length=16,
    samples=4,
    optimizer=optimizer.OptimizerConfig(learning_rate=1e-2),
)
ENGINE = schedule.EngineConfig(rows=30, context=14, page=4, chunk=8, chunks=2, steps=6)
RATE = 1e-2


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, expert=2))


@pytest.fixture(scope="module")
def made(mesh):
    return programs.of_rl_step(MODEL, transformer.Kernels(), CONFIG, ENGINE, mesh)


def batch():
    rng = np.random.default_rng(0)
    answers = [
        packing.Answer(tokens=rng.integers(1, 60, n).tolist(), weights=[1.0] * n, advantage=a)
        for n, a in ((3, 1.0), (5, -1.0))
    ]
    items = [packing.Item(prompt=(1, 2, 3), answers=(answer,)) for answer in answers * 4]
    (packed,) = packing.pack_all(items, CONFIG.rows, CONFIG.row_length)
    return packed


def test_a_step_by_the_programs_compiled_ahead_is_the_learners_own(made, mesh):
    trunk = learner.Trunk(config=MODEL, kernels=transformer.Kernels())
    own = learner.Learner(
        trunk,
        functools.partial(learner.policy_gradient, trunk, grpo.GrpoConfig(), 1.0),
        optimizer.make_optimizer(CONFIG.optimizer),
        mesh,
        router_bias_rate=1e-3,
    )
    variables = transformer.init(MODEL, jax.random.key(0))
    put = own.put(batch())
    wanted, metrics = own.step(own.start(variables), [put], [None], RATE)
    state = own.start(variables)
    ahead = {n: made[n].trace().lower().compile() for n in ("gradients", "update")}
    rate = jax.device_put(np.float32(RATE), sharding.replicated(mesh))
    total = ahead["gradients"](state.variables, put, None, None)
    found, same = ahead["update"](state, total, rate)
    assert float(same["loss"]) == float(metrics["loss"]) != 0.0
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_engines_programs_are_of_its_config_rounded_up_to_the_meshs_ways(made):
    prefill, decode = made["prefill"], made["decode"]
    assert (prefill.sequences, prefill.length) == (8, 8)
    assert (decode.sequences, decode.turns, decode.past) == (32, 6, 7)
    few = dataclasses.replace(ENGINE, context=10)
    kernels = transformer.Kernels(slots=8)
    short = programs.of_rl_step(MODEL, kernels, CONFIG, few, decode.mesh)
    assert short["prefill"].loops == (None, 2)  # 5 + 8 tokens, 8 at once
    assert short["decode"].loops == (6, (3 * 1 + 3 * 2) / 6)  # 6, 7, 8 and 9, 10, 11 tokens
    for program in (prefill, decode):
        assert program.trace().lower().compile().memory_analysis() is not None


def test_what_is_replayed_of_a_rollout_is_in_the_programs_and_recorded_by_the_engines(mesh, made):
    kept = dataclasses.replace(CONFIG, keep_routing=True, keep_sampling_mask=True)
    few = dataclasses.replace(ENGINE, most_kept=5)
    found = programs.of_rl_step(MODEL, transformer.Kernels(), kept, few, mesh)
    sparse, rows, length = MODEL.num_sparse_layers, CONFIG.rows, CONFIG.row_length
    (batch,) = (a for a in found["gradients"].arguments if isinstance(a, packing.Batch))
    assert batch.kept_LBTA.shape == (sparse, rows, length, MODEL.experts_per_token)
    assert batch.allowed_BTY.shape == (rows, length, 5)
    (batch,) = (a for a in made["gradients"].arguments if isinstance(a, packing.Batch))
    assert batch.kept_LBTA is None and batch.allowed_BTY is None

    def outputs(program):
        return [x.aval.shape for x in program.trace().jaxpr.jaxpr.outvars]

    chosen = (few.steps, sparse, 32, MODEL.experts_per_token)
    assert chosen in outputs(found["decode"]) and chosen not in outputs(made["decode"])
    assert (32, few.steps, 5) in outputs(found["decode"])
    assert (sparse, 8, 8, MODEL.experts_per_token) in outputs(found["prefill"])
    assert found["gradients"].trace().lower() is not None


def test_a_chips_share_of_the_arguments_is_what_its_shards_hold(made, mesh):
    trunk = transformer.boxed_abstract(MODEL)
    where = sharding.shardings_for(trunk, mesh)
    variables = jax.device_put(transformer.init(MODEL, jax.random.key(0)), where)
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(variables))
    assert made["logprobs"].argument_bytes(0) == held
    # Two moments for each parameter, and the counts of their steps.
    assert 2.9 * held < made["update"].argument_bytes(0) < 3.1 * held


def test_a_phase_holds_all_parameter_sets_and_the_larger_of_its_programs(made):
    chip = chips.Chip(bf16_flops=1.0, hbm_bytes=1e6, hbm_bandwidth=1.0, ici_bandwidth=1.0)
    variables = made["logprobs"].argument_bytes(0)
    state = made["update"].argument_bytes(0)
    measured = {
        "prefill": {"peak_bytes_per_chip": variables + 5, "fits": True},
        "decode": {"peak_bytes_per_chip": variables + 7, "fits": True},
        "gradients": {"peak_bytes_per_chip": variables + 10**6, "fits": True},
        "update": {"peak_bytes_per_chip": state + 3, "fits": True},
    }
    resident = placement.PlacementConfig()
    found = phases.of_rl_step(made, measured, chip, judged=True, kl=True, placement=resident)
    sampling = found["sampling"]["bytes_per_chip"]
    assert sampling == {
        "policy": variables,
        "optimizer": state - variables,
        "initial_parameters": variables,
        "judge": variables,
        "programs": 7,
    }
    assert found["sampling"]["fits"] is True and found["training"]["fits"] is False
    assert found["reference"]["fits"] is None  # its program was not compiled
    alone = phases.of_rl_step(made, measured, chip, judged=False, kl=False, placement=resident)
    assert set(alone) == {"sampling", "training"} and "judge" not in str(alone)
    assert "initial_parameters" not in str(alone)


def test_sets_that_are_placed_elsewhere_are_in_the_phases_that_use_them_alone(made):
    chip = chips.Chip(bf16_flops=1.0, hbm_bytes=1e6, hbm_bandwidth=1.0, ici_bandwidth=1.0)
    away = placement.PlacementConfig(judge="host", reference="loaded", optimizer="host")
    found = phases.of_rl_step(made, {}, chip, judged=True, kl=True, placement=away)
    held = {name: set(phase["bytes_per_chip"]) for name, phase in found.items()}
    assert held == {
        "sampling": {"policy", "judge"},
        "reference": {"policy", "optimizer", "initial_parameters"},
        "training": {"policy", "optimizer"},
    }


def test_engines_of_their_own_layout_and_dtype_take_a_hand_over(mesh):
    half = dataclasses.replace(ENGINE, param_dtype="bfloat16")
    sampling = sharding.SamplingConfig(replicas=2, data=2, expert=2)
    apart = programs.of_rl_step(MODEL, transformer.Kernels(), CONFIG, half, mesh, sampling)
    assert apart["prefill"].mesh.size == 4 and apart["gradients"].mesh.size == 8
    wanted = [x for x in jax.tree.leaves(apart["prefill"].arguments[0]) if x.size]
    draw = np.random.default_rng(0)
    for program, sampled in zip(apart["hand_over"].each, wanted, strict=True):
        (given,) = program.arguments
        trained = sharding.put(draw.normal(size=given.shape).astype(given.dtype), given.sharding)
        found = program.trace().lower().compile()(trained)
        np.testing.assert_array_equal(found, trained.astype(sampled.dtype))
        assert found.dtype == sampled.dtype and found.sharding.spec == sampled.sharding.spec
    chip = chips.CHIPS["v5p"]
    resident = placement.PlacementConfig()
    phase = phases.of_rl_step(apart, {}, chip, judged=True, kl=True, placement=resident)
    bytes_of = phase["sampling"]["bytes_per_chip"]
    assert bytes_of["policy_of_the_engines"] == bytes_of["judge"]
    assert bytes_of["judge"] == apart["prefill"].argument_bytes(0)
