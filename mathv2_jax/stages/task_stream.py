"""The order in which a stage of reinforcement learning meets its tasks."""

import functools
import hashlib
import io
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import logging

from mathv2_jax import processes, records, roles, storage
from mathv2_jax.data import mixture, table
from mathv2_jax.stages import attempts, rl_config, steps
from mathv2_jax.stages import run as run_lib
from mathv2_jax.stages import tasks as tasks_lib
from mathv2_jax.stages.rl_config import RlStage

_EDGES = 64  # tokens that a template may have more around other texts


def make(run: run_lib.Run, stage: RlStage) -> grain.MapDataset:
    """The stage's tasks by weight: element i is a function of (seed, i), made when it is asked for.

    Those that no row or context holds are left out, and reported. ValueError where none is left.
    """
    found: dict[str, mixture.Mapped] = {}
    hard: dict[str, np.ndarray | None] = {}
    for key, (role, items, places) in _sources(run, stage).items():
        make_task = functools.partial(tasks_lib.make_task, role, run.tokenizer)
        fits = _fitting(run, stage, key, items, places, make_task)
        found[key] = mixture.Mapped(items, fits, make_task)
        hard[key] = mixture.draw_weights(_hardness(items)[fits], stage.data.hardness)
    weights = functools.partial(_weights, found)
    phases = [mixture.Phase(begin=0, weights=weights(stage.mixture, stage.fresh_share))]
    for change in stage.data.schedule:
        by_role = weights(change.mixture, change.fresh_share)
        phases.append(mixture.Phase(begin=change.after, weights=by_role))
    seed = run.seed_for(stage.name, "tasks")
    stream = mixture.stream(found, phases, seed, exhausted=stage.data.exhausted, weights=hard)
    if stage.data.buckets == 1:
        return stream
    size = stage.rl.groups
    return mixture.Bucketed(
        stream, _prompt_tokens, size=size, window=size * stage.data.buckets, seed=seed
    )


def _prompt_tokens(task: tasks_lib.Task) -> int:
    return len(task.prompt)


def _sources(
    run: run_lib.Run, stage: RlStage
) -> dict[str, tuple[roles.Role, Sequence[Any], np.ndarray]]:
    """Records by role, or `role:source` of D_v; which of them are used."""
    found: dict[str, tuple[roles.Role, Sequence[Any], np.ndarray]] = {}
    for name in stage.mixture:
        role = run.roles.named(name)
        if name == roles.VERIFIER:
            for source, (proofs, places) in _labelled_proofs(run, stage).items():
                found[f"{name}:{source}"] = role, proofs, places
            continue
        if name == roles.REFINER:
            shown = attempts.with_issues(run, stage.attempts_from)
            if shown:
                found[name] = role, shown, np.arange(len(shown))
            else:
                names = ", ".join(stage.attempts_from)
                logging.warning("%s: no analysis of %s reports an issue", stage.name, names)
            continue
        kind = records.Problem if name == roles.GENERATOR else records.Analysis
        items = run.input("problems" if name == roles.GENERATOR else "analyses", kind)
        found[name] = role, items, np.arange(len(items))
    return found


def _labelled_proofs(
    run: run_lib.Run, stage: RlStage
) -> dict[str, tuple[Sequence[records.Proof], np.ndarray]]:
    """D_v by where it comes from; sources without a labelled proof are reported and left out."""
    found = {}
    for source in stage.proofs:
        proofs: Sequence[records.Proof] = (
            run.input(source, records.Proof)
            if source == rl_config.INPUT_PROOFS
            else run.stage_records(source, records.Proof)
        )
        labelled = np.flatnonzero(_labelled(proofs))
        if len(labelled):
            found[source] = proofs, labelled
        else:
            logging.warning("%s: %s holds no labelled proof", stage.name, source)
    return found


def _labelled(items: Sequence[Any]) -> np.ndarray:
    if isinstance(items, table.Table):
        return items.labelled
    return np.array([item.label is not None for item in items], bool)


def _hardness(items: Sequence[Any]) -> np.ndarray:
    """records.Label.hardness of each; 0 of one without a label."""
    if isinstance(items, table.Table):
        return items.hardness
    labels = [getattr(item, "label", None) for item in items]
    return np.array([0.0 if label is None else label.hardness for label in labels])


def _fitting(
    run: run_lib.Run,
    stage: RlStage,
    name: str,
    items: Sequence[Any],
    places: np.ndarray,
    make_task: Any,
) -> np.ndarray:
    """Of the places those whose prompts leave room for an answer at full length."""
    limit = min(run.engine_config.context, stage.rl.row_length)

    def needs(place: int) -> int:
        task = make_task(items[place])
        return len(task.prompt) + task.role.sampling.max_tokens

    if isinstance(items, table.Table) and len(places):
        # A token is a byte at least, so what is short enough in bytes need not be tokenised.
        most = items.num_bytes()[places] + needs(int(places[0])) + _EDGES
    else:
        most = np.full(len(places), limit + 1)
    unsure = places[most > limit]
    counted = _counted(run, name, items, unsure, needs)
    fits = most <= limit
    fits[most > limit] = counted <= limit
    kept = places[fits]
    said = (
        "engine.context and row_length with an answer at full length: engine.context = "
        f"{run.engine_config.context}, row_length = {stage.rl.row_length}"
    )
    left_out = len(places) - len(kept)
    steps.report_left_out(f"{stage.name}/{name}", left_out, len(places), said)
    return np.array(kept, np.int64)


def _counted(
    run: run_lib.Run,
    name: str,
    items: Sequence[Any],
    places: np.ndarray,
    needs: Callable[[int], int],
) -> np.ndarray:
    """What some prompts need, counted by the tokenizer once in a run, of records in a table."""
    if not isinstance(items, table.Table) or not len(places):
        return np.array([needs(place) for place in places.tolist()], np.int64)
    role = run.roles.named(name.partition(":")[0])
    facts = (run.tokenizer.fingerprint, role.template.fingerprint, role.think, role.sampling)
    digest = hashlib.sha256(repr(facts).encode())
    for array in (items.num_bytes(), places):
        digest.update(np.ascontiguousarray(array).tobytes())
    path = run.input_path("").parent / "lengths" / f"{digest.hexdigest()[:16]}.npy"
    if processes.exchange(storage.exists(path))[0]:
        return np.load(io.BytesIO(storage.read_bytes(path)))
    counts = np.array([needs(place) for place in places.tolist()], np.int64)
    data = io.BytesIO()
    np.save(data, counts)
    processes.first(lambda: storage.write_whole(path, data.getvalue()))
    return counts


def _weights(
    sources: Collection[str], by_role: Mapping[str, float], fresh_share: float
) -> dict[str, float]:
    """Of the sources that there are; those of D_v share their role's weight."""
    found = {}
    for name, weight in by_role.items():
        if name != roles.VERIFIER:
            if name in sources:
                found[name] = weight
            continue
        left = [key.partition(":")[2] for key in sources if key.startswith(f"{name}:")]
        for source, share in proof_shares(left, fresh_share).items():
            found[f"{name}:{source}"] = weight * share
    return found


def proof_shares(sources_left: Collection[str], fresh_share: float) -> dict[str, float]:
    """The weights of D_v's sources, which sum to 1, or to 0 where only weightless ones are left."""
    fresh = [p for p in sources_left if p != rl_config.INPUT_PROOFS]
    shares = {p: fresh_share / len(fresh) for p in fresh}
    if rl_config.INPUT_PROOFS in sources_left:
        shares[rl_config.INPUT_PROOFS] = 1.0 - fresh_share if fresh else 1.0
    total = sum(shares.values())
    return {p: share / total if total else 0.0 for p, share in shares.items()}
