"""What became of refinements is counted by what they refined, hand-worked."""

from experiments.search import repairs
from mathv2_jax import records, roles
from mathv2_jax.text import parse

STATEMENT = "Given: A. Rules: (1) A implies B (2) B implies C (3) D implies C. Show: C."
WHOLE = "Step 1: A implies B\nStep 2: B implies C"
SHORT = "Step 1: A implies B"
FALSE = "Step 1: A implies C"
DETACHED = "Step 1: A implies B\nStep 2: D implies C"


def refinement(before, after, *, step=1, role=roles.GENERATOR, outcome=records.Outcome.PARSED):
    return records.Sample(
        id=f"{before}/{after}",
        role=role,
        stage="search",
        step=step,
        problem_id="p",
        target="p",
        index=0,
        statement=STATEMENT,
        proof=before,
        analysis="",
        text=parse.write_generation(after, parse.write_analysis("So.", 0.0)),
        outcome=outcome,
        finish=records.Finish.STOP,
        num_tokens=9,
        checkpoint="c",
    )


def test_a_proof_is_right_stops_short_or_has_a_fault():
    states = [repairs.state(STATEMENT, p) for p in (WHOLE, SHORT, FALSE, DETACHED, "no steps")]
    assert states == ["right", "stops short", "fault", "fault", "fault"]


def test_refinements_are_counted_by_what_they_refined():
    counts, unreadable = repairs.count(
        [
            refinement("", SHORT, step=0),  # a first proof
            refinement(SHORT, WHOLE, role=roles.VERIFIER),
            refinement(SHORT, WHOLE),
            refinement(SHORT, SHORT),
            refinement(SHORT, DETACHED),
            refinement(FALSE, SHORT),
            refinement(WHOLE, FALSE),
            refinement(WHOLE, "", outcome=records.Outcome.LENGTH),
        ]
    )
    assert unreadable == 1
    assert {name: dict(found) for name, found in counts.items()} == {
        "stops short": {"right": 1, "copy": 1, "fault": 1},
        "fault": {"stops short": 1},
        "right": {"fault": 1},
    }
    lines = repairs.table(counts, unreadable, 1, 2).split("\n")
    assert lines[0] == "1 of 2 problems have a right proof; 1 refinements cannot be read"
    assert lines[4] == "| stops short | 3 | 1 | 1 | 0 | 1 |"


def test_a_folder_that_is_no_search_is_one_line(tmp_path, capsys):
    assert repairs.main(["repairs", f"--search={tmp_path}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
