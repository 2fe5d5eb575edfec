"""The optimizer: Adam with decoupled decay, clipping by global norm, and a schedule."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

VERIFIER_HEAD = "verifier_head"
NOT_DECAYED = ("scale", "bias")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Warm-up over `warmup_steps`, then cosine decay to `final_share` of the rate at the end.

    `final_share` 1 holds the rate. Matrices decay by `weight_decay`, norms and biases never.
    """

    learning_rate: float
    warmup_steps: int = 10
    final_share: float = 1.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    clip_norm: float = 1.0
    moments: str = "float32"  # or bfloat16, as DeepSeek-V3 keeps both

    def __post_init__(self):
        if not (0.0 < self.learning_rate < math.inf and self.clip_norm > 0):
            raise ValueError(
                f"optimizer.learning_rate = {self.learning_rate}, optimizer.clip_norm = "
                f"{self.clip_norm}: both must be positive, the rate finite"
            )
        if self.moments not in ("float32", "bfloat16"):
            raise ValueError(f"optimizer.moments = {self.moments!r}: must be float32 or bfloat16")
        if self.moments != "float32" and self.beta2 > 0.95:
            raise ValueError(
                f"optimizer.moments = {self.moments!r} with optimizer.beta2 = {self.beta2}: what a "
                "step adds to the second moment would be rounded away; take beta2 = 0.95 at most, "
                "or float32"
            )
        if self.warmup_steps < 0 or not 0.0 <= self.final_share <= 1.0:
            raise ValueError(
                f"optimizer.warmup_steps = {self.warmup_steps} must not be negative and "
                f"optimizer.final_share = {self.final_share} must lie in 0..1"
            )
        if self.weight_decay < 0 or self.epsilon <= 0:
            raise ValueError(
                f"optimizer.weight_decay = {self.weight_decay} must not be negative and "
                f"optimizer.epsilon = {self.epsilon} must be positive"
            )
        if not (0.0 <= self.beta1 < 1.0 and 0.0 <= self.beta2 < 1.0):
            raise ValueError(
                f"optimizer.beta1 = {self.beta1}, optimizer.beta2 = {self.beta2}: each must lie "
                "in [0, 1)"
            )

    def without_rate(self) -> "OptimizerConfig":
        """Equal for configs that make the same optimizer: what decides the rate alone is gone."""
        return dataclasses.replace(self, learning_rate=1.0, warmup_steps=0, final_share=1.0)


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """The rate of step `step` (from 0) of `num_steps`; computed on the host."""
    warmup = min(config.warmup_steps, max(num_steps - 1, 0))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(num_steps - warmup, 1)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    return config.learning_rate * (config.final_share + (1.0 - config.final_share) * cosine)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Directions for a tree of parameters; the caller scales them by minus the learning rate.

    The rate stays outside, so that stages which differ only in it share a compiled step. The
    verifier head stands outside the trunk's clipping, whose gradient it never shares, and has no
    decay: without a gradient it stays where it is.
    """

    moments = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
    if config.moments != "float32":
        moments = _kept_as(moments, jnp.dtype(config.moments))

    def adam(weight_decay: float) -> optax.GradientTransformation:
        return optax.chain(
            optax.clip_by_global_norm(config.clip_norm),
            moments,
            optax.add_decayed_weights(weight_decay, mask=_decayed),
        )

    return optax.multi_transform({"trunk": adam(config.weight_decay), "head": adam(0.0)}, _labels)


def _kept_as(inner: optax.GradientTransformation, dtype: Any) -> optax.GradientTransformation:
    """`inner`, computing in float32, with the floats of its state rounded to `dtype` in between."""

    def init(params: Any) -> Any:
        return _floats_as(inner.init(params), dtype)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        found, fresh = inner.update(updates, _floats_as(state, jnp.float32), params)
        return found, _floats_as(fresh, dtype)

    return optax.GradientTransformation(init, update)


def _floats_as(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def _labels(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "head" if str(path[0].key).startswith(VERIFIER_HEAD) else "trunk", params
    )


def _decayed(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: str(path[-1].key) not in NOT_DECAYED, params
    )
