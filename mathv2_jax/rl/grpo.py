"""GRPO (arXiv 2402.03300) with the defaults of the DeepSeek-V3.2 report: advantages and losses.

Pure functions of arrays: nothing here knows a model, a sampler or a role. Losses are sums weighted
per token; the weights are made on the host (`token_weights`), so a batch may be cut into
micro-batches in any way.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

ADVANTAGES = ("mean", "mean_std")
NORMALISATIONS = ("sequence", "token", "constant")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrpoConfig:
    """The objective. `advantage`: reward minus the group's mean (`mean`), also divided by its
    standard deviation (`mean_std`). `normalisation`: mean over a sequence's tokens, then over the
    group (`sequence`); over all tokens (`token`); or over `constant_length` (`constant`).
    `off_policy_delta`: sequences of negative advantage whose mean log(pi_old/pi) exceeds it leave
    the clipped term; 0 turns it off. `importance_cap`: the ratio is clipped against the trainer's
    own log-probabilities before the update, and what the sampler's differ from these weighs the
    token, at most so much; 0: the ratio is against the sampler's.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    kl_coefficient: float = 0.02
    entropy_coefficient: float = 0.0
    advantage: str = "mean"
    normalisation: str = "sequence"
    constant_length: int = 1024
    off_policy_delta: float = 0.0
    importance_cap: float = 0.0

    def __post_init__(self):
        if self.advantage not in ADVANTAGES:
            raise ValueError(f"grpo.advantage = {self.advantage!r}: must be one of {ADVANTAGES}")
        if self.normalisation not in NORMALISATIONS:
            raise ValueError(
                f"grpo.normalisation = {self.normalisation!r}: must be one of {NORMALISATIONS}"
            )
        if not 0.0 < self.clip_low < 1.0 or self.clip_high <= 0.0:
            raise ValueError(
                f"grpo.clip_low = {self.clip_low}, grpo.clip_high = {self.clip_high}: the ratio is "
                "kept in [1 - clip_low, 1 + clip_high]; clip_low lies in (0, 1), clip_high above 0"
            )
        for name in ("kl_coefficient", "entropy_coefficient", "off_policy_delta", "importance_cap"):
            if getattr(self, name) < 0.0:
                raise ValueError(f"grpo.{name} = {getattr(self, name)}: must not be negative")
        if self.constant_length < 1:
            raise ValueError(f"grpo.constant_length = {self.constant_length}: must be positive")


def advantages(rewards: Sequence[float], kind: str) -> np.ndarray:
    """Group-relative advantages of one group's rewards; all 0 where the rewards are equal."""
    rewards_G = np.asarray(rewards, np.float64)
    centred_G = rewards_G - rewards_G.mean() if len(rewards_G) else rewards_G
    if not np.any(np.abs(centred_G) > 1e-9):
        return np.zeros_like(rewards_G)
    return centred_G / rewards_G.std() if kind == "mean_std" else centred_G


def token_weights(group_lengths: Sequence[Sequence[int]], config: GrpoConfig) -> list[list[float]]:
    """For each group, the weight of every token of each of its sequences; see GrpoConfig."""
    groups = [g for g in group_lengths if g]
    total = sum(sum(g) for g in groups)
    weights = []
    for lengths in group_lengths:
        if config.normalisation == "token":
            weights.append([1.0 / max(total, 1)] * len(lengths))
        else:
            share = 1.0 / (len(groups) * len(lengths)) if lengths else 0.0
            over = [
                config.constant_length if config.normalisation == "constant" else max(n, 1)
                for n in lengths
            ]
            weights.append([share / n for n in over])
    return weights


class Anchors(NamedTuple):
    """Log-probabilities that stay while the policy moves, of the same tokens.

    Those of the reference, and `proximal_BT`, the policy's own before a rollout's first update;
    either None where it is not needed, or is the policy that is differentiated.
    """

    reference_BT: Float[Array, "B T"] | None = None
    proximal_BT: Float[Array, "B T"] | None = None


def truncated_importance(
    proximal: Float[Array, "..."], sampled: Float[Array, "..."], cap: float
) -> Float[Array, "..."]:
    """min(pi_trainer/pi_sampler, cap), both of before the update; it has no gradient."""
    return jax.lax.stop_gradient(jnp.minimum(jnp.exp(proximal - sampled), cap))


def unbiased_kl(
    logprob: Float[Array, "..."], old: Float[Array, "..."], reference: Float[Array, "..."]
) -> Float[Array, "..."]:
    """r (pi_ref/pi - log(pi_ref/pi) - 1), r = pi/pi_old; the gradient flows through r too."""
    log_gap = reference - logprob
    return jnp.exp(logprob - old) * (jnp.exp(log_gap) - log_gap - 1.0)


def clipped_gain(
    logprob: Float[Array, "..."],
    old: Float[Array, "..."],
    advantage: Float[Array, "..."],
    config: GrpoConfig,
) -> Float[Array, "..."]:
    """min(r A, clip(r, 1 - low, 1 + high) A)."""
    ratio = jnp.exp(logprob - old)
    clipped = jnp.clip(ratio, 1.0 - config.clip_low, 1.0 + config.clip_high)
    return jnp.minimum(ratio * advantage, clipped * advantage)


def on_policy_mask(
    logprob_BT: Float[Array, "B T"],
    old_BT: Float[Array, "B T"],
    advantage_BT: Float[Array, "B T"],
    segments_BT: Int[Array, "B T"],
    counts_BT: Float[Array, "B T"],
    delta: float,
) -> Float[Array, "B T"]:
    """0 on sequences of negative advantage whose mean log(pi_old/pi) is above delta, else 1.

    A sequence is a segment of a row; its mean is over the tokens that `counts_BT` marks.
    """
    most = segments_BT.shape[1] + 1  # segments of a row, with the one of padding

    def sums(x_BT: jax.Array) -> jax.Array:
        """Over a token's segment."""
        total_BN = jax.vmap(functools.partial(jax.ops.segment_sum, num_segments=most))(
            x_BT, segments_BT
        )
        return jnp.take_along_axis(total_BN, segments_BT, axis=1)

    gap_BT = jax.lax.stop_gradient(old_BT - logprob_BT) * counts_BT
    mean_BT = sums(gap_BT) / jnp.maximum(sums(counts_BT), 1.0)
    return jnp.where((advantage_BT < 0) & (mean_BT > delta), 0.0, 1.0)


class GrpoAux(NamedTuple):
    """Sums over the batch's tokens under their loss weights, and the weights' own sum."""

    gain: Float[Array, ""]
    kl: Float[Array, ""]
    entropy: Float[Array, ""]
    clipped: Float[Array, ""]
    dropped: Float[Array, ""]
    ratio: Float[Array, ""]
    importance: Float[Array, ""]
    weight: Float[Array, ""]


def grpo_loss(
    logprob_BT: Float[Array, "B T"],
    entropy_BT: Float[Array, "B T"],
    old_BT: Float[Array, "B T"],
    anchors: Anchors,
    advantage_BT: Float[Array, "B T"],
    segments_BT: Int[Array, "B T"],
    weight_BT: Float[Array, "B T"],
    config: GrpoConfig,
) -> tuple[Float[Array, ""], GrpoAux]:
    """- gain + kl_coefficient KL - entropy_coefficient entropy, each a weighted sum over tokens.

    `old_BT` are the sampler's log-probabilities. Tokens of weight 0 are replaced before exp, so
    that nothing they hold can reach the loss.
    """
    real_BT = weight_BT > 0

    def real(x_BT: jax.Array | None) -> jax.Array:
        """The policy's own where there is no other."""
        x_BT = jax.lax.stop_gradient(logprob_BT) if x_BT is None else x_BT
        return jnp.where(real_BT, x_BT, 0.0)

    reference_BT, proximal_BT = map(real, anchors)
    logprob_BT, sampled_BT = real(logprob_BT), real(old_BT)
    advantage_BT = jnp.where(real_BT, advantage_BT, 0.0)
    old_BT, trust_BT = sampled_BT, jnp.ones_like(weight_BT)
    if config.importance_cap:
        old_BT = proximal_BT
        trust_BT = truncated_importance(proximal_BT, sampled_BT, config.importance_cap)
    keep_BT = jnp.ones_like(weight_BT)
    if config.off_policy_delta:
        keep_BT = on_policy_mask(
            logprob_BT,
            sampled_BT,
            advantage_BT,
            segments_BT,
            real_BT.astype(weight_BT.dtype),
            config.off_policy_delta,
        )
    ratio_BT = jnp.exp(logprob_BT - old_BT)
    outside_BT = (ratio_BT < 1.0 - config.clip_low) | (ratio_BT > 1.0 + config.clip_high)
    trusted_BT = weight_BT * trust_BT
    gain = jnp.sum(trusted_BT * keep_BT * clipped_gain(logprob_BT, old_BT, advantage_BT, config))
    kl = jnp.sum(trusted_BT * unbiased_kl(logprob_BT, old_BT, reference_BT))
    entropy = jnp.sum(weight_BT * jnp.where(real_BT, entropy_BT, 0.0))
    loss = -gain + config.kl_coefficient * kl - config.entropy_coefficient * entropy
    aux = GrpoAux(
        gain=gain,
        kl=kl,
        entropy=entropy,
        clipped=jnp.sum(jnp.where(outside_BT, weight_BT, 0.0)),
        dropped=jnp.sum(weight_BT * (1.0 - keep_BT)),
        ratio=jnp.sum(weight_BT * ratio_BT),
        importance=jnp.sum(trusted_BT),
        weight=jnp.sum(weight_BT),
    )
    return loss, aux
