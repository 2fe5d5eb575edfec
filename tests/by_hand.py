"""Texts, tasks, answers and records made by hand for the tests of stages."""

from mathv2_jax import records, roles
from mathv2_jax.records import Finish
from mathv2_jax.stages import scoring, tasks
from mathv2_jax.text import parse

VERDICTS = {score: parse.write_analysis(f"Found {score}.", score) for score in records.SCORES}
RATINGS = {score: parse.write_meta_analysis(f"Rated {score}.", score) for score in records.SCORES}
NOISE = "I do not know."
PROOF = "Step 1: A implies B"
GENERATIONS = {score: parse.write_generation(PROOF, text) for score, text in VERDICTS.items()}
STATEMENT = "Given: A. Rules: (1) A implies B. Show: B."


def task(role: roles.Role, label: float | None = None, **fields) -> tasks.Task:
    """A task of a role."""
    values = dict(problem_id="p", target="t", statement=STATEMENT, proof=PROOF, prompt=(7, 8))
    return tasks.Task(role=role, label=label, **{**values, **fields})


def answer(
    role: roles.Role, text: str, label: float | None = None, finish: Finish = Finish.STOP
) -> scoring.Answered:
    """One answer to a task, three tokens long."""
    response = records.Response(
        request_id="r",
        index=0,
        token_ids=(5, 6, 7),
        logprobs=(-0.5, -0.5, 0.0),
        text=text,
        final_text=text,
        thinking_text="",
        finish=finish,
        parameter_version="rl@3",
    )
    return scoring.Answered(task(role, label), roles.understand(role, response))


def proof(name: str, text: str = PROOF, score: float | None = None, source: str = "human"):
    """A proof of D_v, or one without a label."""
    label = None if score is None else records.Label(score=score, source=source)
    return records.Proof(id=name, problem_id="p", statement=STATEMENT, text=text, label=label)


def sample(name: str, text: str, role: str = roles.VERIFIER, **fields) -> records.Sample:
    """One recorded answer, named stage/step/group/place."""
    values = dict(
        stage=name.split("/")[0],
        step=int(name.split("/")[1]),
        problem_id="p",
        target="t",
        index=0,
        statement=STATEMENT,
        proof=PROOF if role == roles.VERIFIER else "",
        analysis="",
        outcome=records.Outcome.PARSED,
        finish=Finish.STOP,
        num_tokens=3,
        checkpoint="policy@0",
    )
    return records.Sample(id=name, role=role, text=text, **{**values, **fields})
