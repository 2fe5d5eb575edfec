"""A run's folder becomes a folder of files: whole, deterministic, and safe to open."""

import json
import pathlib
import re

import pytest
from etils import epath

from mathv2_jax import records, storage
from mathv2_jax.report import site
from tests.report.test_cases import PROBLEM, TEXT, generated
from tests.report.test_scripts import read
from tools import report_runs

ASSETS = pathlib.Path(site.__file__).parent / "assets"


def table(folder, *items, step=1):
    parts = storage.Parts(folder)
    parts.write_part(storage.part_name(step), records.to_lines(items))
    parts.commit(step)


@pytest.fixture
def workdir(tmp_path):
    folder = tmp_path / "run"
    storage.write_whole(folder / "records" / "input" / "p.jsonl", records.to_lines([PROBLEM]))
    table(folder / "records" / "gen", generated("a"))
    return folder


def write(workdir, name="report"):
    return site.write(epath.Path(workdir), epath.Path(workdir.parent / name))


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_same_records_give_the_same_bytes(tmp_path):
    report_runs.make(tmp_path / "run", 300)
    first, again = write(tmp_path / "run", "one"), write(tmp_path / "run", "two")
    assert (first.problems, first.proofs, first.remarks) == (
        again.problems,
        again.proofs,
        again.remarks,
    )
    assert first.proofs > 30 and first.remarks > 200
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_a_site_that_is_there_follows_the_run_and_keeps_no_old_texts(workdir):
    write(workdir)
    before = files(workdir.parent / "report")
    table(workdir / "records" / "gen", generated("b", index=1), step=2)
    assert write(workdir).proofs == 2
    after = files(workdir.parent / "report")
    old, new = ({n for n in each if "texts-" in n} for each in (before, after))
    assert len(old) == len(new) == 1 and old != new


def test_parts_that_are_not_committed_do_not_count(workdir):
    more = records.to_lines([generated("b", index=1)])
    storage.write_whole(workdir / "records" / "gen" / storage.part_name(2), more)
    assert write(workdir).proofs == 1


def test_a_run_that_has_only_metrics_has_curves(tmp_path):
    row = json.dumps({"stage": "sft", "step": 1, "loss": 1.0})
    storage.write_whole(tmp_path / "run" / "metrics.jsonl", f"{row}\n".encode())
    made = write(tmp_path / "run")
    assert (made.problems, made.stages) == (0, 1)
    drawn = read((tmp_path / "report" / "data" / "curves.js").read_bytes())[2]
    stage = {"name": "sft", "steps": [1], "every": 1, "scalars": [["loss", [1.0]]]}
    assert drawn == {"training": [stage], "search": None}


def test_nothing_to_show_is_an_error_and_writes_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        write(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither records nor metrics"):
        write(tmp_path / "empty")
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("place", ["input/p.jsonl", "input/experts/e.jsonl"])
@pytest.mark.parametrize("line", [b'{"kind": ', b"[]", b"\xff", b"[" * 100_000])
def test_a_damaged_line_names_its_file(workdir, place, line):
    storage.write_whole(workdir / "records" / place, b'{"kind": "Other"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=f"{place}, line 2 is damaged"):
        write(workdir)


def test_a_record_that_lacks_a_field_names_its_file(workdir):
    storage.write_whole(workdir / "records" / "input" / "p.jsonl", b'{"kind": "Problem"}\n')
    with pytest.raises(ValueError, match=r"p\.jsonl, line 1 is damaged \(Problem lacks"):
        write(workdir)


def test_a_damaged_part_is_named(workdir):
    name = storage.part_name(1)
    (workdir / "records" / "gen" / name).write_bytes(b"{}\n")
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        write(workdir)


def test_the_name_of_a_run_is_text(tmp_path):
    folder = tmp_path / "<script>&amp;"
    table(folder / "records" / "gen", generated("a", text=TEXT))
    write(folder)
    page = (tmp_path / "report" / "index.html").read_text()
    assert "<title>&lt;script&gt;&amp;amp;</title>" in page
    assert "<script>&" not in page


def test_the_page_allows_no_code_but_its_own_files():
    page = (ASSETS / "index.html").read_text()
    policy = re.search('Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy[1].split(";"))
    assert rules["default-src"] == rules["connect-src"] == rules["base-uri"] == "'none'"
    assert rules["script-src"] == rules["style-src"] == "'self'"
    assert rules["require-trusted-types-for"] == "'script'"
    assert not re.search(r"<script(?! (defer )?src=\"(assets|data)/)|\son\w+=|style=", page)
    assert not re.search("https?://", page)


def test_the_page_never_reads_text_as_html():
    ways = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|srcdoc"
    for path in ASSETS.glob("*.js"):
        assert not re.search(ways, path.read_text(encoding="utf-8")), path.name


def test_every_file_that_the_page_loads_is_shipped(workdir):
    write(workdir)
    out = workdir.parent / "report"
    page = (out / "index.html").read_text()
    for name in re.findall('(?:src|href)="((?:assets|data)/[^"]*)"', page):
        assert (out / name).is_file(), name
    styles = (out / "assets" / "katex" / "katex.min.css").read_text()
    for name in re.findall(r"url\((fonts/[^)]*\.woff2)\)", styles):
        assert (out / "assets" / "katex" / name).is_file(), name
