import functools
import logging

import numpy as np
import pytest

from mathv2_jax import records
from mathv2_jax.data import packing
from mathv2_jax.model import paged, transformer
from mathv2_jax.rl import learner as learner_lib
from mathv2_jax.rl import optimizer as optimizer_lib
from mathv2_jax.rollout import decode, schedule
from mathv2_jax.rollout import engine as engine_lib

SHORT = (3, 40, 41, 42, 7)
SHORTEST = (3,)  # shorter than the embedding taps
LONG = (3, 90, 17, 60, 61, 62, 100, 5, 11)


def request(name="a", prompt=SHORT, num_samples=3, seed=1, **fields):
    fields = dict(max_tokens=6) | fields
    return records.Request(id=name, prompt=prompt, num_samples=num_samples, seed=seed, **fields)


MIXED = [
    request("a", temperature=0.7),
    request("b", LONG, seed=2, max_tokens=10),
    request("c", SHORTEST, seed=3, max_tokens=4, temperature=1.5),
    request("d", seed=4, temperature=0.0),
    request("e", LONG, max_tokens=10, temperature=0.7),
    request("f", seed=6),
]


def said(responses):
    """What decides whether two lists of responses are the same, up to rounding."""
    return [(r.request_id, r.index, r.token_ids, r.text, r.finish) for r in responses]


def logprobs(responses):
    return np.concatenate([r.logprobs for r in responses])


def swapped(variables, first, second):
    """Variables that say the one token wherever they would have said the other."""
    unembed_DV = np.array(variables["params"]["unembed"])
    unembed_DV[:, [first, second]] = unembed_DV[:, [second, first]]
    return variables | {"params": variables["params"] | {"unembed": unembed_DV}}


@pytest.fixture(scope="module")
def engine(make_engine):
    return make_engine()


@pytest.fixture(scope="module")
def together(engine):
    return engine.generate(MIXED)


@pytest.fixture(scope="module")
def greedy(engine):
    """The two first tokens of the likeliest answer to SHORT, and all of it."""
    (response,) = engine.generate([request(temperature=0.0)])[0][:1]
    assert len(set(response.token_ids[:2])) == 2
    return response


# The sampler and the trainer.


def test_the_samplers_log_probabilities_are_the_trainers_on_the_same_packed_tokens(
    engine, config, programs, mesh, place, variables
):
    """Several answers share a prompt, prompts share a row, and the temperature is not 1."""
    temperature = 0.7
    requests = [
        request("a", temperature=temperature),
        request("b", LONG, seed=2, temperature=temperature, max_tokens=10),
        request("c", SHORTEST, seed=3, temperature=temperature),
    ]
    items = [
        packing.Item(
            prompt=asked.prompt,
            answers=tuple(
                packing.Answer(
                    tokens=r.token_ids,
                    weights=[1.0] * len(r.token_ids),
                    old_logprobs=r.logprobs,
                )
                for r in responses
            ),
        )
        for asked, responses in zip(requests, engine.generate(requests), strict=True)
    ]
    (batch,) = packing.pack_all(items, 2, 48)
    assert (batch.segments_BT.max(axis=1) > 4).any()  # some row holds two prompts
    trunk = learner_lib.Trunk(config=config, kernels=programs.kernels)
    learner = learner_lib.Learner(
        trunk,
        functools.partial(learner_lib.supervised, trunk),
        optimizer_lib.make_optimizer(optimizer_lib.OptimizerConfig(learning_rate=1e-3)),
        mesh,
        router_bias_rate=0.0,
        temperature=temperature,
    )
    trained_BT = np.asarray(learner.logprobs(place(variables), learner.put(batch)))
    answered_BT = batch.weights_BT > 0
    assert answered_BT.sum() == sum(len(a.tokens) for i in items for a in i.answers)
    np.testing.assert_allclose(
        trained_BT[answered_BT], batch.old_logprobs_BT[answered_BT], atol=1e-5
    )


# What an answer depends on.


def test_answering_together_is_answering_one_at_a_time(engine, together):
    for asked, responses in zip(MIXED, together, strict=True):
        (alone,) = engine.generate([asked])
        assert said(alone) == said(responses)
        np.testing.assert_allclose(logprobs(alone), logprobs(responses), atol=1e-5)


def test_the_order_of_the_requests_changes_no_answer(engine, together):
    turned = engine.generate(MIXED[::-1])[::-1]
    assert [said(r) for r in turned] == [said(r) for r in together]


def test_an_answer_follows_its_index_however_many_are_asked_for(engine, together):
    """Eleven answers need two calls of eight rows; the first three are those of asking three."""
    (many,) = engine.generate([request("f", seed=6, num_samples=11)])
    assert [r.index for r in many] == list(range(11))
    assert said(many[:3]) == said(together[5])
    assert len({r.token_ids for r in many}) == 11


def test_only_seed_and_index_make_two_answers_to_a_prompt_differ(engine):
    first, again, other = engine.generate([request(), request("b"), request("c", seed=2)])
    assert [r.token_ids for r in first] == [r.token_ids for r in again]
    assert len({r.token_ids for r in (*first, *other)}) == 6


def test_greedy_answers_are_all_the_same(together):
    assert len({r.token_ids for r in together[3]}) == 1


def test_a_lower_limit_gives_the_beginning_of_the_same_answer(engine, together):
    (short,) = engine.generate([request("f", seed=6, max_tokens=4)])
    for cut, whole in zip(short, together[5], strict=True):
        assert len(whole.token_ids) == 6 and whole.finish is records.Finish.LENGTH
        assert cut.token_ids == whole.token_ids[:4] and cut.finish is records.Finish.LENGTH
        np.testing.assert_allclose(cut.logprobs, whole.logprobs[:4], atol=1e-6)


def test_a_requests_stop_ids_end_its_own_answers_and_no_neighbours(engine, together):
    """Both requests are of one compiled shape, and answer alike but for the stop."""
    stop = together[5][0].token_ids[2]
    ended, free = engine.generate([request("f", seed=6, stop_ids=(stop,)), request("f", seed=6)])
    assert said(free) == said(together[5])
    assert ended[0].token_ids == free[0].token_ids[:3]
    assert ended[0].finish is records.Finish.STOP


def test_the_end_token_is_part_of_the_answer_and_of_its_log_probabilities(
    make_engine, tokenizer, variables, greedy
):
    ends = make_engine(swapped(variables, greedy.token_ids[1], tokenizer.eos_id))
    (response,) = ends.generate([request(temperature=0.0, num_samples=3)])[0][:1]
    assert response.token_ids == (greedy.token_ids[0], tokenizer.eos_id)
    assert response.finish is records.Finish.STOP
    np.testing.assert_allclose(response.logprobs, greedy.logprobs[:2], atol=1e-5)
    assert response.text == tokenizer.decode(greedy.token_ids[:1])


# Requests that cannot be answered.


@pytest.mark.parametrize(
    "hopeless",
    [
        request("lost", prompt=tuple(range(20, 37)), num_samples=2),
        request("lost", prompt=(), num_samples=2),
        request("lost", max_tokens=18, num_samples=2),
        request("lost", max_tokens=0, num_samples=2),
    ],
    ids=["prompt_too_long", "no_prompt", "limit_too_long", "no_limit"],
)
def test_a_request_that_does_not_fit_is_lost_and_no_other(engine, together, hopeless):
    before, lost, after = engine.generate([MIXED[0], hopeless, MIXED[5]])
    assert said(before) == said(together[0]) and said(after) == said(together[5])
    assert [(r.index, r.finish, r.token_ids, r.final_text) for r in lost] == [
        (i, records.Finish.LOST, (), None) for i in range(2)
    ]


def test_requests_that_do_not_fit_are_told_in_one_line_a_call(engine, caplog):
    with caplog.at_level(logging.WARNING):
        engine.generate([request(name, max_tokens=0) for name in ("first", "second", "third")])
    (line,) = [r.getMessage() for r in caplog.records if "is lost" in r.getMessage()]
    assert line.startswith("request first is lost: ") and line.endswith("so are 2 more of 3")
    with caplog.at_level(logging.WARNING):
        engine.generate([request("alone", max_tokens=0)])
    assert "more of" not in caplog.records[-1].getMessage()


def test_an_engine_without_variables_says_what_to_call(programs, tokenizer, mesh):
    empty = engine_lib.Engine(programs, tokenizer, schedule.EngineConfig(), mesh)
    with pytest.raises(ValueError, match="call load before the first request"):
        empty.generate([request()])


# Variables and the head.


def test_loaded_variables_answer_from_then_on_under_their_name(
    make_engine, variables, greedy, together
):
    changing = make_engine(version="rl@1")
    (before,) = changing.generate([MIXED[3]])
    first, other = greedy.token_ids[0], 200
    assert other not in greedy.token_ids
    changing.load(swapped(variables, first, other), "rl@2")
    (after,) = changing.generate([MIXED[3]])
    assert said(before) == said(together[3])
    assert {r.parameter_version for r in before} == {"rl@1"}
    assert {r.parameter_version for r in after} == {"rl@2"}
    assert {r.token_ids[0] for r in after} == {other}


def test_first_opinions_are_the_head_on_a_plain_passes_last_state(engine, states, variables):
    """More prompts than one call holds, of both buckets, in the order of asking."""
    prompts = [LONG[: 1 + n % 9] + (n,) for n in range(12)]
    opinions_N3 = engine.first_opinions(prompts)
    params = variables["params"]
    for prompt, opinion_3 in zip(prompts, opinions_N3, strict=True):
        hidden_D = states(prompt)[-1]
        logits_3 = hidden_D @ params["verifier_head_kernel"] + params["verifier_head_bias"]
        expected_3 = np.exp(logits_3) / np.exp(logits_3).sum()
        np.testing.assert_allclose(opinion_3, expected_3, atol=1e-5)
    assert np.ptp(opinions_N3, axis=0).min() > 0.01


def test_an_opinion_on_a_prompt_that_does_not_fit_is_an_error(engine):
    with pytest.raises(
        ValueError, match="prompt 1 has 23 tokens: it must have 1 to engine.context = 22"
    ):
        engine.first_opinions([SHORT, range(23)])


# Thinking.


def test_without_the_end_of_thinking_there_is_no_final_text(make_engine, greedy):
    (response,) = make_engine(think=True).generate([request(temperature=0.0)])[0][:1]
    assert response.token_ids == greedy.token_ids
    assert response.final_text is None
    assert response.thinking_text == response.text == greedy.text


def test_thinking_and_final_text_part_at_the_end_of_thinking(
    make_engine, tokenizer, variables, greedy
):
    given = swapped(variables, greedy.token_ids[1], tokenizer.end_think_id)
    asked = [request(temperature=0.0)]
    (response,) = make_engine(given, think=True).generate(asked)[0][:1]
    first, end, *rest = response.token_ids
    assert end == tokenizer.end_think_id and end not in rest
    assert response.thinking_text == tokenizer.decode([first])
    assert response.final_text == tokenizer.decode(rest)
    (plain,) = make_engine(given).generate(asked)[0][:1]
    assert plain.token_ids == response.token_ids
    assert plain.final_text == plain.text and plain.thinking_text == ""


# Settings.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(rows=0), "engine.rows = 0: must be at least 1"),
        (dict(page=0), "engine.page = 0: must be at least 1"),
        (dict(steps=-1), "engine.steps = -1: must be at least 1"),
        (dict(context=1), "engine.context = 1: must hold a prompt and an answer"),
        (dict(context=32, page=16, pages=2), "engine.pages = 2: a row of engine.context = 32"),
        (dict(param_dtype="half"), "engine.param_dtype = 'half': must be float32"),
    ],
)
def test_a_bad_setting_is_named_with_its_rule(fields, message):
    with pytest.raises(ValueError, match=message):
        schedule.EngineConfig(**fields)


def test_a_cancelled_request_is_left_and_the_others_are_answered_as_ever(make_engine, together):
    engine = make_engine()
    for name in ("b", "nobody"):
        engine.cancel(name)
    found = engine.generate(MIXED)
    assert [r.finish for r in found[1]] == [records.Finish.CANCELLED] * 3
    assert all(r.token_ids == () and r.final_text is None for r in found[1])
    for at in (0, 2, 3, 4, 5):
        assert said(found[at]) == said(together[at])
    assert said(engine.generate(MIXED)[1]) == said(together[1])  # once, not for ever


def test_one_cancelled_during_another_call_is_cancelled_in_the_next(make_engine):
    engine = make_engine()
    engine.generate([request("a")], lambda place, response: engine.cancel("b"))
    (found,) = engine.generate([request("b")])
    assert {r.finish for r in found} == {records.Finish.CANCELLED}
    (found,) = engine.generate([request("b")])
    assert records.Finish.CANCELLED not in {r.finish for r in found}


@pytest.mark.parametrize("program", ["prefill", "decode"])
def test_after_a_call_that_failed_no_page_of_it_is_used(make_engine, monkeypatch, program):
    """Its prompts' pages were promised before they were computed, and the cache went with it."""
    engine = make_engine()
    expected = engine.generate([request("a"), request("b", LONG)])
    engine.load(engine._worker._variables, "again")

    def fail(*args, **settings):
        raise MemoryError

    programs = engine._worker.programs
    with monkeypatch.context() as patch:
        patch.setattr(programs, program, fail)
        with pytest.raises(MemoryError):
            engine.generate([request("a"), request("b", LONG)])
        if program == "prefill":
            with pytest.raises(MemoryError):
                engine.first_opinions([LONG])
    found = engine.generate([request("a"), request("b", LONG)])
    for one, other in zip(found, expected, strict=True):
        assert said(one) == said(other)
        np.testing.assert_array_equal(logprobs(one), logprobs(other))
    engine.load(engine._worker._variables, "again")


def test_no_program_is_compiled_after_the_first_calls(make_engine):
    """Whatever is asked, and how much of it; truncation and what is recorded choose programs."""
    engine = make_engine()
    programs = engine._worker.programs

    def ask():
        engine.generate([request("a", num_samples=11), request("b", LONG)])
        engine.generate([request("c", SHORTEST, temperature=0.0, max_tokens=3)])
        engine.generate([request("d", top_p=0.9), request("e", LONG, top_k=3, min_p=0.1)])
        engine.first_opinions([LONG])

    ask()
    sizes = programs.prefill._cache_size(), programs.decode._cache_size()
    engine.load(engine._worker._variables, "again")
    ask()
    engine.generate([request("f", LONG, num_samples=30, top_p=0.5, max_tokens=9, stop=("a",))])
    assert (programs.prefill._cache_size(), programs.decode._cache_size()) == sizes


def test_a_truncated_neighbour_changes_no_token(make_engine, together):
    engine = make_engine()
    asked = MIXED[:2]
    found = engine.generate([*asked, request("cut", seed=9, num_samples=2, top_p=0.5)])
    for one, other in zip(found[:2], together[:2], strict=True):
        assert said(one) == said(other)
        np.testing.assert_allclose(logprobs(one), logprobs(other), atol=1e-5)


def test_a_call_whose_requests_are_all_cancelled_does_not_run(make_engine):
    engine = make_engine()
    engine.cancel("a")
    found = engine.generate([request("a")])
    assert [r.finish for r in found[0]] == [records.Finish.CANCELLED] * 3
    assert engine.stats.prompt_tokens == engine.stats.steps == 0


# Continuous batching over pages.


def exactly(responses):
    return [(r.index, r.token_ids, r.logprobs, r.finish) for r in responses]


def test_answers_are_the_same_to_the_last_bit_whatever_runs_beside_them(make_engine):
    """In rows that are filled again, with prompts that share pages."""
    prompts = [LONG[:n] for n in (9, 7, 9, 2, 8, 6, 9, 4)]
    asked = [
        request(str(at), prompt, num_samples=1 + at % 5, seed=at, max_tokens=1 + (7 * at) % 12)
        for at, prompt in enumerate(prompts)
    ]
    together = make_engine()
    found = together.generate(asked)
    assert together.stats.computed_tokens < 0.5 * together.stats.prompt_tokens
    assert together.stats.row_use > 0.6
    for one, wanted in zip(asked, found, strict=True):
        (alone,) = make_engine().generate([one])
        assert exactly(alone) == exactly(wanted)


def test_rows_that_are_attended_to_apart_get_what_all_at_once_would_get(
    programs, config, tokenizer, mesh, variables
):
    """Three times eight rows, by their length; and to the last bit whatever runs beside them."""
    apart, at_once = programs, decode.Programs(config, transformer.Kernels(rows=0))
    limits = schedule.EngineConfig(rows=24, context=22, page=4, chunk=4, chunks=4, steps=4)
    asked = [
        request(str(at), LONG[: 2 + at % 7], num_samples=7, seed=at, max_tokens=1 + (5 * at) % 12)
        for at in range(9)
    ]

    def engine_of(programs):
        made = engine_lib.Engine(programs, tokenizer, limits, mesh)
        made.load(variables, "v")
        return made

    found = engine_of(apart).generate(asked, experts=True)
    others = engine_of(at_once).generate(asked, experts=True)
    for one, other in zip(found, others, strict=True):
        assert said(one) == said(other)
        np.testing.assert_allclose(logprobs(one), logprobs(other), atol=1e-5)
        assert [r.experts for r in one] == [r.experts for r in other]
    found = engine_of(apart).generate(asked)
    for one, wanted in zip(asked[::4], found[::4], strict=True):
        (alone,) = engine_of(apart).generate([one])
        assert exactly(alone) == exactly(wanted)


@pytest.mark.parametrize(
    ("rows", "most", "together"),
    [(24, 8, 8), (30, 8, 6), (8, 8, 8), (4, 8, 4), (64, 0, 64), (31, 8, 31), (10, 8, 5), (9, 2, 9)],
)
def test_rows_are_divided_into_equal_parts_near_the_size_that_is_wanted(rows, most, together):
    assert paged.rows_together(rows, most) == together


def test_answers_of_a_prompt_share_its_pages_and_all_pages_come_back(make_engine):
    engine = make_engine()
    (pool,) = engine.pools
    engine.generate([request("a", LONG, num_samples=8, max_tokens=10)])
    assert engine.stats.computed_tokens == len(LONG) - 1
    assert pool.kept == 2 and pool.available == pool.number
    engine.generate([request("b", LONG[:5], num_samples=2, max_tokens=10)])
    assert engine.stats.computed_tokens == len(LONG) - 1  # it begins alike, to a page's end


def test_pages_hold_nothing_of_the_variables_before(make_engine, variables):
    engine = make_engine()
    asked = [request("a", LONG, num_samples=2)]
    engine.generate(asked)
    other = {**variables, "params": {**variables["params"]}}
    other["params"]["embed"] = 0.5 * other["params"]["embed"]
    engine.load(other, "rl@1")
    assert engine.pools[0].kept == 0
    assert exactly(engine.generate(asked)[0]) == exactly(make_engine(other).generate(asked)[0])


def test_with_too_few_pages_the_youngest_answers_begin_again_and_none_differs(
    programs, tokenizer, mesh, variables
):
    asked = [
        request(str(at), (3, 30 + at, 40, 41, 42), num_samples=3, seed=at, max_tokens=12)
        for at in range(4)
    ]
    found = {}
    for pages in (0, 9):
        limits = schedule.EngineConfig(
            rows=8, context=22, page=4, pages=pages, chunk=4, chunks=4, steps=4
        )
        engine = engine_lib.Engine(programs, tokenizer, limits, mesh)
        engine.load(variables, "sft@3")
        found[pages] = [exactly(r) for r in engine.generate(asked)]
        assert (engine.stats.restarted > 0) == (pages == 9)
        assert all(pool.available == pool.number for pool in engine.pools)
    assert found[0] == found[9]


def test_an_answer_ends_with_the_token_that_completes_a_stop_string(engine, tokenizer, together):
    whole = together[5][0]
    text = tokenizer.decode(whole.token_ids[:3])
    stop = text[-2:]
    (found,) = engine.generate([request("f", seed=6, num_samples=1, stop=("never", stop))])
    (response,) = found
    assert response.finish is records.Finish.STOP and stop in response.text
    assert response.token_ids == whole.token_ids[: len(response.token_ids)]
    assert stop not in tokenizer.decode(response.token_ids[:-1])
    assert len(response.logprobs) == len(response.policy_logprobs) == len(response.token_ids)


def test_answers_are_told_of_as_they_are_complete(engine, together):
    told = []
    engine.generate(MIXED, lambda place, response: told.append((place, response)))
    assert sorted((p, r.index) for p, r in told) == [
        (p, i) for p, found in enumerate(together) for i in range(len(found))
    ]


def test_a_request_that_is_cancelled_while_it_is_answered_is_left(make_engine):
    engine = make_engine()
    asked = [request("a", max_tokens=2, num_samples=1), request("b", max_tokens=17, num_samples=2)]
    found = engine.generate(asked, lambda place, _: engine.cancel("b"))
    assert [r.finish for r in found[0]] == [records.Finish.LENGTH]
    assert [(r.finish, r.token_ids) for r in found[1]] == [(records.Finish.CANCELLED, ())] * 2
    assert all(pool.available == pool.number for pool in engine.pools)


def test_experts_and_kept_sets_are_recorded_where_they_are_asked_for(
    programs, tokenizer, mesh, variables, config, forward
):
    limits = schedule.EngineConfig(
        rows=8, context=22, page=4, chunk=4, chunks=4, steps=4, most_kept=40
    )
    engine = engine_lib.Engine(programs, tokenizer, limits, mesh)
    engine.load(variables, "sft@3")
    (found,) = engine.generate([request(top_p=0.4, seed=9)], experts=True, kept=True)
    for response in found:
        length = len(response.token_ids)
        assert response.experts.array().shape == (length, config.num_sparse_layers, 2)
        assert response.prompt_experts.shape == (len(SHORT) - 1, config.num_sparse_layers, 2)
        logits_TV = forward([*SHORT, *response.token_ids])[len(SHORT) - 1 :]
        for token, ids, logprob, policy, logits_V in zip(
            response.token_ids,
            response.kept,
            response.logprobs,
            response.policy_logprobs,
            logits_TV,
            strict=False,
        ):
            share_V = np.exp(logits_V - logits_V.max())
            share_V /= share_V.sum()
            assert policy == pytest.approx(np.log(share_V[token]), abs=1e-4)
            if ids is None:
                continue
            assert token in ids and share_V[list(ids)].sum() >= 0.4 - 1e-4
            assert logprob == pytest.approx(policy - np.log(share_V[list(ids)].sum()), abs=1e-4)
    assert any(ids is not None for r in found for ids in r.kept)
