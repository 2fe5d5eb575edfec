"""Moonlight-16B-A3B: the DeepSeek-V3 architecture at 15.96 B parameters, about 3 B active.

No query latent, no expert groups, no YaRN, no MTP layer.
"""


def model() -> dict:
    """Context 8,192."""
    return dict(
        vocab_size=163_840,
        width=2048,
        num_layers=27,
        num_dense_layers=1,
        num_heads=16,
        q_latent_width=0,
        kv_latent_width=512,
        head_key_width=128,
        head_rope_width=64,
        head_value_width=128,
        dense_width=11_264,
        expert_width=1408,
        num_experts=64,
        experts_per_token=6,
        num_shared_experts=2,
        routed_scaling=2.446,
        rope_theta=50_000.0,
        max_position=8192,
        norm_eps=1e-5,
        param_dtype="bfloat16",
        compute_dtype="bfloat16",
        remat="full",
    )
