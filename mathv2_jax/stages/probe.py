"""The drift probe: no verifier becomes a reward before it has scored a fixed labelled set."""

import dataclasses
import math

import numpy as np

from mathv2_jax import records, reward, roles
from mathv2_jax.evaluation import held_out
from mathv2_jax.stages import run as run_lib


class DriftError(ValueError):
    """A verifier is worse than its predecessor beyond noise, and is refused as a reward."""


NONE = "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeStage:
    """Scores the input file `probe` with `verifier`; `predecessor` names the probe stage before.

    Refused where the mean absolute error of its first opinion rises by more than `tolerance_se`
    paired standard errors. Without a predecessor, as the first probe is, it only records what later
    ones are compared with; a later one that is to have none says `NONE`. `iterate.check_stages`
    holds that no verifier rewards a generator unprobed; a meta-verifier, as the judge of a verifier
    stage is, scores no proofs, and is not probed.
    """

    name: str
    verifier: str
    predecessor: str | None = None
    tolerance_se: float = 3.0

    def __post_init__(self):
        if self.tolerance_se <= 0:
            raise ValueError(f"stage {self.name}: tolerance_se = {self.tolerance_se}: must be > 0")


def run_stage(run: run_lib.Run, stage: ProbeStage) -> dict[str, float]:
    """The probe's figures; DriftError with both verifiers' figures where the new one is worse.

    It is short: a run that is asked to stop while it lasts stops after it. ValueError where the
    file holds an unlabelled proof, or fewer than 2, which have no standard error.
    """
    run.check_stop(lambda: None)
    proofs = run.input("probe", records.Proof)
    unlabelled = [p.id for p in proofs if p.label is None]
    if unlabelled or len(proofs) < 2:
        raise ValueError(
            f"stage {stage.name}: the input file probe holds {len(proofs)} proofs, "
            f"{len(unlabelled)} of them without a label: give it at least 2, all labelled"
        )
    run.judge.load(run.variables(stage.verifier), stage.verifier)
    fields = [{"statement": p.statement, "proof": p.text} for p in proofs]
    seed = (run.seed, "probe")
    prompts = [run.roles.verifier.prompt(run.tokenizer, **f) for f in fields]

    def look(replica: int, places: range) -> list[tuple[roles.Opinion, np.ndarray]]:
        judge = run.judge.engines[replica]
        share = [fields[place] for place in places]
        opinions = roles.ask(judge, run.roles.verifier, share, 1, seed, places)
        head_P3 = judge.first_opinions([prompts[place] for place in places])
        return [(opinion, head_3) for (opinion,), head_3 in zip(opinions, head_P3, strict=True)]

    found = run.gather(run.each(len(proofs), look))
    samples = [
        roles.make_sample(
            opinion,
            id=f"{stage.name}/{proof.id}",
            role=roles.VERIFIER,
            stage=stage.name,
            step=0,
            problem_id=proof.problem_id,
            target=proof.id,
            index=0,
            statement=proof.statement,
            proof=proof.text,
            analysis="",
            label=None if proof.label is None else proof.label.score,
        )
        for proof, (opinion, _) in zip(proofs, found, strict=True)
    ]
    run.parts(stage.name).write_only(records.to_lines(samples))
    errors = _errors(samples)
    head = np.stack([head_3 for _, head_3 in found]) @ np.asarray(records.SCORES, np.float32)
    labels = np.asarray([s.label for s in samples], np.float64)
    figures = {
        "mean_error": float(np.mean(errors)),
        "accuracy": float(np.mean(errors == 0.0)),
        "head_mean_error": float(np.mean(np.abs(head - labels))),
        # The best constant answer's: what a head that has learnt anything stays below.
        "constant_mean_error": held_out.least_error(labels.tolist()),
        "n": float(len(errors)),
    }
    if stage.predecessor not in (None, NONE):
        before = _errors(run.samples(stage.predecessor))
        rise = errors - before
        se = float(np.std(rise, ddof=1)) / math.sqrt(len(rise))
        figures |= {"rise": float(np.mean(rise)), "rise_se": se}
        if not np.mean(rise) <= stage.tolerance_se * se:  # so that nan never passes
            raise DriftError(
                f"verifier {stage.verifier!r} is refused as a reward: on {len(errors)} labelled "
                f"proofs its mean error is {np.mean(errors):.3f}, that of its predecessor "
                f"{np.mean(before):.3f}; the rise of {np.mean(rise):.3f} is more than "
                f"{stage.tolerance_se} standard errors of {se:.3f}. Train it on more labels, or "
                f"go on from the predecessor"
            )
    return figures


def _errors(samples: list[records.Sample]) -> np.ndarray:
    """|s' - s| a proof in the order of their ids; 1 where the analysis did not parse."""
    return np.asarray(
        [
            1.0 if s.score is None or s.label is None else 1.0 - reward.agreement(s.score, s.label)
            for s in sorted(samples, key=lambda s: s.target)
        ]
    )
