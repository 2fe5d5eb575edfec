"""The programs of an RL step, as a run would compile them, with abstract arguments on any mesh."""

import contextlib
import dataclasses
import functools
import math
import statistics
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mathv2_jax import sharding
from mathv2_jax.data import packing
from mathv2_jax.model import cache, paged, transformer
from mathv2_jax.model.config import ModelConfig
from mathv2_jax.pods import counting
from mathv2_jax.rl import auxiliary as auxiliary_lib
from mathv2_jax.rl import learner, optimizer
from mathv2_jax.rollout import decode, sampling, schedule, worker
from mathv2_jax.stages import rl, updates


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A compiled function and what it is called on; `sequences` of `length` tokens pass through.

    `loops` are the lengths of those that its trace does not tell; it reads its arguments in each
    turn. `each` are the calls that it consists of, where they are several.
    """

    name: str
    mesh: Mesh
    function: Any
    arguments: tuple[Any, ...]
    settings: dict[str, Any]
    sequences: int
    length: int
    past: int = 0  # tokens that are in pages already
    longest: int | None = None  # tokens that pages have room for
    loops: counting.Loops = counting.Loops()
    each: tuple["Program", ...] = ()

    @property
    def turns(self) -> int:
        """How often it reads its arguments."""
        return self.loops.turns or 1

    def argument_bytes(self, *places: int) -> int:
        """A chip's share of the arguments, or of those at `places`."""
        some = [self.arguments[at] for at in places] if places else self.arguments
        return sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(some)
        )

    def model_flops(
        self, model: ModelConfig, auxiliary: auxiliary_lib.AuxiliaryConfig
    ) -> counting.Terms:
        """Of one call, on all chips."""
        if self.name in ("update", "hand_over"):
            return counting.model_flops(model, 0, 1)
        trained = self.name == "gradients"
        found = counting.model_flops(
            model,
            self.sequences,
            self.length,
            past=self.past,
            longest=self.longest,
            mtp=trained and auxiliary.mtp > 0,
        )
        if self.name == "prefill":
            return dataclasses.replace(found, unembedding=0.0)
        return found.trained(aligned=auxiliary.indexer > 0) if trained else found

    def trace(self) -> Any:
        """Traced on its mesh: `.jaxpr` and `.lower()`."""
        # What crosses from one mesh to another is of none.
        with contextlib.nullcontext() if self.name == "hand_over" else jax.set_mesh(self.mesh):
            return self.function.trace(*self.arguments, **self.settings)


def of_rl_step(
    model: ModelConfig,
    kernels: transformer.Kernels,
    config: rl.RlConfig,
    engine_config: schedule.EngineConfig,
    mesh: Mesh,
    sampling: sharding.SamplingConfig | None = None,
) -> dict[str, Program]:
    """Gradients, update and log-probabilities of the learner; prefill and decode of an engine; the
    hand-over of parameters to the engines, where they have a layout or dtype of their own. What the
    learner replays of a rollout is an argument of its programs, and recorded by the engine's.

    Sequences of the engine are taken to be half as long as its context allows.
    """
    spread = sharding.make_sampling_mesh(sampling, mesh)
    own = mesh if sampling is None else sharding.replica_mesh(spread, 0)
    dtype = engine_config.param_dtype or model.param_dtype
    sampled = dataclasses.replace(model, param_dtype=dtype)
    replay = updates.replay_of(config, model, engine_config)
    found = _of_learner(model, kernels, config, mesh, replay)
    if sampling is not None or sampled != model:
        taken = found["logprobs"].arguments[0]
        found["hand_over"] = _hand_over(taken, sampled, kernels, mesh, spread)
    return found | _of_engine(sampled, kernels, engine_config, own, replay)


def _hand_over(
    variables: Any, sampled: ModelConfig, kernels: transformer.Kernels, mesh: Mesh, spread: Mesh
) -> Program:
    """What Replicas.hand_over does, one array after the other."""
    boxed = transformer.boxed_abstract(sampled, kernels)

    def one(arguments: Any, function: Any, each: tuple[Program, ...] = ()) -> Program:
        return Program(
            name="hand_over",
            mesh=mesh,
            function=function,
            arguments=(arguments,),
            settings={},
            sequences=0,
            length=0,
            each=each,
        )

    leaves = jax.tree.map(
        lambda x, y, at: one(x, jax.jit(lambda x: x.astype(y.dtype), out_shardings=at)),
        variables,
        transformer.unboxed(boxed),
        sharding.shardings_for(boxed, spread),
    )
    return one(variables, None, tuple(p for p in jax.tree.leaves(leaves) if p.argument_bytes()))


def _of_learner(
    model: ModelConfig,
    kernels: transformer.Kernels,
    config: rl.RlConfig,
    mesh: Mesh,
    replay: packing.Replay,
) -> dict[str, Program]:
    trunk = learner.Trunk(config=model, kernels=kernels, auxiliary=config.auxiliary)
    made = learner.Learner(
        trunk,
        functools.partial(learner.policy_gradient, trunk, config.grpo, 1.0),
        optimizer.make_optimizer(config.optimizer),
        mesh,
        router_bias_rate=1e-3,
    )
    found = made.programs(packing.empty_batch(config.rows, config.row_length, replay))
    return {
        name: Program(
            name=name,
            mesh=mesh,
            function=function,
            arguments=arguments,
            settings={},
            sequences=config.rows,
            length=0 if name == "update" else config.row_length,
        )
        for name, (function, arguments) in found.items()
    }


def _of_engine(
    model: ModelConfig,
    kernels: transformer.Kernels,
    config: schedule.EngineConfig,
    mesh: Mesh,
    replay: packing.Replay,
) -> dict[str, Program]:
    programs = decode.Programs(model, kernels)
    sizes = worker.sizes_on(mesh, config)
    rows, everywhere = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    own = worker.pages_sharding(mesh)

    def array(dtype: Any, *shape: int, lies: Any = rows) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=lies)

    ints, floats = functools.partial(array, jnp.int32), functools.partial(array, jnp.float32)
    boxed = transformer.boxed_abstract(model, kernels)
    where = sharding.shardings_for(boxed, mesh)
    variables = sharding.laid_out(transformer.unboxed(boxed), where)
    number = sizes.parts * (sizes.pages_a_part + 1)
    pages = jax.eval_shape(lambda: transformer.empty_cache(model, number, config.page))
    pages = jax.tree.map(lambda x: array(x.dtype, *x.shape, lies=own), pages)
    pieces, length, taps = sizes.chunks, config.chunk, model.embedding_taps
    chunks = decode.Chunks(
        tokens_RT=ints(pieces, length),
        positions_RT=ints(pieces, length),
        previous_RTW=ints(pieces, length, taps),
        view=cache.PageView(
            ints(pieces, config.pages_a_row), ints(pieces, length), ints(pieces), ints(pieces)
        ),
    )
    b, past, recorded = sizes.rows, config.context // 2, replay.routing is not None
    span = config.page * paged.pages_together(kernels.slots, config.page, config.pages_a_row)

    def blocks(longest: int) -> int:
        return -(-longest // span)

    answers = decode.Rows(
        token_B=ints(b),
        previous_BW=ints(b, taps),
        position_B=ints(b),
        drawn_B=ints(b),
        limit_B=ints(b),
        stops_BX=ints(b, config.most_stops),
        keys_B2=array(jnp.uint32, b, 2),
        temperature_B=floats(b),
        truncation=sampling.Truncation(floats(b), ints(b), floats(b)),
        table_BM=ints(b, config.pages_a_row),
        shared_B=ints(b),
        padded_B=ints(b),
    )
    return {
        "prefill": Program(
            name="prefill",
            mesh=mesh,
            function=programs.prefill,
            arguments=(variables, pages, chunks),
            settings=dict(experts=recorded),
            sequences=pieces,
            length=length,
            past=past,
            longest=config.context,
            loops=counting.Loops(blocks=blocks(past + length)),
        ),
        "decode": Program(
            name="decode",
            mesh=mesh,
            function=programs.decode,
            arguments=(variables, pages, answers, array(jnp.int32, lies=everywhere)),
            settings=dict(
                steps=config.steps,
                truncate=replay.allowed > 0,
                experts=recorded,
                most_kept=replay.allowed,
            ),
            sequences=b,
            length=config.steps,
            past=past,
            longest=config.context,
            loops=counting.Loops(
                config.steps,
                statistics.mean(blocks(past + step) for step in range(1, config.steps + 1)),
            ),
        ),
    }
