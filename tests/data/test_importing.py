"""Files of others into a folder of records: each row is taken rightly or named, nothing is lost."""

import collections
import csv
import dataclasses
import json
import pathlib
import random
import string
from typing import Any

import hypothesis
import pytest
from array_record.python import array_record_module
from etils import epath
from hypothesis import strategies as st

from mathv2_jax import records
from mathv2_jax.data import graded, importing
from mathv2_jax.data import store as store_lib
from mathv2_jax.text import parse

FULL = importing.ImportConfig(scale="full-marks")


def letters(name: str, number: int = 60) -> str:
    return "".join(random.Random(name).choices(string.ascii_lowercase + " ", k=number))


def good(name: str, **fields: Any) -> dict[str, Any]:
    body = dict(id=name, problem=letters(f"x{name}"), proof=letters(f"y{name}"), score=1)
    return {**body, **fields}


def lines(rows: list[Any]) -> bytes:
    return b"".join(
        row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows
    )


def take(
    folder: pathlib.Path, data: bytes, config: importing.ImportConfig = FULL, name: str = "a.jsonl"
) -> tuple[importing.Report, store_lib.Store]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
    store = store_lib.Store(folder / "records")
    return importing.import_files(store, [epath.Path(folder / name)], config), store


def loose(**fields: Any) -> importing.ImportConfig:
    return dataclasses.replace(FULL, max_bad_share=1.0, **fields)


# Rows with a fault, and rows that look as if they had one: (how to spoil, rule or None).
BIG = "z" * 10_000_000
SPOILED: dict[str, tuple[Any, str | None]] = {
    "truncated JSON": (lambda r: lines([r])[:-20] + b"\n", "malformed"),
    "no object": (lambda r: b"[1, 2]\n", "malformed"),
    "bytes that are no UTF-8": (lambda r: b'{"problem": "\xff\xfe"}\n', "malformed"),
    "nested absurdly": (lambda r: b'{"problem": ' + b"[" * 100_000 + b"\n", "malformed"),
    "NaN as a score": (lambda r: {**r, "score": float("nan")}, "malformed"),
    "0.3 as a score": (lambda r: {**r, "score": 0.3}, "malformed"),
    "a boolean as a score": (lambda r: {**r, "score": True}, "malformed"),
    "a word as a score": (lambda r: {**r, "score": "good"}, "malformed"),
    "a list as a proof": (lambda r: {**r, "proof": ["Step 1"]}, "malformed"),
    "a number as a problem": (lambda r: {**r, "problem": 7}, "malformed"),
    "no problem": (lambda r: {k: v for k, v in r.items() if k != "problem"}, "malformed"),
    "a blank proof": (lambda r: {**r, "proof": " \n\t "}, "malformed"),
    "a lone surrogate": (lambda r: {**r, "proof": r["proof"] + "\ud800"}, "malformed"),
    "10 MB": (lambda r: {**r, "proof": BIG}, "too-long"),
    "marks beside another score": (
        lambda r: {**r, "human_score": 2, "human_max": 7},
        "malformed",
    ),
    "the id of another row": (lambda r: {**r, "id": "good-0"}, "duplicate-id"),
    "headings inside": (
        lambda r: {**r, "proof": f"{r['proof']}\n## Solution\n## Self Evaluation\n"},
        None,
    ),
    "a box and a verdict inside": (
        lambda r: {**r, "proof": r["proof"] + parse.write_analysis("Fine.", 1.0)},
        None,
    ),
    "text of control tokens": (
        lambda r: {**r, "proof": f"{r['proof']}<|assistant|></s><think>"},
        None,
    ),
    "an exotic end of line": (lambda r: {**r, "proof": f"{r['proof']}\u2028\u0085\r\x0b."}, None),
}


def test_a_thousand_spoiled_rows_are_named_or_taken_rightly_and_the_good_ones_survive(tmp_path):
    draw = random.Random(0)
    kinds = list(SPOILED) * 50
    for kind in ["10 MB", "nested absurdly"]:  # a few of these are enough for the disk
        kinds = [k for k in kinds if k != kind] + [kind] * 3
    kinds += ["truncated JSON"] * (1000 - len(kinds))
    rows: list[tuple[str | None, Any]] = [(None, good(f"good-{n}")) for n in range(1000)]
    rows += [(kind, SPOILED[kind][0](good(f"bad-{n}"))) for n, kind in enumerate(kinds)]
    rows[1:] = draw.sample(rows[1:], len(rows) - 1)  # good-0 stays first: another takes its id
    report, store = take(tmp_path, lines([row for _, row in rows]), loose())
    assert report.rows == 2000
    expected = {
        number: SPOILED[kind][1]
        for number, (kind, _) in enumerate(rows, start=1)
        if kind is not None and SPOILED[kind][1] is not None
    }
    assert {r.line: r.rule for r in report.rejects} == expected
    assert all(r.reason and r.file.endswith("a.jsonl") for r in report.rejects)
    kept = {record.text: record for record in store.of(records.Proof)}
    accepted = [row for kind, row in rows if kind is None or SPOILED[kind][1] is None]
    assert set(kept) == {row["proof"].strip() for row in accepted}
    assert len(store.of(records.Proof)) == len(accepted) == 1000 + 200
    named = [
        records.from_json(store_lib.Reject, x)
        for x in (tmp_path / "records" / "rejects.jsonl").read_text().splitlines()
    ]
    assert named == report.rejects


def test_too_many_bad_rows_fail_the_command_and_leave_nothing_behind(tmp_path):
    rows = [good(f"g{n}") for n in range(18)] + [b"{\n"] * 2
    with pytest.raises(
        importing.TooManyBadError, match=r"2 of 20 rows are bad.*0\.05(?s:.*)line 19"
    ):
        take(tmp_path, lines(rows))
    assert not (tmp_path / "records").exists()
    report, store = take(tmp_path, lines(rows), dataclasses.replace(FULL, max_bad_share=0.1))
    assert report.kept == {"Proof": 18} and len(store.of(records.Proof)) == 18


def test_a_file_that_cannot_be_read_leaves_nothing_behind_of_the_files_before_it(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines([good("a")]))
    store = store_lib.Store(tmp_path / "records")
    files = [epath.Path(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    with pytest.raises(FileNotFoundError, match=r"b\.jsonl does not exist"):
        importing.import_files(store, files, FULL)
    with pytest.raises(ValueError, match="ends in one of .json, .jsonl, .csv"):
        importing.import_files(store, [files[0], epath.Path(tmp_path)], FULL)
    assert not list(store)


def test_the_same_rows_as_json_lines_csv_parquet_and_array_record(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [good(f"r{n}", human_score=float(n % 8), human_max=7) for n in range(16)]
    for row in rows:
        del row["score"]
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    out = array_record_module.ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    for row in rows:
        out.write(json.dumps(row).encode())
    out.close()
    found = []
    config = dataclasses.replace(FULL, score_map=graded.ScoreMap(marks=True))
    for name in ("a.jsonl", "a.csv", "a.parquet", "a.array_record"):
        store = store_lib.Store(tmp_path / name.replace(".", "-"))
        report = importing.import_files(store, [epath.Path(tmp_path / name)], config)
        assert report.kept == {"Proof": 16} and not report.rejects
        found.append(
            [(r.id, r.label, r.source, r.parents[0][16:]) for r in store.of(records.Proof)]
        )
    assert found[0] == found[1] == found[2] == found[3]
    assert collections.Counter(label.score for _, label, _, _ in found[0] if label) == {
        0.0: 12,
        0.5: 2,
        1.0: 2,
    }


def test_columns_may_have_other_names_and_grades_their_own_map(tmp_path):
    rows = [
        dict(question=letters(f"q{n}"), answer_text=letters(f"p{n}"), grade=n) for n in range(8)
    ]
    config = loose(
        fields={"problem": "question", "proof": "answer_text", "score": "grade"},
        score_map=graded.ScoreMap.parse("7:1,6:0.5,5:0,4:0,3:0"),
    )
    report, store = take(tmp_path, lines(rows), config)
    scores = [r.label.score for r in store.of(records.Proof) if r.label]
    assert scores == [0.0, 0.0, 0.0, 0.5, 1.0]
    assert [r.line for r in report.rejects] == [1, 2, 3]


def test_evaluation_problems_are_refused_in_training_files_exact_and_near(tmp_path):
    take(tmp_path, lines([dict(id="e", problem=letters("secret", 200))]), loose(evaluation=True))
    copies = [
        good("exact", problem=letters("secret", 200).upper()),
        good("near", problem=letters("secret", 200) + " Show all steps of it."),
        good("other"),
    ]
    report, store = take(tmp_path, lines(copies), loose(), "b.jsonl")
    assert [(r.id, r.rule) for r in report.rejects] == [
        ("exact", "evaluation"),
        ("near", "evaluation"),
    ]
    assert "a.jsonl, line 1" in report.rejects[0].reason
    assert report.num_bad == 0 and len(store.of(records.Proof)) == 1
    late = lines([dict(id="l", problem=copies[2]["problem"])])
    report, _ = take(tmp_path, late, loose(evaluation=True), "c.jsonl")
    assert report.notes == [
        "1 records for training are about problems that are kept for evaluation: "
        "runs leave them out"
    ]


def test_a_file_is_imported_once_and_its_copies_are_duplicates(tmp_path):
    rows = lines([good("a"), good("b")])
    take(tmp_path, rows)
    report, store = take(tmp_path, rows)
    assert report.rows == 0 and "imported before" in report.notes[0]
    report, store = take(tmp_path, rows + lines([good("c")]))
    assert [r.rule for r in report.rejects] == ["duplicate", "duplicate"]
    assert len(store.of(records.Proof)) == 3


def test_a_label_that_comes_later_takes_the_place_of_none_and_a_persons_that_of_a_machine(tmp_path):
    unlabelled = {k: v for k, v in good("a").items() if k != "score"}
    take(tmp_path, lines([unlabelled]))
    proof = store_lib.Store(tmp_path / "records").of(records.Proof)[0]
    auto = dataclasses.replace(proof, label=records.Label(score=0.5, source="auto"))
    take(tmp_path, records.to_lines([auto]), name="b.jsonl")
    report, store = take(tmp_path, lines([good("a")]), name="c.jsonl")
    assert not report.rejects
    (latest,) = [r for r in store.latest() if isinstance(r, records.Proof)]
    assert latest.label is not None and latest.label.source == "human"
    report, _ = take(tmp_path, lines([good("a", score=0)]), loose(), "d.jsonl")
    (reject,) = report.rejects
    assert reject.rule == "conflicting-label" and "which is a 1 (full-marks)" in reject.reason


def test_a_false_variant_is_a_problem_of_its_own_in_the_same_cluster(tmp_path):
    row = dict(id="a", problem=letters("true"), false_variant=letters("false"), answer="4")
    _, store = take(tmp_path, lines([row]))
    true, false = store.of(records.Problem)
    assert (true.answer, true.false_variant_of) == ("4", None)
    assert false.false_variant_of == true.id and false.cluster == true.cluster


def test_records_that_this_program_wrote_are_taken_as_they_are(tmp_path):
    take(tmp_path / "1", lines([good("a"), good("b")]))
    first = store_lib.Store(tmp_path / "1" / "records").of(records.Proof)
    _, store = take(tmp_path / "2", records.to_lines(first))
    second = store.of(records.Proof)
    assert [dataclasses.replace(r, parents=()) for r in second] == [
        dataclasses.replace(r, parents=()) for r in first
    ]
    assert [r.parents[1:] for r in second] == [("row:a",), ("row:b",)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(score=0.3), "score 0.3 is not one of"),
        (dict(label=dict(score=1.0, source="auto", votes=[0.0, 100.0])), "vote of a label"),
        (dict(kind=[]), "has no known scale"),
        (dict(schema=9), "this program reads"),
    ],
)
def test_a_record_of_ours_must_be_one(tmp_path, change, reason):
    row = dict(kind="Analysis", schema=1, id="i", problem_id="p", proof_id="q", statement="S")
    row |= dict(proof="P", text=parse.write_analysis("Fine.", 1.0), score=1.0)
    report, _ = take(tmp_path, lines([{**row, **change}]), importing.ImportConfig(max_bad_share=1))
    assert [r.rule for r in report.rejects] == ["malformed"]
    assert reason in report.rejects[0].reason


def test_one_id_of_two_texts_is_no_duplicate(tmp_path):
    take(tmp_path / "1", lines([good("a"), good("b")]))
    first, second = store_lib.Store(tmp_path / "1" / "records").of(records.Proof)
    forged = dataclasses.replace(second, id=first.id)
    report, store = take(
        tmp_path / "2", records.to_lines([first, forged]), importing.ImportConfig(max_bad_share=1)
    )
    assert [r.rule for r in report.rejects] == ["duplicate-id"]
    assert "another text" in report.rejects[0].reason and len(store.of(records.Proof)) == 1


def test_settings_for_rows_of_others_are_refused_for_ours_or_said_to_be_unused(tmp_path):
    take(tmp_path / "1", lines([good("a")]))
    data = records.to_lines(store_lib.Store(tmp_path / "1" / "records").of(records.Proof))
    marks = loose(score_map=graded.ScoreMap(marks=True))
    report, _ = take(tmp_path / "2", data, marks)
    assert "import it without --score_map" in report.rejects[0].reason
    report, _ = take(tmp_path / "3", data, FULL)
    assert report.notes == ["1 records of ours keep their own source and scale"]


EVALUATION = importing.ImportConfig(scale="full-marks", evaluation=True)
WITHDRAW = importing.ImportConfig(scale="full-marks", withdraw=True)


def marked(store, use):
    return {kind.__name__ for kind, _ in store.marked(use)}


def test_evaluation_counts_for_texts_that_were_there_before(tmp_path):
    rows = [dict(id="p", problem=letters("secret", 200)), good("q")]
    take(tmp_path, lines(rows))
    report, store = take(tmp_path, lines(rows), EVALUATION, "b.jsonl")
    assert not report.rejects
    assert report.notes == [
        "2 records that were there are for evaluation from now on",
        "2 records for training are about problems that are kept for evaluation: "
        "runs leave them out",
    ]
    assert marked(store, "evaluation") == {"Problem", "Proof"}
    (proof,) = [r for r in store.latest() if isinstance(r, records.Proof)]
    assert proof.label is not None and proof.label.score == 1.0
    near = good("n", problem=letters("secret", 200) + " Show it.")
    report, _ = take(tmp_path, lines([near]), loose(), "c.jsonl")
    assert [r.rule for r in report.rejects] == ["evaluation"]
    report, _ = take(tmp_path, lines(rows), dataclasses.replace(EVALUATION, near=0.9), "d.jsonl")
    assert [r.rule for r in report.rejects] == ["duplicate", "duplicate"]


def test_withdrawal_counts_for_texts_that_were_there_before(tmp_path):
    rows = lines([dict(id="p", problem=letters("secret", 200))])
    take(tmp_path, rows, EVALUATION)
    near = lines([good("n", problem=letters("secret", 200) + " Show it.")])
    report, _ = take(tmp_path, near, loose(), "b.jsonl")
    assert [r.rule for r in report.rejects] == ["evaluation"]
    report, store = take(tmp_path, rows, WITHDRAW, "c.jsonl")
    assert report.notes == ["1 records that were there are withdrawn from evaluation from now on"]
    report, store = take(tmp_path, near, FULL, "d.jsonl")
    assert not report.rejects and len(store.of(records.Proof)) == 1


def test_a_neighbour_of_an_evaluation_problem_is_refused_whoever_is_nearer(tmp_path):
    text = letters("window", 400)
    between, evaluated, wanted = text[:300], text[60:360], text[20:320]
    take(tmp_path, lines([good("t", problem=between)]))
    take(tmp_path, lines([dict(id="e", problem=evaluated)]), EVALUATION, "b.jsonl")
    report, _ = take(tmp_path, lines([good("n", problem=wanted)]), loose(), "c.jsonl")
    assert [r.rule for r in report.rejects] == ["evaluation"]


def test_a_proof_of_a_false_statement_is_never_right(tmp_path):
    variant = letters("false", 80)
    take(tmp_path, lines([dict(id="a", problem=letters("true", 80), false_variant=variant)]))
    rows = [good("r", problem=variant, score=1), good("w", problem=variant, score=0)]
    report, store = take(tmp_path, lines(rows), loose(), "b.jsonl")
    assert [(r.id, r.rule) for r in report.rejects] == [("r", "conflicting-label")]
    assert [p.label.score for p in store.of(records.Proof)] == [0.0]


def test_rows_without_an_id_have_none(tmp_path):
    rows = [{**good("a"), "id": None}, {**good("b"), "id": None}]
    report, store = take(tmp_path, lines(rows))
    assert not report.rejects and len(store.of(records.Proof)) == 2


def test_a_column_that_no_row_has_is_an_error_and_so_is_a_score_of_nothing(tmp_path):
    typo = dataclasses.replace(FULL, fields={"score": "graed"})
    with pytest.raises(ValueError, match=r"--field=score=graed: .* has a column 'graed'; there"):
        take(tmp_path / "1", lines([good("a")]), typo)
    row = good("a")
    row["prof"] = row.pop("proof")
    report, _ = take(tmp_path / "2", lines([row]), loose())
    assert "no proof or analysis that it could be of" in report.rejects[0].reason


def test_csv_may_have_spaces_in_its_header_long_cells_and_what_json_lines_say(tmp_path):
    long = "z" * 200_000
    text = f'id, problem , proof,score\na,"{letters("p")}",{long},.5\n'
    _, store = take(tmp_path / "1", text.encode(), name="a.csv")
    (proof,) = store.of(records.Proof)
    assert proof.text == long and proof.label.score == 0.5
    critique = "It fails. <verification>false</verification>"
    text = "problem,proof,analysis,human_agrees_with_analyst,issues\n"
    text += f"{letters('p')},{letters('q')},{critique},True,\n"
    text += f'{letters("r")},{letters("s")},An issue,,"[""a gap""]"\n'
    _, store = take(tmp_path / "2", text.encode(), name="a.csv")
    judged, listed = store.of(records.Analysis)
    assert judged.label.score == 1.0 and listed.score == 0.0


def test_a_byte_order_mark_hides_no_row(tmp_path):
    _, store = take(tmp_path, b"\xef\xbb\xbf" + lines([good("a")]))
    assert len(store.of(records.Proof)) == 1


def test_what_an_analysis_brings_of_its_proof_is_kept_though_the_analysis_was_there(tmp_path):
    row = {**good("a"), "analysis": parse.write_analysis("Fine.", 1.0)}
    row.pop("score")
    take(tmp_path, lines([row]))
    marks = dataclasses.replace(FULL, score_map=graded.ScoreMap(marks=True))
    judged = {**row, "human_score": 7, "human_max": 7}
    report, store = take(tmp_path, lines([judged]), marks, "b.jsonl")
    assert not report.rejects
    assert [p.label.score for p in store.of(records.Proof)] == [1.0]


def test_numbers_that_no_float_holds_are_named(tmp_path):
    huge = json.dumps(good("a")).replace('"score": 1', f'"score": {10**400}').encode() + b"\n"
    deep = lines([good("b", score="[" * 100_000)])
    endless = json.dumps(good("c")).replace('"score": 1', '"score": Infinity').encode() + b"\n"
    mapped = loose(score_map=graded.ScoreMap(pairs=((7.0, 1.0),), otherwise=0.0))
    report, _ = take(tmp_path, huge + deep + endless, mapped)
    assert [r.rule for r in report.rejects] == ["malformed"] * 3


def test_only_a_changed_limit_of_bad_rows_imports_nothing_again(tmp_path):
    rows = lines([good("a"), good("b", score=0.3)])
    take(tmp_path, rows, loose())
    report, _ = take(tmp_path, rows, dataclasses.replace(FULL, max_bad_share=0.5))
    assert report.rows == 0 and not report.rejects


_LEAF = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
_KEYS = st.text(max_size=3)
_ANY = st.recursive(
    _LEAF, lambda x: st.lists(x, max_size=2) | st.dictionaries(_KEYS, x, max_size=2)
)
_NAMES = st.sampled_from(["Problem", "Proof", "Analysis", "Import", 1, 10**400, "[[[", "1e999"])
_FIELDS = st.sampled_from((*importing.FIELDS, "kind", "schema", "statement", "text", "label"))


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    st.lists(st.dictionaries(_FIELDS, _ANY | _NAMES, max_size=6), max_size=5),
    st.lists(st.binary(max_size=30), max_size=3),
)
def test_whatever_stands_in_a_file_each_row_is_a_record_or_a_reject(tmp_path_factory, bodies, junk):
    folder = tmp_path_factory.mktemp("any")
    data = b"".join(json.dumps(body).encode() + b"\n" for body in bodies)
    data += b"\n".join(line.replace(b"\n", b" ") for line in junk)
    report, store = take(folder, data, loose())
    rows = len(bodies) + sum(bool(line.replace(b"\n", b" ").strip()) for line in junk)
    assert report.rows == rows
    taken = {store_lib.import_of(r)[1] for r in store if hasattr(r, "parents")}
    assert len(taken) + len({r.line for r in report.rejects} - taken) == rows
