"""A stage compiles its programs in its first steps, and holds no more than its phases need."""

import gc

import jax
import pytest
from jax import monitoring

from mathv2_jax import records, roles
from mathv2_jax.cli import inputs
from mathv2_jax.rl import learner, optimizer, placement
from mathv2_jax.stages import rl, sft
from tests import scripted
from tests.by_hand import RATINGS, VERDICTS, proof

ADAM = optimizer.OptimizerConfig(learning_rate=0.01, warmup_steps=0)
TORN = {
    scripted.VERIFY: {VERDICTS[0.0]: 0.3, VERDICTS[1.0]: 0.7},
    scripted.META: {RATINGS[0.5]: 0.5, RATINGS[1.0]: 0.5},
}


def learned(steps):
    config = rl.RlConfig(steps=steps, groups=2, samples=8, rows=4, row_length=400, optimizer=ADAM)
    return rl.RlStage(
        name="learned", init="torn", judge="torn", mixture={roles.VERIFIER: 1.0}, rl=config
    )


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
    seen = before_each_step(run, compiled)
    rl.run_stage(run, learned(steps=5))
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


def held(run, stage):
    """Bytes of arrays on the devices while the policy is sampled, and while the step is trained,
    in the last of the stage's steps."""
    seen = {}

    def count():
        arrays = [x for x in jax.live_arrays() if x.sharding.memory_kind == "device"]
        buffers = [s.data for x in arrays if not x.is_deleted() for s in x.addressable_shards]
        return sum({b.unsafe_buffer_pointer(): b.nbytes for b in buffers}.values())

    class Counting(type(run.policy.engines[0])):
        def generate(self, *arguments, **recorded):
            seen["sampling"] = count()
            return super().generate(*arguments, **recorded)

    run.policy.engines[0].__class__ = Counting
    step = learner.Learner.step

    def counted(self, *arguments):
        seen["training"] = count()
        return step(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learner.Learner, "step", counted)
        gc.collect()
        before = count()
        rl.run_stage(run, stage)
    return {phase: number - before for phase, number in seen.items()}


def test_a_set_that_is_placed_on_the_hosts_takes_no_room_in_other_phases(make_run_in, tmp_path):
    found, one = {}, 0
    for where in (placement.RESIDENT, placement.HOST):
        run = make_run_in(tmp_path / where, torn=TORN)
        places = placement.PlacementConfig(judge=where, reference=where, optimizer=where)
        run.runtime = type(run.runtime)(save_every=100, placement=places)
        inputs.write_files(run.workdir, {"proofs": [proof(f"h{n}", score=1.0) for n in range(3)]})
        found[where] = held(run, learned(steps=3))
        one = sum(x.nbytes for x in jax.tree.leaves(run.variables("torn")))
    resident, host = found[placement.RESIDENT], found[placement.HOST]
    # Without the reference and the moments; and without the judge and the reference.
    assert resident["sampling"] - host["sampling"] == pytest.approx(3 * one, rel=0.05)
    assert resident["training"] - host["training"] == pytest.approx(2 * one, rel=0.05)
