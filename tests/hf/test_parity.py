"""Logits and greedy generations against the reference library, float32, random weights.

The worst difference of every setting and all near-ties of its top-k choices are listed at the end
of the test run (tests/conftest.py). Where two scores are nearer than rounding the two libraries may
choose differently: the places that depend on such a tie, none or few, are listed, not compared.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from configs.models import tiny_v3, tiny_v32
from mathv2_jax import records, sharding
from mathv2_jax.model import transformer
from mathv2_jax.model.config import ModelConfig
from mathv2_jax.rollout import answers as answers_lib
from mathv2_jax.rollout import decode, schedule, worker
from tests.hf import parity

LENGTH = 24
LIMIT = 2e-5
MAX_TIED = 0.05  # of all places
LENGTHS = {1: (17,), 5: (24, 9, 17, 1, 13)}  # of padded rows, by batch

PLAIN_ROTATION = {
    field.name: field.default
    for field in dataclasses.fields(ModelConfig)
    if field.name.startswith("yarn_")
}
ONE_GROUP = dict(num_expert_groups=1, expert_groups_per_token=1)
NO_Q_LATENT = dict(q_latent_width=0)


def v3(**changes) -> ModelConfig:
    return ModelConfig(**(tiny_v3.model() | changes))


def v32(**changes) -> ModelConfig:
    return ModelConfig(**(tiny_v32.model() | changes))


# name: (config, batch)
SETTINGS = {
    "v3-full": (v3(), 5),
    "v3-moonlight": (v3(**NO_Q_LATENT, **PLAIN_ROTATION, **ONE_GROUP, num_dense_layers=1), 5),
    "v3-all-sparse": (v3(**PLAIN_ROTATION, **ONE_GROUP, num_dense_layers=0), 1),
    "v3-no-q-latent": (v3(**NO_Q_LATENT, num_dense_layers=2), 1),
    "v3-raw-weights": (
        v3(**PLAIN_ROTATION, normalize_expert_weights=False, num_shared_experts=1, norm_eps=0.03),
        5,
    ),
    "v3-yarn-uncorrected": (v3(yarn_mscale=1.0, yarn_mscale_all_dim=0.0), 1),
    "v32-k-below": (v32(), 5),
    "v32-k-below-plain": (v32(**PLAIN_ROTATION, **ONE_GROUP, index_topk=4, num_dense_layers=0), 1),
    "v32-k-above": (v32(index_topk=LENGTH + 3, num_dense_layers=2), 5),
    "v32-k-at-length": (v32(**PLAIN_ROTATION, index_topk=LENGTH, norm_eps=0.03), 1),
}


def padded(batch: int, side: str) -> np.ndarray:
    """True where a token is real."""
    lengths_B = np.array([LENGTH] * batch if side == "none" else LENGTHS[batch])
    real_BT = np.arange(LENGTH)[None, :] < lengths_B[:, None]
    return np.ascontiguousarray(real_BT[:, ::-1]) if side == "left" else real_BT


@functools.cache
def models(name: str):
    """A reference model, ours with its weights, and our compiled pass."""
    config, _ = SETTINGS[name]
    model = parity.drawn_reference(config, seed=7)
    found, variables = parity.as_ours(model)
    assert found == config
    return model, variables, jax.jit(functools.partial(parity.our_logits, config))


@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("name", SETTINGS)
def test_logits_are_those_of_the_reference(name, side, record_property):
    config, batch = SETTINGS[name]
    model, variables, run = models(name)
    real_BT = padded(batch, side)
    tokens_BT = np.random.default_rng(5).integers(1, config.vocab_size, real_BT.shape)
    tokens_BT = np.where(real_BT, tokens_BT, 0).astype(np.int32)
    seen = parity.TopK(real_BT)
    wanted_BTV = parity.reference_logits(model, tokens_BT, real_BT, seen)
    got_BTV = run(variables, jnp.asarray(tokens_BT), parity.layout_of(real_BT))
    compared_BT = seen.untouched()
    difference = np.abs(np.asarray(got_BTV) - wanted_BTV)[compared_BT].max()
    relative = difference / np.abs(wanted_BTV[compared_BT]).max()
    found = f"{name}, padding {side}: {relative:.1e}; {seen.report()}"
    record_property("parity", found)
    assert relative < LIMIT, found
    assert 1 - compared_BT.sum() / real_BT.sum() <= MAX_TIED, found


PROMPTS, NEW = (12, 3, 7, 1, 9), 64


@pytest.mark.parametrize("name", ["v3-full", "v32-k-below"])
def test_greedy_generations_of_64_tokens_are_those_of_the_reference(name, record_property):
    """Ours reads prompts in pieces into pages, and decodes absorbed; theirs pads left."""
    config, _ = SETTINGS[name]
    model, variables, _ = models(name)
    lengths_P, slots = np.array(PROMPTS), max(PROMPTS)
    tokens_PS = np.random.default_rng(6).integers(1, config.vocab_size, (len(PROMPTS), slots))
    real_PS = np.arange(slots)[None, :] < lengths_P[:, None]
    tokens_PS = np.where(real_PS, tokens_PS, 0).astype(np.int32)
    shift_PS = (np.arange(slots)[None, :] + lengths_P[:, None]) % slots
    out = model.generate(
        input_ids=torch.from_numpy(np.take_along_axis(tokens_PS, shift_PS, axis=1)).long(),
        attention_mask=torch.from_numpy(np.take_along_axis(real_PS, shift_PS, axis=1)).long(),
        do_sample=False,
        max_new_tokens=NEW,
        output_scores=True,
        return_dict_in_generate=True,
    )
    best_two = torch.stack(out.scores, dim=1).topk(2, dim=-1).values
    margin = float((best_two[..., 0] - best_two[..., 1]).min())
    found = f"{name}, greedy: smallest margin between the two best tokens {margin:.1e}"
    record_property("parity", found)

    limits = schedule.EngineConfig(rows=5, context=80, page=8, chunk=8, chunks=4, steps=NEW)
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    programs = decode.Programs(config, transformer.Kernels())
    own = worker.Worker(programs, limits, mesh, pad_id=0)
    own.load(jax.tree.map(jnp.asarray, variables))
    pool, answers, pieces = schedule.Pool(60, limits.page), [], []
    for row, length in enumerate(PROMPTS):
        prompt = tuple(tokens_PS[row, :length].tolist())
        asked = records.Request(
            id=str(row), prompt=prompt, num_samples=1, seed=0, max_tokens=NEW, temperature=0.0
        )
        lease = pool.lease(prompt[:-1])
        pieces += schedule.pieces(prompt[:-1], lease.pages, lease.start, limits.chunk)
        answers.append(answers_lib.Answer(row, 0, asked, (), 0, lease, answers_lib.row_key(0, 0)))
        answers[-1].own = pool.take_all(NEW // limits.page)
    list(own.compute([pieces]))
    decoded_BN = own.advance(answers, 1).tokens_BK
    wanted_BN = out.sequences[:, slots:].numpy()
    np.testing.assert_array_equal(decoded_BN, wanted_BN, err_msg=found)


def test_a_near_tie_is_found_and_listed():
    """Two experts with the same router row and nearly the same bias; everything else is drawn."""
    config, _ = SETTINGS["v3-all-sparse"]
    model = parity.drawn_reference(config, seed=3)
    gate = model.model.layers[2].mlp.gate
    with torch.no_grad():
        gate.weight[4] = gate.weight[7]
        gate.e_score_correction_bias[4] = gate.e_score_correction_bias[7]
    real_BT = padded(5, "right")
    tokens_BT = np.random.default_rng(5).integers(1, config.vocab_size, real_BT.shape)
    seen = parity.TopK(real_BT)
    parity.reference_logits(model, tokens_BT.astype(np.int32), real_BT, seen)
    experts = [chosen for chosen in seen.chosen if chosen.shape[-1] == config.experts_per_token]
    one_of_two_BT = ((experts[2] == 4) | (experts[2] == 7)).sum(-1).reshape(real_BT.shape) == 1
    wanted = np.argwhere(one_of_two_BT.numpy() & real_BT).tolist()
    assert wanted and [[tie.row, tie.time] for tie in seen.ties] == wanted
    assert all(tie.gap == 0 for tie in seen.ties)
    assert f"{len(wanted)} near-ties" in seen.report()
