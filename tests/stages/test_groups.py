"""Groups, their records and a step's scalars."""

import numpy as np
import pytest

from mathv2_jax import roles
from mathv2_jax.records import Finish
from mathv2_jax.stages import groups, scoring
from tests import scripted
from tests.by_hand import GENERATIONS, NOISE, PROOF, RATINGS, VERDICTS, answer

ROLES = scripted.ROLES


def scored(total, **fields):
    components = None if total is None else {"format": 1.0, "total": total}
    return scoring.Scored(components, **fields)


def verifier_group(*values):
    answered = [answer(ROLES.verifier, VERDICTS[0.5], 1.0) for _ in values]
    return groups.make_group(answered, [scored(v) for v in values], "mean")


def measured(*found):
    return groups.measure([groups.summarise(group) for group in found])


def opinion(role, text):
    return answer(role, text).opinion


def test_an_answer_without_a_reward_is_outside_the_baseline():
    group = verifier_group(1.0, None, 0.5, 0.0)
    assert group.kept == (0, 2, 3)
    np.testing.assert_allclose(group.advantages, [0.5, 0.0, -0.5])
    assert group.has_signal and not verifier_group(0.5, None, 0.5).has_signal


def test_only_a_verifiers_prompt_has_a_target_for_the_head():
    assert verifier_group(1.0, 0.0).head_label == 1.0
    for role in (ROLES.meta_verifier, ROLES.generator):
        group = groups.make_group([answer(role, NOISE, 0.5)] * 2, [scored(0.0)] * 2, "mean")
        assert group.head_label is None


def test_the_steps_scalars_by_hand():
    answered = [
        answer(ROLES.verifier, VERDICTS[1.0], 1.0),
        answer(ROLES.verifier, VERDICTS[0.5], 1.0),
        answer(ROLES.verifier, NOISE, 1.0),
        answer(ROLES.verifier, VERDICTS[0.0], 1.0, Finish.LENGTH),
    ]
    votes = (opinion(ROLES.meta_verifier, RATINGS[1.0]), opinion(ROLES.meta_verifier, NOISE))
    rewards = [
        scoring.Scored({"format": 1.0, "meta": 0.5, "total": 0.5}, meta=votes),
        scoring.Scored(None, meta=(votes[1],)),
        scoring.Scored({"format": 0.0, "total": 0.0}),
        scoring.Scored({"format": 0.0, "total": 0.0}),
    ]
    found = measured(groups.make_group(answered, rewards, "mean"), verifier_group(0.25, 0.25))
    assert found == pytest.approx(
        {
            "reward": (0.5 + 0 + 0 + 0.25 + 0.25) / 5,
            "reward/format": (1 + 0 + 0 + 1 + 1) / 5,
            "reward/meta": 0.5,
            "outcome/parsed": 4 / 6,
            "outcome/unparseable": 1 / 6,
            "outcome/length": 1 / 6,
            "outcome/lost": 0.0,
            "length": 3.0,
            "score": (1.0 + 0.5 + 0.5 + 0.5) / 4,
            "zero_signal": 0.5,
            "lost_votes": 2 / 3,
            "left_group": 1 / 6,
        }
    )


def test_a_mean_of_nothing_is_left_out():
    answered = [answer(ROLES.verifier, NOISE, 1.0)] * 2
    found = measured(groups.make_group(answered, [scored(None)] * 2, "mean"))
    assert not {"reward", "score", "lost_votes"} & set(found)
    assert (found["outcome/unparseable"], found["left_group"], found["length"]) == (1.0, 1.0, 3.0)
    asked = [scored(None, meta=(opinion(ROLES.meta_verifier, RATINGS[1.0]),))] * 2
    assert measured(groups.make_group(answered, asked, "mean"))["lost_votes"] == 0.0


def test_each_kind_of_failure_is_said_once_a_stage_with_its_step(caplog):
    alarms = groups.Alarms("gen", lost=0.05, failed=0.25)
    alarms.check(1, {"outcome/unparseable": 0.25, "outcome/length": 0.1, "lost_votes": 0.05})
    assert not caplog.messages
    for step in (2, 3):
        alarms.check(step, {"outcome/unparseable": 0.5, "outcome/length": 0.1, "lost_votes": 0.1})
    alarms.check(4, {"outcome/unparseable": 0.5, "outcome/length": 0.3, "outcome/lost": 0.06})
    said = [message.split(",")[:2] for message in caplog.messages]
    assert said == [
        ["gen", " step 2: 10 % of the judge's votes are lost"],
        ["gen", " step 2: 50 % of the policy's answers are unparseable"],
        ["gen", " step 4: 6 % of the policy's answers are lost"],
        ["gen", " step 4: 30 % of the policy's answers are cut at their limit"],
    ]


def test_every_answer_is_recorded_and_followed_by_what_was_said_about_it():
    answered = [answer(ROLES.generator, GENERATIONS[0.5]), answer(ROLES.generator, NOISE)]
    said = dict(
        verifier=(opinion(ROLES.verifier, VERDICTS[1.0]), opinion(ROLES.verifier, NOISE)),
        meta=(opinion(ROLES.meta_verifier, RATINGS[0.5]),),
    )
    group = groups.make_group(answered, [scored(0.8, **said), scored(None)], "mean")
    found = groups.to_samples("gen", 3, {1: group, 0: verifier_group(1.0, 0.0)})[2:]
    assert [(s.id, s.role) for s in found] == [
        ("gen/3/1/0", roles.GENERATOR),
        ("gen/3/1/0/verifier/0", roles.VERIFIER),
        ("gen/3/1/0/verifier/1", roles.VERIFIER),
        ("gen/3/1/0/meta_verifier/0", roles.META_VERIFIER),
        ("gen/3/1/1", roles.GENERATOR),
    ]
    own, verdict, _, rating, last = found
    assert (own.votes, own.meta_votes, own.rewards["total"], own.advantage) == (
        (1.0,),
        (0.5,),
        0.8,
        0.0,
    )
    assert (verdict.proof, verdict.analysis, verdict.target) == (PROOF, "", own.id)
    assert (rating.proof, rating.analysis) == (PROOF, VERDICTS[0.5])  # the self-analysis alone
    assert (last.rewards, last.advantage) == ({}, None)


def test_what_processes_wrote_is_put_in_the_order_of_one():
    whole = groups.to_samples("gen", 3, {n: verifier_group(1.0, 0.0) for n in range(12)})
    first, second = (
        groups.to_samples("gen", 3, {n: verifier_group(1.0, 0.0) for n in places})
        for places in ((*range(3), 11), range(3, 11))
    )
    before = groups.to_samples("gen", 2, {0: verifier_group(1.0, 0.0)})
    assert groups.in_order([*first, *before, *second]) == [*before, *whole]
