"""mathv2-records as it is called: imports, what is there, lineage, and people's labels."""

import json
import pathlib

import pytest

from mathv2_jax import records, storage
from mathv2_jax.cli import records as command
from mathv2_jax.cli import shell
from mathv2_jax.data import annotation
from mathv2_jax.data import store as store_lib
from tests.data.test_annotation import export


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


def test_peoples_labels_go_back_into_the_store(capsys, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"problem": "Show that one is one.", "proof": "It is."}\n')
    to, project = tmp_path / "records", tmp_path / "project"
    call(capsys, f"--from={path}", f"--records={to}")
    code, out, _ = call(capsys, f"--records={to}", f"--annotate={project}")
    assert code == shell.FINISHED and "1 proofs with 0 analyses" in out
    tasks = json.loads((project / annotation.TASKS).read_text())
    choice = {"from_name": "score", "type": "choices", "value": {"choices": ["0.5"]}}
    tasks[0]["annotations"] = [{"completed_by": rater, "result": [choice]} for rater in (1, 2)]
    (tmp_path / "export.json").write_text(json.dumps(tasks))
    flags = (f"--records={to}", f"--annotations={tmp_path / 'export.json'}")
    code, out, err = call(capsys, *flags)
    assert code == shell.FINISHED, err
    assert "proofs: 1 labelled, 0 not decided" in out and "equal 100.0%" in out
    (latest,) = [r for r in store_lib.Store(to).latest() if isinstance(r, records.Proof)]
    assert latest.label.score == 0.5 and latest.label.votes == (0.5, 0.5)
    code, _, err = call(capsys, f"--records={to}", f"--annotate={tmp_path / 'more'}")
    assert code == shell.BAD_INPUT and "no proof without a label" in err


def test_peoples_labels_go_to_the_stage_of_a_run_that_waits(capsys, tmp_path):
    from tests.data.test_annotation import ITEMS

    folder = tmp_path / "records"
    for name, items in (("grade-wanted", ITEMS[:2]), ("label", ITEMS[3:])):
        parts = storage.Parts(folder / name)
        parts.write_part(storage.part_name(1), records.to_lines(items))
        parts.commit(1)
    (tmp_path / "export.json").write_text(json.dumps(export([(0, 1, "1", "0"), (1, 1, "0", None)])))
    out_file = tmp_path / "out.jsonl"
    flags = (f"--annotations={tmp_path / 'export.json'}", f"--to={out_file}")
    code, out, err = call(capsys, f"--records={folder}", *flags)
    assert code == shell.FINISHED, err
    lines = (folder / "input" / "experts" / "grade.jsonl").read_text().splitlines()
    found = [records.from_json(records.Proof, line) for line in lines]
    assert [(p.id, p.label.score) for p in found] == [("proof1", 1.0), ("proof2", 0.0)]
    assert len(out_file.read_text().splitlines()) == 3  # an analysis among them


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--records=... must be given"),
        (("--records=R", "--recods=R"), "Unknown command line flag 'recods'"),
        (("--records=R",), "holds no imported records: make them with mathv2-records --from"),
        (("--records=R", "--lineage=a", "--to=b.jsonl"), "--lineage and --to exclude each other"),
        (("--records=R", "--from=none.jsonl"), "none.jsonl does not exist"),
        (("--records=R", "--from=a.txt"), "ends in one of .jsonl"),
        (("--records=R", "--from=a.jsonl", "--field=proof"), "give OURS=THEIRS"),
        (("--records=R", "--from=a.jsonl", "--field=prof=x"), "ours are id, source"),
        (("--records=R", "--from=a.jsonl", "--kind=proofs"), "--kind=proofs: one of auto"),
        (("--records=R", "--from=a.jsonl", "--score_map=7"), "--score_map=7"),
        (("--records=R", "--score_map=marks"), "--score_map are about --from=FILE"),
        (("--records=R", "--from=a.jsonl", "--evaluation", "--withdraw"), "exclude each other"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(capsys, *flags)
    assert code == shell.BAD_INPUT and message in err
    assert err.startswith("mathv2-records: ") and err.count("\n") == 1
    assert not list(pathlib.Path(tmp_path).glob("R/part*"))
