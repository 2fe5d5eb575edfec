"""The shapes of released models: each is evaluated without an array, and counted.

What this project adds, the verifier head, is left out of the counts; the router's bias is in.
"""

import dataclasses
import importlib
import pathlib

import jax
import pytest

from mathv2_jax.model import transformer
from mathv2_jax.model.config import ModelConfig

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "configs" / "models"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))

# (config, MTP layers counted, parameters, where the figure in billions is published)
PUBLISHED = [
    ("deepseek_v3", 0, 671_026_419_200, "671.03: the main model"),
    ("deepseek_v32", 0, 671_877_944_064, "671.88: with the indexers"),
    ("deepseek_v32", 1, 683_501_971_712, "683.50: with the MTP layer"),
    ("moonlight_16b_a3b", 0, 15_960_110_208, "15.96: the whole model"),
]


def read(name: str) -> ModelConfig:
    return ModelConfig(**importlib.import_module(f"configs.models.{name}").model())


def count(config: ModelConfig) -> int:
    verifier_head = config.width * 3 + 3
    return transformer.num_parameters(transformer.boxed_abstract(config)) - verifier_head


@pytest.mark.parametrize("name", NAMES)
def test_a_model_config_builds_and_evaluates(name):
    config = read(name)
    variables = transformer.unboxed(transformer.boxed_abstract(config))
    assert all(leaf.size for leaf in jax.tree.leaves(variables))
    layers = {kind: getattr(config, f"num_{kind}_layers") for kind in ("dense", "sparse")}
    for kind, length in layers.items():
        assert {x.shape[0] for x in jax.tree.leaves(variables["params"][kind])} == {length}


@pytest.mark.parametrize(("name", "num_mtp_layers", "parameters", "figure"), PUBLISHED)
def test_a_released_shape_has_the_parameters_it_is_known_for(
    name, num_mtp_layers, parameters, figure
):
    config = dataclasses.replace(read(name), num_mtp_layers=num_mtp_layers)
    assert count(config) == parameters
    assert f"{parameters / 1e9:.2f}" == figure.partition(":")[0]


def test_the_checkpoint_on_disk_holds_copies_of_embedding_and_head_for_the_mtp_layer():
    config = read("deepseek_v32")
    copies = config.num_mtp_layers * 2 * config.vocab_size * config.width
    assert f"{(count(config) + copies) / 1e9:.2f}" == "685.36"


def test_only_sparse_attention_tells_v32_from_v3():
    dense = dict(index_topk=0, index_heads=0, index_head_width=0)
    assert dataclasses.replace(read("deepseek_v32"), **dense) == read("deepseek_v3")
