"""DeepSeek-V3's architecture at 63 thousand parameters, for tests: no two widths are equal."""


def model() -> dict:
    """Every part of V3 but the MTP layer; YaRN bends the rotation within the first 16 positions."""
    return dict(
        vocab_size=61,
        width=24,
        num_layers=4,
        num_dense_layers=1,
        num_heads=3,
        q_latent_width=13,
        kv_latent_width=11,
        head_key_width=7,
        head_rope_width=8,
        head_value_width=5,
        dense_width=29,
        expert_width=16,
        num_experts=12,
        experts_per_token=4,
        num_shared_experts=2,
        num_expert_groups=4,
        expert_groups_per_token=2,
        routed_scaling=1.7,
        rope_theta=30.0,
        yarn_factor=6.0,
        yarn_original_length=16,
        yarn_beta_fast=1.0,
        yarn_beta_slow=0.2,
        yarn_mscale=0.8,
        yarn_mscale_all_dim=0.6,
        max_position=96,
        norm_eps=1e-6,
    )
