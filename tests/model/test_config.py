import dataclasses

import pytest

WRONG = [
    ("vocab_size", 0, "at least 1"),
    ("width", -3, "at least 1"),
    ("num_layers", 0, "at least 1"),
    ("num_heads", 0, "at least 1"),
    ("kv_latent_width", 0, "at least 1"),
    ("head_key_width", 0, "at least 1"),
    ("head_value_width", 0, "at least 1"),
    ("logprob_chunk", 0, "at least 1"),
    ("dense_width", 0, "at least 1"),
    ("expert_width", 0, "at least 1"),
    ("q_latent_width", -1, "at least 0"),
    ("num_shared_experts", -1, "at least 0"),
    ("embedding_taps", -1, "at least 0"),
    ("num_dense_layers", 4, "between 0 and num_layers = 3"),
    ("num_dense_layers", -1, "between 0 and num_layers = 3"),
    ("experts_per_token", 0, "between 1 and num_experts = 6"),
    ("experts_per_token", 7, "between 1 and num_experts = 6"),
    ("experts_per_token", 5, "expert_groups_per_token = 2 groups .* have 4 experts"),
    ("num_expert_groups", 0, "at least 1"),
    ("num_expert_groups", 4, "divide num_experts = 6"),
    ("expert_groups_per_token", 0, "between 1 and num_expert_groups = 3"),
    ("expert_groups_per_token", 4, "between 1 and num_expert_groups = 3"),
    ("head_rope_width", 3, "even"),
    ("compute_dtype", "float16", "float32 or bfloat16"),
    ("param_dtype", "float64", "float32 or bfloat16"),
    ("remat", "some", "none or full or dots or dots_no_batch"),
    ("rope_theta", 1.0, "above 1"),
    ("rope_theta", float("nan"), "finite"),
    ("routed_scaling", float("inf"), "finite"),
    ("routed_scaling", 0.0, "positive"),
    ("norm_eps", 0.0, "positive"),
    ("yarn_factor", 0.5, "at least 1"),
    ("yarn_original_length", 0, "at least 1"),
    ("yarn_beta_fast", 0.5, "below yarn_beta_slow = 1.0"),
    ("yarn_beta_slow", 0.0, "positive"),
    ("yarn_mscale", -1.0, "not be negative"),
    ("yarn_mscale_all_dim", -1.0, "not be negative"),
    ("max_position", 0, "at least 1"),
    ("num_mtp_layers", -1, "at least 0"),
    ("index_topk", -1, "at least 0"),
]
INDEXER = dict(index_topk=4, index_heads=2, index_head_width=6)
WRONG_INDEXER = [
    ("index_topk", 0, "all set .* or all 0"),
    ("index_heads", 0, "all set .* or all 0"),
    ("index_head_width", 0, "all set .* or all 0"),
    ("index_head_width", 3, "at least head_rope_width = 4"),
]


@pytest.mark.parametrize(("field", "value", "rule"), WRONG)
def test_a_wrong_size_is_refused_by_field_value_and_rule(full, field, value, rule):
    with pytest.raises(ValueError, match=rf"model\.{field} = {value!r}: .*{rule}"):
        dataclasses.replace(full.config, **{field: value})


def test_a_dense_model_needs_no_experts_and_a_sparse_one_no_dense_width(full):
    dense = dataclasses.replace(
        full.config,
        num_dense_layers=3,
        num_experts=1,
        num_expert_groups=1,
        expert_groups_per_token=1,
        experts_per_token=0,
        expert_width=0,
    )
    assert dense.num_sparse_layers == 0
    sparse = dataclasses.replace(full.config, num_dense_layers=0, dense_width=0)
    assert sparse.num_sparse_layers == 3


@pytest.mark.parametrize(("field", "value", "rule"), WRONG_INDEXER)
def test_an_indexer_is_set_as_a_whole_and_can_hold_the_rotated_channels(full, field, value, rule):
    dataclasses.replace(full.config, **INDEXER)
    with pytest.raises(ValueError, match=rf"model\.{field} = {value!r}: .*{rule}"):
        dataclasses.replace(full.config, **{**INDEXER, field: value})


def test_an_indexer_needs_a_query_latent(full):
    with pytest.raises(ValueError, match=r"model\.index_topk = 4: .*q_latent_width is 0"):
        dataclasses.replace(full.config, **INDEXER, q_latent_width=0)


def test_layers_that_predict_further_tokens_need_experts(full):
    dense = dataclasses.replace(full.config, num_dense_layers=3, dense_width=8)
    with pytest.raises(ValueError, match=r"model\.expert_width = 0: must be at least 1"):
        dataclasses.replace(dense, num_mtp_layers=1, expert_width=0)
