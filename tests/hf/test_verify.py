"""The gate blesses what is the same and nothing else; the reference library reads what we write."""

import builtins
import dataclasses
import io
import json
import re

import numpy as np
import pytest
import torch
import transformers

from mathv2_jax.hf import folder, ties, verify
from tests.hf import checkpoints, parity
from tests.hf.checkpoints import export, read_all, rewrite, save

# Scores of experts and of the indexer must not tie under rounding: weights as `parity` draws them.
V3 = dataclasses.replace(checkpoints.PLAIN, num_layers=2, num_mtp_layers=1)
V32 = dataclasses.replace(checkpoints.FULL, num_layers=2, num_mtp_layers=1)
TOKENS_BT = np.random.default_rng(3).integers(0, 61, (2, 20)).astype(np.int32)


@pytest.fixture(scope="module", params=[V3, V32], ids=["v3", "v32"])
def both(request, tmp_path_factory):
    """(a checkpoint, its export in float32)."""
    at = tmp_path_factory.mktemp("verify")
    trained = save(at / "a", request.param, parity.drawn_arrays(request.param))
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


CHANGES = dict(
    routed_scaling_factor=1.8,
    max_position_embeddings=7,
    eos_token_id=60,
    bos_token_id=None,
    torch_dtype="bfloat16",
    index_topk=6,
)


def test_a_config_that_says_something_else_is_found(both, tmp_path):
    trained, held = copied(both, tmp_path)
    rewrite(tmp_path, held)
    config = tmp_path / "config.json"
    body = json.loads(config.read_text())
    changes = {n: value for n, value in CHANGES.items() if n in body}  # one model has no indexer
    assert len(changes) >= len(CHANGES) - 1
    for field, value in changes.items():
        config.write_text(json.dumps(body | {field: value}))
        said = re.escape(f"another model than the checkpoint: {field} = {value!r}, not ")
        with pytest.raises(verify.MismatchError, match=said + r"[^;]*$"):
            verify.require_same(trained, str(tmp_path), "float32", TOKENS_BT)


COPY = "model.layers.2.embed_tokens.weight"


@pytest.mark.parametrize("name", ["verifier_head.kernel", COPY])
def test_a_tensor_that_an_export_lacks_is_a_difference(both, tmp_path, name):
    trained, held = copied(both, tmp_path)
    held.pop(name, None)
    rewrite(tmp_path, held)
    if name not in held and name != COPY:
        (tmp_path / "verifier_head.safetensors").unlink()
    with pytest.raises(verify.MismatchError, match=rf"{name} \(missing\)"):
        verify.require_same(trained, str(tmp_path), "float32", TOKENS_BT)


def test_what_an_import_may_lack_is_no_difference_but_a_trained_head_is(both, tmp_path):
    _, held = copied(both, tmp_path)
    del held[COPY]
    rewrite(tmp_path, held)
    trained = checkpoints.bring_in(tmp_path, tmp_path / "trained")
    (tmp_path / "verifier_head.safetensors").unlink()
    fresh = checkpoints.bring_in(tmp_path, tmp_path / "fresh")
    assert verify.require_same(fresh, str(tmp_path), None, TOKENS_BT).relative < 2e-6
    with pytest.raises(verify.MismatchError, match=r"2 tensors .*verifier_head.kernel \(missing\)"):
        verify.require_same(trained, str(tmp_path), None, TOKENS_BT)


def test_rounding_on_the_way_out_is_not_a_difference_but_unasked_rounding_is(both, tmp_path):
    trained, _ = both
    export(trained, tmp_path / "hf", "bfloat16")
    found = verify.require_same(trained, str(tmp_path / "hf"), "bfloat16", TOKENS_BT)
    assert found.relative < 2e-6
    with pytest.raises(verify.MismatchError, match="tensors of"):
        verify.require_same(trained, str(tmp_path / "hf"), None, TOKENS_BT)


def test_numbers_that_were_not_rounded_as_asked_are_a_difference(both, tmp_path):
    trained, held = copied(both, tmp_path)
    rewrite(tmp_path, held)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"float32"', '"bfloat16"'))
    with pytest.raises(verify.MismatchError, match=r"lm_head.weight \(F32, not BF16\)") as error:
        verify.require_same(trained, str(tmp_path), "bfloat16", TOKENS_BT)
    assert "e_score_correction_bias" not in str(error.value)


def test_an_indexer_whose_scores_are_all_0_chooses_at_random_and_is_not_compared(tmp_path):
    arrays = parity.drawn_arrays(V32)
    silent = {n: np.zeros_like(x) if "indexer.weights" in n else x for n, x in arrays.items()}
    assert any(np.any(arrays[n] != x) for n, x in silent.items())
    trained = save(tmp_path / "a", V32, silent)
    export(trained, tmp_path / "hf")
    found = verify.require_same(trained, str(tmp_path / "hf"), "float32", TOKENS_BT)
    assert found.reach == V32.index_topk and found.compared == 2 * V32.index_topk


def test_random_tokens_give_the_indexer_something_to_choose_where_that_is_affordable():
    def length(chosen, most=4096):
        config = dataclasses.replace(V32, index_topk=chosen, max_position=most)
        return verify.random_tokens(config).shape[1]

    assert [length(chosen) for chosen in (7, 64, 128, 2048)] == [64, 80, 144, 64]
    assert length(64, most=70) == 70


def test_the_place_of_the_largest_difference_is_named():
    ours = np.zeros((2, 3, 4), np.float32)
    theirs = ours.copy()
    theirs[0, 0, 0], ours[1, 2, 3] = -8.0, -6.0
    ours[0, 0, 0] = -8.0
    everywhere = np.ones((2, 3), bool)
    found = verify.difference(ours, theirs, everywhere)
    assert found == (0.75, 1, 2, 3, -6.0, 0.0, 6, 6, 3)
    ours[0, 1, 1] = np.nan
    assert np.isnan(verify.difference(ours, theirs, everywhere).relative)


def test_places_after_a_near_tie_are_not_compared_and_counted():
    ours = np.zeros((2, 3, 4), np.float32)
    theirs = ours.copy()
    theirs[0, 0, 0], ours[0, 0, 0], ours[1, 1, 3], ours[1, 2, 3] = 8.0, 8.0, 2.0, np.nan
    before_tie = np.asarray([[True, True, True], [True, False, False]])
    found = verify.difference(ours, theirs, before_tie)
    assert (found.relative, found.compared, found.places, found.reach) == (0.0, 4, 6, 3)
    assert "over 4 of 6 places" in str(found) and "less than 1e-06 apart" in str(found)


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


def test_a_source_in_fp8_is_verified_by_the_numbers_that_came_of_it(tmp_path):
    """Matrices are larger than a block and end within one."""
    for base, dtype in ((V3, "bfloat16"), (V32, None)):
        config = dataclasses.replace(base, width=160, dense_width=272)
        at = tmp_path / str(dtype)
        export(save(at / "a", config, parity.drawn_arrays(config)), at / "hf", "bfloat16")
        tensors = checkpoints.quantized(read_all(at / "hf"))
        scaled = {n: x * 1.1 if n.endswith("_scale_inv") else x for n, x in tensors.items()}
        rewrite(at / "hf", scaled)
        body = json.loads((at / "hf" / "config.json").read_text())
        body["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        (at / "hf" / "config.json").write_text(json.dumps(body))
        back = checkpoints.bring_in(at / "hf", at / "b", dtype)
        assert verify.require_same(back, str(at / "hf"), None, TOKENS_BT).relative < 2e-6


def test_kimi_k2_is_compared_by_our_config_and_its_code_is_never_run(tmp_path, monkeypatch):
    """The reference does not know the name, and would run what auto_map names if someone said y."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    config = dataclasses.replace(V3, num_mtp_layers=0)
    export(save(tmp_path / "a", config, parity.drawn_arrays(config)), tmp_path / "hf")
    body = json.loads((tmp_path / "hf" / "config.json").read_text())
    body |= {"model_type": "kimi_k2", "auto_map": {"AutoConfig": "configuration_x.X"}}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(body))
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass X: pass\n"
    (tmp_path / "hf" / "configuration_x.py").write_text(code)
    back = checkpoints.bring_in(tmp_path / "hf", tmp_path / "b")
    assert verify.require_same(back, str(tmp_path / "hf"), None, TOKENS_BT).relative < 2e-6
    assert not (tmp_path / "ran").exists()


def test_rounding_that_was_asked_for_on_the_way_in_is_no_difference(both, tmp_path):
    _, path = both
    back = checkpoints.bring_in(path, tmp_path / "b", "bfloat16")
    assert verify.require_same(back, str(path), None, TOKENS_BT).relative < 2e-6


@pytest.mark.parametrize("rest", [0, 3])
def test_a_comparison_of_hardly_any_place_is_none(both, monkeypatch, rest):
    trained, path = both
    few_BT = np.arange(TOKENS_BT.size).reshape(TOKENS_BT.shape) < rest
    monkeypatch.setattr(ties.Watch, "untouched", lambda watch: few_BT)
    with pytest.raises(ValueError, match=f"only {rest} of 40 places .* at least 10% must"):
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
