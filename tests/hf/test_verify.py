"""The gate blesses what is the same and nothing else; the reference library reads what we write."""

import builtins
import dataclasses

import jax
import numpy as np
import pytest
import torch
import transformers

from mathv2_jax.hf import folder, verify
from tests.hf import checkpoints, parity
from tests.hf.checkpoints import export, read_all, rewrite, save

# Scores of experts and of the indexer must not tie under rounding: weights as `parity` draws them.
V3 = dataclasses.replace(checkpoints.PLAIN, num_layers=2, num_mtp_layers=1)
V32 = dataclasses.replace(checkpoints.FULL, num_layers=2, num_mtp_layers=1)
TOKENS_BT = np.random.default_rng(3).integers(0, 61, (2, 20)).astype(np.int32)


def scaled(config):
    """The trunk as the reference draws it; numbers in the layer that it does not have."""
    _, trunk = parity.as_ours(parity.drawn_reference(config, 0))
    found = {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(x)
        for path, x in jax.tree.leaves_with_path(trunk)
        if "verifier" not in str(path)
    }
    return checkpoints.drawn(config) | found


@pytest.fixture(scope="module", params=[V3, V32], ids=["v3", "v32"])
def both(request, tmp_path_factory):
    """(a checkpoint, its export in float32)."""
    at = tmp_path_factory.mktemp("verify")
    trained = save(at / "a", request.param, scaled(request.param))
    export(trained, at / "hf")
    return trained, at / "hf"


def test_an_export_has_the_logits_of_its_checkpoint(both):
    trained, path = both
    assert verify.require_same(trained, str(path), "float32", TOKENS_BT).relative < 2e-6


def test_the_reference_loads_an_export_without_a_complaint(both):
    _, path = both
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, output_loading_info=True, dtype=torch.float32
    )
    # It has no MTP layers: all that it leaves aside is theirs.
    assert {n.rpartition(".layers.")[2][:2] for n in info["unexpected_keys"]} == {"2."}
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert model.dtype == torch.float32


def copied(both, tmp_path):
    trained, path = both
    held = read_all(path)
    for name in ("config.json", "verifier_head.safetensors"):
        (tmp_path / name).write_bytes((path / name).read_bytes())
    return trained, held


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.kv_b_proj.weight",
        "model.layers.2.mlp.experts.3.down_proj.weight",  # of the layer that transformers ignores
    ],
)
def test_one_changed_number_is_found(both, tmp_path, name):
    trained, held = copied(both, tmp_path)
    held[name] = held[name].copy()
    held[name].view(np.uint32)[0, 0] ^= 1
    rewrite(tmp_path, held)
    with pytest.raises(verify.MismatchError, match=f"1 tensors of .* differ: {name}"):
        verify.require_same(trained, str(tmp_path), "float32", TOKENS_BT)


def test_a_config_that_means_another_model_is_found_by_the_logits(both, tmp_path):
    trained, held = copied(both, tmp_path)
    rewrite(tmp_path, held)
    config = tmp_path / "config.json"
    text = config.read_text().replace(
        '"routed_scaling_factor": 1.7', '"routed_scaling_factor": 1.8'
    )
    config.write_text(text)
    with pytest.raises(verify.MismatchError, match=r"max\|a-b\|/max\|b\| = .* at row"):
        verify.require_same(trained, str(tmp_path), "float32", TOKENS_BT)


def test_rounding_on_the_way_out_is_not_a_difference_but_unasked_rounding_is(both, tmp_path):
    trained, _ = both
    export(trained, tmp_path / "hf", "bfloat16")
    found = verify.require_same(trained, str(tmp_path / "hf"), "bfloat16", TOKENS_BT)
    assert found.relative < 2e-6
    with pytest.raises(verify.MismatchError, match="tensors of"):
        verify.require_same(trained, str(tmp_path / "hf"), None, TOKENS_BT)


def test_the_place_of_the_largest_difference_is_named():
    ours = np.zeros((2, 3, 4), np.float32)
    theirs = ours.copy()
    theirs[0, 0, 0], ours[1, 2, 3] = -8.0, -6.0
    ours[0, 0, 0] = -8.0
    found = verify.difference(ours, theirs)
    assert found == (0.75, 1, 2, 3, -6.0, 0.0)
    ours[0, 1, 1] = np.nan
    assert np.isnan(verify.difference(ours, theirs).relative)


def test_without_the_reference_library_the_extra_is_named(both, monkeypatch):
    trained, path = both
    real = builtins.__import__

    def without_torch(name, *args, **kwargs):
        if name == "torch":
            raise ImportError("No module named 'torch'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    with pytest.raises(ValueError, match=r"mathv2_jax\[hf\]"):
        verify.require_same(trained, str(path), "float32", TOKENS_BT)


@pytest.mark.parametrize("text", ["", "1,a", "1,2;3", "1,61", "-1"])
def test_what_are_no_tokens_is_an_error(text):
    with pytest.raises(ValueError, match="--tokens"):
        verify.parse_tokens(text, V3)


def test_tokens_are_read_row_by_row():
    np.testing.assert_array_equal(verify.parse_tokens("1,2;3,60", V3), [[1, 2], [3, 60]])


def test_an_import_is_verified_against_its_source(both, tmp_path):
    _, path = both
    back = checkpoints.bring_in(path, tmp_path / "b")
    assert isinstance(back, folder.Trained)
    assert verify.require_same(back, str(path), None, TOKENS_BT).relative < 2e-6
