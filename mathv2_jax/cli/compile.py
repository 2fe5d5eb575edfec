"""mathv2-compile: the programs of an RL step, compiled for TPUs that are not there.

mathv2-compile --config=FILE --topology=v5p:8x8x16 [--stage=NAME] [--json=FILE] [--max_layers=N]
               [--programs=gradients,update,logprobs,hand_over,prefill,decode] [--lower_only]
               [--config.field=value ...]
mathv2-compile --topology=v5p --xla_flags

For every program: whether it fits, its memory, FLOPs of the model and of the program, what chips
send each other, and estimates of its time and MFU at peak rates; for every phase of the step: what
is in memory together. The mesh is the config's; -1 fills the topology. With --max_layers the model
is cut short (--config.model.num_layers would be another model's config), to answer in a minute or
two. --lower_only compiles nothing: FLOPs alone, in seconds. Both need libtpu: the extra [tpu].
--xla_flags only prints the chip's flags of XLA, for a run's LIBTPU_INIT_ARGS; programs are compiled
with the same, unless that variable is set.

Topologies: a chip (v5e, v5p, v6e, tpu7x) and its shape; --xla_flags takes the chip alone, or Cloud
TPU's name of a type, as v5p-2048, too. The folder of --json must be there.

First the experts' product is compiled with 2 and with 8 experts on a chip: its FLOPs must not grow.

Exit codes: 0 all fits, 1 something does not, those FLOPs grow or a compiler fails, 2 bad usage or
input.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from absl import flags
from jax.experimental import topologies

from mathv2_jax import storage
from mathv2_jax.cli import config as config_lib
from mathv2_jax.cli import machine, shell, source
from mathv2_jax.cli import overrides as overrides_lib
from mathv2_jax.model import transformer
from mathv2_jax.model.config import ModelConfig
from mathv2_jax.pods import chips, experts, measure, phases, programs
from mathv2_jax.stages import rl

# Its own, as are those of the tools: one process may hold several programs.
_OWN = flags.FlagValues()
_CONFIG = flags.DEFINE_string(
    "config", None, "File with get_config(), as of mathv2-train.", flag_values=_OWN
)
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Chips and their shape, like v5p:8x8x16.", flag_values=_OWN
)
_STAGE = flags.DEFINE_string(
    "stage", None, "The RL stage; default: the last one.", flag_values=_OWN
)
_JSON = flags.DEFINE_string("json", None, "File for the result.", flag_values=_OWN)
_MAX_LAYERS = flags.DEFINE_integer(
    "max_layers", None, "Cut the model to so many layers.", flag_values=_OWN
)
_PROGRAMS = flags.DEFINE_string(
    "programs", None, "Some of them, with commas; default: all.", flag_values=_OWN
)
_LOWER = flags.DEFINE_bool("lower_only", False, "Do not compile: FLOPs alone.", flag_values=_OWN)

_FLAGS = flags.DEFINE_bool(
    "xla_flags", False, "Print the chip's LIBTPU_INIT_ARGS, and nothing else.", flag_values=_OWN
)

# libtpu looks for a machine with TPUs, and two of them for each other's lock file.
_WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def main(argv: Sequence[str]) -> int:
    """Usage and input errors are one line and exit code 2; what is a bug keeps its traceback."""
    try:
        rest, overrides = overrides_lib.split(argv)
        if not shell.read_flags(_OWN, rest, __doc__, ("topology",)):
            return shell.FINISHED
        assert _TOPOLOGY.value is not None
        if _FLAGS.value:
            print(" ".join(chips.chip_of(_TOPOLOGY.value).xla_flags))
            return shell.FINISHED
        if not _CONFIG.value:
            raise ValueError("--config=... must be given")
        if _JSON.value and not shell.absolute(_JSON.value).parent.is_dir():
            raise ValueError(f"--json={_JSON.value}: its folder is not there")
        jax.config.update("jax_platforms", "cpu")
        loaded = overrides_lib.load(_CONFIG.value)
        if not loaded.data and loaded.world is None:
            loaded.data = "none is read"
        config = config_lib.build(loaded, overrides)
        result = compiled(config, chips.libtpu_name(_TOPOLOGY.value), _save, argv[1:])
    except (ValueError, FileNotFoundError, flags.Error) as error:
        if not shell.is_of_input(error):
            raise
        print(f"mathv2-compile: {error}", file=sys.stderr)
        return shell.BAD_INPUT
    except jax.errors.JaxRuntimeError as error:
        print(f"mathv2-compile: the compiler failed: {measure.first_line(error)}", file=sys.stderr)
        return shell.FAILED
    fits = [part["fits"] for part in (*result["programs"].values(), *result["phases"].values())]
    scales = result.get("experts", {}).get("scales", False)
    failed = any("why" in program for program in result["programs"].values())
    good = all(fit is not False for fit in fits) and not scales and not failed
    return shell.FINISHED if good else shell.FAILED


def _save(result: Mapping[str, Any]) -> None:
    if _JSON.value:
        text = json.dumps(result, indent=1, sort_keys=True) + "\n"
        storage.write_whole(shell.absolute(_JSON.value), text.encode())


def compiled(
    config: config_lib.RunConfig,
    topology: str,
    save: Callable[[Mapping[str, Any]], None],
    argv: Sequence[str] = (),
) -> dict[str, Any]:
    """All figures; each program is printed and `save`d, with those before it, as it is done.

    `topology` as libtpu writes it; `argv` is noted.
    """
    chip = chips.chip_of(topology)
    os.environ.setdefault("LIBTPU_INIT_ARGS", " ".join(chip.xla_flags))
    devices = _devices(topology)
    mesh = machine.make_mesh(config.runtime.mesh, config.stages, devices)
    stage, model = _stage(config, _STAGE.value), _cut(config.model, _MAX_LAYERS.value)
    kernels = machine.make_kernels(config.runtime, mesh.devices.flat[0].platform, model)
    runtime = config.runtime
    made = programs.of_rl_step(model, kernels, stage.rl, config.engine, mesh, runtime.sampling)
    wanted = list(made) if _PROGRAMS.value is None else _PROGRAMS.value.split(",")
    for name in wanted:
        if name not in made:
            raise ValueError(f"--programs: {name!r} is none of {', '.join(made)}")
        if wanted.count(name) > 1:
            raise ValueError(f"--programs: {name!r} is given {wanted.count(name)} times: leave one")
    result: dict[str, Any] = {
        "topology": topology,
        "mesh": dict(mesh.shape),
        "sampling": runtime.sampling and dataclasses.asdict(runtime.sampling),
        "placement": dataclasses.asdict(runtime.placement),
        "stage": stage.name,
        "parameters": transformer.num_parameters(transformer.boxed_abstract(model, kernels)),
        "layers": model.num_layers,
        "commit": source.commit(),
        "command": ["mathv2-compile", *argv],
        "versions": {"jax": jax.__version__, "libtpu": _libtpu_version()},
        "xla_flags": os.environ["LIBTPU_INIT_ARGS"].split(),
        "rooflines_are": chips.LEFT_OUT,
        "programs": {},
        "phases": {},
    }
    save(result)  # a file that cannot be written is missed now, not after an hour
    shape = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    print(f"{result['parameters'] / 1e9:.2f} B parameters on {topology}: {shape}", flush=True)
    if not _LOWER.value:
        result["experts"] = experts.flops_by_experts(kernels.experts, model, devices[0])
        print(experts.said(result["experts"]), flush=True)
    for name in wanted:
        found = measure.measured(
            made[name],
            model,
            chip,
            auxiliary=stage.rl.auxiliary,
            buffer=runtime.expert_buffer,
            lower_only=_LOWER.value,
        )
        result["programs"][name] = found
        print(f"{name}: {_line(found)}", flush=True)
        save(result)
    judged, kl = stage.judge is not None, bool(stage.rl.grpo.kl_coefficient)
    result["phases"] = phases.of_rl_step(
        made, result["programs"], chip, judged=judged, kl=kl, placement=runtime.placement
    )
    for name, phase in result["phases"].items():
        print(f"phase {name}: {_phase_line(phase)}", flush=True)
    save(result)
    return result


def _devices(topology: str) -> Sequence[Any]:
    if _libtpu_version() is None:
        raise ValueError(
            "compiling for TPUs needs libtpu, the one that this JAX pins: pip install "
            '"mathv2_jax[tpu]"'
        )
    os.environ.update({k: v for k, v in _WITHOUT_TPU.items() if k not in os.environ})
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"topology {topology!r}: libtpu does not know it: {error}") from error
    return found.devices


def _libtpu_version() -> str | None:
    if importlib.util.find_spec("libtpu") is None:
        return None
    return importlib.metadata.version("libtpu")


def _stage(config: config_lib.RunConfig, name: str | None) -> rl.RlStage:
    stages = {stage.name: stage for stage in config.stages if isinstance(stage, rl.RlStage)}
    if not stages:
        raise ValueError(f"{_CONFIG.value} has no stage of reinforcement learning")
    if name is not None and name not in stages:
        raise ValueError(f"--stage={name!r} is none of the RL stages {', '.join(stages)}")
    return stages[name] if name else list(stages.values())[-1]


def _cut(model: ModelConfig, most: int | None) -> ModelConfig:
    if most is None or most >= model.num_layers:
        return model
    if most < 2:
        raise ValueError(f"--max_layers={most}: must be at least 2, a dense and a sparse one")
    return dataclasses.replace(
        model, num_layers=most, num_dense_layers=min(model.num_dense_layers, 1)
    )


def _line(found: Mapping[str, Any]) -> str:
    ratio = found["executed_over_model"]
    said = "no FLOPs of the model" if ratio is None else f"executed / model FLOPs {ratio:.2f}"
    if "why" in found:
        what = "does not fit" if found["fits"] is False else "the compiler failed"
        return f"{what}: {found['why']}; {said}"
    if found["fits"] is None:
        return said
    sent = found["collective_bytes_per_chip"]
    moved = sent if isinstance(sent, str) else f"{sum(sent.values()) / 1e9:.1f} GB"
    at = found["roofline"]
    estimate = (
        f"{at['overlapped_seconds']:.3g} s at peak rates, {at['without_overlap_seconds']:.3g} "
        "without overlap"
    )
    if ratio is not None:
        estimate += f", MFU {at['mfu_overlapped']:.0%} and {at['mfu_without_overlap']:.0%}"
    return (
        f"{found['peak_bytes_per_chip'] / chips.GIB:.1f} GiB, {said}; collectives {moved}; "
        f"estimate {estimate}; compiled in {found['compile_seconds']:.0f} s"
    )


def _phase_line(phase: Mapping[str, Any]) -> str:
    parts = ", ".join(f"{n} {x / chips.GIB:.1f}" for n, x in phase["bytes_per_chip"].items())
    verdict = {True: "fits", False: "does not fit", None: "not compiled"}[phase["fits"]]
    return f"{parts} GiB: {verdict}"


def run() -> None:
    """The console script."""
    shell.run(main)


if __name__ == "__main__":
    run()
