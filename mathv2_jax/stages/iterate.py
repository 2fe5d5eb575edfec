"""The recipe as a list of stages: run what is not finished, in order."""

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from mathv2_jax import metrics, storage
from mathv2_jax.stages import answer, autolabel, probe, rejection, rl, sft
from mathv2_jax.stages import run as run_lib

Stage = (
    sft.SftStage
    | rl.RlStage
    | autolabel.AutolabelStage
    | rejection.RejectionStage
    | probe.ProbeStage
    | answer.AnswerStage
)

KINDS: dict[str, tuple[type[Any], Callable[[run_lib.Run, Any], dict[str, float]]]] = {
    "sft": (sft.SftStage, sft.run_stage),
    "rl": (rl.RlStage, rl.run_stage),
    "autolabel": (autolabel.AutolabelStage, autolabel.run_stage),
    "rejection": (rejection.RejectionStage, rejection.run_stage),
    "probe": (probe.ProbeStage, probe.run_stage),
    "answer": (answer.AnswerStage, answer.run_stage),
}
_RUNNERS = {kind: runner for kind, runner in KINDS.values()}
_REFERENCES = ("init", "judge", "verifier", "generator", "proofs_from", "predecessor")


def check_stages(stages: Sequence[Stage]) -> None:
    """ValueError where a name repeats, or a stage refers to one that does not stand before it."""
    known: set[str] = {run_lib.FRESH}
    for stage in stages:
        if stage.name in known:
            raise ValueError(f"two stages are named {stage.name!r}: names are unique")
        wanted = [getattr(stage, field, None) for field in _REFERENCES]
        wanted += getattr(stage, "samples_from", ())
        wanted += [p for p in getattr(stage, "proofs", ()) if p != "proofs"]
        for name in wanted:
            if name is not None and name not in known:
                raise ValueError(
                    f"stage {stage.name!r} uses {name!r}, which is no stage before it; those are "
                    f"{sorted(known)}"
                )
        known.add(stage.name)


def report_path(run: run_lib.Run, name: str) -> Any:
    """Where a finished stage's figures stand; the file is a stage's last act."""
    return run.workdir / "records" / name / "stage.json"


def run_all(run: run_lib.Run, stages: Sequence[Stage]) -> dict[str, dict[str, float]]:
    """Every stage's figures by name. Finished stages are not run again."""
    check_stages(stages)
    figures: dict[str, dict[str, float]] = {}
    with metrics.CompileTime() as compiling:
        for number, stage in enumerate(stages, start=1):
            path = report_path(run, stage.name)
            if storage.exists(path):
                figures[stage.name] = json.loads(storage.read_bytes(path))
                print(f"{stage.name}: finished before ({number} of {len(stages)})", flush=True)
                continue
            print(f"{stage.name}: stage {number} of {len(stages)}", flush=True)
            figures[stage.name] = _run_timed(run, stage, compiling)
            body = json.dumps(figures[stage.name], sort_keys=True, indent=1)
            storage.write_whole(path, body.encode())
    return figures


def _run_timed(run: run_lib.Run, stage: Stage, compiling: metrics.CompileTime) -> dict[str, float]:
    began, compiled = time.monotonic(), compiling.seconds
    found = _RUNNERS[type(stage)](run, stage)
    times = {
        "seconds": time.monotonic() - began,
        "compile_seconds": compiling.seconds - compiled,
    }
    metrics.write_timing(run.workdir, f"stage/{stage.name}", times)
    figures = {name: float(value) for name, value in sorted(found.items())}
    spent = {name: metrics.duration(seconds) for name, seconds in times.items()}
    print(
        f"{stage.name}: done in {spent['seconds']} ({spent['compile_seconds']} compiling)  "
        + "  ".join(f"{name} {value:.4g}" for name, value in figures.items()),
        flush=True,
    )
    return figures
