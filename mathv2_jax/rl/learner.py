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
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from mathv2_jax import sharding
from mathv2_jax.data import packing
from mathv2_jax.model import cache, heads, moe, transformer
from mathv2_jax.model.config import ModelConfig
from mathv2_jax.rl import auxiliary as auxiliary_lib
from mathv2_jax.rl import grpo


@flax.struct.dataclass
class TrainState:
    """Everything that a checkpoint must hold to go on, sharded like the parameters.

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
    overflow: Float[Array, ""]  # assignments to experts that were left out (model/exchange.py)
    further_load_ME: Float[Array, "M E"] | None = None  # of the MTP layers, where they ran
    auxiliary: auxiliary_lib.AuxiliaryLosses | None = None


# (params, variables, batch, anchors, number of real tokens in the step or None where unused)
Loss = Callable[
    [Any, transformer.Variables, packing.Batch, grpo.Anchors | None, jax.Array | None],
    tuple[jax.Array, LossAux],
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trunk:
    """How to run the model: shape, kernels and auxiliary losses, chosen once."""

    config: ModelConfig
    kernels: transformer.Kernels
    auxiliary: auxiliary_lib.AuxiliaryConfig = auxiliary_lib.AuxiliaryConfig()

    def __post_init__(self):
        self.auxiliary.require(self.config, "auxiliary")

    def read(
        self,
        params: Any,
        variables: transformer.Variables,
        batch: packing.Batch,
        signals: transformer.Signals | None = None,
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
            sources_BT=sources_BT,
            kernels=self.kernels,
            signals=signals,
        )
        return jnp.take_along_axis(out.hidden_BTD, sources_BT[..., None], axis=1), out

    def logprobs(
        self,
        params: Any,
        variables: transformer.Variables,
        batch: packing.Batch,
        temperature: float,
        signals: transformer.Signals | None = None,
    ) -> tuple[heads.TokenLogprobs, transformer.TrunkOutput]:
        """Log-probability and entropy of every token of the batch given what precedes it."""
        hidden_BTD, out = self.read(params, variables, batch, signals)
        found = heads.token_logprobs(
            hidden_BTD,
            params["unembed"],
            jnp.asarray(batch.tokens_BT),
            None if batch.allowed_BTY is None else jnp.asarray(batch.allowed_BTY),
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

    def auxiliary_losses(
        self,
        out: transformer.TrunkOutput,
        unembed_DV: jax.Array,
        batch: packing.Batch,
        tokens: jax.Array | None,
        weight_total: jax.Array | float = 1.0,
    ) -> tuple[jax.Array, auxiliary_lib.AuxiliaryLosses | None]:
        """Their weighted sum and each; MTP is weighted like the tokens of the batch."""
        if self.auxiliary.signals() == transformer.Signals():
            return jnp.zeros(()), None
        weights_BT = jnp.asarray(batch.weights_BT) / weight_total
        mtp = auxiliary_lib.further_loss(self.config, unembed_DV, batch, out.further, weights_BT)
        return auxiliary_lib.losses(self.auxiliary, out, tokens, mtp)


def _load(out: transformer.TrunkOutput) -> jax.Array:
    return jnp.zeros((0, 0)) if out.routing is None else out.routing.load_E


def _overflow(out: transformer.TrunkOutput) -> jax.Array:
    both = (out.routing, out.further and out.further.routing)
    return sum((jnp.sum(r.overflow) for r in both if r is not None), jnp.zeros(()))


def _further_load(out: transformer.TrunkOutput) -> jax.Array | None:
    routing = out.further and out.further.routing
    return None if routing is None else routing.load_E


def supervised(
    trunk: Trunk,
    params: Any,
    variables: transformer.Variables,
    batch: packing.Batch,
    _: Any,
    tokens: jax.Array | None = None,
    *,
    mean: bool = False,
) -> tuple[jax.Array, LossAux]:
    """- sum of weighted log-probabilities of the assistant's tokens; with `mean` over the weights.

    The mean is the batch's own, for steps of one batch.
    """
    found, out = trunk.logprobs(params, variables, batch, 1.0, trunk.auxiliary.signals())
    weights_BT = jnp.asarray(batch.weights_BT)
    total = jnp.maximum(jnp.sum(weights_BT), 1.0) if mean else jnp.ones(())
    loss = -jnp.sum(jnp.where(weights_BT > 0, found.logprob_BT, 0.0) * weights_BT) / total
    beside, each = trunk.auxiliary_losses(out, params["unembed"], batch, tokens, total)
    zero = jnp.zeros(())
    real = jnp.sum(batch.segments_BT > 0).astype(jnp.float32)
    load = (_load(out), None, _overflow(out), _further_load(out))
    aux = LossAux(loss, real, zero, zero, *load, each)
    return loss + beside, aux


def policy_gradient(
    trunk: Trunk,
    config: grpo.GrpoConfig,
    temperature: float,
    params: Any,
    variables: transformer.Variables,
    batch: packing.Batch,
    anchors: grpo.Anchors | None,
    tokens: jax.Array | None = None,
) -> tuple[jax.Array, LossAux]:
    """GRPO on the answers plus the verifier head's cross-entropy (no gradient into the trunk).

    MTP learns to follow the policy and is kept from teaching it: its own layers alone are trained.
    """
    signals = trunk.auxiliary.signals(detached=True)
    found, out = trunk.logprobs(params, variables, batch, temperature, signals)
    loss, aux = grpo.grpo_loss(
        found.logprob_BT,
        found.entropy_BT,
        jnp.asarray(batch.old_logprobs_BT),
        anchors or grpo.Anchors(),
        jnp.asarray(batch.advantages_BT),
        jnp.asarray(batch.segments_BT),
        jnp.asarray(batch.weights_BT),
        config,
    )
    head_loss, head_weight = trunk.head_loss(params, out.hidden_BTD, batch)
    unembed_DV = jax.lax.stop_gradient(params["unembed"])
    beside, each = trunk.auxiliary_losses(out, unembed_DV, batch, tokens)
    real = jnp.sum(batch.segments_BT > 0).astype(jnp.float32)
    load = (_load(out), aux, _overflow(out), _further_load(out))
    measured = LossAux(loss, real, head_loss, head_weight, *load, each)
    return loss + head_loss + beside, measured


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
        self._abstract = transformer.unboxed(boxed)
        self._where = _state_shardings(boxed, optimizer, mesh)
        gradient = jax.value_and_grad(loss, has_aux=True)

        only_indexer = trunk.auxiliary.only_indexer

        def gradients(variables: Any, batch: Any, anchors: Any, tokens: Any) -> Any:
            (_, aux), grads = gradient(variables["params"], variables, batch, anchors, tokens)
            return _of_indexers(grads) if only_indexer else grads, aux

        def logprobs(variables: Any, batch: Any) -> jax.Array:
            return trunk.logprobs(variables["params"], variables, batch, temperature)[0].logprob_BT

        bias_rate = 0.0 if only_indexer else router_bias_rate
        update = functools.partial(_guarded_update, optimizer, bias_rate, only_indexer)
        self._counts_tokens = bool(trunk.auxiliary.balance or trunk.auxiliary.indexer)
        self._count = jax.jit(lambda batch: jnp.sum(batch.segments_BT > 0).astype(jnp.float32))
        # Gradients are summed where their parameters lie, and no chip holds all of one.
        lie = self._where.variables["params"]
        self._gradients = jax.jit(gradients, out_shardings=(lie, None))
        self._add = jax.jit(functools.partial(jax.tree.map, jnp.add))
        # The state comes back laid out as it came in, or the next step would compile anew.
        everywhere = sharding.replicated(mesh)
        self._update = jax.jit(update, donate_argnums=0, out_shardings=(self._where, everywhere))
        self._logprobs = jax.jit(logprobs)

    def programs(self, batch: packing.Batch) -> dict[str, tuple[Any, tuple[Any, ...]]]:
        """What a step runs, and what on: compiled functions by name, with abstract arguments.

        `batch` is of NumPy. `logprobs` is for a reference; where the loss has none it does not run.
        """
        state = TrainState(
            jax.ShapeDtypeStruct((), jnp.int32),
            self._abstract,
            jax.eval_shape(self._optimizer.init, self._abstract["params"]),
        )
        state = sharding.laid_out(state, self._where)
        batch = sharding.laid_out(batch, _batch_shardings(batch, self.mesh))
        scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.replicated(self.mesh))
        tokens = scalar if self._counts_tokens else None
        asked = (state.variables, batch, None, tokens)
        with jax.set_mesh(self.mesh):
            total = jax.eval_shape(self._gradients, *asked)
        gradients = sharding.laid_out(total[0], self._where.variables["params"])
        sums = jax.tree.map(lambda x: sharding.laid_out(x, scalar.sharding), total[1])
        return {
            "gradients": (self._gradients, asked),
            "update": (self._update, (state, (gradients, sums), scalar)),
            "logprobs": (self._logprobs, (state.variables, batch)),
        }

    def start(self, variables: transformer.Variables) -> TrainState:
        """Step 0 on copies of `variables`, laid out for the mesh, with a fresh optimizer."""
        where = self._where
        variables = jax.tree.map(jnp.copy, jax.device_put(variables, where.variables))
        with jax.set_mesh(self.mesh):
            init = jax.jit(self._optimizer.init, out_shardings=where.optimizer)
            optimizer = init(variables["params"])
        step = sharding.put(np.int32(0), where.step)
        return TrainState(step, variables, optimizer)

    def logprobs(self, variables: transformer.Variables, batch: packing.Batch) -> jax.Array:
        """log-probability [B, T] of every token of a batch (already `put`)."""
        with sharding.computing(self.mesh):
            return self._logprobs(variables, batch)

    def put(self, batch: packing.Batch) -> packing.Batch:
        """The batch on the devices, rows split over the batch axes of the mesh."""
        return put_batch(batch, self.mesh)

    def step(
        self,
        state: TrainState,
        batches: Sequence[packing.Batch],
        anchors: Sequence[grpo.Anchors | None],
        learning_rate: float,
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One update on micro-batches (already `put`). Metrics stay on the device.

        Where loss or gradient is not finite the state comes back as it was, `finite` 0.
        """
        total, tokens = None, None
        with sharding.computing(self.mesh):
            if self._counts_tokens:
                tokens = functools.reduce(self._add, map(self._count, batches))
            for batch, fixed in zip(batches, anchors, strict=True):
                found = self._gradients(state.variables, batch, fixed, tokens)
                total = found if total is None else self._add(total, found)
            rate = sharding.put(np.float32(learning_rate), sharding.replicated(self.mesh))
            return self._update(state, total, rate)


def put_batch(batch: packing.Batch, mesh: Mesh) -> packing.Batch:
    """Host arrays to the mesh: rows over the batch axes, everything else replicated."""
    return sharding.put(batch, _batch_shardings(batch, mesh))


def _batch_shardings(batch: packing.Batch, mesh: Mesh) -> packing.Batch:
    rows = sharding.batch_sharding(mesh)
    kept = NamedSharding(mesh, PartitionSpec(None, *rows.spec))
    return packing.Batch(
        *(
            None if array is None else kept if name == "kept_LBTA" else rows
            for name, array in batch._asdict().items()
        )
    )


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


def _stepped(biases: Any, load_LE: jax.Array | None, rate: float) -> Any:
    """The biases of one kind of layer after a step; as they were where the layers did not run."""
    if load_LE is None:
        return biases
    return jax.tree.map(lambda bias_LE: moe.updated_bias(bias_LE, load_LE, rate), biases)


def _of_indexers(tree: Any) -> Any:
    """The tree with zeros everywhere but in the parameters of indexers."""

    def kept(path: Any, leaf: jax.Array) -> jax.Array:
        names = {key.key for key in path}
        return leaf if "indexer" in names else jnp.zeros_like(leaf)

    return jax.tree_util.tree_map_with_path(kept, tree)


def _guarded_update(
    optimizer: optax.GradientTransformation,
    bias_rate: float,
    only_indexer: bool,
    state: TrainState,
    total: Any,
    learning_rate: jax.Array,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Optimizer step and router bias step, undone as a whole where something is not finite."""
    grads, aux = total
    params = state.variables["params"]
    norm = optax.tree.norm(grads)
    each = (aux.loss, aux.head_loss, *jax.tree.leaves(aux.auxiliary))
    finite = jnp.isfinite(jnp.stack([norm, *each])).all()
    # optax raises floats to integer counts, and the rate is wider than a bfloat16 parameter.
    with jax.numpy_dtype_promotion("standard"):
        directions, optimizer_state = optimizer.update(grads, state.optimizer, params)
        updates = jax.tree.map(lambda d: -learning_rate * d, directions)
        updates = _of_indexers(updates) if only_indexer else updates
        variables = {**state.variables, "params": optax.apply_updates(params, updates)}
    loads = {"sparse": aux.load_LE, "mtp": aux.further_load_ME}
    if "router" in variables:  # a model without sparse layers has none
        variables["router"] = {
            kind: _stepped(biases, loads[kind], bias_rate)
            for kind, biases in variables["router"].items()
        }
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
        "expert_overflow": aux.overflow,
        "head_loss": aux.head_loss / jnp.maximum(aux.head_weight, 1e-6),
    }
    if aux.auxiliary is not None:
        found = aux.auxiliary._asdict().items()
        metrics |= {f"{name}_loss": value for name, value in found if value is not None}
    if aux.policy is not None:
        scale = jnp.maximum(aux.policy.weight, 1e-12)
        metrics |= {
            "kl": aux.policy.kl / scale,
            "entropy": aux.policy.entropy / scale,
            "clipped": aux.policy.clipped / scale,
            "dropped": aux.policy.dropped / scale,
            "ratio": aux.policy.ratio / scale,
            "importance": aux.policy.importance / scale,
        }
    return kept.replace(step=state.step + 1), metrics
