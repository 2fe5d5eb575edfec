"""What refiners are shown: attempts of earlier stages that leave something to mend.

That reinforcement learning asks for refinements is ours; the paper refines at test time alone, with
a generator whose training it says no more about.
"""

from collections.abc import Iterator, Sequence

from mathv2_jax import records, roles
from mathv2_jax.stages import run as run_lib


def with_issues(run: run_lib.Run, stages: Sequence[str]) -> list[records.Analysis]:
    """Proofs of these stages, each with an analysis that reports issues, in the order of records.

    Of a generator's answer that is its own; of a verifier's the proof is what it was asked about,
    and so is that of a judge. The same analysis of the same proof counts once. `parents` are the
    samples, and the proof, that are shown.
    """
    found: dict[str, records.Analysis] = {}
    for stage in stages:
        for sample in run.samples(stage):
            for made in _of_sample(run, sample):
                found.setdefault(made.id, made)
    return list(found.values())


def _of_sample(run: run_lib.Run, sample: records.Sample) -> Iterator[records.Analysis]:
    if sample.outcome is not records.Outcome.PARSED or sample.score in (None, 1.0):
        return
    if sample.role == roles.VERIFIER:
        proof, text, parents = sample.proof, sample.text, (sample.target, sample.id)
    elif sample.role == roles.GENERATOR:
        written = run.roles.generator.read(sample.text)
        assert written is not None, f"sample {sample.id} was parsed when it was written"
        proof, text, parents = written.body, written.self_analysis, (sample.id,)
    else:
        return
    yield records.Analysis(
        id=records.content_id("analysis", sample.statement, proof, text),
        problem_id=sample.problem_id,
        proof_id=records.content_id("proof", sample.statement, proof),
        statement=sample.statement,
        proof=proof,
        text=text,
        score=sample.score or 0.0,
        source=sample.stage,
        parents=parents,
    )
