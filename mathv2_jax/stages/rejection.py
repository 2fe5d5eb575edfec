"""Rejection fine-tuning: the previous iteration's own best responses in every role, imitated."""

import dataclasses
from typing import Any

from absl import logging

from mathv2_jax import records, roles
from mathv2_jax.stages import run as run_lib
from mathv2_jax.stages import sft
from mathv2_jax.text import prompts

CHOSEN = "-chosen"  # the folder of records beside the stage's own


@dataclasses.dataclass(frozen=True, kw_only=True)
class RejectionStage:
    """SFT from `init` on responses of `samples_from` whose reward is at least `min_reward`.

    At most `per_group` responses of a group are taken, so that easy prompts do not dominate; equal
    ones count as often as they were sampled.
    With `allow_empty` a stage without any such response leaves the variables of `init` unchanged,
    and says so; otherwise that is an error.
    """

    name: str
    init: str
    samples_from: tuple[str, ...]
    min_reward: float = 1.0
    per_group: int = 2
    allow_empty: bool = False
    sft: sft.SftConfig

    def __post_init__(self):
        if not 0.0 < self.min_reward <= 1.0:
            raise ValueError(
                f"stage {self.name}: min_reward = {self.min_reward} must lie in (0, 1]"
            )
        if self.per_group < 1:
            raise ValueError(f"stage {self.name}: per_group = {self.per_group} must be positive")


def best_responses(run: run_lib.Run, stage: RejectionStage) -> list[records.Demonstration]:
    """The chosen responses as demonstrations: groups in the order in which they were sampled, of
    each the best first, ties in the order of sampling."""
    chosen = []
    for source in stage.samples_from:
        groups: dict[tuple[int, str], list[records.Sample]] = {}
        for sample in run.samples(source):
            if sample.rewards.get("total", 0.0) >= stage.min_reward:
                groups.setdefault((sample.step, sample.id.rsplit("/", 1)[0]), []).append(sample)
        for group in groups.values():
            best = sorted(group, key=lambda sample: -sample.rewards["total"])[: stage.per_group]
            chosen += [_demonstration(_role(run, sample), sample) for sample in best]
    return chosen


def _role(run: run_lib.Run, sample: records.Sample) -> roles.Role:
    return run.roles.refiner if sample.parents else run.roles.named(sample.role)


def _demonstration(role: roles.Role, sample: records.Sample) -> records.Demonstration:
    user = prompts.fill(
        role.template, statement=sample.statement, proof=sample.proof, analysis=sample.analysis
    )
    return records.Demonstration(
        id=records.content_id(
            "demonstration", user, *(t for t in (sample.thinking, sample.text) if t is not None)
        ),
        role=sample.role,
        problem_id=sample.problem_id,
        user=user,
        assistant=sample.text,
        thinking=sample.thinking,
        source=sample.stage,
        parents=(sample.id,),
    )


def run_stage(run: run_lib.Run, stage: RejectionStage) -> dict[str, Any]:
    """Choose, write the choice down, and train on it; leaves the stage's variables.

    ValueError where no response reaches the bar.
    """
    chosen = best_responses(run, stage)
    if not chosen and stage.allow_empty:
        logging.warning(
            "%s: no response of %s earned %g; the variables of %s are left as they are",
            stage.name,
            ", ".join(stage.samples_from),
            stage.min_reward,
            stage.init,
        )
        run.keep_variables(stage.name, run.variables(stage.init), 0)
        return {f"chosen/{n}": 0.0 for n in roles.NAMES}
    if not chosen:
        raise ValueError(
            f"stage {stage.name}: no response of {', '.join(stage.samples_from)} earned "
            f"{stage.min_reward}: lower min_reward"
        )
    run.parts(f"{stage.name}{CHOSEN}").write_only(records.to_lines(chosen))
    counts = {f"chosen/{n}": float(sum(d.role == n for d in chosen)) for n in roles.NAMES}
    return {**sft.train(run, stage.name, stage.init, stage.sft, chosen), **counts}
