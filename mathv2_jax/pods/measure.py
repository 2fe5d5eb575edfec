"""The figures of one program: traced, and compiled for the mesh's devices."""

import dataclasses
import functools
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from mathv2_jax.model.config import ModelConfig
from mathv2_jax.pods import chips, counting, hlo, programs
from mathv2_jax.rl import auxiliary as auxiliary_lib


def measured(
    program: programs.Program,
    model: ModelConfig,
    chip: chips.Chip,
    *,
    auxiliary: auxiliary_lib.AuxiliaryConfig,
    buffer: float | None,
    lower_only: bool,
) -> dict[str, Any]:
    """A chip's share of everything, as JSON takes it; of FLOPs alone with `lower_only`.

    `buffer` is Exchange.buffer: at an even load the rest of an experts' device's rows is empty, and
    its products are told apart. What a compiler that failed said is in `why`, and `fits` is False
    where it asked for too much memory.
    """
    if program.each:
        alike = functools.partial(
            measured,
            model=model,
            chip=chip,
            auxiliary=auxiliary,
            buffer=buffer,
            lower_only=lower_only,
        )
        return _in_turn(alike(one) for one in program.each)
    mesh = program.mesh
    traced = program.trace()
    ways = mesh.shape["expert"]
    spare = 1.0 if ways == 1 else min(ways, buffer or ways)
    executed = counting.executed(traced.jaxpr, program.loops, 1 / spare)
    of_model = dataclasses.asdict(program.model_flops(model, auxiliary))
    of_model = {name: x / mesh.size for name, x in of_model.items()}
    by_pass = {
        part: {name: x / mesh.size for name, x in passes.items()}
        for part, passes in sorted(executed.by_pass.items())
    }
    experts = by_pass.get(counting.EXPERTS, {})
    full = sum(experts.values())
    by_pass[counting.EXPERTS] = {name: x / spare for name, x in experts.items()}
    parts = {name: sum(passes.values()) for name, passes in by_pass.items()}
    model_total = sum(of_model.values())
    found: dict[str, Any] = {
        "model_flops_per_chip": of_model,
        "executed_flops_per_chip": parts,
        "model_flops_per_chip_total": model_total,
        "executed_flops_per_chip_total": sum(parts.values()),
        "excess_flops_per_chip": excess(of_model, by_pass, trained=program.name == "gradients"),
        "executed_over_model": sum(parts.values()) / model_total if model_total else None,
        "flops_of_empty_buffer_rows_per_chip": full - full / spare,
        "loops_of_unknown_length": executed.unknown,
        "argument_bytes_per_chip": program.argument_bytes(),
        "fits": None,
    }
    try:
        lowered = traced.lower()
        if lower_only:
            return found
        began = time.monotonic()
        done = lowered.compile()
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        fits = False if "RESOURCE_EXHAUSTED" in str(error) else None
        return found | {"fits": fits, "why": first_line(error)}
    memory = done.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    peak = held + memory.temp_size_in_bytes - memory.alias_size_in_bytes
    sent = hlo.collectives(done.as_text(), program.loops.length)
    bounds = chips.roofline(
        chip,
        model_flops=model_total,
        executed_flops=sum(parts.values()),
        argument_bytes=float(memory.argument_size_in_bytes * program.turns),
        sent=sent.bytes_by_kind,
    )
    return found | {
        "fits": peak <= chip.hbm_bytes,
        "compile_seconds": time.monotonic() - began,
        "peak_bytes_per_chip": peak,
        "temp_bytes_per_chip": memory.temp_size_in_bytes,
        "output_bytes_per_chip": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "collective_bytes_per_chip": sent.bytes_by_kind if not sent.unknown_loops else "unknown",
        "collective_bytes_once_per_unknown_loop": sent.bytes_by_kind,
        "roofline": dataclasses.asdict(bounds),
    }


def excess(
    of_model: Mapping[str, float], by_pass: Mapping[str, Mapping[str, float]], *, trained: bool
) -> dict[str, dict[str, float]]:
    """Why a part executes more than its due: FLOPs by pass, with the due ones taken off.

    Of what is due a third is the forward pass where there is a backward one. Their sum over all
    parts is what is executed beyond the model's FLOPs; a part that takes less is negative.
    """
    found = {}
    for part in sorted({*of_model, *by_pass}):
        passes = {n: 0.0 for n in counting.PASSES} | dict(by_pass.get(part, {}))
        due = of_model.get(part, 0.0)
        forward = due / 3 if trained and passes[counting.BACKWARD] else due
        passes[counting.FORWARD] -= forward
        passes[counting.BACKWARD] -= due - forward
        if any(passes.values()):
            found[part] = passes
    return found


def first_line(error: Exception) -> str:
    """The most that a table or a terminal has room for."""
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__


def _in_turn(each: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The figures of calls one after the other: sums, but of what each needs for itself alone.

    Those of the first that could not be compiled, if there is one.
    """
    parts = []
    for part in each:
        if "why" in part:
            return part
        parts.append(part)
    found: dict[str, Any] = {}
    for name in parts[0]:
        values = [part[name] for part in parts if name in part]
        if name == "fits":
            found[name] = None if None in values else all(values)
        elif name == "temp_bytes_per_chip":
            found[name] = max(values)
        elif isinstance(values[0], Mapping):
            keys = sorted({key for value in values for key in value})
            found[name] = {key: sum(value.get(key, 0) for value in values) for key in keys}
        elif isinstance(values[0], list):
            found[name] = [item for value in values for item in value]
        else:
            found[name] = None if None in values else sum(values)
    if "temp_bytes_per_chip" in found:
        held = ("argument_bytes_per_chip", "output_bytes_per_chip", "temp_bytes_per_chip")
        found["peak_bytes_per_chip"] = sum(found[name] for name in held)
    return found
