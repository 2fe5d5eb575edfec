"""What a search has found so far: the best proofs as records, a summary as data, and its table."""

from collections.abc import Mapping
from typing import Any

from mathv2_jax import records
from mathv2_jax.search import candidates as candidates_lib
from mathv2_jax.search import pool as pool_lib
from mathv2_jax.search import problems, rounds, selection
from mathv2_jax.search import run as run_lib

SCHEMA = 1
Pool = candidates_lib.Pool


def best_proofs(search: run_lib.Search) -> list[records.Proof]:
    """The best proof so far of each problem that has any; they import as other proofs do."""
    return [
        records.Proof(
            id=records.content_id("proof", pool.problem.statement, best.proof),
            problem_id=pool.problem.id,
            statement=pool.problem.statement,
            text=best.proof,
            source=rounds.STAGE,
            self_analysis=best.self_analysis,
            self_score=best.self_score,
            parents=(best.id,),
        )
        for pool in search.pools
        if (best := search.method.best(pool)) is not None
    ]


def summarise(search: run_lib.Search) -> dict[str, Any]:
    """Every problem's outcome and what was spent, free of the clock."""
    spent = search.meter.spent
    body: dict[str, Any] = {
        "schema": SCHEMA,
        "problems": [_problem(search, pool) for pool in search.pools],
        "spent": {"answers": spent.answers, "tokens": spent.tokens, "lost": spent.lost},
    }
    if isinstance(search.method, pool_lib.PoolSearch):
        config = search.method.config
        body["votes"] = _votes(search, config)
        if config.unverified:
            body["filter"] = _filter(search, config)
    return body


def _problem(search: run_lib.Search, pool: Pool) -> dict[str, Any]:
    best = search.method.best(pool)
    found: dict[str, Any] = {
        "id": pool.problem.id,
        "name": problems.name(pool.problem),
        "source": pool.problem.source,
        "done": search.method.is_done(pool),
        "rounds": pool.rounds,
        "written": len(pool.written),
        "proofs": len(pool.candidates),
        "tokens": pool.tokens,
        "best": None,
    }
    if best is not None:
        found["best"] = {
            "sample": best.id,
            "round": best.round,
            "mean": best.mean,
            "votes": len(best.votes),
            "lost": len(best.cast) - len(best.votes),
            "majority": best.majority,
            "self_score": best.self_score,
        }
    if isinstance(search.method, pool_lib.PoolSearch):
        found["passed"] = search.method.passed(pool) is not None
    return found


def _votes(search: run_lib.Search, config: pool_lib.PoolConfig) -> dict[str, int]:
    """Votes that were cast, and that all proofs that are verified are to have, or would have had
    without `adaptive`."""
    verified = [c for pool in search.pools for c in pool.candidates if not c.filtered or c.audited]
    cast = sum(len(c.cast) for c in verified)
    every = len(verified) * config.verifications
    return {"cast": cast, "all": every, "adaptive": config.adaptive}


def _filter(search: run_lib.Search, config: pool_lib.PoolConfig) -> dict[str, int]:
    """What the verifier head left out, how much of that was verified nevertheless, and how many of
    those are among the best by their votes, are the first of their problem, and pass: what the
    filter loses."""
    names = ("left_out", "audited", "audited_among_best", "audited_first", "audited_passing")
    found: dict[str, int] = {name: 0 for name in names}
    for pool in search.pools:
        best = selection.ranked(pool.candidates, config.voting)[: config.best]
        filtered = [c for c in pool.candidates if c.filtered]
        audited = [c for c in filtered if c.audited]
        found["left_out"] += len(filtered)
        found["audited"] += len(audited)
        found["audited_among_best"] += sum(c in best for c in audited)
        found["audited_first"] += sum(c in best[:1] for c in audited)
        found["audited_passing"] += sum(config.voting.passes(c) for c in audited)
    return found


def line(search: run_lib.Search, pool: Pool) -> str:
    """A problem's state after a round."""
    found = _problem(search, pool)
    best = found["best"]
    if best is None:
        shown = "no readable proof"
    else:
        mean = "unverified" if best["mean"] is None else f"mean {best['mean']:.3f}"
        shown = f"best {mean} of {best['votes']} votes, self {best['self_score']:g}"
    ended = "  passed" if found.get("passed") else "  done" if found["done"] else ""
    return (
        f"{problems.name(pool.problem)}: round {pool.rounds}, {found['proofs']} proofs, "
        f"{pool.tokens:,} tokens, {shown}{ended}"
    )


def table(summary: Mapping[str, Any]) -> str:
    """The summary to read."""
    lines = [f"{'problem':24} {'rounds':>6} {'proofs':>6} {'mean':>6} {'votes':>5} {'self':>5}"]
    for problem in summary["problems"]:
        best = problem["best"]
        figures = (
            f"{'-':>6} {'-':>5} {'-':>5}"
            if best is None
            else f"{'-' if best['mean'] is None else format(best['mean'], '.3f'):>6} "
            f"{best['votes']:>5} {best['self_score']:>5g}"
        )
        ended = "passed" if problem.get("passed") else "" if problem["done"] else "not done"
        lines.append(
            f"{problem['name']:24} {problem['rounds']:>6} {problem['proofs']:>6} {figures}  {ended}"
        )
    spent = summary["spent"]
    lines.append(
        f"{spent['answers']:,} answers, {spent['lost']:,} of them lost, {spent['tokens']:,} tokens"
    )
    if "votes" in summary and summary["votes"]["all"]:
        cast, every = summary["votes"]["cast"], summary["votes"]["all"]
        saved = f" ({1 - cast / every:.1%} saved)" if summary["votes"]["adaptive"] else ""
        lines.append(f"{cast:,} votes of {every:,}{saved}")
    if "filter" in summary:
        found = summary["filter"]
        lines.append(
            f"first opinions left out {found['left_out']:,} proofs; of {found['audited']:,} that "
            f"were verified nevertheless {found['audited_among_best']:,} are among the best, "
            f"{found['audited_first']:,} are their problem's first, and "
            f"{found['audited_passing']:,} pass"
        )
    return "\n".join(line.rstrip() for line in lines)
