"""The shape of a DeepSeek-V3 family model, in one dataclass."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and constants of the trunk and its two heads.

    Widths follow the report's names: MLA has `num_heads` heads of key width `head_key_width`
    (without rope) + `head_rope_width`, value width `head_value_width`, and latents
    `q_latent_width` (0: queries come straight from the stream) and `kv_latent_width`. The first
    `num_dense_layers` of `num_layers` have a dense feed-forward of `dense_width`; the rest route
    each token to `experts_per_token` of `num_experts` experts of `expert_width`, beside
    `num_shared_experts` that see every token.

    `embedding_taps` (ours; 0 in every released model) adds to each token's embedding those of its
    previous tokens, scaled channel by channel: a model of a few layers then learns to look things
    up in a tenth of the steps.
    """

    vocab_size: int
    width: int
    num_layers: int
    num_dense_layers: int = 1
    num_heads: int
    q_latent_width: int = 0
    kv_latent_width: int
    head_key_width: int
    head_rope_width: int
    head_value_width: int
    dense_width: int
    expert_width: int
    num_experts: int
    experts_per_token: int
    num_shared_experts: int = 1
    num_expert_groups: int = 1
    expert_groups_per_token: int = 1
    routed_scaling: float = 2.5
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    embedding_taps: int = 0
    compute_dtype: str = "float32"
    logprob_chunk: int = 256
    scan_unroll: bool = False

    def __post_init__(self):
        for name in ("vocab_size", "width", "num_layers", "num_heads", "kv_latent_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} = {getattr(self, name)}: must be at least 1")
        if not 0 <= self.num_dense_layers <= self.num_layers:
            raise ValueError(
                f"model.num_dense_layers = {self.num_dense_layers}: must lie between 0 and "
                f"num_layers = {self.num_layers}"
            )
        if self.num_sparse_layers and not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"model.experts_per_token = {self.experts_per_token}: must lie between 1 and "
                f"num_experts = {self.num_experts}"
            )
        if self.num_expert_groups < 1 or self.num_experts % self.num_expert_groups:
            raise ValueError(
                f"model.num_expert_groups = {self.num_expert_groups}: must divide "
                f"num_experts = {self.num_experts}"
            )
        if not 1 <= self.expert_groups_per_token <= self.num_expert_groups:
            raise ValueError(
                f"model.expert_groups_per_token = {self.expert_groups_per_token}: must lie "
                f"between 1 and num_expert_groups = {self.num_expert_groups}"
            )
        if self.head_rope_width % 2:
            raise ValueError(f"model.head_rope_width = {self.head_rope_width}: must be even")
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise ValueError(
                f"model.compute_dtype = {self.compute_dtype!r}: must be float32 or bfloat16"
            )

    @property
    def num_sparse_layers(self) -> int:
        """Layers with routed experts."""
        return self.num_layers - self.num_dense_layers
