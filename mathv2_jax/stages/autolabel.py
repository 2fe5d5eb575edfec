"""Auto-labelling: the newest proofs scored by many analyses and their meta-verification."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from mathv2_jax import processes, records, reward, roles, storage
from mathv2_jax.stages import run as run_lib
from mathv2_jax.stages import shares

CHUNK = 64  # proofs a part
UNDECIDED = "-undecided"  # the folder of records beside the stage's own


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutolabelStage:
    """Labels up to `num_proofs` of the newest distinct proofs in the records of `proofs_from`.

    All of the newest `num_candidates` are analysed n times; those whose analyses disagree most
    come first (ours: the variance of the parsed scores). The undecided are for humans: proofs
    without a label, in the records of `NAME-undecided`. A figure that is a mean of nothing is left
    out.
    """

    name: str
    proofs_from: str
    judge: str
    num_candidates: int
    num_proofs: int
    rule: reward.AutoLabelRule = dataclasses.field(default_factory=reward.AutoLabelRule)

    def __post_init__(self):
        if not 1 <= self.num_proofs <= self.num_candidates:
            raise ValueError(
                f"stage {self.name}: num_proofs = {self.num_proofs} must lie between 1 and "
                f"num_candidates = {self.num_candidates}"
            )


def newest_proofs(run: run_lib.Run, stage: str, number: int) -> list[records.Proof]:
    """The last `number` distinct parsed proofs that a generator's stage wrote, newest first."""
    role = run.roles.generator
    found: dict[str, records.Proof] = {}
    for sample in reversed(run.samples(stage)):
        if sample.role != roles.GENERATOR or sample.outcome is not records.Outcome.PARSED:
            continue
        written = role.read(sample.text)
        assert written is not None, f"sample {sample.id} was parsed when it was written"
        proof_id = records.content_id("proof", sample.statement, written.body)
        if proof_id not in found:
            found[proof_id] = records.Proof(
                id=proof_id,
                problem_id=sample.problem_id,
                statement=sample.statement,
                text=written.body,
                source=stage,
                self_analysis=written.self_analysis,
                self_score=written.score,
                origin=records.Origin(
                    stage=stage,
                    step=sample.step,
                    checkpoint=sample.checkpoint,
                    template=role.template.fingerprint,
                    seed=run.seed,
                ),
                parents=(sample.id,),
            )
        if len(found) == number:
            break
    return list(found.values())


@dataclasses.dataclass(frozen=True)
class _Verdict:
    """What the written analyses of one proof come to."""

    label: float | None
    votes: tuple[float, ...]

    @property
    def disagreement(self) -> float:
        """Variance of the parsed scores; 0 without any."""
        return float(np.var(self.votes)) if self.votes else 0.0


def run_stage(run: run_lib.Run, stage: AutolabelStage) -> dict[str, float]:
    """Analyse the candidates part by part, then write the labelled proofs, hardest first.

    A part counts as soon as it is written; parts that are there already are not asked again.
    """
    candidates = newest_proofs(run, stage.proofs_from, stage.num_candidates)
    run.judge.load(run.variables(stage.judge), stage.judge)
    chunks = [candidates[i : i + CHUNK] for i in range(0, len(candidates), CHUNK)]

    def make(replica: int, number: int) -> bytes:
        chunk, seed = chunks[number - 1], (run.seed, stage.name, number)
        judge = run.judge.engines[replica]
        labelled = roles.auto_label(judge, run.roles, chunk, stage.rule, seed)
        samples = [s for p, v in zip(chunk, labelled, strict=True) for s in _samples(stage, p, v)]
        return records.to_lines(samples)

    shares.write_parts(run, stage.name, len(chunks), make)
    verdicts = _verdicts(run.samples(stage.name), stage.rule)
    found = [(proof, verdicts[proof.id]) for proof in candidates]
    found.sort(key=lambda pair: -pair[1].disagreement)
    decided = [(p, v) for p, v in found if v.label is not None][: stage.num_proofs]
    undecided = [(p, v) for p, v in found if v.label is None]
    proofs = [
        dataclasses.replace(
            proof,
            label=records.Label(
                score=verdict.label,
                source="auto",
                scale="auto",
                rater=stage.judge,
                votes=verdict.votes,
                rubric=f"I_v@{run.roles.verifier.template.fingerprint}",
            ),
        )
        for proof, verdict in decided
        if verdict.label is not None
    ]
    waiting = run.parts(f"{stage.name}{UNDECIDED}")
    waiting.write_only(records.to_lines([proof for proof, _ in undecided]))
    parts, last = run.parts(stage.name), len(chunks) + 1
    if processes.is_first():
        parts.write_part(storage.part_name(last), records.to_lines(proofs))
    run.commit(parts, last)
    means: dict[str, list[float]] = {
        "coverage": [v.label is not None for _, v in found],
        "mean_label": [p.label.score for p in proofs if p.label is not None],
        "disagreement": [v.disagreement for _, v in found],
    }
    return {
        "candidates": float(len(candidates)),
        "labelled": float(len(decided)),
        "undecided": float(len(undecided)),
        **{name: float(np.mean(values)) for name, values in means.items() if values},
    }


def _samples(
    stage: AutolabelStage, proof: records.Proof, found: roles.AutoLabelled
) -> list[records.Sample]:
    return roles.auto_label_samples(
        found,
        f"{stage.name}/{proof.id}",
        stage=stage.name,
        step=0,
        problem_id=proof.problem_id,
        target=proof.id,
        statement=proof.statement,
        proof=proof.text,
    )


def _verdicts(samples: Sequence[records.Sample], rule: reward.AutoLabelRule) -> dict[str, _Verdict]:
    """By proof, from the records alone, so that it does not matter which process asked."""
    judged: dict[str, list[tuple[float, Sequence[float]]]] = {}
    for sample in samples:
        if sample.role == roles.VERIFIER:
            heard = judged.setdefault(sample.target, [])
            if sample.score is not None:
                heard.append((sample.score, sample.meta_votes))
    return {
        proof: _Verdict(roles.label_of(heard, rule), tuple(score for score, _ in heard))
        for proof, heard in judged.items()
    }
