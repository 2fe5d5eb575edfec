"""What all training loops share: resume, metrics, records, checkpoints, stop."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from mathv2_jax import metrics, processes, records, storage
from mathv2_jax.data import packing
from mathv2_jax.rl import learner as learner_lib
from mathv2_jax.rl import placement
from mathv2_jax.stages import run as run_lib


class NotFiniteError(FloatingPointError):
    """A loss or gradient was not finite; the state is the last good one, the batch is on disk."""


INPUT_SECONDS = f"{metrics.TIME_PREFIX}input_seconds"
# Step, moment of its dispatch, seconds it waited for data, measured, scalars, batches.
_Pending = tuple[
    int,
    float,
    float | None,
    Mapping[str, Any],
    Mapping[str, float],
    Sequence[packing.Batch],
]


def report_left_out(stage: str, left_out: int, total: int, limit: str) -> None:
    """Say how much a `limit`, told in words, costs; ValueError where nothing is left."""
    if not total:
        raise ValueError(f"stage {stage}: there is nothing to learn from, its source is empty")
    if left_out == total:
        raise ValueError(f"stage {stage}: none of {total} items fits {limit}: raise that")
    if left_out:
        logging.warning(
            "%s: %d of %d items do not fit %s, and are left out",
            stage,
            left_out,
            total,
            limit,
        )


class Loop:
    """One stage's training state from its newest checkpoint to its end. A context manager.

    Per step the stage calls `advance` with what the learner returned; the step's metrics are read
    only when the next step has been dispatched.
    """

    def __init__(
        self,
        run: run_lib.Run,
        name: str,
        num_steps: int,
        learner: learner_lib.Learner,
        init: str,
    ):
        self.run, self.name, self.num_steps, self.learner = run, name, num_steps, learner
        initial = run.variables(init)
        self.state = learner.start(initial)
        del initial
        self._where: Callable[[], Mapping[str, Any]] = dict
        self.first_step = 0
        self._checkpoints = run.checkpoints(name)
        found = None
        if self._checkpoints.latest_step() is not None:
            shapes = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.state
            )
            del self.state  # there need not be room for two
            found = self._checkpoints.restore(shapes)
        if found is not None:
            self.state, saved, self.first_step = found
            self._where = lambda: saved
            if self.first_step > num_steps:
                raise ValueError(
                    f"stage {name} has taken {self.first_step} steps and is now to have "
                    f"{num_steps}: give it at least as many, or --restart_stage={name}"
                )
            print(f"{name}: goes on at step {self.first_step} of {num_steps}", flush=True)
        self._step, self._overflowed = self.first_step, False
        self._tracing = False
        self._parts = run.parts(name)
        self._parts.discard_after(self.first_step)
        self._writer = metrics.make_writer(
            run.workdir,
            name,
            total_steps=num_steps,
            resume_from=self.first_step,
            config=run.runtime.metrics,
            writes=processes.is_first(),
        )
        processes.meet()  # the others read what it went back to
        self._pending: _Pending | None = None
        self._before: float | None = None  # the moment of the step before, in this session
        self._last = self._figures_of(self.first_step)

    @property
    def position(self) -> Mapping[str, Any]:
        """Where the stage stands in its data; of several processes all ask together."""
        return self._where()

    @property
    def saved_step(self) -> int:
        """The step of the newest checkpoint, which may still be on its way to the disk."""
        return self._checkpoints.latest_step() or 0

    def __enter__(self) -> "Loop":
        return self

    def __exit__(self, *unused: object) -> None:
        self._stop_trace()
        self._writer.close()
        self._checkpoints.close()

    def remaining(self) -> Iterator[int]:
        """The steps still to take, counted from 0; stops early where the run is asked to."""
        if self._step < self.num_steps:
            print(f"{self.name}: first step, compiling its programs or loading them", flush=True)
        while self._step < self.num_steps:
            self.run.check_stop(self._save)
            self._trace()
            yield self._step
        self._stop_trace()

    def _trace(self) -> None:
        """Starts or ends the trace that was asked for, before a step."""
        first, last = self.run.runtime.profile_steps or (0, 0)
        if self._step == last:
            self._stop_trace()
        if self._step + 1 == first:
            folder = self.run.workdir / "profile" / self.name
            folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(os.fspath(folder))
            self._tracing = True

    def _stop_trace(self) -> None:
        if self._tracing:
            self._tracing = False
            jax.block_until_ready(self.state)  # what was dispatched is to be in it
            jax.profiler.stop_trace()
            print(f"{self.name}: trace in {self.run.workdir / 'profile' / self.name}", flush=True)

    def advance(
        self,
        state: learner_lib.TrainState,
        measured: Mapping[str, jax.Array],
        batches: Sequence[packing.Batch],
        position: Callable[[], Mapping[str, Any]],
        scalars: Mapping[str, float],
        written: Sequence[records.Sample],
        waited: float | None = None,
    ) -> None:
        """Take over a step's outcome; `batches` are kept for inspection until it proves finite.

        `position` says, when a checkpoint is written, where the next step's data begin; the step
        has `waited` so many seconds for its own.
        """
        moment = time.monotonic()  # of the dispatch: metrics are read sooner or later
        self._read_pending()
        self._step += 1
        self.state, self._where = state, position
        self._pending = (self._step, moment, waited, measured, scalars, batches)
        if written:
            name = storage.part_name(self._step, processes.index())
            self._parts.write_part(name, records.to_lines(written))
        if self._step % self.run.runtime.save_every == 0 and self._step < self.num_steps:
            self._save()

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        """The optimizer's moments are on the hosts for the block, where they are placed there."""
        if self.run.runtime.placement.optimizer == placement.RESIDENT:
            yield
            return
        optimizer = placement.to_host(self.state.optimizer)
        self.state = dataclasses.replace(self.state, optimizer=None)
        yield
        optimizer = placement.to_devices(optimizer)
        self.state = dataclasses.replace(self.state, optimizer=optimizer)

    def finish(self) -> dict[str, float]:
        """Leave the variables to later stages; the last step's metrics.

        A run killed anywhere before the stage's report is written gets the same ones again.
        """
        self._save()
        self._checkpoints.wait()  # Orbax tells saves that go on at once apart by their steps only
        self.run.keep_variables(self.name, self.state.variables, self._step)
        self._writer.finish()
        return self._last

    def _save(self) -> None:
        self._read_pending()
        self._writer.flush()
        self.run.commit(self._parts, self._step)
        if self._checkpoints.latest_step() != self._step:
            self._checkpoints.save(self._step, self.state, dict(self.position))

    def _figures_of(self, step: int) -> dict[str, float]:
        """What a step measured, from its committed row; nothing of step 0."""
        rows = [row for row in metrics.read(self.run.workdir, self.name) if row["step"] == step]
        return {n: v for row in rows for n, v in row.items() if n not in ("stage", "step")}

    def _read_pending(self) -> None:
        if self._pending is None:
            return
        step, moment, waited, measured, scalars, batches = self._pending
        self._pending = None
        values = {name: float(x) for name, x in jax.device_get(dict(measured)).items()}
        if not values.pop("finite"):
            folder = self.run.workdir / "inspect" / f"{self.name}-{step:06d}"
            processes.first(lambda: write_batches(folder, batches))
            raise NotFiniteError(
                f"{self.name}, step {step}: loss {values['loss']}, gradient norm "
                f"{values['gradient_norm']} are not finite. The state before this step is kept; "
                f"its batch is in {folder}"
            )
        if values.get("expert_overflow", 0.0) and not self._overflowed:
            self._overflowed = True
            logging.warning(
                "%s, step %d: %d assignments of tokens to experts found no room on the experts' "
                "device and were left out (expert_overflow in the metrics; said once a stage): "
                "runtime.expert_buffer = %s, None has room for all",
                *(self.name, step, values["expert_overflow"], self.run.runtime.expert_buffer),
            )
        self._last = {**values, **scalars}
        times = self._figures_of_time(moment, batches)
        if waited is not None:
            times[INPUT_SECONDS] = waited
        self._writer.write(step, self._last | times, at=moment)
        self._before = moment

    def _figures_of_time(self, moment: float, batches: Sequence[packing.Batch]) -> dict[str, float]:
        """What depends on the machine.

        A step's seconds, from dispatch to dispatch; the share of the devices' peak that its
        training takes, where that is known; the most memory that a device here has had in use.
        """
        found = {}
        if self._before is not None:
            seconds = found[f"{metrics.TIME_PREFIX}step_seconds"] = moment - self._before
            rows, length = batches[0].tokens_BT.shape
            share = self.run.share_of_peak(rows * len(batches), length, seconds)
            if share is not None:
                found[metrics.MFU] = share
        seen = [device.memory_stats() or {} for device in jax.local_devices()]
        peaks = [stats["peak_bytes_in_use"] for stats in seen if "peak_bytes_in_use" in stats]
        if peaks:
            found[metrics.MEMORY_GIB] = max(peaks) / 2**30
        return found


def write_batches(folder: Any, batches: Sequence[packing.Batch]) -> None:
    """The micro-batches of a step as .npy files, one an array."""
    for number, batch in enumerate(batches):
        for name, value in batch._asdict().items():
            if value is not None:
                path = folder / f"{number}-{name}.npy"
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as file:
                    np.save(file, np.asarray(value))
