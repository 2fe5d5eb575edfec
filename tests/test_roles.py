import dataclasses

import pytest

from mathv2_jax import records, reward, roles
from mathv2_jax.records import Finish, Outcome
from mathv2_jax.text import parse
from tests import scripted

VERDICTS = {score: parse.write_analysis(f"Found {score}.", score) for score in records.SCORES}
RATINGS = {score: parse.write_meta_analysis(f"Rated {score}.", score) for score in records.SCORES}
NOISE = "I do not know."
ROLES = scripted.ROLES


@pytest.fixture(scope="module")
def house():
    return scripted.build([*VERDICTS.values(), *RATINGS.values(), NOISE])


def response(text, finish=Finish.STOP, final="same"):
    return records.Response(
        request_id="r",
        index=0,
        token_ids=(5, 6, 7),
        logprobs=(-0.5, -0.5, 0.0),
        text=text,
        final_text=text if final == "same" else final,
        thinking_text="",
        finish=finish,
        parameter_version="rl@3",
    )


# What a response says.

GENERATION = parse.write_generation("Step 1: A implies B", VERDICTS[0.5])


@pytest.mark.parametrize(
    ("role", "answer", "outcome", "score"),
    [
        (ROLES.verifier, response(VERDICTS[0.5]), Outcome.PARSED, 0.5),
        (ROLES.meta_verifier, response(RATINGS[1.0]), Outcome.PARSED, 1.0),
        (ROLES.generator, response(GENERATION), Outcome.PARSED, 0.5),
        # In another role's format, or in none.
        (ROLES.verifier, response(RATINGS[1.0]), Outcome.UNPARSEABLE, None),
        (ROLES.meta_verifier, response(VERDICTS[1.0]), Outcome.UNPARSEABLE, None),
        (ROLES.generator, response(VERDICTS[1.0]), Outcome.UNPARSEABLE, None),
        (ROLES.verifier, response(NOISE), Outcome.UNPARSEABLE, None),
        # Thinking that never ended is no final response; only what follows it is read.
        (ROLES.verifier, response(VERDICTS[0.5], final=None), Outcome.UNPARSEABLE, None),
        (ROLES.verifier, response("so it is 0", final=VERDICTS[1.0]), Outcome.PARSED, 1.0),
        # Cut, or never finished: no verdict, whatever stands there.
        (ROLES.verifier, response(VERDICTS[0.0], Finish.LENGTH), Outcome.LENGTH, None),
        (ROLES.verifier, response(VERDICTS[0.0], Finish.CANCELLED), Outcome.LOST, None),
        (ROLES.verifier, response("", Finish.LOST, final=None), Outcome.LOST, None),
    ],
)
def test_a_response_has_the_outcome_that_its_reader_sees(role, answer, outcome, score):
    opinion = roles.understand(role, answer)
    assert (opinion.outcome, opinion.score) == (outcome, score)
    assert (opinion.written is not None) == (outcome is Outcome.PARSED)


def test_what_a_role_wrote_is_split_into_its_parts():
    written = roles.understand(ROLES.generator, response(GENERATION)).written
    assert written == roles.Written("Step 1: A implies B", 0.5, VERDICTS[0.5])
    written = roles.understand(ROLES.verifier, response(VERDICTS[0.0])).written
    assert written == roles.Written("Found 0.0.", 0.0)


def test_a_lost_vote_is_no_vote():
    answers = [
        response(VERDICTS[1.0]),
        response(VERDICTS[0.0], Finish.LENGTH),
        response(VERDICTS[0.0], Finish.LOST),
        response(NOISE),
        response(VERDICTS[0.5]),
    ]
    assert roles.votes([roles.understand(ROLES.verifier, a) for a in answers]) == [1.0, 0.5]


def sample_of(answer):
    """The record of an analysis of statement s and proof y."""
    return roles.make_sample(
        roles.understand(ROLES.verifier, answer),
        id="1",
        role="verifier",
        stage="rl",
        step=4,
        problem_id="p",
        target="t",
        index=2,
        statement="s",
        proof="y",
        analysis="",
    )


def test_a_samples_record_says_what_became_of_the_response():
    sample = sample_of(response("hm", final=VERDICTS[0.5]))
    assert (sample.text, sample.score, sample.outcome) == (VERDICTS[0.5], 0.5, Outcome.PARSED)
    assert (sample.num_tokens, sample.checkpoint, sample.finish) == (3, "rl@3", Finish.STOP)
    assert sample.thinking is None and "thinking" not in records.to_json(sample)


def test_what_was_thought_is_kept_beside_the_final_text():
    answer = dataclasses.replace(response(VERDICTS[0.5]), thinking_text="Is it?")
    sample = sample_of(answer)
    assert (sample.thinking, sample.text) == ("Is it?", VERDICTS[0.5])
    assert records.from_json(records.Sample, records.to_json(sample)) == sample


# Seeds.


def test_a_seed_depends_on_every_part_and_on_their_order():
    seeds = {
        roles.seed_for(run, stage, step, at)
        for run in range(4)
        for stage in ("rl", "rl-1", "sft")
        for step in range(20)
        for at in range(20)
    }
    assert len(seeds) == 4 * 3 * 20 * 20
    assert all(0 <= seed < 2**62 for seed in seeds)
    assert len({roles.seed_for(1, 23), roles.seed_for(12, 3), roles.seed_for(3, 12)}) == 3
    assert roles.seed_for(1, "rl") == roles.seed_for(1, "rl")


# Asking an engine.

ITEMS = [{"statement": "Show: B.", "proof": f"Step {n}: A implies B"} for n in range(1, 6)]


def test_answers_come_as_often_as_their_probability_says(house):
    script = {VERDICTS[0.0]: 0.2, VERDICTS[0.5]: 0.3, VERDICTS[1.0]: 0.4, NOISE: 0.1}
    engine = house.engine({scripted.VERIFY: script})
    found = roles.ask(engine, ROLES.verifier, ITEMS * 10, 16, ("frequency",))
    assert [len(opinions) for opinions in found] == [16] * 50
    opinions = [opinion for answers in found for opinion in answers]
    for score, share in ((0.0, 0.2), (0.5, 0.3), (1.0, 0.4), (None, 0.1)):
        hits = sum(opinion.score == score for opinion in opinions)
        assert abs(hits - share * 800) <= 4 * (800 * share * (1 - share)) ** 0.5
    assert {o.outcome for o in opinions} == {Outcome.PARSED, Outcome.UNPARSEABLE}


def test_answers_are_a_function_of_the_seed_and_the_item(house):
    script = {text: 1 / 3 for text in VERDICTS.values()}
    engine = house.engine({scripted.VERIFY: script})

    def scores(items, *seed):
        found = roles.ask(engine, ROLES.verifier, items, 16, seed)
        return [roles.votes(opinions) for opinions in found]

    asked = scores(ITEMS, 0, "rl", 3)
    assert asked == scores(ITEMS, 0, "rl", 3)
    assert asked[:2] == scores(ITEMS[:2], 0, "rl", 3)  # whoever else is asked
    others = [scores(ITEMS, *seed) for seed in ((1, "rl", 3), (0, "rm", 3), (0, "rl", 4))]
    streams = [tuple(votes) for found in (asked, *others) for votes in found]
    assert len(set(streams)) == len(streams)  # no two items share their noise


def test_a_role_that_never_ends_is_cut(house):
    engine = house.engine({scripted.VERIFY: {scripted.ENDLESS: 1.0}})
    (opinions,) = roles.ask(engine, ROLES.verifier, ITEMS[:1], 16, ("cut",))
    assert {(o.outcome, o.score, o.text) for o in opinions} == {
        (Outcome.LENGTH, None, scripted.ENDLESS * 4)
    }


# Auto-labelling.

PROOFS = [
    records.Proof(id=f"{n}", problem_id="p", statement=item["statement"], text=item["proof"])
    for n, item in enumerate(ITEMS)
]
RULE = reward.AutoLabelRule(num_analyses=16, num_meta=16, num_valid=2)


def auto_labelled(house, verdicts, ratings, rule=RULE, seed=("label",)):
    engine = house.engine({scripted.VERIFY: verdicts, scripted.META: ratings})
    return roles.auto_label(engine, ROLES, PROOFS, rule, seed)


@pytest.mark.parametrize(
    ("verdicts", "ratings", "label", "num_metas"),
    [
        ({VERDICTS[0.0]: 1.0}, {RATINGS[1.0]: 1.0}, 0.0, 16),
        ({VERDICTS[0.5]: 1.0}, {RATINGS[1.0]: 1.0}, 0.5, 16),
        ({VERDICTS[1.0]: 1.0}, {RATINGS[0.0]: 1.0}, 1.0, 0),  # nothing to confirm
        ({VERDICTS[0.0]: 1.0}, {RATINGS[0.0]: 1.0}, 1.0, 16),  # no issue is confirmed
        ({VERDICTS[0.0]: 1.0}, {RATINGS[0.5]: 1.0}, 1.0, 16),  # half right is not confirmed
        ({NOISE: 1.0}, {RATINGS[1.0]: 1.0}, None, 0),
        ({scripted.ENDLESS: 1.0}, {RATINGS[1.0]: 1.0}, None, 0),
        ({VERDICTS[0.0]: 1.0}, {NOISE: 1.0}, None, 16),  # lost meta-votes refute nothing
    ],
)
def test_the_label_of_a_judge_that_always_says_the_same(house, verdicts, ratings, label, num_metas):
    for found in auto_labelled(house, verdicts, ratings):
        assert found.label == label
        assert len(found.metas) == num_metas


def test_meta_votes_belong_to_the_analyses_that_report_issues_in_their_order(house):
    verdicts = {VERDICTS[0.0]: 0.25, VERDICTS[0.5]: 0.25, VERDICTS[1.0]: 0.25, NOISE: 0.25}
    ratings = {RATINGS[1.0]: 0.5, RATINGS[0.0]: 0.3, NOISE: 0.2}
    for found in auto_labelled(house, verdicts, ratings):
        reporting = [o for o in found.analyses if o.score in (0.0, 0.5)]
        assert 0 < len(reporting) == len(found.metas) < 16
        assert found.votes == [o.score for o in found.analyses if o.score is not None]
        # The label again, from the opinions alone.
        confirmed = [2 * roles.votes(m).count(1.0) > len(roles.votes(m)) for m in found.metas]
        lowest = min(found.votes)
        at_lowest = sum(
            valid and o.score == lowest for o, valid in zip(reporting, confirmed, strict=True)
        )
        expected = 1.0 if not any(confirmed) else lowest if at_lowest >= 2 else None
        assert found.label == expected


def test_a_judge_is_shown_the_proof_and_then_the_analyses_that_report_issues(house):
    engine = house.engine({scripted.VERIFY: {VERDICTS[0.5]: 1.0}, scripted.META: {NOISE: 1.0}})
    rule = reward.AutoLabelRule(num_analyses=1, num_meta=1, num_valid=1)
    roles.auto_label(engine, ROLES, PROOFS[:2], rule, ("label",))
    assert engine.asked == [
        scripted.shown(ROLES.verifier, statement=p.statement, proof=p.text) for p in PROOFS[:2]
    ] + [
        scripted.shown(
            ROLES.meta_verifier, statement=p.statement, proof=p.text, analysis=VERDICTS[0.5]
        )
        for p in PROOFS[:2]
    ]


@pytest.mark.parametrize("fields", [dict(max_tokens=0), dict(temperature=-1.0), dict(top_p=0.0)])
def test_impossible_sampling_is_refused(fields):
    ((name, value),) = fields.items()
    with pytest.raises(ValueError, match=f"{name} = {value}"):
        roles.Sampling(**{"max_tokens": 4, **fields})
