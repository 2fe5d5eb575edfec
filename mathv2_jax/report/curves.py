"""The curves of a run: every scalar of its stages over steps, and a search's state over rounds."""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from mathv2_jax import metrics, records, storage
from mathv2_jax.search import candidates, pool, refine, rounds

MOST_POINTS = 1_000  # of a curve; more steps are shown as means of several


@dataclasses.dataclass(frozen=True)
class Curves:
    """Scalars over the same steps; None where a step has no finite value.

    A point is the mean of `every` steps, and stands at the last of them.
    """

    name: str
    steps: Sequence[int]
    scalars: Mapping[str, Sequence[float | None]]
    every: int = 1


def of_training(workdir: epath.Path) -> list[Curves]:
    """Every stage's scalars, in the order in which stages ended; those that go on come last.

    ValueError names a file that is damaged.
    """
    path = workdir / "metrics.jsonl"
    lines = storage.read_bytes(path).decode().splitlines() if storage.exists(path) else []
    by_stage: dict[str, list[Mapping[str, Any]]] = {}
    for stage, line in zip(metrics.stages_of(lines, path), lines, strict=True):
        by_stage.setdefault(stage, []).append(json.loads(line))
    for stage in storage.list_names(workdir / "metrics"):
        if stage not in by_stage and storage.exists(workdir / "metrics" / stage):
            by_stage[stage] = list(metrics.read(workdir, stage))
    return [_thinned(_curves(stage, rows, path)) for stage, rows in by_stage.items() if rows]


def _curves(stage: str, rows: Sequence[Mapping[str, Any]], path: epath.Path) -> Curves:
    names = sorted({name for row in rows for name in row} - {"stage", "step"})
    try:
        return Curves(
            stage,
            [int(row["step"]) for row in rows],
            {name: [_finite(row.get(name)) for row in rows] for name in names},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: a row of stage {stage} is damaged ({error!r}): every row has a step and "
            "numbers; take the line out"
        ) from error


def _finite(value: Any) -> float | None:
    """As in `metrics.read`, where what is not finite is text."""
    number = math.nan if value is None else float(value)
    return float(f"{number:.6g}") if math.isfinite(number) else None


def _thinned(curves: Curves) -> Curves:
    """At most MOST_POINTS points."""
    every = -(-len(curves.steps) // MOST_POINTS)
    if every <= 1:
        return curves
    groups = [
        range(at, min(at + every, len(curves.steps))) for at in range(0, len(curves.steps), every)
    ]
    means = {
        name: [
            _mean([v for v in (values[at] for at in group) if v is not None]) for group in groups
        ]
        for name, values in curves.scalars.items()
    }
    return Curves(curves.name, [curves.steps[group[-1]] for group in groups], means, every)


def _mean(values: Sequence[float]) -> float | None:
    return _finite(math.fsum(values) / len(values)) if values else None


def of_search(workdir: epath.Path, items: Iterable[Any]) -> Curves | None:
    """A search's state after each round, by its own rules; None where this is no search.

    `best mean score` is over the problems that have one, `problems done` of all problems; tokens
    and distinct proofs are sums. A problem that ended keeps its last state.
    """
    path = workdir / "config.json"
    if not storage.exists(path):
        return None
    method = _method(path)
    if method is None:
        return None
    by_problem: dict[str, list[records.Sample]] = {}
    for item in items:
        if isinstance(item, records.Problem):
            by_problem.setdefault(item.id, [])
        elif isinstance(item, records.Sample) and item.stage == rounds.STAGE:
            by_problem.setdefault(item.problem_id, []).append(item)
    histories = [_history(method, name, samples) for name, samples in by_problem.items()]
    number = max(map(len, histories), default=0)
    if not number:
        return None
    states = [[_at(history, at) for history in histories] for at in range(number)]
    return Curves(
        rounds.STAGE,
        list(range(number)),
        {
            "best mean score": [
                _mean([s.best for s in now if s.best is not None]) for now in states
            ],
            "distinct proofs": [float(sum(s.proofs for s in now)) for now in states],
            "generated tokens": [float(sum(s.tokens for s in now)) for now in states],
            "problems done": [sum(s.done for s in now) / len(now) for now in states],
        },
    )


def _method(path: epath.Path) -> pool.PoolSearch | refine.Refinement | None:
    """How the search of a config grows its pools; None where the config is of no search."""
    try:
        saved = storage.parse_json(storage.read_bytes(path))
        if "search" not in saved:
            return None
        search = saved["search"]
        if search["method"] == "pool":
            return pool.PoolSearch(pool.PoolConfig(**search["pool"]), search["seed"])
        return refine.Refinement(refine.RefineConfig(**search["refine"]), search["seed"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged, or of another version ({error!r})") from error


@dataclasses.dataclass(frozen=True)
class _State:
    """A problem's after a round."""

    best: float | None = None
    proofs: int = 0
    tokens: int = 0
    done: bool = False


def _history(
    method: pool.PoolSearch | refine.Refinement, name: str, samples: Sequence[records.Sample]
) -> list[_State]:
    """The state after each recorded round of one problem."""
    statement = samples[0].statement if samples else ""
    problem = records.Problem(id=name, statement=statement, source="", cluster="")
    made, found, tokens = candidates.Pool(problem), list[_State](), 0
    for _, group in itertools.groupby(samples, key=lambda sample: sample.step):
        own = list(group)
        made.end_round(own)
        tokens += sum(sample.num_tokens for sample in own)
        best = method.best(made)
        found.append(
            _State(
                best=None if best is None else best.mean,
                proofs=len(made.candidates),
                tokens=tokens,
                done=method.is_done(made),
            )
        )
    return found


def _at(history: Sequence[_State], at: int) -> _State:
    return history[min(at, len(history) - 1)] if history else _State()
