"""DeepSeek-V3, and by shape R1 and V3.1: 671.03 B parameters in the main model, 37 B active.

The MTP layer adds 11.61 B that are its own; a checkpoint on disk holds another copy of the
embedding and of the head for it.
"""


def model() -> dict:
    """Context 163,840 by YaRN, from 4,096."""
    return dict(
        vocab_size=129_280,
        width=7168,
        num_layers=61,
        num_dense_layers=3,
        num_heads=128,
        q_latent_width=1536,
        kv_latent_width=512,
        head_key_width=128,
        head_rope_width=64,
        head_value_width=128,
        dense_width=18_432,
        expert_width=2048,
        num_experts=256,
        experts_per_token=8,
        num_shared_experts=1,
        num_expert_groups=8,
        expert_groups_per_token=4,
        routed_scaling=2.5,
        rope_theta=10_000.0,
        yarn_factor=40.0,
        yarn_original_length=4096,
        yarn_beta_fast=32.0,
        yarn_beta_slow=1.0,
        yarn_mscale=1.0,
        yarn_mscale_all_dim=1.0,
        max_position=163_840,
        num_mtp_layers=1,
        norm_eps=1e-6,
        param_dtype="bfloat16",
        compute_dtype="bfloat16",
        remat="full",
    )
