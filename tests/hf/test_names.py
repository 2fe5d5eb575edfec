import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.models import deepseek_v3, deepseek_v32, moonlight_16b_a3b
from mathv2_jax.hf import names
from mathv2_jax.model import transformer
from mathv2_jax.model.config import ModelConfig
from tests.hf import checkpoints, parity

CONFIGS = {
    "full": checkpoints.FULL,
    "plain": checkpoints.PLAIN,
    "bfloat16": dataclasses.replace(checkpoints.FULL, param_dtype="bfloat16"),
    "all dense": dataclasses.replace(checkpoints.PLAIN, num_dense_layers=3),
    "all sparse": dataclasses.replace(checkpoints.PLAIN, num_dense_layers=0),
    "unshared": dataclasses.replace(checkpoints.PLAIN, num_shared_experts=0),
    "deepseek_v32": ModelConfig(**deepseek_v32.model()),
    "moonlight": ModelConfig(**moonlight_16b_a3b.model()),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_table_holds_every_variable_of_the_model(config):
    tree = transformer.unboxed(transformer.boxed_abstract(config))
    model = {
        jax.tree_util.keystr(path, simple=True, separator="."): (leaf.shape, leaf.dtype)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }
    table = {e.ours: (e.full_shape, jnp.dtype(e.dtype)) for e in names.table(config) if not e.copy}
    assert table == model


@pytest.mark.parametrize("config", [checkpoints.FULL, checkpoints.PLAIN], ids=["v32", "v3"])
def test_the_table_names_every_tensor_that_the_reference_writes(config, tmp_path):
    parity.drawn_reference(config, 0).save_pretrained(tmp_path, max_shard_size="1GB")
    held = checkpoints.safetensors.numpy.load_file(tmp_path / "model.safetensors")
    table = {
        name: entry.their_shape
        for entry in names.table(dataclasses.replace(config, num_mtp_layers=0))
        for name, _ in entry.tensors()
        if not entry.verifier_head
    }
    assert table == {name: x.shape for name, x in held.items()}


def count(config, *, copies):
    return sum(
        math.prod(entry.stack) * math.prod(entry.shape)
        for entry in names.table(config)
        if not entry.verifier_head
        and (copies or not entry.copy)
        and not entry.ours.startswith("router.")
    )


@pytest.mark.parametrize(
    ("model", "changes", "copies", "billions"),
    [
        (deepseek_v3, {"num_mtp_layers": 0}, False, 671.03),
        (deepseek_v32, {"num_mtp_layers": 0}, False, 671.88),
        (deepseek_v32, {}, False, 683.50),
        (deepseek_v32, {}, True, 685.36),
    ],
)
def test_the_released_files_hold_the_published_number_of_parameters(
    model, changes, copies, billions
):
    config = ModelConfig(**(model.model() | changes))
    assert round(count(config, copies=copies) / 1e9, 2) == billions


def entry_of(config, ours):
    return next(e for e in names.table(config) if e.ours == ours and not e.copy)


def test_heads_lie_one_after_the_other_in_the_rows_or_the_columns_there():
    c = checkpoints.FULL
    key = c.head_key_width + c.head_rope_width
    entry = entry_of(c, "params.dense.attention.q_b")
    q_b_QHK = np.arange(math.prod(entry.shape)).reshape(entry.shape)
    theirs = entry.to_theirs(q_b_QHK)
    assert theirs[2 * key + 5, 4] == q_b_QHK[4, 2, 5]
    entry = entry_of(c, "params.dense.attention.o")
    o_HUD = np.arange(math.prod(entry.shape)).reshape(entry.shape)
    assert entry.to_theirs(o_HUD)[7, 2 * c.head_value_width + 3] == o_HUD[2, 3, 7]


@pytest.mark.parametrize("step", [1, 2, 5, 1000])
def test_pieces_cover_every_array_and_every_tensor_once(step):
    for entry in names.table(checkpoints.FULL):
        ours = np.zeros(entry.full_shape, int)
        for number, (_, place) in enumerate(entry.tensors()):
            theirs = np.zeros(entry.their_shape, int)
            x = np.random.default_rng(number).normal(size=entry.shape)
            for piece in entry.pieces(place, step):
                ours[piece.index] += 1
                inner = piece.index[len(piece.index) - len(entry.shape) :]
                part = entry.to_theirs(x[inner])
                theirs[piece.rows] += 1
                np.testing.assert_array_equal(part, entry.to_theirs(x)[piece.rows])
                np.testing.assert_array_equal(entry.to_ours(part), x[inner])
            assert (theirs == 1).all()
        assert (ours == (math.prod(entry.stack) if entry.copy else 1)).all()


def test_layers_of_multi_token_prediction_follow_those_of_the_trunk():
    found = {name for e in names.table(checkpoints.FULL) for name, _ in e.tensors()}
    assert {"model.layers.3.eh_proj.weight", "model.layers.4.enorm.weight"} <= found
    assert "model.layers.4.self_attn.indexer.wk.weight" in found
    assert not any(name.startswith("model.layers.5.") for name in found)
