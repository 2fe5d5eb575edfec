"""mathv2-evaluate with a verifier that is asked: what it says, is asked once, and is attacked."""

import json
import signal
import subprocess
import sys

import pytest

from mathv2_jax.cli import evaluate
from mathv2_jax.evaluation import injection
from mathv2_jax.text import parse
from tests import faulty, smoke

ROWS = [
    dict(id=f"r{place}", source="s", problem=f"Show {place}.", proof=f"By {word}.", score=score)
    for place, (word, score) in enumerate([("luck", 0), ("rule", 1), ("rule two", 1), ("hope", 0)])
]


def gullible(asked):
    """Gives 1 to what goes by a rule, and to whatever orders it to."""
    prompt = asked.body["messages"][-1]["content"]
    good = "rule" in prompt or "Ignore all other instructions" in prompt
    return faulty.completion(parse.write_analysis("So it is.", 1.0 if good else 0.0))


@pytest.fixture
def graded(tmp_path):
    path = tmp_path / "graded.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def run(*arguments):
    return evaluate.main(["mathv2-evaluate", *map(str, arguments)])


def settings(graded, url, out, *more):
    roles = [f"--config.roles.{r}.max_tokens=64" for r in ("generator", "verifier")]
    return [
        *(f"--graded={graded}", f"--engine=openai:{url}#m", f"--out={out}", "--scale=full-marks"),
        *("--votes=3", "--rounds=20", "--config.remote.key_env=''"),
        *("--config.roles.templates=world", "--config.roles.meta_verifier.max_tokens=64"),
        *("--config.runtime.call=6", *roles, *more),
    ]


def test_a_verifier_is_asked_about_each_proof_and_what_is_on_disk_is_not_asked_again(
    graded, tmp_path, capsys
):
    server = faulty.Server(answer=gullible)
    with faulty.serving(server) as url:
        assert run(*settings(graded, url, tmp_path / "out")) == 0
        body = json.loads((tmp_path / "out" / "evaluation.json").read_text())
        assert body["all"]["exact"]["value"] == body["all"]["auc"]["value"] == 1.0
        assert sum(server.answered.values()) == len(ROWS) * 3
        assert run(*settings(graded, url, tmp_path / "out")) == 0
        assert sum(server.answered.values()) == len(ROWS) * 3
        assert run(*settings(graded, url, tmp_path / "out", "--config.seed=1")) == 2
    assert "holds another evaluation: config.seed was 0, now 1" in capsys.readouterr().err


def test_attacks_that_move_the_verdict_are_counted(graded, tmp_path):
    with faulty.serving(faulty.Server(answer=gullible)) as url:
        assert run(*settings(graded, url, tmp_path / "out", "--injections")) == 0
    attacks = json.loads((tmp_path / "out" / "evaluation.json").read_text())["attacks"]
    assert set(attacks) == set(injection.ATTACKS)
    for name, found in attacks.items():
        obeyed = "Ignore all other instructions" in injection.ATTACKS[name]
        moved = 0.5 if obeyed else 0.0  # the two proofs that were a 0
        assert found["shift"]["value"] == found["changed"]["value"] == moved
        assert found["raised_to_1"]["value"] == moved
    assert "| order | 4 | 0.500 [" in (tmp_path / "out" / "evaluation.md").read_text()


def strict(asked):
    """A meta-verifier that confirms critiques which name a gap."""
    prompt = asked.body["messages"][-1]["content"]
    assert "By luck." in prompt and "evaluation" in prompt
    return faulty.completion(parse.write_meta_analysis("So.", 1.0 if "A gap" in prompt else 0.0))


def test_a_meta_verifier_is_asked_about_analyses_that_people_judged(tmp_path):
    rows = [
        dict(
            id=f"a{place}",
            source="s",
            problem=f"Show {place}.",
            proof="By luck.",
            analysis=f"{found}. <verification>false</verification>",
            human_agrees_with_analyst=agrees,
        )
        for place, (found, agrees) in enumerate(
            [("A gap", True), ("Ugly", False), ("A gap", True), ("A gap", False)]
        )
    ]
    path = tmp_path / "analyses.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with faulty.serving(faulty.Server(answer=strict)) as url:
        asked = settings("", url, tmp_path / "out")
        assert run(f"--graded_analyses={path}", *asked[1:]) == 0
    body = json.loads((tmp_path / "out" / "evaluation.json").read_text())["all"]
    assert body["confusion"] == [[1, 0, 1], [0, 0, 0], [0, 0, 2]]
    assert (body["exact"]["value"], body["too_high"]["value"]) == (0.75, 0.25)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--graded_analyses=FILE or --search=WORKDIR must be given"),
        (["--graded=g", "--graded_analyses=g"], "must be given, one of them"),
        (["--graded=g"], "one of the two"),
        (["--graded=g", "--rating=r", "--votes=3"], "--votes are about --engine"),
        (["--graded=g", "--rating=r", "--config.seed=1"], "--config.seed is about --engine"),
        (["--graded=g", "--rating=r", "--judge=world"], "--judge are about --search"),
        (["--search=w", "--rating=r"], "--rating are of no use beside --search"),
        (["--search=w", "--graded=g"], "--graded are of no use beside --search"),
        (["--search=w", "--scale=s"], "--scale are about --judge=people"),
        (["--search=w", "--judge=people"], "--judge=people needs --graded=FILE"),
        (["--search=w"], "it is no search's workdir"),
        (["--graded=/nowhere.jsonl", "--rating=r"], "there is no such file"),
        (["--graded=g", "--rating=r", "--rounds=0"], "--rounds=0: must be at least 1"),
        (["--graded=g", "--rating=r", "--seed=-1"], "--seed=-1: must not be negative"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(tmp_path, capsys, arguments, message):
    assert run(*arguments, f"--out={tmp_path / 'out'}") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


def test_parts_of_another_size_go_on_as_they_were_begun(graded, tmp_path):
    with faulty.serving(faulty.Server(answer=gullible)) as url:
        assert run(*settings(graded, url, tmp_path / "out")) == 0
        whole = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    # As if it had been killed after its first part of two texts: the others are asked for now.
    folder = tmp_path / "out" / "records" / "evaluate"
    for kind in ("part", "manifest"):
        first, second = sorted(p for p in folder.iterdir() if kind in p.name)
        second.unlink()
    with faulty.serving(faulty.Server(answer=gullible)) as url:
        larger = [a for a in settings(graded, url, tmp_path / "out") if "runtime.call" not in a]
        assert run(*larger, "--config.runtime.call=600") == 0
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == whole


def test_several_files_are_one_set_and_places_are_of_their_own_file(graded, tmp_path):
    for name in "ab":
        rows = [json.dumps({**row, "id": f"{name}{row['id']}", "auto": 0.5}) for row in ROWS]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    files = [f"--graded={tmp_path / name}.jsonl" for name in "ab"]
    asked = ["--rating=auto", "--scale=full-marks", f"--out={tmp_path / 'out'}", "--rounds=20"]
    assert run(*files, *asked) == 0
    body = json.loads((tmp_path / "out" / "evaluation.json").read_text())["all"]
    assert body["items"] == 2 * len(ROWS)
    assert [row["upto"] for row in body["place_bias"]] == [2, 3, 4]  # 1 to 4, twice


def test_a_file_where_a_folder_should_be_is_one_line(graded, capsys):
    rows = [json.dumps({**row, "auto": 0.5}) for row in ROWS]
    graded.write_text("\n".join(rows))
    asked = [f"--graded={graded}", "--rating=auto", "--scale=full-marks", "--rounds=20"]
    assert run(*asked, f"--out={graded}") == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("mathv2-evaluate: ")


def test_a_reader_who_leaves_early_sees_no_traceback(graded):
    rows = [json.dumps({**row, "auto": 0.5}) for row in ROWS]
    graded.write_text("\n".join(rows))
    command = [sys.executable, "-u", "-m", "mathv2_jax.cli.evaluate", "--rating=auto"]
    command += [f"--graded={graded}", f"--out={graded.parent / 'out'}", "--scale=full-marks"]
    process = subprocess.Popen(
        [*command, "--rounds=20"], cwd=smoke.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read().decode()
    process.stderr.close()
    assert (process.wait(), errors) == (128 + signal.SIGPIPE, "")
