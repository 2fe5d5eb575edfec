"""A stage compiles its programs in its first steps, and then no more."""

import pytest
from jax import monitoring

from mathv2_jax import records, roles
from mathv2_jax.cli import inputs
from mathv2_jax.rl import optimizer, placement
from mathv2_jax.stages import rl, sft
from tests import scripted
from tests.by_hand import RATINGS, VERDICTS, proof

ADAM = optimizer.OptimizerConfig(learning_rate=0.01, warmup_steps=0)
TORN = {
    scripted.VERIFY: {VERDICTS[0.0]: 0.3, VERDICTS[1.0]: 0.7},
    scripted.META: {RATINGS[0.5]: 0.5, RATINGS[1.0]: 0.5},
}


@pytest.fixture
def compiled():
    """How many programs were compiled or loaded so far, in a list of one."""
    number = [0]

    def listen(event, seconds, **_):
        number[0] += event == "/jax/core/compile/backend_compile_duration"

    monitoring.register_event_duration_secs_listener(listen)
    yield number
    monitoring.unregister_event_duration_listener(listen)


def before_each_step(run, compiled):
    """The number before each step of what runs next."""
    seen = []

    def look():
        seen.append(compiled[0])
        return False

    run.should_stop = look
    return seen


@pytest.mark.parametrize("where", [placement.RESIDENT, placement.HOST, placement.LOADED])
def test_reinforcement_learning_compiles_nothing_after_its_second_step(make_run, compiled, where):
    run = make_run(torn=TORN)
    run.runtime = type(run.runtime)(
        save_every=100,
        placement=placement.PlacementConfig(
            judge=where,
            reference=where,
            optimizer=placement.RESIDENT if where == placement.LOADED else where,
        ),
    )
    inputs.write_files(run.workdir, {"proofs": [proof(f"h{n}", score=1.0) for n in range(3)]})
    config = rl.RlConfig(steps=5, groups=2, samples=8, rows=4, row_length=400, optimizer=ADAM)
    stage = rl.RlStage(
        name="learned", init="torn", judge="torn", mixture={roles.VERIFIER: 1.0}, rl=config
    )
    seen = before_each_step(run, compiled)
    rl.run_stage(run, stage)
    assert len(seen) == 5
    assert seen[1] > seen[0] and seen[2:] == [seen[2]] * 3


def test_supervised_learning_compiles_nothing_after_its_second_step(make_run, compiled):
    run = make_run(torn=TORN)
    conversations = [
        records.Demonstration(
            id=f"d{n}", role=roles.VERIFIER, problem_id="p", user="Show: B.", assistant="B" * n
        )
        for n in range(1, 10)
    ]
    inputs.write_files(run.workdir, {"demonstrations": conversations})
    config = sft.SftConfig(steps=5, rows=2, row_length=400, optimizer=ADAM)
    seen = before_each_step(run, compiled)
    sft.run_stage(run, sft.SftStage(name="learned", init="torn", sft=config))
    assert seen[1] > seen[0] and seen[2:] == [seen[2]] * 3
