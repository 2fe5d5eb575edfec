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
