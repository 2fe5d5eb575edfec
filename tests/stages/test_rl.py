"""Collecting and packing a step of reinforcement learning; what a stage refuses."""

import dataclasses

import numpy as np
import pytest

from mathv2_jax import records, roles, storage
from mathv2_jax.cli import inputs
from mathv2_jax.rl import optimizer
from mathv2_jax.rollout import durable
from mathv2_jax.stages import groups, rl, task_stream, updates
from tests import scripted
from tests.by_hand import RATINGS, STATEMENT, VERDICTS, proof, task

ROLES = scripted.ROLES
ADAM = optimizer.OptimizerConfig(learning_rate=1e-3)
MIXED = {"verifier": 1.0, "meta_verifier": 1.0}
# The verifier always says the same, so its groups hold no signal; the meta-verifier does not.
SCRIPT = {
    scripted.VERIFY: {VERDICTS[1.0]: 1.0},
    scripted.META: {RATINGS[0.0]: 0.5, RATINGS[1.0]: 0.5},
}


def config(**fields):
    values = dict(steps=2, groups=2, samples=8, rows=2, row_length=64, optimizer=ADAM)
    return rl.RlConfig(**{**values, **fields})


def stage(**fields):
    values = dict(name="mixed", init="start", mixture=MIXED, rl=config())
    return rl.RlStage(**{**values, **fields})


def stream(run):
    """Verifier and meta-verifier tasks by turns, numbered."""
    verifier = ROLES.verifier.prompt(run.tokenizer, statement=STATEMENT, proof="P")
    meta = ROLES.meta_verifier.prompt(run.tokenizer, statement=STATEMENT, proof="P", analysis="V")
    return [
        task(ROLES.meta_verifier if n % 2 else ROLES.verifier, 1.0, target=str(n), prompt=prompt)
        for n, prompt in enumerate([verifier, meta] * 4)
    ]


def collected(run, position=0, step=0, **fields):
    run.policy.load(run.variables("start"), "start@0")
    mixed = stage(rl=config(**fields))
    responses = durable.Responses(run.workdir / "responses", 30.0)
    scores = rl.make_scores(run, mixed, responses)
    policy = {0: responses.of(run.policy.engines[0], "start@0", writes=False)}
    with rl.judging(run, mixed, rl.make_judge(run, mixed)):
        found = rl.collect(run, mixed, stream(run), scores, step, position, policy)
    return [found.groups[place] for place in range(len(found.summaries))], found.position


def packed(setting, found):
    return updates.pack(setting, [updates.trained(groups.summarise(g)) for g in found])


@pytest.mark.parametrize(
    ("max_refills", "targets"), [(0, "01"), (1, "012"), (2, "0123"), (9, "0123")]
)
def test_groups_without_signal_are_refilled_in_the_streams_order(make_run, max_refills, targets):
    found, position = collected(make_run(start=SCRIPT), max_refills=max_refills)
    assert [g.task.target for g in found] == list(targets)
    assert position == len(targets)
    assert [g.has_signal for g in found] == [target in "13" for target in targets]


def test_collecting_is_a_function_of_position_and_step(make_run):
    run = make_run(start=SCRIPT)

    def texts(**where):
        found, _ = collected(run, **where)
        return [[a.opinion.text for a in g.answered] for g in found]

    assert texts(position=2, step=1) == texts(position=2, step=1)
    assert texts(position=2, step=1) != texts(position=2, step=0)  # other noise
    assert collected(run, position=2)[0][0].task.target == "2"


def test_a_packed_step_learns_from_groups_with_signal_and_from_every_human_score(make_run):
    found, _ = collected(make_run(start=SCRIPT), max_refills=2)
    batches = packed(config(rows=4, row_length=400), found)
    weights_BT = np.concatenate([b.weights_BT for b in batches])
    signal = [g for g in found if g.has_signal]
    lengths = [len(a.opinion.response.token_ids) for g in signal for a in g.answered]
    assert np.count_nonzero(weights_BT) == sum(lengths)
    heads_BN = np.concatenate([b.head_weights_BN for b in batches])
    labels_BN = np.concatenate([b.head_labels_BN for b in batches])
    np.testing.assert_allclose(heads_BN[heads_BN > 0], [0.5, 0.5])  # two verifier groups
    assert set(labels_BN[heads_BN > 0]) == {2}
    places = weights_BT > 0
    old_BT = np.concatenate([b.old_logprobs_BT for b in batches])
    advantages_BT = np.concatenate([b.advantages_BT for b in batches])
    expected = sorted(p for g in signal for a in g.answered for p in a.opinion.response.logprobs)
    np.testing.assert_allclose(sorted(old_BT[places]), expected, rtol=1e-6)
    assert abs((advantages_BT * weights_BT).sum()) < 1e-6  # a group's advantages cancel


def test_machine_labels_weigh_less_in_the_heads_loss(make_run):
    found, _ = collected(make_run(start=SCRIPT), max_refills=2)
    auto = [
        dataclasses.replace(
            g,
            answered=tuple(
                dataclasses.replace(a, task=dataclasses.replace(a.task, auto=i == 0))
                for a in g.answered
            ),
        )
        for i, g in enumerate(found)
    ]
    setting = config(rows=4, row_length=400, head_weight=0.8, head_auto_weight=0.2)
    heads = np.concatenate(
        [b.head_weights_BN[b.head_weights_BN > 0] for b in packed(setting, auto)]
    )
    np.testing.assert_allclose(sorted(heads), [0.1, 0.4])


# Where tasks come from.


def write_inputs(run, **files):
    inputs.write_files(run.workdir, files)


def test_fresh_proofs_have_their_share_and_unlabelled_ones_none(make_run):
    run = make_run()
    human = [proof(f"h{n}", text=f"H{n}", score=1.0) for n in range(7)]
    auto = [proof(f"a{n}", text=f"A{n}", score=0.0, source="auto") for n in range(3)]
    write_inputs(run, proofs=human)
    parts = run.parts("label")
    parts.write_part(storage.part_name(1), records.to_lines([*auto, proof("u", text="U")]))
    parts.commit(1)
    mixed = stage(
        mixture={"verifier": 1.0},
        proofs=("proofs", "label"),
        fresh_share=0.25,
        rl=config(row_length=400),
    )
    tasks = task_stream.make(run, mixed)
    drawn = [tasks[n] for n in range(80)]
    assert sum(t.auto for t in drawn) == 20
    assert {t.target for t in drawn} == {p.id for p in (*human, *auto)}


@pytest.mark.parametrize("proofs", [("proofs", "label"), ("label", "proofs"), ("proofs",)])
def test_a_source_without_labels_leaves_its_weight_to_the_others_of_its_role(make_run, proofs):
    run = make_run()
    quality = records.Label(score=1.0, source="human", rubric="I_mv")
    analysis = records.Analysis(
        id="v",
        problem_id="p",
        proof_id="y",
        statement=STATEMENT,
        proof="P",
        text=VERDICTS[0.5],
        score=0.5,
        label=quality,
    )
    write_inputs(run, proofs=[proof("h", score=1.0)], analyses=[analysis])
    parts = run.parts("label")
    parts.write_part(storage.part_name(1), records.to_lines([proof("u", text="U")]))
    parts.commit(1)
    tasks = task_stream.make(run, stage(proofs=proofs, fresh_share=0.75, rl=config(row_length=400)))
    drawn = [tasks[n].role.name for n in range(40)]
    assert drawn.count(roles.VERIFIER) == drawn.count(roles.META_VERIFIER) == 20


def test_fresh_proofs_alone_have_the_whole_weight_of_the_verifier():
    assert task_stream.proof_shares(["a", "b"], 0.25) == {"a": 0.5, "b": 0.5}
    both = task_stream.proof_shares(["proofs", "a", "b"], 0.25)
    assert both == {"a": 0.125, "b": 0.125, "proofs": 0.75}


def test_a_stage_without_any_labelled_proof_says_so(make_run):
    run = make_run()
    write_inputs(run, proofs=[proof("u")])
    with pytest.raises(ValueError, match="no source has a positive weight"):
        task_stream.make(run, stage(mixture={"verifier": 1.0}))


def test_tasks_that_no_row_holds_are_left_out_and_none_left_is_an_error(make_run, caplog):
    run = make_run()
    write_inputs(
        run, proofs=[proof("s", score=1.0), proof("l", text="A implies B " * 60, score=1.0)]
    )
    short = stage(mixture={"verifier": 1.0}, rl=config(row_length=100))
    tasks = task_stream.make(run, short)
    assert {tasks[n].target for n in range(6)} == {"s"}
    assert "1 of 2 items do not fit engine.context and row_length" in caplog.text
    with pytest.raises(ValueError, match=r"none of 2 items fits .*row_length = 5"):
        task_stream.make(run, stage(mixture={"verifier": 1.0}, rl=config(row_length=5)))


def test_long_prompts_are_counted_once_in_a_run(make_run):
    run = make_run()
    texts = {f"l{n}": "A implies B " * (60 + n) for n in range(3)}
    write_inputs(
        run,
        proofs=[proof("s", score=1.0), *(proof(n, text=t, score=1.0) for n, t in texts.items())],
    )
    short = stage(mixture={"verifier": 1.0}, rl=config(row_length=100))
    first = task_stream.make(run, short)
    (kept,) = run.input_path("").parent.glob("lengths/*.npy")
    counted = np.load(kept)
    assert len(counted) == 4 and sorted(counted)[1] > 100
    again = task_stream.make(run, short)
    assert [again[n].target for n in range(6)] == [first[n].target for n in range(6)]
    np.save(kept, np.minimum(counted, 100))  # what stands there is what counts
    assert {task_stream.make(run, short)[n].target for n in range(60)} == {"s", *texts}


# Settings.


def sampled(**changes):
    settings = {
        name: dataclasses.replace(ROLES.named(name).sampling, **changes.get(name, {}))
        for name in roles.NAMES
    }
    return roles.make_roles(roles.RolesConfig(templates="world", **settings))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (dict(verifier=dict(temperature=0.0)), "trains at one positive temperature"),
        (dict(verifier=dict(temperature=0.5)), "trains at one positive temperature"),
        (dict(meta_verifier=dict(top_p=0.9)), "top_p = {'meta_verifier': 0.9}"),
    ],
)
def test_what_the_trainer_could_not_replay_is_refused(make_run, changes, complaint):
    run = make_run()
    run.roles = sampled(**changes)
    with pytest.raises(ValueError, match=complaint):
        rl.require_trainable(stage(), run.roles.sampling)
    run.roles = sampled(generator=dict(temperature=0.0, top_p=0.5))  # is not trained here
    assert rl.require_trainable(stage(), run.roles.sampling) == 1.0


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        (dict(mixture={}), "must weigh some of"),
        (dict(mixture={"prover": 1.0}), "must weigh some of"),
        (dict(mixture={"verifier": 1.0, "meta_verifier": -0.5}), "must not be negative"),
        (dict(mixture={"verifier": 0.0}), "one must be positive"),
        (dict(fresh_share=1.5), "fresh_share = 1.5 must lie in 0..1"),
        (dict(fresh_share=-0.5), "fresh_share = -0.5 must lie in 0..1"),
        (dict(mixture={"generator": 1.0}), "a generator needs a judge"),
        (dict(mixture={"generator": 1.0, "verifier": 1.0}, judge="j"), "a generator trains alone"),
    ],
)
def test_an_impossible_mixture_is_refused(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        stage(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        dict(steps=0),
        dict(samples=1),
        dict(max_refills=-1),
        dict(updates=0),
        dict(updates=3),
        dict(gate=-0.5),
        dict(on_length="ignore"),
        dict(head_weight=-1.0),
        dict(head_auto_weight=-0.5),
    ],
)
def test_an_impossible_setting_is_named(fields):
    ((name, value),) = fields.items()
    with pytest.raises(ValueError, match=f"rl.{name} = {value!r}"):
        config(**fields)
