"""mathv2-evaluate: how right verifiers are, and what a search has solved, with intervals.

A verifier's ratings against people's scores, from files alone; with --graded_analyses a
meta-verifier's against people's judgements of analyses:

mathv2-evaluate --graded=FILE|--graded_analyses=FILE [more of them] --rating=COLUMN --out=DIR
                [--scale=NAME] [--score_map=marks:7]

A verifier, or a meta-verifier, that is asked, with --votes on each text; with --injections under
attacks, too:

mathv2-evaluate --graded=FILE|--graded_analyses=FILE --engine=checkpoint:DIR|openai:URL#MODEL
                [--votes=8] [--injections] --out=DIR [--config.field=value ...]   # mathv2-search's

What a search has solved, by attempts, rounds, tokens and proofs, and what it says of itself:

mathv2-evaluate --search=WORKDIR [--one_shot=WORKDIR] [--judge=votes|world|people] --out=DIR
                [--graded=FILE]     # people: who graded the answers, with --scale and --score_map

The judge of a proof is the majority of its own votes, the exact one of the proof world, or people.
With --one_shot the best of N proofs without refinement is put beside it, at the tokens that they
took. Of a search that goes on, or that a budget broke off, what there is counts. A benchmark
(IMO-ProofBench, Putnam, IMO, CMO) is searched first: mathv2-search --problems=.

DIR gets evaluation.json, evaluation.md and, where matplotlib is installed, figures. Intervals are
the middle 95 % of a bootstrap over problems (--rounds draws, --seed).

Exit codes: 0 finished, 75 stopped (the same command goes on), 2 bad usage or input, 1 failure.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from absl import flags
from etils import epath

from mathv2_jax import records, roles, storage
from mathv2_jax.cli import config as config_lib
from mathv2_jax.cli import engines, search_config, searched, session, shell
from mathv2_jax.cli import overrides as overrides_lib
from mathv2_jax.cli import players as players_lib
from mathv2_jax.data import graded, sources
from mathv2_jax.evaluation import (
    agreement,
    benchmarks,
    curves,
    figures,
    honesty,
    injection,
    intervals,
    verifying,
)
from mathv2_jax.rollout import durable
from mathv2_jax.search import candidates as candidates_lib
from mathv2_jax.search import pool as pool_lib
from mathv2_jax.world import judge as world_judge
from mathv2_jax.world import problems as world_problems

_ASKED = flags.FlagValues()
VOTES, WORLD, PEOPLE = "votes", "world", "people"


def _define(make: Callable[..., Any], name: str, default: Any, doc: str) -> None:
    make(name, default, doc, flag_values=_ASKED)


_define(flags.DEFINE_multi_string, "graded", [], "A file of graded proofs; may be given often.")
_define(flags.DEFINE_multi_string, "graded_analyses", [], "Of analyses that people judged; as it.")
_define(flags.DEFINE_string, "rating", None, "The column of a verifier's mean score.")
_define(flags.DEFINE_string, "engine", None, "A verifier, or meta-verifier, to be asked.")
_define(flags.DEFINE_integer, "votes", 8, "Of it on each text.")
_define(flags.DEFINE_bool, "injections", False, "Ask it about the texts under attack, too.")
_define(flags.DEFINE_string, "scale", "", "How people's scores were made, such as full-marks.")
_define(flags.DEFINE_string, "score_map", None, "marks, marks:7, or pairs: 7:1,6:0.5,else:0")
_define(flags.DEFINE_string, "search", None, "The workdir of a search.")
_define(flags.DEFINE_string, "one_shot", None, "The workdir of one without refinement.")
_define(flags.DEFINE_string, "judge", VOTES, f"Of proofs: {VOTES}, {WORLD} or {PEOPLE}.")
_define(flags.DEFINE_string, "out", None, "The folder for what is found.")
_define(flags.DEFINE_integer, "rounds", intervals.ROUNDS, "Draws of the bootstrap.")
_define(flags.DEFINE_integer, "seed", 0, "Of the bootstrap.")
_OF_ENGINES, _OF_SEARCHES = ("votes", "injections"), ("one_shot", "judge")
_OF_GRADED = ("graded", "graded_analyses", "rating", "engine")
_OF_PEOPLE = ("graded", "scale", "score_map")


def main(argv: Sequence[str]) -> int:
    """Usage and input errors are one line and exit code 2; what is a bug keeps its traceback."""
    return session.ended("mathv2-evaluate", functools.partial(_main, argv))


def _main(argv: Sequence[str]) -> int:
    _ASKED.unparse_flags()  # one process may call it often
    rest, overrides = overrides_lib.split(argv, often=("graded", "graded_analyses"))
    if not shell.read_flags(_ASKED, rest, __doc__, ["out"]):
        return shell.FINISHED
    if _ASKED.rounds < 1:
        raise ValueError(f"--rounds={_ASKED.rounds}: must be at least 1")
    if _ASKED.seed < 0:
        raise ValueError(f"--seed={_ASKED.seed}: must not be negative")
    if _ASKED.search:
        by_people = _ASKED.judge == PEOPLE
        unused = [name for name in _OF_GRADED if not (by_people and name in _OF_PEOPLE)]
        shell.require_unused(_ASKED, unused, "are of no use beside --search")
        if not by_people:
            shell.require_unused(_ASKED, _OF_PEOPLE, f"are about --judge={PEOPLE}")
        elif not _ASKED.graded:
            raise ValueError(f"--judge={PEOPLE} needs --graded=FILE, the answers that they graded")
    elif bool(_ASKED.graded) == bool(_ASKED.graded_analyses):
        raise ValueError(
            "--graded=FILE, --graded_analyses=FILE or --search=WORKDIR must be given, one of them"
        )
    else:
        shell.require_unused(_ASKED, _OF_SEARCHES, "are about --search")
    if not _ASKED.engine:
        shell.require_unused(_ASKED, _OF_ENGINES, "are about --engine")
        if overrides:
            raise ValueError(f"--{overrides[0][0]} is about --engine, which is not asked for")
    _run(shell.absolute(_ASKED.out), overrides)
    return shell.FINISHED


def _run(out: epath.Path, overrides: Sequence[tuple[str, str]]) -> None:
    if _ASKED.search:
        _searched(out)
        return
    if bool(_ASKED.rating) == bool(_ASKED.engine):
        raise ValueError(
            "--rating=COLUMN, where a verifier's mean scores stand, or --engine=, a verifier to be "
            "asked, must be given beside graded texts, one of the two"
        )
    found = _graded()
    if _ASKED.rating:
        _ratings(found, out)
    else:
        with session.signals_stop(), session.holding(out, "mathv2-evaluate"):
            _asked(found, overrides, out)


def _graded() -> list[benchmarks.Graded]:
    given = None if _ASKED.score_map is None else graded.ScoreMap.parse(_ASKED.score_map)
    scale = benchmarks.Scale(scale=_ASKED.scale, score_map=given)
    kind = records.Analysis if _ASKED.graded_analyses else records.Proof
    return [
        item
        for file in [*_ASKED.graded, *_ASKED.graded_analyses]
        for item in benchmarks.read(shell.absolute(file), scale, _ASKED.rating or "", kind)
    ]


def _draws() -> dict[str, int]:
    return {"rounds": _ASKED.rounds, "seed": _ASKED.seed}


def _ratings(found: Sequence[benchmarks.Graded], out: epath.Path) -> None:
    body = agreement.by_group(benchmarks.rated(found), **_draws())
    _write(out, body, agreement.table(body))
    figures.draw_agreement(body["all"], out)


def _asked(
    found: Sequence[benchmarks.Graded], overrides: Sequence[tuple[str, str]], out: epath.Path
) -> None:
    spec, votes = engines.parse("engine", _ASKED.engine), _ASKED.votes
    if votes < 1:
        raise ValueError(f"--votes={votes}: must be at least 1")
    players = players_lib.Players.of(spec, spec, overrides)
    config = players.config
    judged = [item.record for item in found]
    items = injection.attempts(judged) if _ASKED.injections else injection.plain(judged)
    name = roles.META_VERIFIER if _ASKED.graded_analyses else roles.VERIFIER
    together = _require_same_question(out, players, items, name)
    cache = os.fspath(out.parent / "compilation_cache")
    jax.config.update("jax_compilation_cache_dir", cache)
    opened = players.open()[spec]
    responses = durable.Responses(out / "responses", config.runtime.responses_every)
    known = roles.make_roles(config.roles)
    judge = verifying.Judge(
        name=name,
        role=known.meta_verifier if _ASKED.graded_analyses else known.verifier,
        respondent=responses.of(opened.engine, opened.version),
        votes=votes,
        seed=config.seed,
    )
    folder = out / "records" / verifying.STAGE
    samples = verifying.ask(judge, items, folder, responses, together)
    heard = verifying.votes_by_item(items, samples, votes)
    own = [v for item, v in zip(items, heard, strict=True) if item.attack == injection.NONE]
    body: dict[str, Any] = agreement.by_group(verifying.rated(found, own), **_draws())
    table = agreement.table(body)
    if _ASKED.injections:
        attacks = verifying.of_attacks(items, heard, **_draws())
        body, table = body | {"attacks": attacks}, f"{table}\n{verifying.table(attacks)}"
    _write(out, body, table)
    figures.draw_agreement(body["all"], out)


def _require_same_question(
    out: epath.Path, players: players_lib.Players, items: Sequence[injection.Injected], judge: str
) -> int:
    """Writes down what is asked, or checks that the folder is of the same question: how many texts
    stand in each of its parts."""
    texts = "".join(f"{item.attack} {item.record.id}\n" for item in items)
    digest = hashlib.sha256(texts.encode()).hexdigest()[:16]
    asked = search_config.identity(players.config, digest, players.names)
    asked |= {"votes": _ASKED.votes, "judge": judge}
    path, together = out / "config.json", max(1, players.config.runtime.call // _ASKED.votes)
    if storage.exists(path):
        known = sources.read_object(path, ("evaluation", "together"), "take another folder")
        saved, together = known["evaluation"], int(known["together"])
        for where, old, new in config_lib.differences(saved, asked, "config"):
            raise ValueError(
                f"--out={_ASKED.out} holds another evaluation: {where} was {old}, now {new}. Take "
                "another folder, or the old value"
            )
    body = {"evaluation": asked, "together": together}
    storage.write_whole(path, (json.dumps(body, indent=1, sort_keys=True) + "\n").encode())
    return together


def _judge(problems: Sequence[records.Problem]) -> curves.Score:
    if _ASKED.judge == VOTES:
        return curves.by_majority
    if _ASKED.judge == PEOPLE:
        by_people = [item.record for item in _graded()]
        return honesty.by_people([r for r in by_people if isinstance(r, records.Proof)])
    if _ASKED.judge != WORLD:
        raise ValueError(f"--judge={_ASKED.judge}: must be {VOTES}, {WORLD} or {PEOPLE}")
    for problem in problems:
        try:
            world_problems.parse_statement(problem.statement)
        except ValueError as error:
            raise ValueError(f"--judge={WORLD}, problem {problem.id}: {error}") from error
    exact = world_judge.ExactJudge()
    return lambda problem, candidate: exact.proof_score(problem.statement, candidate.proof)


def _searched(out: epath.Path) -> None:
    found = searched.read("search", _ASKED.search)
    score = _judge(found.problems)
    if found.config.method == search_config.REFINE and _ASKED.one_shot:
        raise ValueError("--one_shot is put beside a pool search, and this is a refinement")
    pools = found.pools()
    if _ASKED.judge == VOTES and not any(c.votes for pool in pools for c in pool.candidates):
        raise ValueError(
            f"--search={_ASKED.search}: none of its proofs has a vote, which --judge={VOTES} goes "
            f"by: name another judge, {WORLD} or {PEOPLE}"
        )
    notes = found.notes(pools)
    if _ASKED.judge == VOTES and found.config.method == search_config.POOL:
        notes.append("the votes that chose the answers judge them too: their scores lie too high")
    body: dict[str, Any] = {"judge": _ASKED.judge, "problems": len(found.written), "notes": notes}
    best = [(pool, found.method.best(pool)) for pool in pools]
    body["answers"] = honesty.answers(best, score, **_draws())
    body["self_scores"] = agreement.measure(honesty.self_scores(pools, score), **_draws())
    if _ASKED.judge != VOTES:
        body["votes"] = agreement.measure(honesty.votes(pools, score), **_draws())
    if _ASKED.judge != PEOPLE:  # who grade answers, seldom all that was written on the way
        limits = _doubling(max(1, *(len(pool.written) for pool in pools)))
        first = curves.best_of_first(found.written, score, limits, **_draws())
        body["best_of_first"] = config_lib.plain(first)
        if found.config.method == search_config.REFINE:
            body |= _refinement(found, pools, score)
        else:
            body |= _pool(found, score, notes)
    _write(out, body, f"{curves.table(body)}\n{honesty.table(body)}")
    figures.draw_curves(body, out)


def _refinement(
    found: searched.Searched, pools: Sequence[candidates_lib.Pool], score: curves.Score
) -> dict[str, Any]:
    config = found.config.refine
    made = curves.of_refinement(pools, config, score, **_draws())
    first, last = made.pass_at_1[0], made.pass_at_1[-1]
    differences = {
        "rise_of_pass_at_1": curves.difference(first, last, **_draws()),
        "best_above_pass_at_1": curves.difference(first, made.best_at_n[0], **_draws()),
        "best_above_last_pass_at_1": curves.difference(last, made.best_at_n[-1], **_draws()),
    }
    return {"threads": config.threads, **config_lib.plain(made), **config_lib.plain(differences)}


def _pool(found: searched.Searched, score: curves.Score, notes: list[str]) -> dict[str, Any]:
    assert isinstance(found.method, pool_lib.PoolSearch)
    made = curves.of_rounds(found.written, found.method, score, **_draws())
    rise = curves.difference(made[0], made[-1], **_draws())
    body = {"pool": config_lib.plain(made), "rise_of_pool": config_lib.plain(rise)}
    if _ASKED.one_shot:
        other = searched.read("one_shot", _ASKED.one_shot)
        if other.config.method != search_config.POOL or other.config.pool.rounds:
            raise ValueError(
                f"--one_shot={_ASKED.one_shot}: this search refines; one with "
                "--config.pool.rounds=0 does not"
            )
        searched.require_alike(found, other)
        single = other.method
        assert isinstance(single, pool_lib.PoolSearch)

        def best_of(number: int) -> curves.Point:
            return curves.of_one_shot(other.written, single, score, [number], **_draws())[0]

        most, last = other.config.pool.proofs, made[-1]
        shots = [best_of(number) for number in _doubling(most)]
        body["one_shot"] = config_lib.plain(shots)
        beside = curves.no_cheaper(best_of, most, last.tokens)
        if beside is None:
            notes.append(
                f"one-shot generation took at most {shots[-1].tokens:,.0f} tokens of a problem, "
                f"the search {last.tokens:,.0f}: nothing is said of equal tokens"
            )
        else:
            above = curves.difference(beside, last, **_draws())
            body["pool_above_one_shot"] = config_lib.plain(above)
            tokens = [last.tokens, beside.tokens, beside.limit]
            body["tokens"] = {"pool_above_one_shot": tokens}
    return body


def _doubling(most: int) -> list[int]:
    """1, 2, 4 and so on, and `most`."""
    return [*(2**n for n in range(most.bit_length()) if 2**n < most), most]


def _write(out: epath.Path, body: Mapping[str, Any], table: str) -> None:
    text = json.dumps(body, indent=1, sort_keys=True) + "\n"
    storage.write_whole(out / "evaluation.json", text.encode())
    storage.write_whole(out / "evaluation.md", table.encode())
    print(table)
    print(f"in {os.fspath(out)}")


def run() -> None:
    """The console script."""
    shell.run(main)


if __name__ == "__main__":
    run()
