"""mathv2-records as it is called: imports, what is there, lineage, and people's labels."""

import dataclasses
import json
import pathlib

import pytest

from mathv2_jax import records, storage
from mathv2_jax.cli import records as command
from mathv2_jax.cli import shell
from mathv2_jax.data import annotation
from mathv2_jax.data import store as store_lib
from tests.data.test_annotation import ITEMS, export


def call(capsys, *flags):
    code = command.main(["mathv2-records", *map(str, flags)])
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    body = [
        dict(
            id=f"r{n}", problem=f"Show that {n} is {n} for all of us.", proof=f"It is {n}.", mark=n
        )
        for n in range(8)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in body))
    return path


def imported(capsys, rows, *more):
    to = rows.parent / "records"
    flags = ("--field=score=mark", "--score_map=marks:7", "--scale=full-marks", *more)
    return to, call(capsys, f"--from={rows}", f"--records={to}", *flags)


def test_an_import_says_what_it_took_and_the_table_shows_it(capsys, rows, tmp_path):
    to, (code, out, err) = imported(capsys, rows)
    assert (code, err) == (shell.FINISHED, "")
    assert "8 rows: Proof 8" in out
    code, out, _ = call(capsys, f"--records={to}", f"--statistics={tmp_path / 's.json'}")
    head, line = out.strip().split("\n")
    assert code == shell.FINISHED
    assert line.split()[:6] == ["proof", "rows", "8", "6", "1", "1"]
    body = json.loads((tmp_path / "s.json").read_text())
    assert body["rows"][0]["scores"] == {"0": 6, "0.5": 1, "1": 1}


def test_rejects_are_shown_and_too_many_are_one_error_and_no_records(capsys, rows):
    with rows.open("a") as file:
        file.write("{\n")
    to, (code, out, err) = imported(capsys, rows)
    assert code == shell.BAD_INPUT and "1 of 9 rows are bad" in err and "line 9" in err
    assert not storage.list_names(to, "*")
    to, (code, out, err) = imported(capsys, rows, "--max_bad_share=0.2")
    assert code == shell.FINISHED and "1 malformed (line 9" in out
    assert len((to / "rejects.jsonl").read_text().splitlines()) == 1


def test_what_was_imported_goes_out_and_in_again(capsys, rows, tmp_path):
    to, _ = imported(capsys, rows)
    out = tmp_path / "out.jsonl"
    assert call(capsys, f"--records={to}", f"--to={out}", "--kind=proof")[0] == shell.FINISHED
    again = tmp_path / "again"
    code, said, _ = call(capsys, f"--from={out}", f"--records={again}")
    assert code == shell.FINISHED and "8 rows: Proof 8" in said
    code, _, err = call(capsys, f"--records={to}", f"--to={out}")
    assert code == shell.BAD_INPUT and "is there already" in err


def test_lineage_names_file_and_line(capsys, rows):
    to, _ = imported(capsys, rows)
    proof = store_lib.Store(to).of(records.Proof)[2]
    code, out, _ = call(capsys, f"--records={to}", f"--lineage={proof.id[:10]}")
    assert code == shell.FINISHED and f"line 3 of {rows}" in out


@pytest.fixture
def one(tmp_path, capsys):
    """A store of one proof with one analysis, without labels, and the project made of it."""
    to, project = tmp_path / "records", tmp_path / "project"
    row = dict(problem="Show that one is one.", proof="It is.")
    rows = [row, row | dict(analysis="It is complete.", verdict=1)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    call(capsys, f"--from={tmp_path / 'a.jsonl'}", f"--records={to}")
    code, out, err = call(capsys, f"--records={to}", f"--annotate={project}")
    assert code == shell.FINISHED and "1 proofs with 1 analyses" in out, err
    return to


def rated(one, capsys, scores, *flags, qualities=None, place=1):
    """Takes back an export of the project, with a score of each rater."""
    (task,) = json.loads((one.parent / "project" / annotation.TASKS).read_text())
    task["annotations"] = []
    other = {"data": task["data"], "annotations": []}
    for given, name in ((scores, "score"), (qualities or {}, "quality_1")):
        for rater, score in given.items():
            choice = {"from_name": name, "type": "choices", "value": {"choices": [score]}}
            task["annotations"].append({"completed_by": rater, "result": [choice]})
    export_file = one.parent / "export.json"
    export_file.write_text(json.dumps([other] * (place - 1) + [task]))
    return call(capsys, f"--records={one}", f"--annotations={export_file}", *flags)


def latest(one, kind=records.Proof):
    (found,) = [r for r in store_lib.Store(one).latest() if isinstance(r, kind)]
    return found


def test_peoples_labels_go_back_into_the_store(capsys, one, tmp_path):
    code, out, err = rated(one, capsys, {1: "0.5", 2: "0.5"}, qualities={1: "1"})
    assert code == shell.FINISHED, err
    assert "proofs: 1 labelled, 0 not decided" in out and "equal 100.0%" in out
    assert latest(one).label.score == 0.5 and latest(one).label.votes == (0.5, 0.5)
    assert latest(one, records.Analysis).label.rubric == "I_mv"
    code, _, err = call(capsys, f"--records={one}", f"--annotate={tmp_path / 'more'}")
    assert code == shell.BAD_INPUT and "no proof without a label, and no analysis" in err


def test_lineage_of_a_label_names_the_task_in_the_export(capsys, one):
    rated(one, capsys, {1: "0.5"}, place=3)
    code, out, _ = call(capsys, f"--records={one}", f"--lineage={latest(one).id}")
    assert code == shell.FINISHED and f"task 3 of {one.parent / 'export.json'}" in out
    assert f"line 1 of {one.parent / 'a.jsonl'}" in out


def test_a_project_is_rated_in_rounds_and_adjudicated(capsys, one, tmp_path):
    assert "1 labelled" in rated(one, capsys, {1: "1"})[1]
    code, out, _ = rated(one, capsys, {1: "1", 2: "0"})
    assert code == shell.FINISHED and "0 labelled, 1 not decided" in out
    assert f"not decided: {latest(one).id}, it stays 1 (human, full-marks by 1)" in out
    code, out, _ = rated(one, capsys, {1: "1", 2: "0"}, "--adjudicate=2")
    assert code == shell.FINISHED and "was 1 (human, full-marks by 1), is 0 (human" in out
    assert latest(one).label.score == 0.0
    assert rated(one, capsys, {1: "1", 2: "0"}, "--adjudicate=1")[0] == shell.FINISHED
    assert latest(one).label.score == 1.0
    assert rated(one, capsys, {1: "1", 2: "0"}, "--adjudicate=2")[0] == shell.FINISHED
    assert latest(one).label.score == 0.0  # back again
    assert rated(one, capsys, {1: "1", 2: "0", 3: "1"})[0] == shell.FINISHED
    assert latest(one).label.votes == (1.0, 0.0, 1.0)
    imports = store_lib.Store(one).of(store_lib.Import)
    assert len({came_by.id for came_by in imports}) == len(imports) == 6
    assert [json.loads(i.settings)["adjudicate"] for i in imports[1:]] == [
        *("majority", "2", "1", "2", "majority")
    ]


def test_the_same_export_again_changes_nothing_and_says_so(capsys, one):
    rated(one, capsys, {1: "1"})
    number = len(list(store_lib.Store(one)))
    code, out, _ = rated(one, capsys, {1: "1"})
    assert code == shell.FINISHED and "1 had their label already" in out
    assert len(list(store_lib.Store(one))) == number


def test_an_undecided_analysis_of_a_decided_proof_goes_out_again(capsys, one, tmp_path):
    rated(one, capsys, {1: "1"}, qualities={1: "1", 2: "0"})
    again = tmp_path / "again"
    code, out, _ = call(capsys, f"--records={one}", f"--annotate={again}")
    assert code == shell.FINISHED and "1 proofs with 1 analyses" in out
    code, _, err = call(capsys, f"--records={one}", f"--annotate={again}2", "--kind=proof")
    assert code == shell.BAD_INPUT and "no proof without a label: there is" in err


def test_a_rating_that_conflicts_with_an_imported_label_is_refused_and_nothing_is_written(
    capsys, one, tmp_path
):
    row = dict(problem="Show that one is one.", proof="It is.", score=1, scale="full-marks")
    (tmp_path / "b.jsonl").write_text(json.dumps(row) + "\n")
    call(capsys, f"--from={tmp_path / 'b.jsonl'}", f"--records={one}")
    number, out_file = len(list(store_lib.Store(one))), tmp_path / "out.jsonl"
    code, out, err = rated(one, capsys, {1: "0"}, f"--to={out_file}", qualities={1: "1"})
    assert code == shell.BAD_INPUT and out == ""
    assert f"Proof {latest(one).id} is 1 (human, full-marks) already" in err
    assert len(list(store_lib.Store(one))) == number and not out_file.exists()


@pytest.fixture
def run(tmp_path):
    """The records of a run, a stage of which waits for people."""
    folder = tmp_path / "records"
    for name, items in (("grade-wanted", ITEMS[:2]), ("label", ITEMS[3:])):
        parts = storage.Parts(folder / name)
        parts.write_part(storage.part_name(1), records.to_lines(items))
        parts.commit(1)
    return folder


def answered(capsys, run, answers, *flags):
    path = run.parent / "export.json"
    path.write_text(json.dumps(export(answers)))
    code, out, err = call(capsys, f"--records={run}", f"--annotations={path}", *flags)
    file = run / "input" / "experts" / "grade.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    found = [records.from_json(records.Proof, line) for line in lines]
    return code, out, err, {p.id: p.label.score for p in found}


def test_peoples_labels_go_to_the_stage_of_a_run_that_waits(capsys, run, tmp_path):
    out_file = tmp_path / "out.jsonl"
    answers = [(0, 1, "1", "0"), (1, 1, "0", None)]
    code, _, err, found = answered(capsys, run, answers, f"--to={out_file}")
    assert code == shell.FINISHED, err
    assert found == {"proof1": 1.0, "proof2": 0.0}
    assert len(out_file.read_text().splitlines()) == 3  # an analysis among them


def test_labels_of_a_runs_analyses_need_a_file_of_their_own(capsys, run, tmp_path):
    code, out, err, found = answered(capsys, run, [(0, 1, "1", "0")])
    assert code == shell.BAD_INPUT and (out, found) == ("", {})
    assert "no stage of this run takes the labels of 1 analyses, such as analysis3" in err
    out_file = tmp_path / "out.jsonl"
    assert answered(capsys, run, [(0, 1, "1", "0")], f"--to={out_file}")[0] == shell.FINISHED
    to = tmp_path / "store"  # the way that the error names
    code, out, _ = call(capsys, f"--records={to}", f"--from={out_file}")
    assert code == shell.FINISHED and "Analysis 1" in out
    assert latest(to, records.Analysis).label.score == 0.0


def test_labels_of_proofs_that_no_stage_waits_for_need_a_file_too(capsys, run):
    storage.remove_folder(run / "grade-wanted")
    parts = storage.Parts(run / "label-undecided")
    parts.write_part(storage.part_name(1), records.to_lines(ITEMS[:2]))
    parts.commit(1)
    code, _, err, _ = answered(capsys, run, [(0, 1, "1", None)])
    assert code == shell.BAD_INPUT and "labels of 1 proofs, such as proof1" in err


def test_a_second_export_for_a_stage_is_merged_into_its_answers(capsys, run):
    assert answered(capsys, run, [(0, 1, "1", None)])[3] == {"proof1": 1.0}
    code, out, _, found = answered(capsys, run, [(1, 2, "0", None)])
    assert code == shell.FINISHED and found == {"proof1": 1.0, "proof2": 0.0}
    assert "2 labels in" in out and "--restart_stage" not in out
    parts = storage.Parts(run / "grade")
    parts.write_part(storage.part_name(1), records.to_lines(ITEMS[:1]))
    parts.commit(1)
    answers = [(0, 1, "1", None), (0, 3, "0", None), (0, 4, "0", None), (1, 2, "0", None)]
    code, out, _, found = answered(capsys, run, answers)
    assert code == shell.FINISHED and found == {"proof1": 0.0, "proof2": 0.0}
    assert "--restart_stage=grade takes these" in out


def test_an_export_that_conflicts_with_a_stages_answers_is_refused(capsys, run):
    answered(capsys, run, [(0, 1, "1", None)])
    code, out, err, found = answered(capsys, run, [(0, 2, "0", None), (1, 2, "0", None)])
    assert code == shell.BAD_INPUT and out == "" and found == {"proof1": 1.0}
    assert "proof1 is 1 (human, full-marks by 1) already" in err and err.count("\n") == 1


def test_an_answer_of_another_hand_that_conflicts_names_its_file(capsys, run):
    answers = run / "input" / "experts"
    for stage, score, rater in (("again", 1.0, "x"), ("grade", 0.0, "1")):
        wanted = storage.Parts(run / f"{stage}-wanted")
        wanted.write_only(records.to_lines(ITEMS[:1]))
        label = records.Label(score=score, source="human", rater=rater)
        line = records.to_lines([dataclasses.replace(ITEMS[0], label=label)])
        storage.write_whole(answers / f"{stage}.jsonl", line)
    code, out, err, _ = answered(capsys, run, [(0, 1, "0", None)])
    assert code == shell.BAD_INPUT and out == ""
    assert f"proof proof1 is 1 (human, full-marks by x) in {answers / 'again.jsonl'}" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--records=... must be given"),
        (("--records=R", "--recods=R"), "Unknown command line flag 'recods'"),
        (("--records=R",), "holds no imported records: make them with mathv2-records --from"),
        (("--records=R", "--lineage=a", "--to=b.jsonl"), "--lineage and --to exclude each other"),
        (("--records=R", "--from=none.jsonl"), "none.jsonl does not exist"),
        (("--records=R", "--from=a.txt"), "ends in one of .json, .jsonl"),
        (("--records=R", "--from=a.jsonl", "--field=proof"), "give OURS=THEIRS"),
        (("--records=R", "--from=a.jsonl", "--field=prof=x"), "ours are id, source"),
        (("--records=R", "--from=a.jsonl", "--kind=proofs"), "--kind=proofs: one of auto"),
        (("--records=R", "--from=a.jsonl", "--score_map=7"), "--score_map=7"),
        (("--records=R", "--annotate=P", "--kind=analysis"), "--kind=analysis: auto, or proof"),
        (("--records=R", "--score_map=marks"), "--score_map are about --from=FILE"),
        (("--records=R", "--analyses=3"), "--analyses are about --annotate=DIR"),
        (("--records=R", "--adjudicate=ann"), "--adjudicate is about --annotations=FILE"),
        (("--records=R", "--lineage="), "--lineage= is empty"),
        (("--records=R", "--from=a.jsonl", "--evaluation", "--withdraw"), "exclude each other"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(capsys, *flags)
    assert code == shell.BAD_INPUT and message in err
    assert err.startswith("mathv2-records: ") and err.count("\n") == 1
    assert not list(pathlib.Path(tmp_path).glob("R/part*"))
