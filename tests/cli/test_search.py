"""mathv2-search and mathv2-evaluate as commands: a checkpoint, a server, kills, mistakes."""

import collections
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys

import pytest
from etils import epath

from mathv2_jax.cli import engines, evaluate, players, search, search_config
from mathv2_jax.search import problems as problems_lib
from mathv2_jax.text import parse
from tests import faulty, smoke
from tools import check_search


@pytest.fixture(scope="module")
def problems(smoke_workdir, tmp_path_factory):
    lines = (smoke_workdir / "records/input/test_problems.jsonl").read_bytes().splitlines(True)
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    path.write_bytes(b"".join(lines[:3]))
    return path


def test_a_search_with_a_checkpoint_killed_and_asked_to_stop_ends_as_one_left_alone(
    smoke_workdir, problems, tmp_path
):
    """tools/check_search.py kills it more often, and with a real server."""
    engine = f"checkpoint:{smoke_workdir}"
    check_search.run(check_search.command(problems, engine, tmp_path / "whole"))
    arguments = check_search.command(problems, engine, tmp_path / "killed")
    check_search.kill_while_running(arguments, tmp_path / "killed", 2, random.Random(0))
    process = subprocess.Popen(
        arguments, cwd=smoke.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    before = check_search.on_disk(tmp_path / "killed")
    while process.poll() is None and len(check_search.on_disk(tmp_path / "killed") - before) < 2:
        pass
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert "the same command goes on from here" in errors
    check_search.run(arguments)
    expected = check_search.digests(tmp_path / "whole")
    assert len(expected) > 3 and check_search.digests(tmp_path / "killed") == expected
    assert not check_search.faults(tmp_path / "killed")


def author(asked):
    """Proofs and votes of a server without a seed: no two alike."""
    prompt, number = asked.body["messages"][-1]["content"], os.urandom(4).hex()
    if prompt.endswith("Evaluate it."):
        return faulty.completion(
            parse.write_analysis(f"Doubt {number}.", random.choice([0.0, 1.0]))
        )
    analysis = parse.write_analysis(f"Well, {number}.", 1.0)
    return faulty.completion(parse.write_generation(f"Proof {number}", analysis))


SERVER = (
    *("--config.remote.key_env=''", "--config.roles.templates=world"),
    *(f"--config.roles.{r}.max_tokens=64" for r in ("generator", "verifier", "meta_verifier")),
)


def test_a_search_with_a_server_loses_and_doubles_nothing_when_it_is_killed(problems, tmp_path):
    server = faulty.Server(answer=author)
    with faulty.serving(server) as url:
        arguments = check_search.command(problems, f"openai:{url}#m", tmp_path / "w", *SERVER)
        kills = check_search.kill_while_running(arguments, tmp_path / "w", 2, random.Random(1))
        check_search.run(arguments)
    found = check_search.samples(tmp_path / "w")
    assert kills == 2 and len(found) > 200
    assert not check_search.faults(tmp_path / "w")
    assert len({s["text"] for s in found}) == len(found)  # each of another answer
    answered = sum(server.answered.values())
    assert len(found) <= answered <= len(found) + 2 * 16  # those on the way


def run(*arguments, main=search.main):
    return main(["mathv2", *map(str, arguments)])


@pytest.fixture(scope="module")
def searched(problems, tmp_path_factory):
    """Two searches with a server: one that refines, and one that does not."""
    folder = tmp_path_factory.mktemp("searched")
    with faulty.serving(faulty.Server(answer=author)) as url:
        for name, more in (("refine", ["--config.method=refine"]), ("shot", [])):
            more += ["--config.refine.threads=3", "--config.refine.attempts=2"]
            more += ["--config.refine.verifications=3", "--config.pool.rounds=0"]
            arguments = [
                *(sys.executable, "-m", "mathv2_jax.cli.search", f"--problems={problems}"),
                *(f"--engine=openai:{url}#m", f"--workdir={folder / name}", *SERVER, *more),
                *("--config.pool.proofs=4", "--config.pool.verifications=4"),
            ]
            check_search.run(arguments)
    return folder


def test_what_was_found_is_in_the_workdir_and_a_finished_search_changes_nothing(
    problems, searched, capsys
):
    best = [json.loads(line) for line in (searched / "shot/best.jsonl").read_text().splitlines()]
    assert [b["kind"] for b in best] == ["Proof"] * 3
    before = check_search.digests(searched / "shot")
    summary = json.loads((searched / "shot/summary.json").read_text())
    assert summary["spent"] == {"answers": 3 * 4 * 5, "lost": 0, "tokens": 3 * 4 * 5 * 3}
    again = ["--config.pool.rounds=0", "--config.pool.proofs=4", "--config.pool.verifications=4"]
    more = [f"--config.refine.{n}" for n in ("threads=3", "attempts=2", "verifications=3")]
    other = "openai:http://127.0.0.1:9/v1#m"  # another address, where nobody listens
    where = [f"--problems={problems}", f"--engine={other}", f"--workdir={searched / 'shot'}"]
    assert run(*where, *SERVER, *again, *more) == 0
    assert "finished; nothing was changed" in capsys.readouterr().out
    assert check_search.digests(searched / "shot") == before


def test_searches_are_evaluated_by_their_votes(searched, tmp_path, capsys):
    asked = ["--rounds=20", f"--out={tmp_path}"]
    assert run(f"--search={searched / 'refine'}", *asked, main=evaluate.main) == 0
    body = json.loads((tmp_path / "evaluation.json").read_text())
    assert [p["limit"] for p in body["pass_at_1"]] == [1, 2]
    for place, name in ((0, "best_above_pass_at_1"), (-1, "best_above_last_pass_at_1")):
        best, mean = (body[curve][place]["score"]["value"] for curve in ("best_at_n", "pass_at_1"))
        assert body[name]["value"] == pytest.approx(best - mean)
    shot = searched / "shot"
    assert run(f"--search={shot}", f"--one_shot={shot}", *asked, main=evaluate.main) == 0
    body = json.loads((tmp_path / "evaluation.json").read_text())
    assert body["pool"][0]["score"] == body["one_shot"][-1]["score"]
    assert [p["limit"] for p in body["best_of_first"]] == [1, 2, 4]
    assert body["self_scores"]["items"] and "votes" not in body  # which would judge themselves
    assert "| 4 |" in capsys.readouterr().out


def test_a_search_that_its_budget_broke_off_is_evaluated_by_what_there_is(
    problems, tmp_path, capsys
):
    with faulty.serving(faulty.Server(answer=author)) as url:
        where = [
            f"--problems={problems}",
            f"--engine=openai:{url}#m",
            f"--workdir={tmp_path / 'w'}",
        ]
        more = ["--config.pool.proofs=4", "--config.pool.verifications=4", "--config.at_once=1"]
        more.append("--config.pool.rounds=0")  # so that a round that is whole ends a problem
        more.append("--config.remote.concurrency=1")  # so that it never is
        assert run(*where, *SERVER, *more, "--config.budget.answers=9") == 0
    summary = json.loads((tmp_path / "w" / "summary.json").read_text())
    assert not any(p["done"] for p in summary["problems"])
    capsys.readouterr()
    asked = [f"--search={tmp_path / 'w'}", f"--out={tmp_path / 'out'}", "--rounds=20"]
    assert run(*asked, main=evaluate.main) == 0
    shown = capsys.readouterr().out
    assert "1 problems, judged by votes" in shown
    assert "2 problems are not begun, and are left out of all figures" in shown
    assert "1 problems are not done" in shown and "too high" in shown
    assert "answers are of a round that the search's budget broke off" in shown
    body = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert body["answers"]["all"]["unanswered"] == 0
    part = epath.Path(tmp_path / "w" / "records" / "unfinished.jsonl")
    lines = part.read_text().splitlines()
    assert len(lines) >= 9 and len({json.loads(line)["id"] for line in lines}) == len(lines)


def test_no_votes_are_no_judge_and_other_worlds_have_no_exact_one(
    searched, problems, tmp_path, capsys
):
    lines = (searched / "refine/records/input/problems.jsonl").read_text().splitlines()
    shutil.copytree(searched / "refine", tmp_path / "w")
    elsewhere = [json.loads(line) | {"statement": "Show 0."} for line in lines]
    text = "".join(json.dumps(row) + "\n" for row in elsewhere)
    (tmp_path / "w/records/input/problems.jsonl").write_text(text)
    asked = [f"--search={tmp_path / 'w'}", f"--out={tmp_path / 'out'}", "--rounds=20"]
    assert run(*asked, "--judge=world", main=evaluate.main) == 2
    assert "not a statement of the proof world" in capsys.readouterr().err
    with faulty.serving(faulty.Server(answer=author)) as url:
        where = [f"--problems={problems}", f"--engine=openai:{url}#m"]
        more = ["--config.method=refine", "--config.refine.threads=2"]
        more += ["--config.refine.attempts=1", "--config.refine.verifications=0"]
        assert run(*where, f"--workdir={tmp_path / 'v'}", *SERVER, *more) == 0
    asked[0] = f"--search={tmp_path / 'v'}"
    assert run(*asked, main=evaluate.main) == 2
    assert "none of its proofs has a vote" in capsys.readouterr().err


def test_people_judge_the_answers_of_a_search(searched, tmp_path, capsys):
    best = [json.loads(line) for line in (searched / "shot/best.jsonl").read_text().splitlines()]
    rows = [
        dict(problem=b["statement"], proof=b["text"], human_score=marks, source="p")
        for b, marks in zip(best, (7, 6), strict=False)  # nobody graded the third
    ]
    graded = tmp_path / "graded.jsonl"
    graded.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [f"--search={searched / 'shot'}", f"--out={tmp_path}", "--judge=people", "--rounds=20"]
    asked += [f"--graded={graded}", "--scale=full-marks", "--score_map=marks:7"]
    assert run(*asked, main=evaluate.main) == 0
    found = json.loads((tmp_path / "evaluation.json").read_text())
    answers = found["answers"]["all"]
    assert (answers["solved"]["value"], answers["score"]["value"]) == (0.5, 0.75)
    assert answers["unjudged"] == [best[2]["problem_id"]]
    assert found["votes"]["items"] == 2 and "pool" not in found
    assert "| all | 3 | 0 | 1 | 0.750" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engine": "checkpiont:x"}, "did you mean checkpoint:?"),
        ({"engine": "openai:http://x/v1"}, "name the model after the URL"),
        ({"engine": "checkpoint:/nowhere"}, "there is no folder /nowhere"),
        ({"problems": "/nowhere.jsonl"}, "there is no such file"),
        ({"workdir": ""}, "--workdir=... must be given"),
        ({"config.pool.proof": "3"}, "did you mean config.pool.proofs?"),
        ({"config.pool.verifications": "0"}, "pool.verifications = 0: must be at least 1"),
        ({"config.method": "pol"}, "must be pool or refine"),
        ({"config.remote.time": "3"}, "config.remote has no field 'time'"),
        ({"config.remote.model": "x"}, "/v1#m says it; leave it out"),
        ({"config.budget.tokens": "0"}, "budget.tokens = 0: must be positive"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(problems, tmp_path, capsys, change, message):
    asked = {"problems": problems, "engine": "openai:http://127.0.0.1:9/v1#m"}
    asked |= {"workdir": tmp_path / "w", "config.remote.key_env": "''"} | change
    assert run(*(f"--{name}={value}" for name, value in asked.items())) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not (tmp_path / "w").exists()


def test_a_checkpoint_is_known_by_its_variables_wherever_it_stands(smoke_workdir, tmp_path):
    engine = engines.parse("engine", f"checkpoint:{smoke_workdir}#verifier-1")
    shutil.copytree(smoke_workdir, tmp_path / "moved")
    moved = engines.parse("engine", f"checkpoint:{tmp_path}/./moved/#verifier-1")
    other = engines.parse("engine", f"checkpoint:{smoke_workdir}#generator-1")
    names = [players.Players.of(e, e, []).names for e in (engine, moved, other)]
    assert names[0] == names[1] != names[2]
    assert names[0]["generator"].startswith("checkpoint:step 3 #")


def test_a_checkpoint_and_a_server_search_together_with_the_checkpoints_prompts(smoke_workdir):
    run_ = engines.parse("engine", f"checkpoint:{smoke_workdir}")
    server = engines.parse("engine", "openai:http://127.0.0.1:9/v1#m")
    key = [("config.remote.key_env", "''"), ("config.verifier_remote.key_env", "''")]
    for pair in ((run_, server), (server, run_)):
        made = players.Players.of(*pair, key)
        assert made.config.roles.templates == "world"
    # The verifier's answers may be longer than the writer's context.
    longer = [*key, ("config.roles.verifier.max_tokens", "300")]
    assert players.Players.of(run_, server, longer).config.roles.verifier.max_tokens == 300
    with pytest.raises(ValueError, match="leaves no room for a prompt in config.engine.context"):
        players.Players.of(run_, run_, longer)


def test_a_server_thinks_as_the_roles_say_unless_its_own_field_says_otherwise():
    server = engines.parse("engine", "openai:http://127.0.0.1:9/v1#m")
    key = [("config.remote.key_env", "''")]
    thinks = [("config.roles.think", "True")]
    for said, think in ((key, False), (key + thinks, True)):
        assert players.Players.of(server, server, said).servers[server].think is think
    own = [*key, *thinks, ("config.remote.think", "False")]
    assert players.Players.of(server, server, own).servers[server].think is False


def test_runs_with_other_prompts_need_a_word_which_are_meant(smoke_workdir):
    found = engines.locate(engines.parse("engine", f"checkpoint:{smoke_workdir}"))
    other = dataclasses.replace(found, roles=dict(found.roles, templates="olympiad"))
    with pytest.raises(ValueError, match=r"say which are meant, --config.roles.templates="):
        search_config.build([], found, other)
    said = [("config.roles.templates", "world")]
    assert search_config.build(said, found, other).roles.templates == "world"


def test_another_search_is_refused_in_the_workdir_of_one(problems, searched, capsys):
    where = [f"--problems={problems}", "--engine=openai:http://127.0.0.1:9/v1#m"]
    assert run(*where, f"--workdir={searched / 'shot'}", *SERVER, "--config.seed=1") == 2
    assert "this workdir was begun with another search: config." in capsys.readouterr().err


def test_problems_of_others_are_read_and_a_bad_row_is_named(tmp_path):
    path = tmp_path / "imo.csv"
    path.write_text("id,question\na,Show A.\nb,Show B.\nc,Show A.\n")
    found = problems_lib.read(epath.Path(path))
    assert collections.Counter(p.source for p in found) == {"imo": 2}
    path.write_text("id,question\na,\n")
    with pytest.raises(ValueError, match=r"imo.csv, line 1: field 'problem' holds no text"):
        problems_lib.read(epath.Path(path))
