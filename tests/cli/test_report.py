"""mathv2-report as it is called."""

import pytest

from mathv2_jax.cli import report as command
from mathv2_jax.cli import shell
from tools import report_runs


def call(capsys, *flags):
    code = command.main(["mathv2-report", *map(str, flags)])
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.fixture
def workdir(tmp_path):
    report_runs.make(tmp_path / "run", 100)
    return tmp_path / "run"


def test_a_report_lies_in_its_run_unless_told_otherwise(capsys, workdir, tmp_path):
    code, out, err = call(capsys, f"--workdir={workdir}")
    assert (code, err) == (shell.FINISHED, "")
    assert out.endswith(f"stages with curves 2: {workdir / 'report' / 'index.html'}\n")
    assert (workdir / "report" / "index.html").is_file()
    code, out, _ = call(capsys, f"--workdir={workdir}", f"--out={tmp_path / 'there'}")
    assert code == shell.FINISHED and (tmp_path / "there" / "data" / "index.js").is_file()


@pytest.mark.parametrize(
    "flags, said",
    [
        ([], "--workdir=... must be given"),
        (["--workdir=/nowhere/at/all"], "there is no such folder"),
        (["--workdir=.", "more"], "unexpected argument 'more'"),
        (["--workdri=."], "workdri"),
    ],
)
def test_bad_usage_is_one_line(capsys, flags, said):
    code, out, err = call(capsys, *flags)
    assert (code, out) == (shell.BAD_INPUT, "")
    assert err.startswith("mathv2-report: ") and said in err and err.count("\n") == 1


def test_damage_is_one_line_that_names_the_file(capsys, workdir):
    (workdir / "metrics.jsonl").write_text("{\n")
    code, _, err = call(capsys, f"--workdir={workdir}")
    assert code == shell.BAD_INPUT
    assert "metrics.jsonl, line 1 is damaged" in err and err.count("\n") == 1


def test_help_says_what_is_made(capsys):
    code, out, _ = call(capsys, "--help")
    assert code == shell.FINISHED
    assert "index.html" in out and "--workdir" in out


def test_a_folder_that_may_not_be_written_is_no_bug(capsys, workdir, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = call(capsys, f"--workdir={workdir}", f"--out={tmp_path / 'file'}")
    assert code == shell.FAILED and err.count("\n") == 1
