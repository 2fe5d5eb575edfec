"""The recipe as a list of stages: run what is not finished, in order."""

import difflib
import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from mathv2_jax import metrics, processes, roles, storage
from mathv2_jax.stages import answer, autolabel, experts, probe, rejection, rl, rl_config, sft
from mathv2_jax.stages import run as run_lib

Stage = (
    sft.SftStage
    | rl.RlStage
    | autolabel.AutolabelStage
    | experts.ExpertsStage
    | rejection.RejectionStage
    | probe.ProbeStage
    | answer.AnswerStage
)

KINDS: dict[str, tuple[type[Any], Callable[[run_lib.Run, Any], dict[str, float]]]] = {
    "sft": (sft.SftStage, sft.run_stage),
    "rl": (rl.RlStage, rl.run_stage),
    "autolabel": (autolabel.AutolabelStage, autolabel.run_stage),
    "experts": (experts.ExpertsStage, experts.run_stage),
    "rejection": (rejection.RejectionStage, rejection.run_stage),
    "probe": (probe.ProbeStage, probe.run_stage),
    "answer": (answer.AnswerStage, answer.run_stage),
}
_RUNNERS = {kind: runner for kind, runner in KINDS.values()}

# What a stage leaves to later ones, in the words of error messages.
VARIABLES = "variables"
REWARDED = "responses with rewards"
GENERATED = "a generator's proofs"
ATTEMPTS = "proofs with analyses"
LABELLED = "labelled proofs"
UNDECIDED = "undecided proofs"
PROBED = "a probe's scores"
ANSWERS = "answers to the test set"

_NEEDED = {
    "init": VARIABLES,
    "judge": VARIABLES,
    "verifier": VARIABLES,
    "generator": VARIABLES,
    "samples_from": REWARDED,
    "proofs_from": GENERATED,
    "attempts_from": ATTEMPTS,
    "undecided_from": UNDECIDED,
    "proofs": LABELLED,
    "predecessor": PROBED,
}
# Before any stage.
_GIVEN = {run_lib.FRESH: VARIABLES, rl_config.INPUT_PROOFS: LABELLED, probe.NONE: PROBED}


def leaves(stage: Stage) -> set[str]:
    """What later stages may take from a stage."""
    match stage:
        case rl.RlStage():
            shows = stage.generates or roles.VERIFIER in stage.mixture
            written = [*([GENERATED] if stage.generates else []), *([ATTEMPTS] if shows else [])]
            return {VARIABLES, REWARDED, *written}
        case sft.SftStage() | rejection.RejectionStage():
            return {VARIABLES}
        case autolabel.AutolabelStage():
            return {LABELLED, UNDECIDED, ATTEMPTS}
        case experts.ExpertsStage():
            return {LABELLED}
        case probe.ProbeStage():
            return {PROBED}
        case answer.AnswerStage():
            return {ANSWERS}


def check_stages(stages: Sequence[Stage]) -> None:
    """ValueError where a name repeats, a reference does not name a stage before it that leaves
    what it needs, or a generator's judge has not been probed before."""
    known = {name: {left} for name, left in _GIVEN.items()}
    probed: set[str] = set()
    for place, stage in enumerate(stages):
        if stage.name in known or stage.name == "input":
            taken = "another stage's" if stage.name in [s.name for s in stages[:place]] else "taken"
            raise ValueError(
                f"stages[{place}]: the name {stage.name!r} is {taken}; give it its own"
            )
        for field, need in _NEEDED.items():
            names = getattr(stage, field, None)
            for name in (names,) if isinstance(names, str) else names or ():
                if need not in known.get(name, ()):
                    where = f"stage.{stage.name}.{field} = {name!r}"
                    raise ValueError(f"{where}: {_fault(name, need, known, stages, place)}")
        if isinstance(stage, probe.ProbeStage):
            if probed and stage.predecessor is None:
                raise ValueError(
                    f"stage.{stage.name}.predecessor is not given, and without one no verifier is "
                    f"ever refused: name the probe stage before it, or {probe.NONE!r}"
                )
            probed.add(stage.verifier)
        generates = GENERATED in leaves(stage)
        judge = stage.judge if isinstance(stage, rl.RlStage) and generates else None
        if judge is not None and judge not in probed:
            raise ValueError(
                f"stage.{stage.name}.judge = {judge!r}: no probe stage before {stage.name!r} "
                "scores that verifier, and none rewards a generator unprobed; list a stage of "
                f"kind 'probe' with verifier = {judge!r} before it"
            )
        known[stage.name] = leaves(stage)


def _fault(
    name: str, need: str, known: Mapping[str, Collection[str]], stages: Sequence[Stage], place: int
) -> str:
    """What is wrong with a reference of `stages[place]`, and what would do."""
    fitting = [n for n, left in known.items() if need in left]
    later = [s.name for s in stages[place + 1 :]]
    if name == stages[place].name:
        fault = "a stage cannot use itself"
    elif name in known:
        fault = f"it leaves {', '.join(sorted(known[name]))}; this field takes {need}"
    elif name in later:
        fault = f"that stage comes after {stages[place].name!r}, this field looks back"
    else:
        near = difflib.get_close_matches(name, fitting, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        fault = f"no stage in the list has that name{hint}"
    found = f"before it {fitting} leave {need}" if fitting else f"no stage before it leaves {need}"
    return f"{fault}; {found}"


def check_settings(
    stages: Sequence[Stage],
    sampling: Mapping[str, roles.Sampling],
    conversations: Collection[str],
) -> None:
    """ValueError where a stage does not go with the roles' sampling, or reads an input file that
    is none of `conversations`."""
    for stage in stages:
        if isinstance(stage, rl.RlStage):
            rl.require_trainable(stage, sampling)
        if isinstance(stage, sft.SftStage) and stage.demonstrations not in conversations:
            near = difflib.get_close_matches(stage.demonstrations, list(conversations), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"stage.{stage.name}.demonstrations = {stage.demonstrations!r}: the run's input "
                f"has conversations in {sorted(conversations)}{hint}"
            )


def run_all(run: run_lib.Run, stages: Sequence[Stage]) -> dict[str, dict[str, float]]:
    """Every stage's figures by name. Finished stages are not run again."""
    check_stages(stages)
    figures: dict[str, dict[str, float]] = {}
    with metrics.CompileTime() as compiling:
        for number, stage in enumerate(stages, start=1):
            before = run.report(stage.name)
            if before is not None:
                figures[stage.name] = before
                print(f"{stage.name}: finished before ({number} of {len(stages)})", flush=True)
                continue
            print(f"{stage.name}: stage {number} of {len(stages)}", flush=True)
            found = _run_timed(run, stage, compiling)
            processes.meet()
            figures[stage.name] = {
                **found,
                run_lib.WROTE: float(len(run.parts(stage.name).names())),
            }
            body = json.dumps(figures[stage.name], sort_keys=True, indent=1)
            path = run.report_path(stage.name)
            processes.first(lambda path=path, body=body: storage.write_whole(path, body.encode()))
    return figures


def _run_timed(run: run_lib.Run, stage: Stage, compiling: metrics.CompileTime) -> dict[str, float]:
    """Its time is added to what earlier sessions spent on the stage, stopped ones too; that of a
    killed one is lost."""
    section = f"stage/{stage.name}"
    before = metrics.read_timing(run.workdir).get(section, {})
    began, compiled = time.monotonic(), compiling.seconds
    try:
        found = _RUNNERS[type(stage)](run, stage)
    finally:
        run.policy.unload()
        run.judge.unload()
        spent = {
            "seconds": time.monotonic() - began,
            "compile_seconds": compiling.seconds - compiled,
        }
        times = {name: before.get(name, 0.0) + seconds for name, seconds in spent.items()}
        if processes.is_first():
            metrics.write_timing(run.workdir, section, times)
    figures = {name: float(value) for name, value in sorted(found.items())}
    said = {name: metrics.duration(seconds) for name, seconds in times.items()}
    print(
        f"{stage.name}: done in {said['seconds']} ({said['compile_seconds']} compiling)  "
        + "  ".join(f"{name} {value:.4g}" for name, value in figures.items()),
        flush=True,
    )
    return figures
