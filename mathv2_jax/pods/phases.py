"""What is in a chip's memory together in each phase of an RL step."""

from collections.abc import Mapping
from typing import Any

from mathv2_jax.pods import chips, programs

# The programs that each phase runs, and whether the parameters that they take are the policy's own,
# which are in memory in any case.
SAMPLING = ("prefill", "decode")
PHASES = {
    "sampling": SAMPLING,
    "judging": SAMPLING,
    "reference": ("logprobs",),
    "training": ("gradients", "update"),
}


def of_rl_step(
    made: Mapping[str, programs.Program],
    measured: Mapping[str, Mapping[str, Any]],
    chip: chips.Chip,
    *,
    judged: bool,
    kl: bool,
) -> dict[str, Any]:
    """By phase: bytes a chip, by what they are, and whether they fit; None where not compiled.

    All parameter sets are resident: the policy with its optimizer, the parameters that the stage
    began with, and the judge. A phase adds what its programs need beyond parameters: the larger.
    """
    state = made["update"].argument_bytes(0)
    variables = made["logprobs"].argument_bytes(0)
    resident = {"policy_and_optimizer": state, "initial_parameters": variables}
    if judged:
        resident["judge"] = variables
    found = {}
    for phase, names in PHASES.items():
        if (phase == "judging" and not judged) or (phase == "reference" and not kl):
            continue
        beyond = [_beyond(measured.get(name), made[name], state, variables) for name in names]
        held = dict(resident)
        known = [size for size in beyond if size is not None]
        if known:
            held["programs"] = max(known)
        fits = None
        if len(known) == len(beyond):
            fits = sum(held.values()) <= chip.hbm_bytes
        elif any(measured.get(name, {}).get("fits") is False for name in names):
            fits = False
        found[phase] = {"bytes_per_chip": held, "fits": fits, "runs": list(names)}
    return found


def _beyond(
    measured: Mapping[str, Any] | None, program: programs.Program, state: int, variables: int
) -> int | None:
    """A program's memory without the parameters, or the state, that is there in any case."""
    if measured is None or "peak_bytes_per_chip" not in measured:
        return None
    counted = state if program.name == "update" else variables
    return max(0, measured["peak_bytes_per_chip"] - counted)
