"""The answer stage's own figures: agreement with human labels, where the test proofs have any."""

from mathv2_jax import records
from mathv2_jax.evaluation import held_out
from mathv2_jax.stages import answer


def proof(name: str, score: float | None, scale: str = "full-marks") -> records.Proof:
    label = None
    if score is not None:
        label = records.Label(score=score, source="human", scale=scale)
    return records.Proof(id=name, problem_id="p", statement="S", text=name, label=label)


def sample(target: str, score: float | None, test: str = held_out.VERIFY) -> records.Sample:
    parsed = score is not None
    return records.Sample(
        id=f"after/{test}/{target}",
        role=test,
        stage="after",
        step=0,
        problem_id="p",
        target=target,
        index=0,
        statement="S",
        proof=target,
        analysis="",
        text="",
        outcome=records.Outcome.PARSED if parsed else records.Outcome.UNPARSEABLE,
        finish=records.Finish.STOP,
        num_tokens=1,
        checkpoint="c",
        score=score,
    )


def test_agreement_is_counted_by_scale_and_what_does_not_parse_is_wrong() -> None:
    proofs = [proof("a", 1.0), proof("b", 0.0), proof("c", 0.5), proof("d", 1.0, "opc-5-of-7")]
    samples = [sample("a", 1.0), sample("b", None), sample("c", 0.0), sample("d", 1.0)]
    samples += [sample("a", 0.0, held_out.AUTOLABEL), sample("p", 1.0, held_out.PROVE)]
    found = answer.agreement(samples, proofs)
    assert found == {
        "human/full-marks/parsed": 2 / 3,
        "human/full-marks/accuracy": 1 / 3,
        "human/full-marks/n": 3.0,
        "human/opc-5-of-7/parsed": 1.0,
        "human/opc-5-of-7/accuracy": 1.0,
        "human/opc-5-of-7/n": 1.0,
    }


def test_without_labels_there_is_no_figure() -> None:
    assert answer.agreement([sample("a", 1.0)], [proof("a", None)]) == {}
