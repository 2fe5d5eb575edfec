"""Train state and step: gradients of a loss over micro-batches, one guarded update.

A loss is a value: `supervised` and `policy_gradient` below read like their equations and give a
weighted sum over tokens, so a step may be cut into any number of micro-batches.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from mathv2_jax import sharding
from mathv2_jax.data import packing
from mathv2_jax.model import cache, heads, moe, transformer
from mathv2_jax.model.config import ModelConfig
from mathv2_jax.rl import grpo


@flax.struct.dataclass
class TrainState:
    """Everything that a checkpoint must hold to go on: float32, sharded like the parameters.

    A pytree: the same class holds the state's arrays, their shapes or their shardings.
    """

    step: Any  # int32 []
    variables: transformer.Variables
    optimizer: optax.OptState


class LossAux(NamedTuple):
    """What a loss reports beside its scalar: sums, over the micro-batches of a step."""

    loss: Float[Array, ""]
    tokens: Float[Array, ""]
    head_loss: Float[Array, ""]
    head_weight: Float[Array, ""]
    load_LE: Float[Array, "L E"]
    policy: grpo.GrpoAux | None


Loss = Callable[[Any, transformer.Variables, packing.Batch, Any], tuple[jax.Array, LossAux]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trunk:
    """How to run the model: shape and kernels, chosen once."""

    config: ModelConfig
    kernels: transformer.Kernels

    def read(
        self, params: Any, variables: transformer.Variables, batch: packing.Batch
    ) -> tuple[jax.Array, transformer.TrunkOutput]:
        """Hidden states [B, T, D] aligned with the tokens they predict, and the raw output."""
        tokens_BT, sources_BT = jnp.asarray(batch.tokens_BT), jnp.asarray(batch.sources_BT)
        layout = cache.Layout(
            jnp.asarray(batch.positions_BT),
            jnp.asarray(batch.segments_BT),
            jnp.asarray(batch.prefixes_BT),
        )
        out = transformer.apply(
            self.config,
            {**variables, "params": params},
            tokens_BT,
            layout,
            kept_LBTA=None if batch.kept_LBTA is None else jnp.asarray(batch.kept_LBTA),
            previous_BTW=cache.previous_tokens(tokens_BT, sources_BT, self.config.embedding_taps),
            kernels=self.kernels,
        )
        return jnp.take_along_axis(out.hidden_BTD, sources_BT[..., None], axis=1), out

    def logprobs(
        self,
        params: Any,
        variables: transformer.Variables,
        batch: packing.Batch,
        temperature: float,
    ) -> tuple[heads.TokenLogprobs, transformer.TrunkOutput]:
        """Log-probability and entropy of every token of the batch given what precedes it."""
        hidden_BTD, out = self.read(params, variables, batch)
        found = heads.token_logprobs(
            hidden_BTD,
            params["unembed"],
            jnp.asarray(batch.tokens_BT),
            temperature=temperature,
            chunk=self.config.logprob_chunk,
        )
        return found, out

    def head_loss(
        self, params: Any, hidden_BTD: jax.Array, batch: packing.Batch
    ) -> tuple[jax.Array, jax.Array]:
        """Weighted cross-entropy of the verifier head at the marked places, and the weights."""
        places = jnp.asarray(batch.head_places_BN)[..., None]
        hidden_PD = jnp.take_along_axis(hidden_BTD, places, axis=1)
        hidden_PD = hidden_PD.reshape(-1, hidden_BTD.shape[-1])
        logits_P3 = heads.score_logits(
            hidden_PD, params["verifier_head_kernel"], params["verifier_head_bias"]
        )
        labels_P = jnp.asarray(batch.head_labels_BN).reshape(-1)
        weights_P = jnp.asarray(batch.head_weights_BN).reshape(-1)
        each_P = optax.softmax_cross_entropy_with_integer_labels(logits_P3, labels_P)
        return jnp.sum(weights_P * each_P), jnp.sum(weights_P)


def _load(out: transformer.TrunkOutput) -> jax.Array:
    return jnp.zeros((0, 0)) if out.routing is None else out.routing.load_E


def supervised(
    trunk: Trunk, params: Any, variables: transformer.Variables, batch: packing.Batch, _: Any
) -> tuple[jax.Array, LossAux]:
    """- sum of weighted log-probabilities of the assistant's tokens."""
    found, out = trunk.logprobs(params, variables, batch, 1.0)
    weights_BT = jnp.asarray(batch.weights_BT)
    loss = -jnp.sum(jnp.where(weights_BT > 0, found.logprob_BT, 0.0) * weights_BT)
    zero = jnp.zeros(())
    tokens = jnp.sum(batch.segments_BT > 0).astype(jnp.float32)
    return loss, LossAux(loss, tokens, zero, zero, _load(out), None)


def policy_gradient(
    trunk: Trunk,
    config: grpo.GrpoConfig,
    temperature: float,
    params: Any,
    variables: transformer.Variables,
    batch: packing.Batch,
    reference_BT: Any,
) -> tuple[jax.Array, LossAux]:
    """GRPO on the answers plus the verifier head's cross-entropy (no gradient into the trunk)."""
    found, out = trunk.logprobs(params, variables, batch, temperature)
    loss, aux = grpo.grpo_loss(
        found.logprob_BT,
        found.entropy_BT,
        jnp.asarray(batch.old_logprobs_BT),
        jax.lax.stop_gradient(found.logprob_BT) if reference_BT is None else reference_BT,
        jnp.asarray(batch.advantages_BT),
        jnp.asarray(batch.segments_BT),
        jnp.asarray(batch.weights_BT),
        config,
    )
    head_loss, head_weight = trunk.head_loss(params, out.hidden_BTD, batch)
    tokens = jnp.sum(batch.segments_BT > 0).astype(jnp.float32)
    return loss + head_loss, LossAux(loss, tokens, head_loss, head_weight, _load(out), aux)


class Learner:
    """A loss and an optimizer compiled for a mesh. State in, state out; the input is donated."""

    def __init__(
        self,
        trunk: Trunk,
        loss: Loss,
        optimizer: optax.GradientTransformation,
        mesh: Mesh,
        *,
        router_bias_rate: float,
        temperature: float = 1.0,
    ):
        self.mesh = mesh
        self._optimizer = optimizer
        boxed = transformer.boxed_abstract(trunk.config, trunk.kernels)
        self._where = _state_shardings(boxed, optimizer, mesh)
        gradient = jax.value_and_grad(loss, has_aux=True)

        def gradients(variables: Any, batch: Any, reference: Any) -> Any:
            (_, aux), grads = gradient(variables["params"], variables, batch, reference)
            return grads, aux

        def logprobs(variables: Any, batch: Any) -> jax.Array:
            return trunk.logprobs(variables["params"], variables, batch, temperature)[0].logprob_BT

        update = functools.partial(_guarded_update, optimizer, router_bias_rate)
        self._gradients = jax.jit(gradients)
        self._add = jax.jit(functools.partial(jax.tree.map, jnp.add))
        # The state comes back laid out as it came in, or the next step would compile anew.
        everywhere = sharding.replicated(mesh)
        self._update = jax.jit(update, donate_argnums=0, out_shardings=(self._where, everywhere))
        self._logprobs = jax.jit(logprobs)

    def start(self, variables: transformer.Variables) -> TrainState:
        """Step 0 on copies of `variables`, laid out for the mesh, with a fresh optimizer."""
        where = self._where
        variables = jax.tree.map(jnp.copy, jax.device_put(variables, where.variables))
        with jax.set_mesh(self.mesh):
            init = jax.jit(self._optimizer.init, out_shardings=where.optimizer)
            optimizer = init(variables["params"])
        step = jax.device_put(jnp.zeros((), jnp.int32), where.step)
        return TrainState(step, variables, optimizer)

    def logprobs(self, variables: transformer.Variables, batch: packing.Batch) -> jax.Array:
        """log-probability [B, T] of every token of a batch (already `put`)."""
        with jax.set_mesh(self.mesh):
            return self._logprobs(variables, batch)

    def put(self, batch: packing.Batch) -> packing.Batch:
        """The batch on the devices, rows split over the batch axes of the mesh."""
        return put_batch(batch, self.mesh)

    def step(
        self,
        state: TrainState,
        batches: Sequence[packing.Batch],
        references: Sequence[jax.Array | None],
        learning_rate: float,
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One update on micro-batches (already `put`). Metrics stay on the device.

        Where loss or gradient is not finite the state comes back as it was, `finite` 0.
        """
        total = None
        with jax.set_mesh(self.mesh):
            for batch, reference in zip(batches, references, strict=True):
                found = self._gradients(state.variables, batch, reference)
                total = found if total is None else self._add(total, found)
            return self._update(state, total, jnp.float32(learning_rate))


def put_batch(batch: packing.Batch, mesh: Mesh) -> packing.Batch:
    """Host arrays to the mesh: rows over the batch axes, everything else replicated."""
    rows = sharding.batch_sharding(mesh)
    kept = NamedSharding(mesh, PartitionSpec(None, *rows.spec))
    where = packing.Batch(*(kept if name == "kept_LBTA" else rows for name in batch._fields))
    if batch.kept_LBTA is None:
        where = where._replace(kept_LBTA=None)
    return jax.device_put(batch, where)


def _state_shardings(boxed: Any, optimizer: optax.GradientTransformation, mesh: Mesh) -> Any:
    """A TrainState of shardings: the optimizer's moments lie where their parameters do."""
    everywhere = sharding.replicated(mesh)
    variables = sharding.shardings_for(boxed, mesh)
    state = jax.eval_shape(optimizer.init, transformer.unboxed(boxed)["params"])
    moments = optax.tree.map_params(
        optimizer,
        lambda leaf, where: leaf if isinstance(leaf, optax.MaskedNode) else where,
        state,
        variables["params"],
        transform_non_params=lambda _: everywhere,
        is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
    )
    return TrainState(everywhere, variables, moments)


def _guarded_update(
    optimizer: optax.GradientTransformation,
    bias_rate: float,
    state: TrainState,
    total: Any,
    learning_rate: jax.Array,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Optimizer step and router bias step, undone as a whole where something is not finite."""
    grads, aux = total
    params = state.variables["params"]
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(aux.loss) & jnp.isfinite(aux.head_loss)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer counts
        directions, optimizer_state = optimizer.update(grads, state.optimizer, params)
    updates = jax.tree.map(lambda d: -learning_rate * d, directions)
    variables = {**state.variables, "params": optax.apply_updates(params, updates)}
    if "router" in variables:  # a model without sparse layers has none
        variables["router"] = jax.tree.map(
            lambda bias_LE: moe.updated_bias(bias_LE, aux.load_LE, bias_rate), variables["router"]
        )
    fresh = TrainState(state.step, variables, optimizer_state)
    kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), fresh, state)
    mean_load = jnp.maximum(jnp.mean(aux.load_LE, axis=-1), 1.0) if aux.load_LE.size else 1.0
    peak = jnp.max(jnp.max(aux.load_LE, axis=-1) / mean_load) if aux.load_LE.size else jnp.ones(())
    metrics = {
        "loss": aux.loss,
        "tokens": aux.tokens,
        "gradient_norm": norm,
        "learning_rate": learning_rate,
        "finite": finite.astype(jnp.float32),
        "router_peak_load": peak,
        "head_loss": aux.head_loss / jnp.maximum(aux.head_weight, 1e-6),
    }
    if aux.policy is not None:
        scale = jnp.maximum(aux.policy.weight, 1e-12)
        metrics |= {
            "kl": aux.policy.kl / scale,
            "entropy": aux.policy.entropy / scale,
            "clipped": aux.policy.clipped / scale,
            "dropped": aux.policy.dropped / scale,
            "ratio": aux.policy.ratio / scale,
        }
    return kept.replace(step=state.step + 1), metrics
