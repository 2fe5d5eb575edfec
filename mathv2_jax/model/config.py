"""The shape of a DeepSeek-V3 family model, in one dataclass."""

import dataclasses
import math

DTYPES = ("float32", "bfloat16")
# What a layer keeps for its backward pass; see block.REMAT.
REMAT_NAMES = ("none", "full", "dots", "dots_no_batch")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and constants of the trunk and its two heads.

    Widths follow the report's names: MLA has `num_heads` heads of key width `head_key_width`
    (without rope) + `head_rope_width`, value width `head_value_width`, and latents
    `q_latent_width` (0: queries come straight from the stream) and `kv_latent_width`. The first
    `num_dense_layers` of `num_layers` have a dense feed-forward of `dense_width`; the rest route
    each token to `experts_per_token` of `num_experts` experts of `expert_width`, beside
    `num_shared_experts` that see every token.

    YaRN stretches rotation beyond `yarn_original_length` positions by `yarn_factor` (1: plain
    rotation); `yarn_mscale_all_dim` corrects the softmax scale. `max_position` is what a context
    may hold. `index_topk` > 0 makes attention sparse (DSA): each token attends to that many, picked
    by an indexer of `index_heads` heads of `index_head_width`. `num_mtp_layers` extra layers
    predict the tokens after the next.

    `param_dtype` is that of every parameter but the verifier head; the router's bias, the scores of
    router and attention and all log-probabilities are float32 whatever the dtypes say. `remat`
    names what a layer recomputes in its backward pass.

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
    normalize_expert_weights: bool = True
    rope_theta: float = 10_000.0
    yarn_factor: float = 1.0
    yarn_original_length: int = 4096
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    yarn_mscale: float = 1.0
    yarn_mscale_all_dim: float = 1.0
    max_position: int = 4096
    index_topk: int = 0
    index_heads: int = 0
    index_head_width: int = 0
    num_mtp_layers: int = 0
    norm_eps: float = 1e-6
    embedding_taps: int = 0
    param_dtype: str = "float32"
    compute_dtype: str = "float32"
    remat: str = "none"
    logprob_chunk: int = 256
    scan_unroll: bool = False

    def __post_init__(self):
        for name, least in self._smallest().items():
            if getattr(self, name) < least:
                raise ValueError(f"model.{name} = {getattr(self, name)}: must be at least {least}")
        if not 0 <= self.num_dense_layers <= self.num_layers:
            raise ValueError(
                f"model.num_dense_layers = {self.num_dense_layers}: must lie between 0 and "
                f"num_layers = {self.num_layers}"
            )
        if self.has_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"model.experts_per_token = {self.experts_per_token}: must lie between 1 and "
                f"num_experts = {self.num_experts}"
            )
        if self.num_experts % self.num_expert_groups:
            raise ValueError(
                f"model.num_expert_groups = {self.num_expert_groups}: must divide "
                f"num_experts = {self.num_experts}"
            )
        if not 1 <= self.expert_groups_per_token <= self.num_expert_groups:
            raise ValueError(
                f"model.expert_groups_per_token = {self.expert_groups_per_token}: must lie "
                f"between 1 and num_expert_groups = {self.num_expert_groups}"
            )
        reachable = self.expert_groups_per_token * (self.num_experts // self.num_expert_groups)
        if self.has_experts and self.experts_per_token > reachable:
            raise ValueError(
                f"model.experts_per_token = {self.experts_per_token}: the "
                f"expert_groups_per_token = {self.expert_groups_per_token} groups that a token may "
                f"use have {reachable} experts"
            )
        if self.head_rope_width % 2:
            raise ValueError(f"model.head_rope_width = {self.head_rope_width}: must be even")
        self._check_names()
        self._check_reals()
        self._check_rotation()
        self._check_indexer()

    def _check_names(self):
        for name, allowed in (
            ("param_dtype", DTYPES),
            ("compute_dtype", DTYPES),
            ("remat", REMAT_NAMES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"model.{name} = {getattr(self, name)!r}: must be {' or '.join(allowed)}"
                )

    def _check_reals(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"model.{field.name} = {value}: must be finite")
        for name in ("norm_eps", "routed_scaling", "yarn_beta_slow"):
            if getattr(self, name) <= 0.0:
                raise ValueError(f"model.{name} = {getattr(self, name)}: must be positive")

    def _check_rotation(self):
        if self.rope_theta <= 1.0:
            raise ValueError(f"model.rope_theta = {self.rope_theta}: must be above 1")
        if self.yarn_factor < 1.0:
            raise ValueError(
                f"model.yarn_factor = {self.yarn_factor}: must be at least 1, which is no YaRN"
            )
        if self.yarn_beta_fast < self.yarn_beta_slow:
            raise ValueError(
                f"model.yarn_beta_fast = {self.yarn_beta_fast}: must not be below "
                f"yarn_beta_slow = {self.yarn_beta_slow}"
            )
        for name in ("yarn_mscale", "yarn_mscale_all_dim"):
            if getattr(self, name) < 0.0:
                raise ValueError(f"model.{name} = {getattr(self, name)}: must not be negative")

    def _check_indexer(self):
        parts = {n: getattr(self, n) for n in ("index_topk", "index_heads", "index_head_width")}
        if not any(parts.values()):
            return
        for name, value in parts.items():
            if not value:
                raise ValueError(
                    f"model.{name} = 0: {parts} are all set (sparse attention) or all 0 (dense)"
                )
        if not self.q_latent_width:
            raise ValueError(
                f"model.index_topk = {self.index_topk}: the indexer reads the query latent, and "
                "q_latent_width is 0"
            )
        if self.index_head_width < self.head_rope_width:
            raise ValueError(
                f"model.index_head_width = {self.index_head_width}: must be at least "
                f"head_rope_width = {self.head_rope_width}, which are the channels it rotates"
            )

    def _smallest(self) -> dict[str, int]:
        """The least value of every count and width."""
        positive = ("vocab_size", "width", "num_layers", "num_heads", "kv_latent_width")
        positive += ("head_key_width", "head_value_width", "num_expert_groups", "logprob_chunk")
        positive += ("yarn_original_length", "max_position")
        natural = ("q_latent_width", "head_rope_width", "num_shared_experts", "embedding_taps")
        natural += ("num_mtp_layers", "index_topk", "index_heads", "index_head_width")
        return {
            **dict.fromkeys(positive, 1),
            **dict.fromkeys(natural, 0),
            "dense_width": int(self.num_dense_layers > 0),
            "expert_width": int(self.has_experts),
        }

    @property
    def num_sparse_layers(self) -> int:
        """Layers with routed experts."""
        return self.num_layers - self.num_dense_layers

    @property
    def has_experts(self) -> bool:
        """Whether any layer routes; those of MTP do."""
        return self.num_sparse_layers > 0 or self.num_mtp_layers > 0
