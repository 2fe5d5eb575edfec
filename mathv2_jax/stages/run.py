"""What every stage is given: the run's fixed parts, its engines and learners, its folders."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
from absl import logging
from etils import epath
from jax.sharding import Mesh

from mathv2_jax import checkpoint, processes, records, roles, sharding, storage
from mathv2_jax import metrics as metrics_lib
from mathv2_jax.data import sources, table
from mathv2_jax.hf import folder
from mathv2_jax.model import transformer
from mathv2_jax.model.config import ModelConfig
from mathv2_jax.rl import learner as learner_lib
from mathv2_jax.rl import placement as placement_lib
from mathv2_jax.rollout import decode, engine, replicas, schedule
from mathv2_jax.stages import groups
from mathv2_jax.text import tokenizer as tokenizer_lib

WROTE = "record_parts"  # the figure of a finished stage that counts its parts of records
T = TypeVar("T")
FRESH = "fresh"  # the name of the parameters that a run starts from


class Preempted(Exception):
    """The run was asked to stop; everything up to here is saved."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """How a run is carried out, never what it computes."""

    save_every: int = 50
    keep_checkpoints: int = 2
    metrics: metrics_lib.MetricsConfig = dataclasses.field(
        default_factory=metrics_lib.MetricsConfig
    )
    mesh: sharding.MeshConfig = dataclasses.field(default_factory=sharding.MeshConfig)
    sampling: sharding.SamplingConfig | None = None  # None: the whole mesh is one replica
    placement: placement_lib.PlacementConfig = dataclasses.field(
        default_factory=placement_lib.PlacementConfig
    )
    # The experts' product: sorted_blocks, ragged, megablox, every_expert, or by the platform.
    model_kernels: str = "auto"
    # Of whole rows: dense, blocks, gathered (of what an indexer picks), or by the row's length.
    attention: str = "auto"
    # What a device has room for of the rows that others send to its experts, in units of an even
    # load; more is left out, and counted in the metric expert_overflow. None: room for all.
    expert_buffer: float | None = None
    profile_steps: tuple[int, ...] = ()  # (a, b): steps a to b of every training stage are traced
    data_workers: int = 0  # processes beside each of the run's that tokenise and pack
    # Seconds between two writes of the finished responses of a training step that has not ended.
    responses_every: float = 30.0
    lost_alarm: float = 0.05  # shares of votes or answers beyond which a stage warns
    failed_alarm: float = 0.25

    def __post_init__(self):
        for name in ("lost_alarm", "failed_alarm"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"runtime.{name} = {getattr(self, name)}: must lie in 0..1")
        if not self.responses_every >= 0.0:
            raise ValueError(
                f"runtime.responses_every = {self.responses_every}: seconds, not negative"
            )
        if self.data_workers < 0:
            raise ValueError(f"runtime.data_workers = {self.data_workers}: must not be negative")
        if self.save_every < 1:
            raise ValueError(f"runtime.save_every = {self.save_every}: must be at least 1")
        asked = self.profile_steps
        if asked and not (len(asked) == 2 and 1 <= asked[0] <= asked[1]):
            raise ValueError(
                f"runtime.profile_steps = {asked}: must be the first and the last step, from 1 on"
            )


@dataclasses.dataclass(kw_only=True)
class Run:
    """The context of a run. Stages take it and their own config, and see only files beside it.

    The fresh variables are drawn, or those of the imported model `start`.
    """

    workdir: epath.Path
    seed: int
    trunk: learner_lib.Trunk
    tokenizer: tokenizer_lib.Tokenizer
    roles: roles.Roles
    mesh: Mesh
    engine_config: schedule.EngineConfig
    runtime: RuntimeConfig
    router_bias_rate: float
    should_stop: Callable[[], bool] = lambda: False
    ask_experts: Callable[[str], None] | None = None  # writes the file that such a stage waits for
    start: folder.Trained | None = None
    # The share of the devices' peak at which rows of a length are trained on in some seconds, None
    # where the peak is not known.
    share_of_peak: Callable[[int, int, float], float | None] = lambda *_: None

    def __post_init__(self):
        dtype = self.engine_config.param_dtype or self.trunk.config.param_dtype
        model = dataclasses.replace(self.trunk.config, param_dtype=dtype)
        programs = decode.Programs(model, self.trunk.kernels)
        self._learners: dict[Any, learner_lib.Learner] = {}
        sampling = sharding.make_sampling_mesh(self.runtime.sampling, self.mesh)

        def make_engine(mesh: Mesh) -> engine.Engine:
            think = self.roles.verifier.think
            return engine.Engine(programs, self.tokenizer, self.engine_config, mesh, think=think)

        self.policy, self.judge = (replicas.Replicas(sampling, make_engine) for _ in range(2))

    def learner(self, key: Any, make: Callable[[], learner_lib.Learner]) -> learner_lib.Learner:
        """The learner for `key` (its hashable settings): made once, so compiled once."""
        if key not in self._learners:
            self._learners[key] = make()
        return self._learners[key]

    def each(self, total: int, work: Callable[[int, range], Sequence[T]]) -> dict[int, T]:
        """What becomes of each of 0 .. total - 1, by its place, where this process speaks for it.

        `work(replica, places)` does a share of them, in order, on that replica's engines.
        """
        found: dict[int, T] = {}
        for replica in self.policy.engines:
            places = self.policy.share(replica, total)
            made = work(replica, places) if places else []
            if replica in self.policy.led:
                found.update(zip(places, made, strict=True))
        return found

    def gather(self, own: Mapping[int, T]) -> list[T]:
        """What `each` gave to every process, in the order of its places."""
        every: dict[int, T] = {}
        for found in processes.exchange(dict(own)):
            every |= found
        return [every[place] for place in sorted(every)]

    def seed_for(self, *parts: object) -> int:
        """A seed for a purpose of this run."""
        return roles.seed_for(self.seed, *parts)

    def parts(self, stage: str) -> storage.Parts:
        """The stage's records."""
        folder = self.workdir / "records" / stage
        return storage.Parts(folder, keeper=processes.is_first())

    def commit(self, parts: storage.Parts, step: int) -> None:
        """The parts that any process wrote count, up to `step`; all processes call it."""
        for written in processes.exchange(parts.pending):
            parts.adopt(written)
        parts.commit(step)
        processes.meet()  # the next may read the manifest

    def input(self, name: str, kind: type[sources.T]) -> table.Table[sources.T]:
        """Records that the run was given: before its first stage, or by experts, in between."""
        read = functools.partial(records.from_json, kind)
        return table.Table.of_file(self.input_path(name), read)

    def input_path(self, name: str) -> epath.Path:
        """Where the file of `input` stands."""
        return self.workdir / "records" / "input" / f"{name}.jsonl"

    def samples(self, stage: str) -> list[records.Sample]:
        """Every sample that a finished stage wrote, in the order of a run of one process."""
        found = self.stage_records(stage, records.Sample)
        names = self.parts(stage).names()
        return groups.in_order(found) if any(map(storage.is_shared, names)) else found

    def stage_records(self, stage: str, kind: type[sources.T]) -> list[sources.T]:
        """The records of one kind among those that a stage wrote.

        ValueError where it has finished and parts of them do not count any more.
        """
        parts, report = self.parts(stage), self.report(stage) or {}
        wrote = report.get(WROTE, len(parts.names()))
        if len(parts.names()) != wrote:
            raise ValueError(
                f"{self.workdir / 'records' / stage} holds {len(parts.names())} of the {wrote:.0f} "
                "parts that the stage wrote: restore its files, manifest-*.json among them, or "
                f"--restart_stage={stage} runs it and what follows anew"
            )
        mark = f'"kind": "{kind.__name__}"'
        lines = [line for line in parts.read() if mark in line]
        return sources.parse_lines(lines, kind, f"records/{stage}")

    def report_path(self, stage: str) -> epath.Path:
        """Where a finished stage's figures stand; the file is a stage's last act."""
        return self.workdir / "records" / stage / "stage.json"

    def report(self, stage: str) -> dict[str, float] | None:
        """A finished stage's figures, None where it is not finished; ValueError where damaged."""
        if not storage.exists(self.report_path(stage)):
            return None
        way_out = f"--restart_stage={stage} runs it and what follows anew"
        return sources.read_object(self.report_path(stage), (), way_out)

    def checkpoints(self, stage: str) -> checkpoint.Checkpoints:
        """The train states of a stage in progress."""
        return checkpoint.Checkpoints(
            self.workdir / "checkpoints" / stage / "steps", keep=self.runtime.keep_checkpoints
        )

    def variables(self, stage: str) -> transformer.Variables:
        """The variables that a finished stage left, or the fresh ones."""
        if stage == FRESH and self.start is not None:
            return self._imported(self.start)
        abstract = self._abstract(self.trunk.config)
        if stage == FRESH:
            shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
            init = functools.partial(
                transformer.init, self.trunk.config, kernels=self.trunk.kernels
            )
            key = jax.random.key(self.seed_for("init") % 2**32)
            return jax.jit(init, out_shardings=shardings)(key)
        folder, complaint = self._final(stage), "it holds none"
        try:
            with checkpoint.Checkpoints(folder, keep=1) as saved:
                found = saved.restore(abstract)
        except ValueError as error:
            found, complaint = None, str(error)
        if found is None:
            raise ValueError(
                f"the variables that stage {stage!r} left in {folder} cannot be had: {complaint}. "
                f"Delete that folder and {self.report_path(stage)}: the same command then takes "
                "them from the stage's own checkpoints, or runs it again where there are none"
            )
        return found[0]

    def _abstract(self, config: ModelConfig) -> transformer.Variables:
        """Shapes, dtypes and shardings of a model's variables on the run's mesh."""
        boxed = transformer.boxed_abstract(config, self.trunk.kernels)
        return jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            transformer.unboxed(boxed),
            sharding.shardings_for(boxed, self.mesh),
        )

    def _imported(self, start: folder.Trained) -> transformer.Variables:
        """Those of `start`, read shard by shard, in the run's dtypes."""
        wanted = self._abstract(self.trunk.config)
        dtype = start.config.param_dtype
        stored = self._abstract(dataclasses.replace(self.trunk.config, param_dtype=dtype))
        with checkpoint.Checkpoints(start.checkpoints) as saved:
            found = saved.restore(stored, start.steps[0])
        assert found is not None, f"{start.checkpoints} had step {start.steps[0]}"
        leaves, structure = jax.tree.flatten(found[0])
        del found  # so that each leaf gives way to its cast
        for place, leaf in enumerate(jax.tree.leaves(wanted)):
            leaves[place] = leaves[place].astype(leaf.dtype)
        return jax.tree.unflatten(structure, leaves)

    def keep_variables(self, stage: str, variables: transformer.Variables, step: int) -> None:
        """Leave a stage's result for later stages; returns when it is on disk."""
        with checkpoint.Checkpoints(self._final(stage), keep=1) as saved:
            saved.save(step, variables, {"stage": stage})

    def _final(self, stage: str) -> epath.Path:
        return self.workdir / "checkpoints" / stage / "final"

    def check_stop(self, save: Callable[[], None]) -> None:
        """Saves and raises Preempted where a process of the run was asked to stop."""
        if processes.any_of(self.should_stop()):
            logging.warning("asked to stop: saving, then leaving")
            save()
            raise Preempted
