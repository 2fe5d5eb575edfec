"""Auto-labelling: the newest proofs scored by many analyses and their meta-verification."""

import dataclasses

import numpy as np

from mathv2_jax import metrics, records, reward, roles, storage
from mathv2_jax.stages import run as run_lib

CHUNK = 64  # proofs a part
UNDECIDED = "-undecided"  # the folder of records beside the stage's own


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutolabelStage:
    """Labels up to `num_proofs` of the newest distinct proofs in the records of `proofs_from`.

    All of the newest `num_candidates` are analysed n times; those whose analyses disagree most
    come first (ours: the variance of the parsed scores). The undecided are for humans: proofs
    without a label, in the records of `NAME-undecided`.
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


def run_stage(run: run_lib.Run, stage: AutolabelStage) -> dict[str, float]:
    """Analyse the candidates part by part, then write the labelled proofs, hardest first."""
    candidates = newest_proofs(run, stage.proofs_from, stage.num_candidates)
    run.judge.load(run.variables(stage.judge), stage.judge)
    parts = run.parts(stage.name)
    found: list[tuple[records.Proof, roles.AutoLabelled]] = []
    chunks = [candidates[i : i + CHUNK] for i in range(0, len(candidates), CHUNK)]
    progress = metrics.PartProgress(stage.name, len(chunks))
    for number, chunk in enumerate(chunks, start=1):
        run.check_stop(lambda: None)
        seed = (run.seed, stage.name, number)
        labelled = roles.auto_label(run.judge, run.roles, chunk, stage.rule, seed)
        found.extend(zip(chunk, labelled, strict=True))
        written = [s for p, v in zip(chunk, labelled, strict=True) for s in _samples(stage, p, v)]
        parts.write_part(storage.part_name(number), records.to_lines(written))
        progress.done(number)
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
                votes=tuple(verdict.votes),
            ),
        )
        for proof, verdict in decided
        if verdict.label is not None
    ]
    waiting = run.parts(f"{stage.name}{UNDECIDED}")
    waiting.write_part(storage.part_name(1), records.to_lines([proof for proof, _ in undecided]))
    waiting.commit(1)
    last = len(chunks) + 1
    parts.write_part(storage.part_name(last), records.to_lines(proofs))
    parts.commit(last)
    return {
        "candidates": float(len(candidates)),
        "labelled": float(len(decided)),
        "undecided": float(len(undecided)),
        "coverage": sum(v.label is not None for _, v in found) / max(len(found), 1),
        "mean_label": _mean([p.label.score for p in proofs if p.label is not None]),
        "disagreement": _mean([v.disagreement for _, v in found]),
    }


def _samples(
    stage: AutolabelStage, proof: records.Proof, found: roles.AutoLabelled
) -> list[records.Sample]:
    common = {
        "stage": stage.name,
        "step": 0,
        "problem_id": proof.problem_id,
        "statement": proof.statement,
        "proof": proof.text,
    }
    samples = []
    reporting = iter(found.metas)
    for index, opinion in enumerate(found.analyses):
        name = f"{stage.name}/{proof.id}/{index}"
        metas = next(reporting) if opinion.score is not None and opinion.score < 1.0 else ()
        samples.append(
            roles.make_sample(
                opinion,
                id=name,
                role=roles.VERIFIER,
                target=proof.id,
                index=index,
                analysis="",
                meta_votes=tuple(roles.votes(metas)),
                **common,
            )
        )
        samples += [
            roles.make_sample(
                meta,
                id=f"{name}/{number}",
                role=roles.META_VERIFIER,
                target=name,
                index=number,
                analysis=opinion.text,
                **common,
            )
            for number, meta in enumerate(metas)
        ]
    return samples


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else 0.0
