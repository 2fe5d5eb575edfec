"""mathv2-train: run the recipe's stages in a workdir, or go on where they stopped.

mathv2-train --config=configs/quick.py --workdir=DIR [--config.field=value ...]

Exit codes: 0 finished, 75 preempted after a save, 2 bad usage or input, 1 failure.
"""

import dataclasses
import functools
import json
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from absl import app, flags, logging
from etils import epath

from mathv2_jax import evaluation, metrics, roles, sharding, storage
from mathv2_jax.cli import config as config_lib
from mathv2_jax.cli import inputs, shell, table
from mathv2_jax.cli import overrides as overrides_lib
from mathv2_jax.model import transformer
from mathv2_jax.rl import learner
from mathv2_jax.stages import iterate, probe, steps
from mathv2_jax.stages import run as run_lib
from mathv2_jax.text import tokenizer as tokenizer_lib
from mathv2_jax.world import judge as world_judge

LEASE_SECONDS = 600.0

_CONFIG = flags.DEFINE_string(
    "config", None, "The run's config file; --config.field=value overrides any of its fields."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives; the same one continues it.")
_CACHE = flags.DEFINE_string(
    "compilation_cache",
    None,
    "Folder of compiled programs, shared by runs. Default: compilation_cache beside the workdir.",
)


def main(argv: Sequence[str]) -> int:
    """Usage and input errors are one line and exit code 2; what is a bug keeps its traceback."""
    try:
        app.define_help_flags()
        rest, overrides = overrides_lib.split(argv)
        flags.FLAGS(rest)
        config_file, workdir = _CONFIG.value, _WORKDIR.value
        if config_file is None or workdir is None:
            raise ValueError("--config=FILE and --workdir=DIR must be given")
        if len(rest) > 1 and not rest[-1].startswith("-"):
            raise ValueError(f"unexpected argument {rest[-1]!r}: every setting is a --flag")
        config = config_lib.build(overrides_lib.load(config_file), overrides)
        return train(config, shell.absolute(workdir), _CACHE.value)
    except run_lib.Preempted:
        logging.warning("preempted; the same command goes on from here")
        return shell.PREEMPTED
    except (steps.NotFiniteError, probe.DriftError) as error:
        print(f"mathv2-train: {error}", file=sys.stderr)
        return shell.FAILED
    except (ValueError, FileNotFoundError, flags.Error) as error:
        if not shell.is_of_input(error):
            raise
        print(f"mathv2-train: {error}", file=sys.stderr)
        return shell.BAD_INPUT


def train(config: config_lib.RunConfig, workdir: epath.Path, cache: str | None) -> int:
    """One run from its config to its table."""
    cache_folder = cache or str(workdir.parent / "compilation_cache")
    jax.config.update("jax_compilation_cache_dir", cache_folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    with storage.Lease(workdir / "lease.json", "mathv2-train", LEASE_SECONDS) as lease:
        begin(workdir, config)
        run = make_run(workdir, config, _stop_on_sigterm(lease))
        if storage.exists(workdir / "summary.json"):
            summary = json.loads(storage.read_bytes(workdir / "summary.json"))
            if set(summary["stages"]) == {s.name for s in config.stages}:
                print(f"this run is finished; nothing was changed. {workdir / 'summary.json'}:")
                print(table.render(summary, *run_seconds(workdir, config.stages)))
                return shell.FINISHED
        figures = iterate.run_all(run, config.stages)
        summary = summarise(run, config, figures)
        body = json.dumps(summary, indent=1, sort_keys=True) + "\n"
        storage.write_whole(workdir / "summary.json", body.encode())
        print(table.render(summary, *run_seconds(workdir, config.stages)))
    return shell.FINISHED


def begin(workdir: epath.Path, config: config_lib.RunConfig) -> None:
    """Write config and input files of a new run, or check that this one may go on."""
    path = workdir / "config.json"
    asked = config_lib.identity(config)
    if storage.exists(path):
        saved = json.loads(storage.read_bytes(path))
        done = [
            s.name
            for s in config.stages
            if storage.exists(workdir / "records" / s.name / "stage.json")
        ]
        config_lib.require_same(saved["identity"], asked, done)
    else:
        began = time.monotonic()
        if config.tokenizer.directory:
            folder = shell.absolute(config.tokenizer.directory)
            inputs.copy_tokenizer(workdir, folder, config.model.vocab_size)
        templates = config.roles.templates
        if config.world is None:
            real = config.real or inputs.RealConfig()
            counts = inputs.write_real(
                workdir,
                shell.absolute(config.data),
                real,
                templates,
                functools.partial(run_tokenizer, workdir, config),
            )
        else:
            counts = inputs.write_world(workdir, config.world, config.seed, templates)
        shown = "  ".join(f"{name} {count}" for name, count in counts.items())
        print(f"input: {shown}", flush=True)
        metrics.write_timing(workdir, "input", {"seconds": time.monotonic() - began})
    body = {
        "schema": config_lib.SCHEMA,
        "identity": asked,
        "runtime": config_lib.runtime(config),
    }
    storage.write_whole(path, (json.dumps(body, indent=1, sort_keys=True) + "\n").encode())


def run_tokenizer(workdir: epath.Path, config: config_lib.RunConfig) -> tokenizer_lib.Tokenizer:
    """The run's tokenizer: its copy of the one given, or trained on its input the first time."""
    if config.tokenizer.directory:
        return inputs.read_tokenizer(workdir)
    return inputs.make_tokenizer(
        workdir,
        config.tokenizer.vocab_size,
        config.tokenizer.whole_phrases,
        config.tokenizer.max_texts,
    )


def make_run(
    workdir: epath.Path, config: config_lib.RunConfig, should_stop: Callable[[], bool]
) -> run_lib.Run:
    """Tokenizer, roles, model and engines of a run."""
    tokenizer = run_tokenizer(workdir, config)
    model = config.model
    if not config.tokenizer.directory:  # a trained vocabulary may be smaller than asked for
        model = dataclasses.replace(model, vocab_size=tokenizer.vocab_size)
    run = run_lib.Run(
        workdir=workdir,
        seed=config.seed,
        trunk=learner.Trunk(config=model, kernels=transformer.Kernels()),
        tokenizer=tokenizer,
        roles=roles.make_roles(config.roles),
        mesh=sharding.make_mesh(config.runtime.mesh),
        engine_config=config.engine,
        runtime=config.runtime,
        router_bias_rate=config.router_bias_rate,
        should_stop=should_stop,
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
    if config.world is not None:
        judge = world_judge.ExactJudge()
        before, after = (run.samples(name) for name in (config.before, config.after))
        measured = evaluation.compare(
            evaluation.measure(before, judge), evaluation.measure(after, judge)
        )
    return {
        "schema": config_lib.SCHEMA,
        "seed": config.seed,
        "metrics": measured,
        "stages": dict(figures),
    }


def run_seconds(
    workdir: epath.Path, stages: Sequence[iterate.Stage]
) -> tuple[Mapping[str, float], float]:
    """Seconds by stage, and how many of them all went into compiling, from timing.json."""
    sections = json.loads(storage.read_bytes(workdir / "timing.json"))["sections"]
    places = {"input": "input", **{s.name: f"stage/{s.name}" for s in stages}}
    found = {name: sections[place] for name, place in places.items() if place in sections}
    compiling = sum(values.get("compile_seconds", 0.0) for values in found.values())
    return {name: values["seconds"] for name, values in found.items()}, compiling


def _stop_on_sigterm(lease: storage.Lease) -> Callable[[], bool]:
    """Asked between steps: keeps the lease, and says whether SIGTERM has arrived."""
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))

    def should_stop() -> bool:
        lease.renew()
        return bool(asked)

    return should_stop


def run() -> None:
    """The console script."""
    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)
    sys.exit(main(sys.argv))


if __name__ == "__main__":
    run()
