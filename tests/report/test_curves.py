"""Scalars over steps, and a search over rounds."""

import dataclasses
import json

import pytest
from etils import epath

from mathv2_jax import metrics, records, storage
from mathv2_jax.report import curves
from mathv2_jax.search import pool, refine
from tests.data.test_lineage import sample
from tests.report.test_cases import PROBLEM, TEXT

QUIET = metrics.MetricsConfig(tensorboard=False)


def written(workdir, stage, rows, finish=True):
    writer = metrics.MetricWriter(workdir, stage, config=QUIET)
    for step, row in enumerate(rows, start=1):
        writer.write(step, row)
    writer.finish() if finish else writer.flush()


def search_config(workdir, **search):
    body = {"search": {"seed": 0, **search}}
    storage.write_whole(workdir / "config.json", json.dumps(body).encode())


def round_of(step, *scores, tokens=10, text=TEXT):
    """A proof of the round and votes on it."""
    name = f"search/prob/{step}/0"
    fields = dict(stage="search", step=step, num_tokens=tokens)
    return [
        sample(name, "generator", "prob", text=text, **fields),
        *(
            sample(f"{name}/{n}", "verifier", name, score=score, **fields)
            for n, score in enumerate(scores)
        ),
    ]


def test_finished_stages_come_in_their_order_and_one_that_goes_on_last(tmp_path, capsys):
    written(tmp_path, "verifier", [{"loss": 2.0}, {"loss": float("nan"), "kl": 1.0}])
    written(tmp_path, "generator", [{"reward": 0.5}])
    written(tmp_path, "again", [{"reward": 0.25}], finish=False)
    found = curves.of_training(epath.Path(tmp_path))
    assert [(each.name, each.steps, each.scalars) for each in found] == [
        ("verifier", [1, 2], {"kl": [None, 1.0], "loss": [2.0, None]}),
        ("generator", [1], {"reward": [0.5]}),
        ("again", [1], {"reward": [0.25]}),
    ]


def test_many_steps_are_means_of_several(tmp_path):
    steps = 2 * curves.MOST_POINTS + 1
    rows = [{"stage": "s", "step": step, "x": step} for step in range(1, steps + 1)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    storage.write_whole(tmp_path / "metrics.jsonl", lines.encode())
    (found,) = curves.of_training(epath.Path(tmp_path))
    assert (found.every, len(found.steps)) == (3, 667)
    assert (found.steps[0], found.scalars["x"][0]) == (3, 2.0)
    assert (found.steps[-1], found.scalars["x"][-1]) == (2001, 2000.0)


@pytest.mark.parametrize(
    "line",
    ["{", '{"step": 1, "x": 1}', '{"stage": "s", "x": 1}', '{"stage": "s", "step": 1, "x": []}'],
)
def test_damaged_metrics_name_the_file(tmp_path, line):
    storage.write_whole(tmp_path / "metrics.jsonl", f"{line}\n".encode())
    with pytest.raises(ValueError, match=r"metrics\.jsonl.*damaged"):
        curves.of_training(epath.Path(tmp_path))


def test_a_search_is_drawn_by_its_own_rules(tmp_path):
    config = pool.PoolConfig(proofs=1, verifications=2, rounds=3)
    search_config(tmp_path, method="pool", pool=dataclasses.asdict(config))
    better = TEXT.replace("is so", "is proved")
    other = dataclasses.replace(PROBLEM, id="other")
    items = [PROBLEM, other, *round_of(0, 0.0, 0.5), *round_of(1, 1.0, 1.0, text=better)]
    found = curves.of_search(epath.Path(tmp_path), items)
    assert found is not None and found.steps == [0, 1]
    assert found.scalars == {
        "best mean score": [0.25, 1.0],
        "distinct proofs": [1.0, 2.0],
        "generated tokens": [30.0, 60.0],
        "problems done": [0.0, 0.5],  # the other has not begun
    }


def test_a_problem_that_ended_keeps_its_last_state(tmp_path):
    config = refine.RefineConfig(threads=1, attempts=2, verifications=1)
    search_config(tmp_path, method="refine", refine=dataclasses.asdict(config))
    half = TEXT.replace("{1}", "{0.5}")
    longer = [
        dataclasses.replace(
            s, id=f"b{s.id}", problem_id="b", target="b" if s.target == "prob" else f"b{s.target}"
        )
        for s in [
            *round_of(0, 0.5, text=half),
            *round_of(1, 1.0, text=TEXT.replace("is so", "is proved")),
        ]
    ]
    found = curves.of_search(epath.Path(tmp_path), [*round_of(0, 0.0), *longer])
    assert found is not None
    assert found.scalars["problems done"] == [0.5, 1.0]
    assert found.scalars["best mean score"] == [0.25, 0.5]


def test_a_training_run_has_no_curves_of_search(tmp_path):
    storage.write_whole(tmp_path / "config.json", b'{"identity": {}}')
    assert curves.of_search(epath.Path(tmp_path), [PROBLEM]) is None


@pytest.mark.parametrize(
    "body", ["{", '{"search": {}}', '{"search": {"method": "pool", "pool": 1}}', "[]"]
)
def test_a_damaged_config_is_named(tmp_path, body):
    storage.write_whole(tmp_path / "config.json", body.encode())
    if body == "[]":
        assert curves.of_search(epath.Path(tmp_path), []) is None
        return
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        curves.of_search(epath.Path(tmp_path), [])


def test_records_of_the_search_alone_are_counted(tmp_path):
    config = pool.PoolConfig(proofs=1, verifications=1, rounds=0)
    search_config(tmp_path, method="pool", pool=dataclasses.asdict(config))
    other = sample("gen/1", "generator", "prob", stage="gen", num_tokens=1000, text=TEXT)
    found = curves.of_search(epath.Path(tmp_path), [other, *round_of(0, 1.0)])
    assert found is not None
    assert found.scalars["generated tokens"] == [20.0]
    assert isinstance(other, records.Sample)
