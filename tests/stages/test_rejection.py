"""The previous iteration's best responses."""

import jax
import numpy as np
import pytest

from mathv2_jax import records, roles, storage
from mathv2_jax.rl import optimizer
from mathv2_jax.stages import rejection, sft
from tests.by_hand import PROOF, STATEMENT, VERDICTS, sample

SFT = sft.SftConfig(
    steps=1, rows=1, row_length=400, optimizer=optimizer.OptimizerConfig(learning_rate=1e-3)
)


def stage(**fields):
    values = dict(name="again", init="start", samples_from=("rl",), min_reward=0.9, sft=SFT)
    return rejection.RejectionStage(**{**values, **fields})


def write(run, totals, stage_name="rl"):
    """Samples named stage/step/group/place with their total reward (None: a judge's opinion)."""
    found = [
        sample(name, VERDICTS[1.0], rewards={} if total is None else {"total": total})
        for name, total in totals.items()
    ]
    parts = run.parts(stage_name)
    parts.write_part(storage.part_name(1), records.to_lines(found))
    parts.commit(1)


def chosen(run, **fields):
    return [d.parents[0] for d in rejection.best_responses(run, stage(**fields))]


REWARDS = {
    "rl/0/0/0": 1.0,
    "rl/0/0/1": 0.9,
    "rl/0/0/2": 1.0,
    "rl/0/0/0/meta_verifier/0": None,
    "rl/0/1/0": 0.8,
    "rl/0/1/1": 0.95,
    "rl/1/0/0": 1.0,
}


def test_the_best_of_each_group_and_none_below_the_bar(make_run):
    run = make_run()
    write(run, REWARDS)
    assert chosen(run) == ["rl/0/0/0", "rl/0/0/2", "rl/0/1/1", "rl/1/0/0"]
    assert chosen(run, per_group=1) == ["rl/0/0/0", "rl/0/1/1", "rl/1/0/0"]
    assert chosen(run, min_reward=1.0) == ["rl/0/0/0", "rl/0/0/2", "rl/1/0/0"]
    everything = chosen(run, min_reward=0.8, per_group=9)
    assert everything[:3] == ["rl/0/0/0", "rl/0/0/2", "rl/0/0/1"]
    assert everything[3:] == ["rl/0/1/1", "rl/0/1/0", "rl/1/0/0"]


def test_a_chosen_response_is_imitated_under_the_prompt_that_it_answered(make_run):
    run = make_run()
    write(run, {"rl/0/0/0": 1.0})
    (found,) = rejection.best_responses(run, stage())
    assert (found.role, found.assistant, found.source) == (roles.VERIFIER, VERDICTS[1.0], "rl")
    assert STATEMENT in found.user and PROOF in found.user and found.learned == ()


def test_a_chosen_response_is_imitated_with_its_thinking(make_run):
    run = make_run()
    fields = dict(rewards={"total": 1.0})
    found = [sample(f"rl/0/{n}/0", VERDICTS[1.0], thinking=f"So {n}.", **fields) for n in range(2)]
    parts = run.parts("rl")
    parts.write_part(storage.part_name(1), records.to_lines(found))
    parts.commit(1)
    first, second = rejection.best_responses(run, stage())
    assert (first.thinking, second.thinking) == ("So 0.", "So 1.")
    assert first.id != second.id


def test_sources_follow_each_other(make_run):
    run = make_run()
    write(run, {"rl/0/0/0": 1.0})
    write(run, {"gen/0/0/0": 1.0}, "gen")
    assert chosen(run, samples_from=("gen", "rl")) == ["gen/0/0/0", "rl/0/0/0"]


def test_nothing_to_imitate_is_an_error_unless_allowed(make_run):
    run = make_run(start={})
    write(run, {"rl/0/0/0": 0.5})
    with pytest.raises(ValueError, match="no response of rl earned 0.9: lower min_reward"):
        rejection.run_stage(run, stage())
    figures = rejection.run_stage(run, stage(allow_empty=True))
    assert figures == {f"chosen/{name}": 0.0 for name in roles.NAMES}
    jax.tree.map(np.testing.assert_array_equal, run.variables("again"), run.variables("start"))


@pytest.mark.parametrize("fields", [dict(min_reward=0.0), dict(min_reward=1.1), dict(per_group=0)])
def test_an_impossible_setting_is_named(fields):
    ((name, value),) = fields.items()
    with pytest.raises(ValueError, match=f"{name} = {value}"):
        stage(**fields)
