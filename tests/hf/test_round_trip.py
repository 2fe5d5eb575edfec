"""import(export(x)) is x, bit for bit, and what each side refuses."""

import dataclasses
import json
import logging as std_logging
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from etils import epath

from mathv2_jax import checkpoint, hf, sharding
from mathv2_jax.hf import exporter, folder, fp8, importer, names
from mathv2_jax.model import transformer
from tests.hf import checkpoints
from tests.hf.checkpoints import (
    FULL,
    PLAIN,
    bits,
    bring_in,
    drawn,
    export,
    read_all,
    restored,
    save,
)

HALF = dataclasses.replace(FULL, param_dtype="bfloat16", compute_dtype="bfloat16")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """FULL in float32, exported; read-only."""
    at = tmp_path_factory.mktemp("exported")
    save(at / "checkpoint", FULL)
    export(folder.locate(epath.Path(at / "checkpoint")), at / "hf")
    return at / "hf"


@pytest.fixture
def copied(exported, tmp_path):
    """A copy of `exported` to be changed."""
    return shutil.copytree(exported, tmp_path / "hf")


@pytest.mark.parametrize("config", [FULL, PLAIN, HALF], ids=["full", "plain", "bfloat16"])
def test_what_is_exported_and_imported_again_is_what_it_was(tmp_path, config):
    trained = save(tmp_path / "a", config)
    export(trained, tmp_path / "hf", config.param_dtype)
    back = bring_in(tmp_path / "hf", tmp_path / "b")
    assert back.config == config and back.tokens == checkpoints.TOKENS
    assert bits(restored(back)) == bits(drawn(config))
    assert back.checkpoints.parent.name == "b" and checkpoints.files(tmp_path) == {"a", "b", "hf"}


@pytest.mark.parametrize("axes", [dict(expert=4, tensor=2), dict(fsdp=8), dict(fsdp=2, expert=4)])
def test_a_checkpoint_of_eight_devices_is_exported_like_one_of_a_single_device(tmp_path, axes):
    config = dataclasses.replace(
        HALF,
        vocab_size=64,
        width=32,
        num_heads=4,
        q_latent_width=16,
        kv_latent_width=8,
        dense_width=32,
        num_experts=4,
        num_mtp_layers=1,
        num_expert_groups=1,
        expert_groups_per_token=1,
        num_layers=2,
    )
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1, **axes))
    shardings = sharding.shardings_for(transformer.boxed_abstract(config), mesh)
    where = {
        jax.tree_util.keystr(path, simple=True, separator="."): s
        for path, s in jax.tree.leaves_with_path(shardings)
    }
    split = {name: jax.device_put(x, where[name]) for name, x in drawn(config).items()}
    export(save(tmp_path / "split", config, split), tmp_path / "hf", "bfloat16")
    export(save(tmp_path / "one", config), tmp_path / "one-hf", "bfloat16")
    assert bits(read_all(tmp_path / "hf")) == bits(read_all(tmp_path / "one-hf"))
    back = bring_in(tmp_path / "hf", tmp_path / "b")
    assert bits(restored(back)) == bits(drawn(config))


def test_exported_files_hold_the_tensors_by_their_names(exported):
    held, arrays = read_all(exported), drawn(FULL)
    key = FULL.head_key_width + FULL.head_rope_width
    q_b = arrays["params.sparse.attention.q_b"][1].reshape(-1, FULL.num_heads * key).T
    np.testing.assert_array_equal(held["model.layers.2.self_attn.q_b_proj.weight"], q_b)
    up = arrays["params.mtp.block.mlp.experts_up"][1, 5].T
    np.testing.assert_array_equal(held["model.layers.4.mlp.experts.5.up_proj.weight"], up)
    bias = arrays["router.sparse.mlp.bias"][1]
    np.testing.assert_array_equal(held["model.layers.2.mlp.gate.e_score_correction_bias"], bias)
    for layer in (3, 4):
        for name, ours in (("embed_tokens", "embed"), ("shared_head.head", "unembed")):
            copy = held[f"model.layers.{layer}.{name}.weight"]
            trunk = arrays[f"params.{ours}"]
            np.testing.assert_array_equal(copy, trunk if ours == "embed" else trunk.T)


def test_shards_are_no_larger_than_asked_and_listed_in_the_index(exported):
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2 and shards == sorted(p.name for p in exported.glob("model-*"))
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    held = [safetensors.numpy.load_file(exported / name) for name in shards]
    sizes = [sum(x.nbytes for x in tensors.values()) for tensors in held]
    assert max(sizes) <= 30_000 and sum(sizes) == index["metadata"]["total_size"]
    layers = [[int(n.split(".")[2]) for n in tensors if ".layers." in n] for tensors in held]
    assert all(max(a) <= min(b) for a, b in zip(layers, layers[1:], strict=False))


def test_bfloat16_rounds_all_but_the_router_bias_and_the_verifier_head(tmp_path):
    export(save(tmp_path / "a", FULL), tmp_path / "hf", "bfloat16")
    head = safetensors.numpy.load_file(tmp_path / "hf" / names.VERIFIER_HEAD_FILE)
    arrays = drawn(FULL)
    np.testing.assert_array_equal(
        head["verifier_head.kernel"], arrays["params.verifier_head_kernel"]
    )
    for name, x in read_all(tmp_path / "hf").items():
        biased = name.endswith("e_score_correction_bias")
        assert x.dtype == (np.float32 if biased else ml_dtypes.bfloat16), name
    back = bring_in(tmp_path / "hf", tmp_path / "b")
    assert back.config == HALF
    for name, x in restored(back).items():
        want = arrays[name]
        kept = name.startswith(("router.", "params.verifier"))
        want = want if kept else want.astype(ml_dtypes.bfloat16)
        assert x.dtype == want.dtype and x.tobytes() == want.tobytes(), name


def test_fp8_weights_are_dequantized_once_and_stay(tmp_path):
    config = dataclasses.replace(HALF, width=160, dense_width=272)  # more than one block, ragged
    export(save(tmp_path / "a", config), tmp_path / "hf", "bfloat16")
    tensors = read_all(tmp_path / "hf")
    checkpoints.rewrite(tmp_path / "hf", checkpoints.quantized(tensors))
    first = bring_in(tmp_path / "hf", tmp_path / "b")
    gate = "model.layers.0.mlp.gate_proj.weight"
    want = fp8.dequantize(*fp8.quantize(tensors[gate])).T.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(restored(first)["params.dense.mlp.gate"][0], want)
    export(first, tmp_path / "again", "bfloat16")
    assert bits(restored(bring_in(tmp_path / "again", tmp_path / "c"))) == bits(restored(first))
    loaded, variables = hf.load(tmp_path / "hf")
    assert loaded == config
    np.testing.assert_array_equal(variables["params"]["dense"]["mlp"]["gate"][0], want)


def test_loading_gives_the_variables_of_the_import(exported):
    config, variables = hf.load(exported)
    assert config == FULL
    found = {
        jax.tree_util.keystr(path, simple=True, separator="."): x
        for path, x in jax.tree.leaves_with_path(variables)
    }
    assert bits(found) == bits(drawn(FULL))
    half, rounded = hf.load(exported, "bfloat16")
    assert half == HALF and rounded["params"]["embed"].dtype == jnp.bfloat16


def test_orbax_alone_reads_what_an_import_wrote(exported, tmp_path):
    back = bring_in(exported, tmp_path / "b")
    found = ocp.StandardCheckpointer().restore(back.checkpoints / "0" / "state")
    assert bits(found) == bits(drawn(FULL))
    manager = ocp.CheckpointManager(back.checkpoints)
    assert manager.latest_step() == 0
    manager.close()


@pytest.mark.parametrize("made", ["by training", "by an import"])
def test_a_chunk_on_disk_spans_no_two_layers_or_experts(exported, tmp_path, made):
    trained = (
        save(tmp_path / "a", FULL) if made == "by training" else bring_in(exported, tmp_path / "a")
    )
    metadata = json.loads(
        (trained.checkpoints / "0" / "state" / "array_metadatas" / "process_0").read_text()
    )["array_metadatas"]
    chunks = {
        m["array_metadata"]["param_name"]: m["array_metadata"]["chunk_shape"] for m in metadata
    }
    for entry in names.table(FULL):
        if not entry.copy:
            assert chunks[entry.ours] == [*(1 for _ in entry.stack), *entry.shape]


def complaint(at, tmp_path):
    with pytest.raises(ValueError) as error:
        bring_in(at, tmp_path / "new")
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".*"))
    return str(error.value)


def test_missing_unknown_and_misshapen_tensors_are_one_error_that_lists_them_all(copied, tmp_path):
    held = read_all(copied)
    first, second = "model.norm.weight", "model.layers.4.self_attn.indexer.wk.weight"
    del held[first], held[second]
    held["model.layers.0.mlp.experts.0.up_proj.weight"] = np.zeros((3, 2), np.float32)
    held["lm_head.weight"] = held["lm_head.weight"].T
    held["model.layers.1.mlp.gate.weight"] = held["model.layers.1.mlp.gate.weight"].astype(np.int32)
    held["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    checkpoints.rewrite(copied, held)
    said = complaint(copied, tmp_path)
    assert all(
        part in said
        for part in (
            "2 missing: ",
            f"{first} [24]",
            f"{second} [10, 24]",
            "1 unknown: model.layers.0.mlp.experts.0.up_proj.weight",
            "lm_head.weight is [24, 61], not [61, 24]",
            "model.layers.1.mlp.gate.weight is of I32",
        )
    )
    assert "inv_freq" not in said


def test_fp8_weights_need_their_scales(copied, tmp_path):
    held = checkpoints.quantized(read_all(copied))
    name = "model.layers.0.mlp.gate_proj.weight"
    del held[name + fp8.SUFFIX]
    other = "model.layers.0.mlp.up_proj.weight"
    held[other + fp8.SUFFIX] = np.ones((2, 2), np.float32)
    checkpoints.rewrite(copied, held)
    said = complaint(copied, tmp_path)
    assert f"1 missing: {name}_scale_inv [1, 1]" in said
    assert f"{other}_scale_inv is F32 [2, 2], not F32 [1, 1]" in said


def test_copies_of_the_embedding_must_be_copies(copied, tmp_path):
    held = read_all(copied)
    name = "model.layers.4.embed_tokens.weight"
    held[name] = held[name] + 1
    checkpoints.rewrite(copied, held)
    assert f"{name} differ" in complaint(copied, tmp_path)
    with pytest.raises(ValueError, match=name):
        hf.load(copied)


def test_an_extra_layer_that_was_left_out_is_noted_but_half_of_one_is_an_error(copied, tmp_path):
    held = read_all(copied)
    trunk = {
        n: x for n, x in held.items() if not n.startswith(("model.layers.3", "model.layers.4"))
    }
    checkpoints.rewrite(copied, trunk)
    opened = importer.open_source(str(copied))
    assert opened.config == dataclasses.replace(FULL, num_mtp_layers=0)
    assert any("multi-token prediction" in note for note in opened.notes)
    some = trunk | {n: held[n] for n in ("model.layers.3.enorm.weight",)}
    checkpoints.rewrite(copied, some)
    assert "model.layers.3.hnorm.weight" in complaint(copied, tmp_path)


def test_without_its_file_the_verifier_head_starts_at_zero(copied, tmp_path):
    (copied / names.VERIFIER_HEAD_FILE).unlink()
    opened = importer.open_source(str(copied))
    assert any(names.VERIFIER_HEAD_FILE in note for note in opened.notes)
    assert not restored(bring_in(copied, tmp_path / "b"))["params.verifier_head_kernel"].any()


KERNEL, BIAS = "verifier_head.kernel", "verifier_head.bias"


@pytest.mark.parametrize(
    ("left_out", "added", "wanted"),
    [
        (KERNEL, {}, f"{names.VERIFIER_HEAD_FILE}: 1 missing: {KERNEL} [24, 3]"),
        (
            "",
            {"lm_head.weight": (61, 24)},
            f"{names.VERIFIER_HEAD_FILE}: 1 unknown: lm_head.weight",
        ),
        ("", {BIAS: (4,)}, f"{names.VERIFIER_HEAD_FILE}: 1 of another shape or kind: {BIAS}"),
    ],
)
def test_the_verifier_heads_file_holds_its_two_tensors_alone(
    copied, tmp_path, left_out, added, wanted
):
    path = copied / names.VERIFIER_HEAD_FILE
    held = safetensors.numpy.load_file(path)
    held |= {name: np.zeros(shape, np.float32) for name, shape in added.items()}
    held.pop(left_out, None)
    safetensors.numpy.save_file(held, path)
    assert wanted in complaint(copied, tmp_path)


def test_the_verifier_head_lies_in_its_own_file_alone(copied, tmp_path):
    checkpoints.rewrite(copied, read_all(copied) | {BIAS: np.zeros(3, np.float32)})
    assert f"1 unknown: {BIAS}" in complaint(copied, tmp_path)


def test_only_matrices_are_quantized(copied, tmp_path):
    held, name = read_all(copied), "model.norm.weight"
    held[name] = held[name].astype(ml_dtypes.float8_e4m3fn)
    checkpoints.rewrite(copied, held)
    assert f"{name} is of F8_E4M3, which is for matrices" in complaint(copied, tmp_path)


def test_what_is_no_folder_is_not_imported(copied):
    for path in (copied / "config.json", copied / "nothing"):
        with pytest.raises(FileNotFoundError, match="is no folder"):
            importer.open_source(str(path))


def test_a_run_of_another_programs_model_is_refused(tmp_path):
    (tmp_path / folder.CHECKPOINTS / "sft").mkdir(parents=True)
    identity = {"stages": [{"name": "sft"}], "model": dataclasses.asdict(PLAIN) | {"widht": 3}}
    (tmp_path / "config.json").write_text(json.dumps({"identity": identity}))
    with pytest.raises(ValueError, match="config.json has another program's model: .*widht"):
        folder.locate(epath.Path(tmp_path))


def test_what_loses_bits_on_import_is_noted(exported):
    notes = importer.open_source(str(exported), "bfloat16").notes
    assert any("rounded to bfloat16" in note for note in notes)
    assert importer.open_source(str(exported)).notes == ()


def test_an_import_that_breaks_off_leaves_nothing(copied, tmp_path):
    opened = importer.open_source(str(copied))
    last = sorted(copied.glob("model-*"))[-1]
    last.write_bytes(last.read_bytes()[:-5000])
    with pytest.raises(ValueError, match="cut short"):
        importer.convert(opened, str(copied), epath.Path(tmp_path / "b"), checkpoints.silent)
    assert checkpoints.files(tmp_path) == {"hf"}


def test_an_export_that_its_check_refuses_does_not_come_into_being(tmp_path):
    seen = []

    def refuse(trained, draft):
        seen.extend((trained.steps, len(read_all(pathlib.Path(draft)))))
        raise RuntimeError("it differs")

    trained = save(tmp_path / "a", PLAIN, steps=(1, 2))
    with pytest.raises(RuntimeError, match="it differs"):
        export(trained, tmp_path / "hf", check=refuse)
    assert seen[0] == [2] and seen[1] > 50
    assert checkpoints.files(tmp_path) == {"a"}


def test_a_folder_that_holds_something_is_left_alone(exported, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine").write_text("")
    with pytest.raises(ValueError, match="not empty"):
        bring_in(exported, tmp_path / "b")
    with pytest.raises(ValueError, match="not empty"):
        export(save(tmp_path / "a", PLAIN), tmp_path / "b")
    assert checkpoints.files(tmp_path / "b") == {"mine"}
    (tmp_path / "b" / "mine").unlink()
    bring_in(exported, tmp_path / "b")


def flip(trained, step):
    """Damages the numbers of one checkpoint, and none of its structure."""
    root = pathlib.Path(trained.checkpoints / str(step))
    target = max(root.glob("**/d/*"), key=lambda p: p.stat().st_size)
    data = bytearray(target.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 64] = bytes(64)
    target.write_bytes(bytes(data))


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, caplog):
    trained = save(tmp_path / "a", PLAIN, steps=(1, 2))
    flip(trained, 2)
    with caplog.at_level(std_logging.WARNING):
        assert export(trained, tmp_path / "hf") == 1
    assert "damaged checkpoint" in caplog.text
    want = drawn(PLAIN, 1)["params.embed"]
    np.testing.assert_array_equal(read_all(tmp_path / "hf")["model.embed_tokens.weight"], want)
    only = dataclasses.replace(trained, steps=[2])
    with pytest.raises(ValueError, match="no sound checkpoint"):
        export(only, tmp_path / "other")
    assert checkpoints.files(tmp_path) == {"a", "hf"}


def test_changed_numbers_are_found_though_they_can_be_read(tmp_path):
    arrays = drawn(PLAIN)
    trained = save(tmp_path / "a", PLAIN, arrays)
    seal = trained.checkpoints / "0" / "seal" / "metadata"
    body = checkpoint.read_seal(trained.checkpoints / "0")
    body["leaves"]["params.sparse.mlp.experts_up"][2] ^= 1
    seal.write_bytes(checkpoint.storage.seal(body))
    with pytest.raises(ValueError, match="experts_up differs from what was saved"):
        export(trained, tmp_path / "hf")
    assert checkpoints.files(tmp_path) == {"a"}


def test_taps_cannot_be_exported(tmp_path):
    trained = save(tmp_path / "a", dataclasses.replace(PLAIN, embedding_taps=2))
    with pytest.raises(ValueError, match="embedding_taps = 2"):
        export(trained, tmp_path / "hf")
    assert checkpoints.files(tmp_path) == {"a"}


def test_a_checkpoint_of_another_model_than_its_config_is_an_error(tmp_path):
    trained = save(tmp_path / "a", PLAIN)
    other = dataclasses.replace(trained, config=dataclasses.replace(PLAIN, width=25))
    with pytest.raises(ValueError, match="params.embed"):
        export(other, tmp_path / "hf")


def test_arrays_that_chunks_of_an_older_layout_hold_are_exported_all_the_same(
    tmp_path, monkeypatch
):
    with monkeypatch.context() as old:
        old.setattr(checkpoint, "num_stacked", lambda name, leaf: 0)
        trained = save(tmp_path / "a", FULL)
    export(trained, tmp_path / "hf")
    assert bits(restored(bring_in(tmp_path / "hf", tmp_path / "b"))) == bits(drawn(FULL))


@pytest.mark.parametrize("limit", [64, 1000])
def test_small_pieces_make_the_same_files(exported, tmp_path, monkeypatch, limit):
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", limit)
    monkeypatch.setattr(exporter, "PIECE_BYTES", limit)
    monkeypatch.setattr(importer, "BATCH_BYTES", 10 * limit)
    small = dataclasses.replace(
        PLAIN, num_layers=2, num_experts=4, num_expert_groups=1, expert_groups_per_token=1
    )
    export(save(tmp_path / "a", small), tmp_path / "hf")
    opened = importer.open_source(str(tmp_path / "hf"))
    parts = {e.ours: len(list(opened.parts(e, limit))) for e in opened.entries}
    assert parts["params.embed"] > 1
    importer.convert(opened, str(tmp_path / "hf"), epath.Path(tmp_path / "b"), checkpoints.silent)
    back = folder.locate(epath.Path(tmp_path / "b"))
    assert bits(restored(back)) == bits(drawn(small))


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), ("700", 700), ("2kb", 2000)]
)
def test_sizes_are_read(text, size):
    assert exporter.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "5 XB", "0", "5GB x"])
def test_what_is_no_size_is_an_error(text):
    with pytest.raises(ValueError, match="size"):
        exporter.parse_size(text)
