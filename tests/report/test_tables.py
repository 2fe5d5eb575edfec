"""The index and the texts of cases, as the page reads them."""

from mathv2_jax import records
from mathv2_jax.report import cases, tables
from tests.data.test_lineage import sample
from tests.report.test_cases import LABEL, PROBLEM, TEXT, generated, proof
from tests.report.test_scripts import read


def entries(made):
    """The texts of every row of the index, problems first."""
    chunks = {name: read(data)[2] for name, data in made.chunks.items()}
    columns = (made.index["problems"], made.index["cases"])
    return [
        [
            chunks[made.index["chunks"][chunk]][place]
            for chunk, place in zip(each["chunk"], each["place"], strict=True)
        ]
        for each in columns
    ]


def make(*items):
    return tables.make(cases.gather([PROBLEM, *items]))


def test_scores_are_digits_and_what_is_missing_is_null():
    made = make(
        generated("a", rewards={"total": 0.25}, advantage=-0.5),
        sample("a/0", "verifier", "a", score=0.5),
        sample("a/1", "verifier", "a", score=1.0),
        sample("a/m", "meta_verifier", "a", score=0.0),
        proof("p", parents=("a",), label=LABEL),
        generated("b", text="lost", outcome=records.Outcome.LOST),
    )
    rows = made.index["cases"]
    assert {name: values[0] for name, values in rows.items()} == {
        "id": "a",
        "problem": 0,
        "stage": 0,
        "step": 2,
        "number": 0,
        "outcome": 0,
        "tokens": 4,
        "self": 2,
        "votes": "12",
        "metas": "0",
        "auto": 1,
        "person": None,
        "total": 0.25,
        "advantage": -0.5,
        "parents": [],
        "same": None,
        "remarks": 2,
        "chunk": 0,
        "place": 1,
    }
    assert made.index["outcomes"][rows["outcome"][1]] == "lost"
    assert (rows["self"][1], rows["votes"][1], rows["total"][1]) == (None, "", None)


def test_refinements_point_at_their_parents_and_show_what_the_prompt_showed():
    made = make(
        generated("search/0"),
        sample("search/0/0", "verifier", "search/0", score=0.0),
        generated("search/1", step=3, proof="It is so.", analysis="No.", parents=("search/0", "v")),
    )
    rows = made.index["cases"]
    assert rows["parents"] == [[], [0]]
    _, (first, second) = entries(made)
    assert first["shown"] is None
    assert second["shown"] == {"proof": "It is so.", "analysis": "No."}
    assert second["parents"] == ["search/0", "v"]


def test_the_votes_on_a_text_count_for_its_copies():
    made = make(
        generated("a"),
        sample("a/0", "verifier", "a", score=0.5),
        generated("b", index=1),
        generated("c", index=2, text=TEXT.replace("is so", "is not so")),
    )
    rows = made.index["cases"]
    assert rows["votes"] == ["1", "1", ""]
    assert rows["same"] == [None, 0, None]


def test_every_row_finds_its_texts_however_many_chunks_there_are(monkeypatch):
    monkeypatch.setattr(tables.scripts.chunks, "__defaults__", (400,))
    made = make(*(generated(f"a{n}", index=n, text=f"{TEXT} {n}") for n in range(9)))
    assert len(made.chunks) > 3
    problems, found = entries(made)
    assert [problem["statement"] for problem in problems] == ["Show it."]
    assert [entry["text"] for entry in found] == ["It is so."] * 9
    assert [entry["self"][-1] for entry in found] == [str(n) for n in range(9)]


def test_no_text_of_a_record_is_the_name_of_a_field():
    name = "__proto__"
    made = make(
        generated("a", rewards={name: 0.5, "total": 1.0}),
        sample("a/0", "verifier", "a", rewards={name: 0.5}),
    )
    _, (entry,) = entries(made)
    assert entry["rewards"] == [[name, 0.5], ["total", 1.0]]
    assert entry["remarks"][0]["rewards"] == [[name, 0.5]]
