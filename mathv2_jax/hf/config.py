"""Their config.json and our ModelConfig, both ways; what we do not implement is refused."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from mathv2_jax import storage
from mathv2_jax.model.config import ModelConfig

# One class of model to us: Kimi-K2 is DeepSeek-V3 by shape, as is Moonlight, which says so itself.
V3, V32 = "deepseek_v3", "deepseek_v32"
MODEL_TYPES = (V3, V32, "kimi_k2")
ARCHITECTURES = {V3: "DeepseekV3ForCausalLM", V32: "DeepseekV32ForCausalLM"}
FP8_BLOCK = (128, 128)

# Fields that mean the same: ours, theirs. They must be given, but for what follows.
_FIELDS: tuple[tuple[str, str], ...] = (
    ("vocab_size", "vocab_size"),
    ("width", "hidden_size"),
    ("num_layers", "num_hidden_layers"),
    ("num_dense_layers", "first_k_dense_replace"),
    ("num_heads", "num_attention_heads"),
    ("q_latent_width", "q_lora_rank"),
    ("kv_latent_width", "kv_lora_rank"),
    ("head_key_width", "qk_nope_head_dim"),
    ("head_rope_width", "qk_rope_head_dim"),
    ("head_value_width", "v_head_dim"),
    ("dense_width", "intermediate_size"),
    ("expert_width", "moe_intermediate_size"),
    ("num_experts", "n_routed_experts"),
    ("experts_per_token", "num_experts_per_tok"),
    ("num_shared_experts", "n_shared_experts"),
    ("num_expert_groups", "n_group"),
    ("expert_groups_per_token", "topk_group"),
    ("routed_scaling", "routed_scaling_factor"),
    ("normalize_expert_weights", "norm_topk_prob"),
    ("max_position", "max_position_embeddings"),
    ("num_mtp_layers", "num_nextn_predict_layers"),
    ("norm_eps", "rms_norm_eps"),
)
_INDEXER_FIELDS = (
    ("index_topk", "index_topk"),
    ("index_heads", "index_n_heads"),
    ("index_head_width", "index_head_dim"),
)
# What null means, and what being left out means: as in the reference, except that layers of MTP are
# there only where config.json says so (their tensors would be unknown, which is an error).
_NULL = {"q_lora_rank": 0, "n_shared_experts": 0, "num_nextn_predict_layers": 0}
_ABSENT = {"norm_topk_prob": True, "rms_norm_eps": 1e-6, "num_nextn_predict_layers": 0}
_CONTAINERS = {
    "layer_types": list,
    "mlp_layer_types": list,
    "quantization_config": dict,
    "rope_parameters": dict,
    "rope_scaling": dict,
}
# The second name is the older one, which transformers 5 still reads.
_SPARSE_ATTENTION = ("indexed_attention", "deepseek_sparse_attention")
# What we compute, where their field is there and not null: (field, the values it may have, why).
_RULES: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("hidden_act", ("silu",), "the feed-forward is gated by silu"),
    ("attention_bias", (False,), "projections of attention have no bias"),
    ("attention_dropout", (0,), "there is no dropout"),
    ("mlp_bias", (False,), "projections of the feed-forward have no bias"),
    ("tie_word_embeddings", (False,), "embedding and unembedding are two arrays"),
    ("scoring_func", ("sigmoid",), "experts are scored by sigmoid"),
    ("topk_method", ("noaux_tc",), "experts are chosen by biased scores, within groups"),
    ("moe_layer_freq", (1,), "every layer after the dense ones routes"),
    ("rope_interleave", (True,), "attention rotates interleaved pairs"),
    ("sliding_window", (), "attention reaches back to the start"),
)
# Nothing in the forward pass depends on these, or they follow from others.
_HARMLESS = """
    _name_or_path architectures auto_map aux_loss_alpha bos_token_id chunk_size_feed_forward dtype
    eos_token_id ep_size head_dim id2label initializer_range is_encoder_decoder label2id layer_types
    mlp_layer_types model_type num_key_value_heads num_local_experts num_mtp_layers
    output_attentions output_hidden_states output_router_logits pad_token_id pretraining_tp
    problem_type qk_head_dim quantization_config return_dict rope_parameters rope_scaling rope_theta
    router_aux_loss_coef seq_aux torch_dtype transformers_version use_cache
"""
_AGAIN = "copy or download it again"
TOKEN_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """A config.json as read: the model, its control tokens' ids, and whether weights are FP8.

    `is_known`: whether the reference library has its model_type.
    """

    model: ModelConfig
    tokens: Mapping[str, Any]
    fp8: bool
    is_known: bool
    ignored: tuple[str, ...]


def read(folder: epath.PathLike, dtype: str | None = None) -> SourceConfig:
    """The config.json in `folder`; FileNotFoundError or ValueError says what is wrong with it.

    `dtype` is what the parameters shall have, by default what the file says.
    """
    path = epath.Path(folder) / "config.json"
    if not path.exists() or path.is_dir():
        raise FileNotFoundError(
            f"{os.fspath(folder)} holds no config.json: give the folder of a model in the format "
            "of Hugging Face"
        )
    try:
        body = storage.parse_json(storage.read_bytes(path))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}; {_AGAIN}") from error
    if not isinstance(body, dict):
        raise ValueError(f"{path} holds a {type(body).__name__}, not a JSON object; {_AGAIN}")
    return from_json(body, str(path), dtype)


def from_json(
    body: Mapping[str, Any], where: str = "config.json", dtype: str | None = None
) -> SourceConfig:
    """Ours for theirs. One ValueError lists each field that we cannot follow, its value and why.

    `dtype` as in `read`.
    """
    given, complaints = set(body), []
    body = _with_containers(body, complaints)
    complaints += _broken_rules(body)
    body["first_k_dense_replace"] = _num_dense(body, complaints)
    if body.get("num_nextn_predict_layers") is None and "num_mtp_layers" in body:
        body["num_nextn_predict_layers"] = body["num_mtp_layers"]
    sparse_attention = body.get("model_type") == V32
    fields = _FIELDS + (_INDEXER_FIELDS if sparse_attention else ())
    hints = {field.name: field.type for field in dataclasses.fields(ModelConfig)}
    values: dict[str, Any] = {}
    for ours, theirs in fields:
        value = body.get(theirs, _ABSENT.get(theirs))
        value = _NULL.get(theirs) if value is None and theirs in body else value
        if value is None:
            complaints.append(f"{theirs} is missing: it must be given")
        elif not _is_a(hints[ours], value):
            complaints.append(f"{theirs} = {value!r}: must be of type {_name(hints[ours])}")
        else:
            values[ours] = float(value) if _name(hints[ours]) == "float" else value
    values |= _rope(body, complaints)
    fp8 = _is_fp8(body, complaints)
    dtype = dtype or _dtype(body, complaints)
    tokens = {name: body[name] for name in TOKEN_FIELDS if body.get(name) is not None}
    complaints += wrong_ids(tokens, body.get("vocab_size"))
    if complaints:
        raise ValueError(
            f"{where} is incomplete or asks for what is not implemented: " + "; ".join(complaints)
        )
    try:
        model = ModelConfig(**values, param_dtype=dtype, compute_dtype=dtype)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    known = {theirs for _, theirs in _FIELDS + _INDEXER_FIELDS} | {r[0] for r in _RULES}
    ignored = tuple(sorted(given - known - set(_HARMLESS.split())))
    is_known = body["model_type"] in ARCHITECTURES
    return SourceConfig(model=model, tokens=tokens, fp8=fp8, is_known=is_known, ignored=ignored)


def _with_containers(body: Mapping[str, Any], complaints: list[str]) -> dict[str, Any]:
    """A copy without those lists and objects that are something else."""
    kept = dict(body)
    for name, kind in _CONTAINERS.items():
        value = kept.get(name)
        if value is not None and not isinstance(value, kind):
            wanted = "a list" if kind is list else "a JSON object"
            complaints.append(f"{name} = {kept.pop(name)!r:.80}: must be {wanted}")
    return kept


def _broken_rules(body: Mapping[str, Any]) -> list[str]:
    broken = [
        f"{name} = {body[name]!r}: {rule}"
        for name, allowed, rule in _RULES
        if body.get(name) is not None and body[name] not in allowed
    ]
    if body.get("model_type") not in MODEL_TYPES:
        broken.insert(
            0, f"model_type = {body.get('model_type')!r}: must be one of {', '.join(MODEL_TYPES)}"
        )
    heads = body.get("num_key_value_heads")
    if heads is not None and heads != body.get("num_attention_heads"):
        broken.append(f"num_key_value_heads = {heads!r}: must equal num_attention_heads")
    attention = _SPARSE_ATTENTION if body.get("model_type") == V32 else ("full_attention",)
    kinds = body.get("layer_types") or ()
    if any(kind not in attention for kind in kinds):
        broken.append(f"layer_types = {kinds!r:.80}: every layer must be {' or '.join(attention)}")
    return broken


def _num_dense(body: Mapping[str, Any], complaints: list[str]) -> Any:
    kinds, told = body.get("mlp_layer_types"), body.get("first_k_dense_replace")
    if kinds is None:
        return told
    dense = kinds.count("dense")
    # The reference's deepseek_v32 goes by the list; its deepseek_v3 does not know of one.
    if body.get("model_type") != V32 and told not in (None, dense):
        complaints.append(
            f"mlp_layer_types has {dense} dense layers, first_k_dense_replace = {told!r}: they "
            "must agree"
        )
    if kinds != ["dense"] * dense + ["sparse"] * (len(kinds) - dense):
        complaints.append(f"mlp_layer_types = {kinds!r:.80}: dense layers come first")
    if len(kinds) != body.get("num_hidden_layers"):
        complaints.append(
            f"mlp_layer_types has {len(kinds)} entries: must have num_hidden_layers = "
            f"{body.get('num_hidden_layers')!r}"
        )
    return dense


def _is_a(hint: Any, value: Any) -> bool:
    kind = {"int": int, "float": (int, float), "bool": bool, "str": str}[_name(hint)]
    return isinstance(value, kind) and (isinstance(value, bool) == (_name(hint) == "bool"))


def _name(hint: Any) -> str:
    return hint if isinstance(hint, str) else hint.__name__


def _rope(body: Mapping[str, Any], complaints: list[str]) -> dict[str, float | int]:
    """Rotation, as in released files (rope_theta, rope_scaling) or transformers 5's one field."""
    rope = {**(body.get("rope_scaling") or {}), **(body.get("rope_parameters") or {})}
    theta = rope.get("rope_theta")
    theta = body.get("rope_theta") if theta is None else theta
    kind = rope.get("rope_type", rope.get("type", "default"))
    values: dict[str, float | int] = {"rope_theta": theta if theta is not None else 10_000.0}
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        complaints.append(
            f"partial_rotary_factor = {rope['partial_rotary_factor']!r}: all rope channels turn"
        )
    if kind == "yarn":
        values |= _yarn(rope, complaints)
    elif kind != "default":
        complaints.append(f"rope type = {kind!r}: must be default or yarn")
    for name, value in values.items():
        whole = name == "yarn_original_length"
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            complaints.append(f"{name} of the rotation = {value!r}: must be a number")
            return {}
    return {n: v if n == "yarn_original_length" else float(v) for n, v in values.items()}


def _yarn(rope: Mapping[str, Any], complaints: list[str]) -> dict[str, Any]:
    if rope.get("attention_factor") is not None:
        complaints.append(
            f"attention_factor = {rope['attention_factor']!r}: the rotation's factor follows from "
            "mscale and mscale_all_dim"
        )
    if rope.get("truncate", True) is not True:
        complaints.append(f"truncate = {rope['truncate']!r}: YaRN's range is rounded outwards")
    for name in ("factor", "original_max_position_embeddings"):
        if rope.get(name) is None:
            complaints.append(f"{name} of the rotation is missing: YaRN needs it")
            return {}
    mscale, all_dim = rope.get("mscale") or 0.0, rope.get("mscale_all_dim") or 0.0
    if all_dim and not mscale:
        complaints.append(f"mscale_all_dim = {all_dim!r} without mscale: give both or neither")
    return {
        "yarn_factor": rope["factor"],
        "yarn_original_length": rope["original_max_position_embeddings"],
        "yarn_beta_fast": rope.get("beta_fast") or 32.0,
        "yarn_beta_slow": rope.get("beta_slow") or 1.0,
        # Without both of them the reference scales by the factor alone.
        "yarn_mscale": mscale if all_dim else 1.0,
        "yarn_mscale_all_dim": all_dim,
    }


def wrong_ids(ids: Mapping[str, Any], vocab_size: Any) -> list[str]:
    """What is wrong with the control tokens' ids: each an id of the vocabulary, or a list of them.

    The rule is not asked for where `vocab_size` is no number, which is a fault of its own.
    """
    wrong = []
    for name in TOKEN_FIELDS:
        value = ids.get(name)
        some: list[Any] = [value]
        if isinstance(value, list) and name == "eos_token_id":
            some = value
        whole = all(isinstance(i, int) and not isinstance(i, bool) for i in some)
        inside = not isinstance(vocab_size, int) or (
            whole and all(0 <= i < vocab_size for i in some)
        )
        if value is not None and not (some and whole and inside):
            wrong.append(f"{name} = {value!r:.80}: no id of a vocabulary of {vocab_size} tokens")
    return wrong


def _is_fp8(body: Mapping[str, Any], complaints: list[str]) -> bool:
    quantized = body.get("quantization_config")
    if quantized is not None:
        expected = {"quant_method": "fp8", "weight_block_size": list(FP8_BLOCK)}
        found = {name: quantized.get(name) for name in expected}
        if found != expected or quantized.get("fmt", "e4m3") != "e4m3":
            complaints.append(
                f"quantization_config = {dict(quantized)!r:.200}: must be fp8, e4m3, in blocks of "
                f"{list(FP8_BLOCK)}"
            )
    return quantized is not None


def _dtype(body: Mapping[str, Any], complaints: list[str]) -> str:
    dtype = body.get("dtype") or body.get("torch_dtype")
    if dtype is None:
        dtype = "float32" if body.get("quantization_config") is None else "bfloat16"
    dtype = str(dtype).removeprefix("torch.")
    if dtype not in ("float32", "bfloat16"):
        complaints.append(
            f"dtype = {dtype!r}: parameters are float32 or bfloat16 here: choose with --dtype; "
            "float32 keeps every number"
        )
    return dtype


def to_json(config: ModelConfig, dtype: str, tokens: Mapping[str, Any]) -> dict[str, Any]:
    """Theirs for ours, in the fields of the released files; ValueError for what they cannot say."""
    c = config
    complaints = []
    if c.embedding_taps:
        complaints.append(
            f"model.embedding_taps = {c.embedding_taps}: the format has no place for taps; train "
            "with embedding_taps = 0"
        )
    if c.index_topk and not c.q_latent_width:
        complaints.append("model.index_topk > 0 without a query latent: the indexer reads it")
    mscales = (c.yarn_mscale, c.yarn_mscale_all_dim)
    if c.yarn_factor > 1 and not all(mscales) and mscales != (1.0, 0.0):
        complaints.append(
            f"model.yarn_mscale = {c.yarn_mscale} with yarn_mscale_all_dim = "
            f"{c.yarn_mscale_all_dim}: the format reads the one only beside the other, neither "
            "being 0; without both it means 1 and 0"
        )
    if complaints:
        raise ValueError("this model has no Hugging Face form: " + "; ".join(complaints))
    kind = V32 if c.index_topk else V3
    body: dict[str, Any] = {"architectures": [ARCHITECTURES[kind]], "model_type": kind}
    fields = _FIELDS + (_INDEXER_FIELDS if kind == V32 else ())
    body |= {theirs: getattr(c, ours) for ours, theirs in fields}
    body["q_lora_rank"] = c.q_latent_width or None
    body |= {
        name: allowed[0]
        for name, allowed, _ in _RULES
        if allowed and (name, kind) != ("rope_interleave", V32)
    }
    body["attention_dropout"] = 0.0
    body["num_key_value_heads"] = c.num_heads
    body["rope_theta"] = c.rope_theta
    body["rope_scaling"] = _rope_scaling(c)
    body["torch_dtype"] = dtype
    body["use_cache"] = True
    return body | {name: tokens[name] for name in TOKEN_FIELDS if name in tokens}


def _rope_scaling(config: ModelConfig) -> dict[str, Any] | None:
    if config.yarn_factor <= 1:
        return None
    scaling = {
        "type": "yarn",
        "factor": config.yarn_factor,
        "original_max_position_embeddings": config.yarn_original_length,
        "beta_fast": config.yarn_beta_fast,
        "beta_slow": config.yarn_beta_slow,
    }
    if config.yarn_mscale_all_dim:
        scaling |= {
            "mscale": config.yarn_mscale,
            "mscale_all_dim": config.yarn_mscale_all_dim,
        }
    return scaling
