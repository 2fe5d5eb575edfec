"""What the trainer replays of a rollout makes its log-probabilities the sampler's."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from mathv2_jax import records
from mathv2_jax.data import packing
from mathv2_jax.rl import grpo
from mathv2_jax.rl import learner as learner_lib
from mathv2_jax.rl import optimizer as optimizer_lib
from mathv2_jax.stages import gate, groups, rl, updates

PROMPTS = [(3, 40, 41, 42, 7), (3, 90, 17, 60, 61, 62, 100, 5, 11), (9,)]
ADAM = optimizer_lib.OptimizerConfig(learning_rate=1e-3, warmup_steps=0)
CONFIG = rl.RlConfig(steps=1, groups=2, samples=2, rows=4, row_length=64, optimizer=ADAM)


def requests(**fields):
    fields = dict(max_tokens=8) | fields
    return [
        records.Request(id=str(n), prompt=prompt, num_samples=8, seed=n, **fields)
        for n, prompt in enumerate(PROMPTS)
    ]


def packed(found, routing=None, allowed=0):
    both = [groups.unscored(p, r) for p, r in zip(PROMPTS, found, strict=True)]
    (batch,) = updates.pack(CONFIG, both, packing.Replay(routing=routing, allowed=allowed))
    return batch


@pytest.fixture(scope="module")
def learner(config, programs, mesh):
    trunk = learner_lib.Trunk(config=config, kernels=programs.kernels)
    loss = functools.partial(learner_lib.policy_gradient, trunk, grpo.GrpoConfig(), 1.0)
    optimizer = optimizer_lib.make_optimizer(ADAM)
    return learner_lib.Learner(trunk, loss, optimizer, mesh, router_bias_rate=0.0)


@pytest.fixture(scope="module")
def score(learner, place, variables):
    """The trainer's log-probabilities of the sampled tokens, beside the sampler's."""

    def scored(batch, given=variables):
        found_BT = np.asarray(learner.logprobs(place(given), learner.put(batch)))
        real_BT = batch.weights_BT > 0
        return found_BT[real_BT], batch.old_logprobs_BT[real_BT]

    return scored


@pytest.fixture(scope="module")
def elsewhere(variables):
    """The same model, but its router prefers other experts: the scores are as they were."""
    rng = np.random.default_rng(3)
    router = jax.tree.map(lambda b: b + 3.0 * rng.normal(size=b.shape), variables["router"])
    return {**variables, "router": jax.tree.map(np.float32, router)}


def test_replayed_routing_gives_the_samplers_log_probabilities_where_the_router_would_choose_anew(
    make_engine, config, score, elsewhere
):
    found = make_engine().generate(requests(), experts=True)
    routing = (config.num_sparse_layers, config.experts_per_token)
    trainer, sampler = score(packed(found, routing=routing), elsewhere)
    np.testing.assert_allclose(trainer, sampler, atol=3e-5)
    trainer, sampler = score(packed(found), elsewhere)
    assert np.abs(trainer - sampler).mean() > 0.05


def test_routing_of_prompts_alone_or_of_answers_alone_is_not_enough(
    make_engine, config, score, elsewhere
):
    found = make_engine().generate(requests(), experts=True)
    routing = (config.num_sparse_layers, config.experts_per_token)
    bare = [[dataclasses.replace(r, experts=None) for r in each] for each in found]
    assert np.ptp(np.subtract(*score(packed(bare, routing=routing), elsewhere))) > 0.01
    bare = [[dataclasses.replace(r, prompt_experts=None) for r in each] for each in found]
    assert np.ptp(np.subtract(*score(packed(bare, routing=routing), elsewhere))) > 0.01


def test_the_experts_of_a_prompt_are_there_too_where_its_pages_were_computed_before(make_engine):
    engine = make_engine()
    first = engine.generate(requests(), experts=True)
    again = engine.generate(requests(), experts=True)
    assert engine.stats.computed_tokens == sum(len(p) - 1 for p in PROMPTS)
    for one, other in zip(first, again, strict=True):
        assert [r.experts for r in one] == [r.experts for r in other]
        assert one[0].prompt_experts == other[0].prompt_experts
    assert {r.prompt_experts.shape[0] for r in first[2]} == {0}


def test_asking_for_experts_after_not_asking_computes_the_prompts_again(make_engine):
    engine = make_engine()
    engine.generate(requests())
    (found, *_) = engine.generate(requests(), experts=True)
    assert found[0].prompt_experts.shape[0] == len(PROMPTS[0]) - 1


@pytest.mark.parametrize("rules", [dict(top_p=0.6), dict(top_k=5), dict(top_p=0.9, min_p=0.02)])
def test_with_the_kept_set_the_importance_ratio_is_one_and_without_it_the_kept_mass(
    make_engine, score, rules
):
    found = make_engine().generate(requests(**rules), kept=True)
    trainer, sampler = score(packed(found, allowed=128))
    ratio = np.exp(trainer - sampler)
    assert len(ratio) > 60
    np.testing.assert_allclose(ratio, 1.0, atol=1e-3)
    trainer, sampler = score(packed(found))
    mass = np.concatenate(
        [
            np.exp(np.subtract(r.policy_logprobs, groups.Drawn.of(r).logprobs))
            for each in found
            for r in each
        ]
    )  # 1 where the kept set was too large to record
    np.testing.assert_allclose(np.sort(np.exp(trainer - sampler)), np.sort(mass), atol=1e-3)
    assert mass.mean() < 0.97


def test_a_token_whose_kept_set_was_too_large_counts_without_truncation_on_both_sides(
    make_engine, score
):
    found = make_engine().generate(requests(top_p=0.95), kept=True)
    sizes = [len(ids) for each in found for r in each for ids in r.kept if ids]
    most = sorted(sizes)[len(sizes) // 2]

    def few_of(r):
        kept = tuple(ids if ids and len(ids) <= most else None for ids in r.kept)
        return dataclasses.replace(r, kept=kept)

    few = [list(map(few_of, each)) for each in found]
    assert any(ids is None for each in few for r in each for ids in r.kept)
    assert any(ids is not None for each in few for r in each for ids in r.kept)
    trainer, sampler = score(packed(few, allowed=most))
    np.testing.assert_allclose(trainer, sampler, atol=1e-3)


def test_the_gap_says_how_far_how_often_and_where(make_engine, learner, place, variables):
    found = make_engine().generate(requests())
    batch = packed(found)
    trainer_BT = np.array(learner.logprobs(place(variables), learner.put(batch)))
    assert gate.measure(batch, trainer_BT, 1e-3).beyond == 0.0
    row, time = np.argwhere(batch.weights_BT > 0)[7]
    segment_T = batch.segments_BT[row] == batch.segments_BT[row, time]
    begin = int(np.flatnonzero(segment_T)[0])
    trainer_BT[row, time] -= 0.5
    trainer_BT[row, begin] += 0.1
    gap = gate.measure(batch, trainer_BT, 1e-3)
    assert (gap.row, gap.time, gap.first) == (row, time, begin)
    assert gap.largest == pytest.approx(0.5, abs=1e-4)
    assert gap.beyond == pytest.approx((1 + (time != begin)) / gap.tokens)
    words = gap.where(batch, lambda ids: "/".join(map(str, ids)))
    assert f"token {time - begin + 1} of an answer" in words
    assert f"'{batch.tokens_BT[row, time]}'" in words and "first at its token 1." in words


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_log_probability_that_is_not_finite_is_beyond_every_bound(make_engine, value):
    batch = packed(make_engine().generate(requests()))
    trainer_BT = batch.old_logprobs_BT.copy()
    row, time = np.argwhere(batch.weights_BT > 0)[0]
    trainer_BT[row, time] = value
    gap = gate.measure(batch, trainer_BT, 1.0)
    assert gap.largest == np.inf and gap.beyond > 0.0
    assert gap.fault(0.99) == f"1 of {gap.tokens} log-probabilities are not finite"


@pytest.mark.parametrize("edge", ["first", "last"])
def test_a_fault_of_one_place_is_found_however_long_the_answers_are(edge):
    """It is one token in 50: below a share of 5 %."""
    items = [
        packing.Item(
            prompt=(3, 4),
            answers=tuple(
                packing.Answer(tokens=[5] * 50, weights=[1.0] * 50, old_logprobs=[-1.0] * 50)
                for _ in range(4)
            ),
        )
    ]
    (batch,) = packing.pack_all(items, 1, 256)
    trainer_BT = batch.old_logprobs_BT.copy()
    assert gate.measure(batch, trainer_BT, 0.1).fault(0.05) == ""
    begins = np.flatnonzero(batch.weights_BT[0] > 0)[:: 50 if edge == "first" else 1]
    places = begins if edge == "first" else np.flatnonzero(batch.weights_BT[0] > 0)[49::50]
    trainer_BT[0, places[:2]] -= 1.0
    assert gate.measure(batch, trainer_BT, 0.1).fault(0.05) == ""  # two may be chance
    trainer_BT[0, places] = -3.0
    gap = gate.measure(batch, trainer_BT, 0.1)
    assert gap.beyond == pytest.approx(0.02)
    assert gap.fault(0.05) == f"of {edge} tokens of answers 4 in 4 are more than 0.1 apart"
    assert "of tokens 4 in 200" in gap.fault(0.01)


def test_of_no_tokens_there_is_no_gap():
    batch = packing.empty_batch(2, 4)
    assert gate.measure(batch, batch.old_logprobs_BT, 0.1) is None
