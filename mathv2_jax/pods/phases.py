"""What is in a chip's memory together in each phase of an RL step."""

from collections.abc import Mapping
from typing import Any

from mathv2_jax.pods import chips, programs
from mathv2_jax.rl import placement as placement_lib

# The programs that each phase runs.
PHASES = {
    "hand_over": ("hand_over",),
    "sampling": ("prefill", "decode"),
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
    placement: placement_lib.PlacementConfig,
) -> dict[str, Any]:
    """By phase: bytes a chip, by what they are, and whether they fit; None where not compiled.

    In memory are the policy, and as they are placed its optimizer, the parameters that the stage
    began with (where there is a KL term), and the judge; while it samples, the policy once more
    where its engines have a layout or dtype of their own. A phase adds what its programs need
    beyond the parameters that they take: the larger.
    """
    state, variables = made["update"].argument_bytes(0), made["logprobs"].argument_bytes(0)
    sampled = made["prefill"].argument_bytes(0)
    taken = {"update": state, "prefill": sampled, "decode": sampled}
    found = {}
    for phase, names in PHASES.items():
        if any(name not in made for name in names) or (phase == "reference" and not kl):
            continue
        samples = phase in ("hand_over", "sampling")
        held = {"policy": variables}
        if not (samples and placement.optimizer == placement_lib.HOST):
            held["optimizer"] = state - variables
        if kl and (phase == "reference" or placement.reference == placement_lib.RESIDENT):
            held["initial_parameters"] = variables
        if judged and (samples or placement.judge == placement_lib.RESIDENT):
            held["judge"] = sampled
        if phase == "sampling" and "hand_over" in made:
            held["policy_of_the_engines"] = sampled
        beyond = [_beyond(measured.get(name), taken.get(name, variables)) for name in names]
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


def _beyond(measured: Mapping[str, Any] | None, taken: int) -> int | None:
    """A program's memory without what it takes that is there in any case."""
    if measured is None or "peak_bytes_per_chip" not in measured:
        return None
    return max(0, measured["peak_bytes_per_chip"] - taken)
