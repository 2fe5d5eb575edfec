import dataclasses
import math

import pytest
import transformers

from configs.models import deepseek_v3, deepseek_v32, moonlight_16b_a3b
from mathv2_jax.hf import config as config_lib
from mathv2_jax.model.config import ModelConfig
from tests.hf import checkpoints, parity

# The fields of the released files that bear on the model.
V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
V32 = V3 | {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 2048,
    "quantization_config": {**V3["quantization_config"], "scale_fmt": "ue8m0"},
}
MOONLIGHT = {n: v for n, v in V3.items() if n != "quantization_config"} | {
    "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "max_position_embeddings": 8192,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": None,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "seq_aux": True,
    "topk_group": 1,
    "vocab_size": 163840,
}
KIMI_K2 = V3 | {
    "model_type": "kimi_k2",
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 0,
    "rope_scaling": {**V3["rope_scaling"], "beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0},
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "topk_group": 1,
    "vocab_size": 163840,
}


def model_of(module):
    return ModelConfig(**module.model() | dict(remat="none"))


@pytest.mark.parametrize(
    ("body", "module"),
    [(V3, deepseek_v3), (V32, deepseek_v32), (MOONLIGHT, moonlight_16b_a3b)],
    ids=["v3", "v32", "moonlight"],
)
def test_released_configs_are_the_models_of_our_configs(body, module):
    found = config_lib.from_json(body)
    assert found.model == model_of(module)
    assert found.fp8 == ("quantization_config" in body)
    assert found.tokens == {"bos_token_id": 0, "eos_token_id": 1}
    assert found.ignored == ()


def test_kimi_k2_is_a_deepseek_v3_of_another_size():
    c = config_lib.from_json(KIMI_K2).model
    assert (c.num_experts, c.num_expert_groups, c.num_heads) == (384, 1, 64)
    assert (c.yarn_factor, c.yarn_beta_fast, c.rope_theta) == (32.0, 1.0, 50_000.0)
    assert config_lib.to_json(c, "bfloat16", {})["model_type"] == "deepseek_v3"


def rotation(theirs):
    """What transformers rotates by: without both of them it leaves the mscales aside."""
    rope = {n: v for n, v in theirs.rope_parameters.items() if n != "type"}
    if not rope.get("mscale_all_dim"):
        rope = {n: v for n, v in rope.items() if not n.startswith("mscale")}
    return rope


@pytest.mark.parametrize(
    "config",
    [
        checkpoints.FULL,
        checkpoints.PLAIN,
        dataclasses.replace(checkpoints.FULL, index_topk=0, index_heads=0, index_head_width=0),
        dataclasses.replace(checkpoints.FULL, yarn_mscale=1.0, yarn_mscale_all_dim=0.0),
        dataclasses.replace(checkpoints.PLAIN, normalize_expert_weights=False),
    ],
    ids=["full", "plain", "v3", "uncorrected", "raw"],
)
def test_what_is_written_is_read_back_by_us_and_by_the_reference(config):
    body = config_lib.to_json(config, "float32", checkpoints.TOKENS)
    assert config_lib.from_json(body).model == config
    kind = {
        "deepseek_v3": transformers.DeepseekV3Config,
        "deepseek_v32": transformers.DeepseekV32Config,
    }[body["model_type"]]
    theirs = kind.from_dict(dict(body))
    drawn = parity.reference_config(config)
    skipped = ("architectures", "rope_scaling", "rope_theta", "torch_dtype", "use_cache")
    skipped += config_lib.TOKEN_FIELDS
    for name in body:
        if name not in skipped:
            assert getattr(theirs, name) == getattr(drawn, name, body.get(name)), name
    assert rotation(theirs) == rotation(drawn)
    # The form that transformers 5 writes means the same.
    modern = config_lib.from_json(theirs.to_dict())
    assert modern.model == config and modern.ignored == ()


def test_mscale_alone_counts_for_nothing_as_in_the_reference():
    scaling = {n: v for n, v in V3["rope_scaling"].items() if n != "mscale_all_dim"}
    c = config_lib.from_json(V3 | {"rope_scaling": scaling | {"mscale": 0.7}}).model
    assert (c.yarn_mscale, c.yarn_mscale_all_dim) == (1.0, 0.0)


REFUSED = {
    "attention_bias = True": {"attention_bias": True},
    "tie_word_embeddings = True": {"tie_word_embeddings": True},
    "scoring_func = 'softmax'": {"scoring_func": "softmax"},
    "topk_method = 'greedy'": {"topk_method": "greedy"},
    "hidden_act = 'gelu'": {"hidden_act": "gelu"},
    "moe_layer_freq = 2": {"moe_layer_freq": 2},
    "rope_interleave = False": {"rope_interleave": False},
    "num_key_value_heads = 8": {"num_key_value_heads": 8},
    "attention_dropout = 0.1": {"attention_dropout": 0.1},
    "model_type = 'llama'": {"model_type": "llama"},
    "rope type = 'linear'": {"rope_scaling": {"type": "linear", "factor": 2}},
    "attention_factor = 1.5": {"rope_scaling": V3["rope_scaling"] | {"attention_factor": 1.5}},
    "truncate = False": {"rope_scaling": V3["rope_scaling"] | {"truncate": False}},
    "without mscale": {"rope_scaling": V3["rope_scaling"] | {"mscale": None}},
    "factor of the rotation is missing": {"rope_scaling": {"type": "yarn"}},
    "partial_rotary_factor = 0.5": {"rope_parameters": {"partial_rotary_factor": 0.5}},
    "hidden_size is missing": {"hidden_size": None},
    "hidden_size = '7168'": {"hidden_size": "7168"},
    "n_group = True": {"n_group": True},
    "n_group is missing": {"n_group": None},
    "norm_topk_prob is missing": {"norm_topk_prob": None},
    "rope_scaling = 'yarn': must be a JSON object": {"rope_scaling": "yarn"},
    "rope_parameters = [1]: must be a JSON object": {"rope_parameters": [1]},
    "quantization_config = 'fp8': must be a JSON object": {"quantization_config": "fp8"},
    "mlp_layer_types = 3: must be a list": {"mlp_layer_types": 3},
    "layer_types = 3: must be a list": {"layer_types": 3},
    "layer_types = [['full_attention']]": {"layer_types": [["full_attention"]]},
    "layer_types = ['indexed_attention']": {"layer_types": ["indexed_attention"]},
    "eos_token_id = 129280: no id of a vocabulary of 129280": {"eos_token_id": 129280},
    "eos_token_id = [1, -1]: no id": {"eos_token_id": [1, -1]},
    "eos_token_id = []: no id": {"eos_token_id": []},
    "bos_token_id = [0]: no id": {"bos_token_id": [0]},
    "pad_token_id = 'x': no id": {"pad_token_id": "x"},
    "first_k_dense_replace = 3: they must agree": {
        "mlp_layer_types": ["dense"] * 2 + ["sparse"] * 59
    },
    "model.norm_eps = nan: must be finite": {"rms_norm_eps": math.nan},
    "model.norm_eps = -1.0: must be positive": {"rms_norm_eps": -1},
    "model.rope_theta = nan: must be finite": {"rope_theta": math.nan},
    "model.routed_scaling = -3.0: must be positive": {"routed_scaling_factor": -3.0},
    "model.yarn_factor = inf": {"rope_scaling": V3["rope_scaling"] | {"factor": math.inf}},
    "dtype = 'float16'": {"torch_dtype": "float16"},
    "quantization_config": {"quantization_config": {"quant_method": "compressed-tensors"}},
    "mlp_layer_types": {"mlp_layer_types": ["sparse", "dense"], "num_hidden_layers": 2},
    "sliding_window = 128": {"sliding_window": 128},
    "model.expert_groups_per_token = 9": {"topk_group": 9},
}


@pytest.mark.parametrize(("said", "change"), REFUSED.items(), ids=REFUSED)
def test_what_is_not_implemented_is_refused_by_field_and_value(said, change):
    with pytest.raises(ValueError) as error:
        config_lib.from_json(V3 | change)
    assert said in str(error.value)


def test_null_is_as_good_as_left_out():
    body = V3 | {"rope_scaling": None, "rope_theta": 5e4, "rope_parameters": {"rope_theta": None}}
    assert config_lib.from_json(body).model.rope_theta == 5e4
    body = V3 | {"dtype": None, "torch_dtype": "bfloat16"}
    assert config_lib.from_json(body).model.param_dtype == "bfloat16"


def test_numbers_in_float16_are_read_once_it_is_said_as_what():
    with pytest.raises(ValueError, match="--dtype; float32 keeps every number"):
        config_lib.from_json(V3 | {"torch_dtype": "float16"})
    read = config_lib.from_json(V3 | {"torch_dtype": "float16"}, dtype="float32")
    assert (read.model.param_dtype, read.model.compute_dtype) == ("float32", "float32")


def test_the_references_sparse_attention_goes_by_the_list_of_layers():
    body = V32 | {"mlp_layer_types": ["dense"] * 2 + ["sparse"] * 59, "first_k_dense_replace": 3}
    assert config_lib.from_json(body).model.num_dense_layers == 2


def test_all_that_is_refused_stands_in_one_error():
    with pytest.raises(ValueError) as error:
        config_lib.from_json(V3 | {"attention_bias": True, "v_head_dim": None, "rope_theta": "x"})
    assert all(n in str(error.value) for n in ("attention_bias", "v_head_dim", "rope_theta"))


def without(body, *names):
    return {name: value for name, value in body.items() if name not in names}


@pytest.mark.parametrize("name", ["n_group", "topk_group", "q_lora_rank", "n_shared_experts"])
def test_what_the_reference_would_guess_must_be_given(name):
    assert getattr(transformers.DeepseekV3Config(), name)
    with pytest.raises(ValueError, match=f"{name} is missing"):
        config_lib.from_json(without(V3, name))


def test_what_may_be_left_out_means_what_it_means_to_the_reference():
    names = ("norm_topk_prob", "rms_norm_eps", "rope_theta")
    reference = {name: getattr(transformers.DeepseekV3Config(), name) for name in names[:2]}
    reference["rope_theta"] = transformers.DeepseekV3Config().rope_parameters["rope_theta"]
    assert config_lib.from_json(without(V3, *names)) == config_lib.from_json(V3 | reference)
    for name in names[:2]:
        assert getattr(transformers.DeepseekV32Config(), name) == reference[name]
    left_out = without(V3, "num_nextn_predict_layers")
    assert config_lib.from_json(left_out).model.num_mtp_layers == 0
    assert config_lib.from_json(left_out | {"num_mtp_layers": 2}).model.num_mtp_layers == 2


@pytest.mark.parametrize("name", ["indexed_attention", "deepseek_sparse_attention"])
def test_layers_of_sparse_attention_have_two_names(name):
    types = [name] * V32["num_hidden_layers"]
    assert config_lib.from_json(V32 | {"layer_types": types}).model.index_topk == 2048
    theirs = transformers.DeepseekV32Config(layer_types=types)
    assert set(theirs.layer_types) == {"indexed_attention"}
    with pytest.raises(ValueError, match="layer_types"):
        config_lib.from_json(V32 | {"layer_types": [*types[1:], "full_attention"]})


def test_unknown_fields_are_named():
    assert config_lib.from_json(V3 | {"new_feature": 3}).ignored == ("new_feature",)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"embedding_taps": 2}, "embedding_taps = 2"),
        ({"yarn_mscale": 0.8, "yarn_mscale_all_dim": 0.0}, "yarn_mscale = 0.8"),
        ({"yarn_mscale": 0.0, "yarn_mscale_all_dim": 1.0}, "yarn_mscale = 0.0"),
        ({"yarn_mscale": 0.0, "yarn_mscale_all_dim": 0.0}, "yarn_mscale = 0.0"),
    ],
)
def test_a_model_without_a_form_there_is_not_written(change, said):
    with pytest.raises(ValueError) as error:
        config_lib.to_json(dataclasses.replace(checkpoints.FULL, **change), "float32", {})
    assert said in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_broken_file_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json"):
        config_lib.read(tmp_path)
