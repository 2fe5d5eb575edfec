"""mathv2-train: run the recipe's stages in a workdir, or go on where they stopped.

mathv2-train --config=configs/quick.py --workdir=DIR [--config.field=value ...]

The same command goes on with a run. What may then change: runtime fields, the steps of the stage
that has begun, and every setting of stages that have not. SIGTERM and the first Ctrl-C save and
leave; the second Ctrl-C ends at once, and what came after the last checkpoint is done again.

Exit codes: 0 finished, 75 preempted after a save, 2 bad usage or input, 1 failure.
"""

import contextlib
import dataclasses
import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import flags, logging
from etils import epath

from mathv2_jax import leases, metrics, processes, records, roles, storage
from mathv2_jax.cli import config as config_lib
from mathv2_jax.cli import inputs, launch, machine, shell, table
from mathv2_jax.cli import overrides as overrides_lib
from mathv2_jax.cli import start as start_lib
from mathv2_jax.cli import workdir as workdir_lib
from mathv2_jax.evaluation import held_out
from mathv2_jax.model import transformer
from mathv2_jax.rl import learner
from mathv2_jax.stages import gate, iterate, probe, steps
from mathv2_jax.stages import run as run_lib
from mathv2_jax.world import judge as world_judge

LEASE_SECONDS = 600.0

_CONFIG = flags.DEFINE_string(
    "config", None, "The run's config file; --config.field=value overrides any of its fields."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives; the same one continues it.")
_RESTART = flags.DEFINE_string(
    "restart_stage",
    None,
    "Delete what this stage and those after it wrote, and run them anew, with any settings. Give "
    "it once: the same command again would restart again.",
)
_CACHE = flags.DEFINE_string(
    "compilation_cache",
    None,
    "Folder of compiled programs, shared by runs. Default: compilation_cache beside the workdir.",
)
_PROFILE = flags.DEFINE_string(
    "profile_steps",
    None,
    "a:b: write a trace of steps a to b, counted from 1, of every training stage into "
    "WORKDIR/profile/STAGE, for XProf or TensorBoard.",
)
_FLAGS = (_CONFIG, _WORKDIR, _RESTART, _CACHE, _PROFILE, *launch.FLAGS)


def main(argv: Sequence[str]) -> int:
    """Usage and input errors are one line and exit code 2; what is a bug keeps its traceback."""
    try:
        rest, overrides = overrides_lib.split(argv)
        if shell.asks_for_help(rest):
            print(__doc__)
            print("\n".join(f"--{f.name}: {flags.FLAGS[f.name].help}" for f in _FLAGS))
            return shell.FINISHED
        rest = flags.FLAGS(rest)
        config_file, workdir = _CONFIG.value, _WORKDIR.value
        if not config_file or not workdir or not workdir.strip():
            raise ValueError("--config=FILE and --workdir=DIR must be given, and not empty")
        if len(rest) > 1:
            raise ValueError(f"unexpected argument {rest[1]!r}: every setting is a --flag")
        config = config_lib.build(overrides_lib.load(config_file), overrides)
        if _PROFILE.value is not None:
            steps_to_trace = _steps_to_trace(_PROFILE.value)
            runtime = dataclasses.replace(config.runtime, profile_steps=steps_to_trace)
            config = dataclasses.replace(config, runtime=runtime)
        with launch.together("mathv2-train"):
            return train(config, shell.absolute(workdir), _CACHE.value, _RESTART.value)
    except processes.FirstFailedError as error:
        print(f"mathv2-train: process {processes.index()} stops: {error}", file=sys.stderr)
        return shell.FAILED
    except run_lib.Preempted:
        logging.warning("preempted; the same command goes on from here")
        return shell.PREEMPTED
    except (steps.NotFiniteError, probe.DriftError, gate.GateError) as error:
        print("\n".join([f"mathv2-train: {error}", *_notes(error)]), file=sys.stderr)
        return shell.FAILED
    except (ValueError, FileNotFoundError, flags.Error) as error:
        if not shell.is_of_input(error):
            raise
        print(f"mathv2-train: {error}", file=sys.stderr)
        return shell.BAD_INPUT


def _steps_to_trace(text: str) -> tuple[int, int]:
    """The steps of `a:b`; ValueError where it is something else."""
    first, colon, last = text.partition(":")
    if not colon or not first.isdigit() or not last.isdigit():
        raise ValueError(f"--profile_steps={text!r}: write the first and the last step, like 3:5")
    return int(first), int(last)


def _notes(error: BaseException) -> list[str]:
    return getattr(error, "__notes__", [])


def train(
    config: config_lib.RunConfig, workdir: epath.Path, cache: str | None, restart: str | None = None
) -> int:
    """One run from its config to its table."""
    cache_folder = cache or str(workdir.parent / "compilation_cache")
    jax.config.update("jax_compilation_cache_dir", cache_folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    mesh = machine.make_mesh(config.runtime.mesh, config.stages)
    with _asked_to_stop() as asked, _lease(workdir) as lease:

        def should_stop() -> bool:
            if lease is not None:
                lease.renew()
            return bool(asked)

        summary = processes.first(lambda: _begin(workdir, config, restart))
        _require_shared(workdir)
        if not processes.any_of(summary is not None):
            if processes.any_of(bool(asked)):
                raise run_lib.Preempted
            run = make_run(workdir, config, should_stop, mesh)
            figures = _run_stages(run, config.stages)
            summary = processes.first(lambda: _end(run, config, figures))
        if summary is not None:
            print(table.render(summary, *run_seconds(workdir, config.stages)))
    return shell.FINISHED


def _begin(
    workdir: epath.Path, config: config_lib.RunConfig, restart: str | None
) -> dict[str, Any] | None:
    """Readies the workdir, by the first process; the summary of a run that is finished."""
    if restart is not None:
        workdir_lib.restart(workdir, restart)
    workdir_lib.begin(workdir, config)
    summary = workdir_lib.finished(workdir, config)
    if summary is not None and compared(summary) == (config.before, config.after):
        print(f"this run is finished; nothing was changed. {workdir / 'summary.json'}:")
        return summary
    workdir_lib.write_config(workdir, config)
    workdir_lib.run_tokenizer(workdir, config)  # trained now, or before
    return None


def _require_shared(workdir: epath.Path) -> None:
    """ValueError in every process where not all of them see the run's folder: this run's lease."""
    path = workdir / "lease.json"
    seen = processes.exchange(storage.read_bytes(path) if storage.exists(path) else b"")
    same = [lease == seen[0] for lease in seen]
    if not all(same):
        raise ValueError(
            f"--workdir={workdir}: process {same.index(False)} does not find what process 0 wrote "
            "there; name a folder that all processes share, such as one in a bucket (gs://)"
        )


def _end(
    run: run_lib.Run, config: config_lib.RunConfig, figures: Mapping[str, Any]
) -> dict[str, Any]:
    """The summary, written down; by the first process."""
    summary = summarise(run, config, figures)
    body = json.dumps(summary, indent=1, sort_keys=True) + "\n"
    storage.write_whole(run.workdir / "summary.json", body.encode())
    return summary


def _run_stages(run: run_lib.Run, stages: Sequence[iterate.Stage]) -> dict[str, dict[str, float]]:
    """Every stage's figures; an error that a setting may mend says which, and how."""
    try:
        return iterate.run_all(run, stages)
    except (steps.NotFiniteError, probe.DriftError, gate.GateError) as error:
        stage = next(s for s in stages if not workdir_lib.is_done(run.workdir, s.name))
        error.add_note(ways_out(stage, stages))
        raise


def ways_out(stage: iterate.Stage, stages: Sequence[iterate.Stage]) -> str:
    """How a run may go on whose `stage` was refused or broke."""
    if not isinstance(stage, probe.ProbeStage):
        return (
            "The same command takes the step again. To change what the stage is made of, such as "
            f"its learning rate, give the new settings and --restart_stage={stage.name}, which "
            "runs it anew from its first step"
        )
    before = [s for s in stages if isinstance(s, probe.ProbeStage) and s.name == stage.predecessor]
    older = before[0].verifier if before else "OLDER"
    where = f"--config.stage.{stage.name}"
    return (
        "Ways to go on, each with the same command: train the verifier anew with other settings "
        f"(--restart_stage={stage.verifier} and the settings); stay with its predecessor "
        f"({where}.verifier={older}, and {older} for {stage.verifier} in the stages after); or "
        f"take it nevertheless ({where}.tolerance_se={2 * stage.tolerance_se:g})"
    )


def compared(summary: Mapping[str, Any]) -> tuple[str, str] | None:
    """The answer stages that a summary's table compares, both empty where it has none."""
    names = summary.get("compared")
    return None if names is None else (names["before"], names["after"])


@contextlib.contextmanager
def _lease(workdir: epath.Path) -> Iterator[leases.Lease | None]:
    """The right to write into `workdir`, which is made; ValueError where it cannot be.

    The first process has it, for all.
    """

    def acquire() -> leases.Lease:
        lease = leases.Lease(workdir / "lease.json", "mathv2-train", LEASE_SECONDS)
        try:
            _acquire(lease)
        except OSError as error:
            raise ValueError(
                f"--workdir={workdir}: nothing can be written there ({error}); name a folder, "
                "there or to be made, of yours"
            ) from error
        return lease

    lease = processes.first(acquire)
    try:
        yield lease
    finally:
        if lease is not None:
            lease.release()


def _acquire(lease: leases.Lease) -> None:
    """Takes the lease. Of several processes the first may have lost its host, and be on another:
    it waits as long as the lease of a process that it cannot ask for may last."""
    until = time.monotonic() + (LEASE_SECONDS if processes.count() > 1 else 0.0)
    while True:
        try:
            return lease.acquire()
        except leases.LeaseHeldError as error:
            if time.monotonic() >= until:
                raise
            logging.warning("%s; waiting for its end", error)
            time.sleep(15.0)


@contextlib.contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """The signals that have asked the run to stop. A second Ctrl-C ends the process at once."""
    asked: list[int] = []

    def ask(number: int, frame: object) -> None:
        asked.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.write(2, b"mathv2-train: saving, then leaving; Ctrl-C again ends at once, unsaved\n")

    # A run in the background of a script is to ignore Ctrl-C, as its shell has arranged.
    numbers = [n for n in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def make_run(
    workdir: epath.Path,
    config: config_lib.RunConfig,
    should_stop: Callable[[], bool],
    mesh: jax.sharding.Mesh | None = None,
) -> run_lib.Run:
    """Tokenizer, roles, model and engines of a run; on the config's mesh by default."""
    tokenizer = workdir_lib.run_tokenizer(workdir, config)
    model = config.model
    if not config.tokenizer.directory:  # a trained vocabulary may be smaller than asked for
        model = dataclasses.replace(model, vocab_size=tokenizer.vocab_size)
    kernels = machine.make_kernels(config.runtime, jax.default_backend(), config.model)
    mesh = mesh or machine.make_mesh(config.runtime.mesh, config.stages)
    run = run_lib.Run(
        workdir=workdir,
        seed=config.seed,
        trunk=learner.Trunk(config=model, kernels=kernels),
        tokenizer=tokenizer,
        roles=roles.make_roles(config.roles),
        mesh=mesh,
        engine_config=config.engine,
        runtime=config.runtime,
        router_bias_rate=config.router_bias_rate,
        should_stop=should_stop,
        ask_experts=inputs.world_experts(workdir, config.world, config.seed)
        if config.world is not None
        else None,
        start=start_lib.locate(config.start) if config.start else None,
        share_of_peak=functools.partial(
            machine.share_of_peak, model, mesh.devices.flat[0].device_kind, mesh.size
        ),
    )
    size = transformer.num_parameters(
        transformer.boxed_abstract(run.trunk.config, run.trunk.kernels)
    )
    print(f"model: {size:,} parameters, vocabulary of {model.vocab_size}", flush=True)
    return run


def summarise(
    run: run_lib.Run, config: config_lib.RunConfig, figures: Mapping[str, Any]
) -> dict[str, Any]:
    """The final table as data, free of the clock. Only here does the judge meet the records."""
    measured: dict[str, Any] | None = None
    constants: dict[str, Any] = {}
    labels: dict[str, Any] = {}
    if config.world is not None and config.before:
        judge = world_judge.ExactJudge()
        before, after = run.samples(config.before), run.samples(config.after)
        sides = held_out.measure(before, judge), held_out.measure(after, judge)
        measured, constants = held_out.compare(*sides), held_out.constants(*sides)
        labels = {
            stage.name: held_out.labels_given(run.stage_records(stage.name, records.Proof), judge)
            for stage in config.stages
            if iterate.LABELLED in iterate.leaves(stage)
        }
    return {
        "schema": config_lib.SCHEMA,
        "seed": config.seed,
        "compared": {"before": config.before, "after": config.after},
        "metrics": measured,
        "constants": constants,
        "labels": labels,
        "stages": dict(figures),
    }


def run_seconds(
    workdir: epath.Path, stages: Sequence[iterate.Stage]
) -> tuple[Mapping[str, float], float]:
    """Seconds by stage, and how many of them all went into compiling, from timing.json."""
    sections = metrics.read_timing(workdir)
    places = {"input": "input", **{s.name: f"stage/{s.name}" for s in stages}}
    found = {name: sections[place] for name, place in places.items() if place in sections}
    compiling = sum(values.get("compile_seconds", 0.0) for values in found.values())
    return {name: values["seconds"] for name, values in found.items()}, compiling


def run() -> None:
    """The console script."""
    launch.run(main)


if __name__ == "__main__":
    run()
