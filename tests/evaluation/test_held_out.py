import dataclasses
import math
import random

import numpy as np
import pytest

from mathv2_jax import records, reward, roles
from mathv2_jax.evaluation import held_out
from mathv2_jax.evaluation.held_out import Ratio
from mathv2_jax.records import Finish, Outcome
from mathv2_jax.text import parse
from mathv2_jax.world import corpus, judge
from mathv2_jax.world.problems import Rule, WorldProblem
from tests import by_hand, scripted

RULES = (Rule(("A",), "B"), Rule(("B",), "C"), Rule(("E",), "C"))
STATEMENT = str(WorldProblem(facts=("A",), rules=RULES, goal="C"))
RIGHT = "Step 1: A implies B\nStep 2: B implies C"  # 1
SKIPS = "Step 1: B implies C"  # 0.5
FALSE = "Step 1: A implies C"  # 0
SILENT = parse.write_analysis("Step 1: holds\nGoal: reached", 1.0)
REAL = parse.write_analysis("Step 1: not a given rule\nGoal: reached", 0.0)  # of FALSE
GOAL_FALSE = parse.write_analysis("Step 1: holds\nGoal: missing", 0.0)  # nowhere above


def sample(role, target, **fields):
    defaults = dict(
        id=f"after/{role}/{target}",
        role=role,
        stage="after",
        step=0,
        problem_id=target,
        target=target,
        index=0,
        statement=STATEMENT,
        proof="",
        analysis="",
        text="",
        outcome=Outcome.PARSED,
        finish=Finish.STOP,
        num_tokens=1,
        checkpoint="after",
    )
    return records.Sample(**{**defaults, **fields})


def measured(samples):
    return held_out.measure(samples, judge.ExactJudge())


# The metrics, by hand.

VERIFY = [
    sample("verify", "1", proof=RIGHT, text=SILENT, score=1.0),  # right, names nothing
    sample("verify", "2", proof=FALSE, text=REAL, score=0.0),  # right and faithful
    sample("verify", "3", proof=FALSE, text=GOAL_FALSE, score=0.0),  # right by an invented issue
    sample("verify", "4", proof=SKIPS, text=SILENT, score=1.0),  # off by a half
    sample("verify", "5", proof=RIGHT, text=GOAL_FALSE, score=0.0),  # off by one, invented
    sample("verify", "6", proof=RIGHT, text="?", outcome=Outcome.UNPARSEABLE),  # unreadable
]
META = [
    sample("meta", "1", proof=FALSE, analysis=REAL, score=1.0),
    sample("meta", "2", proof=RIGHT, analysis=REAL, score=0.0),
    sample("meta", "3", proof=RIGHT, analysis=REAL, score=0.5),
    sample("meta", "4", proof=RIGHT, analysis=SILENT, outcome=Outcome.LENGTH),
]
PROVE = [
    sample("prove", "1", proof=RIGHT, score=1.0, votes=(1.0,)),
    sample("prove", "2", proof=FALSE, score=1.0, votes=(0.5,)),  # an overclaim, and a kind vote
    sample("prove", "3", proof=SKIPS, score=0.0, votes=(0.0,)),  # a hard vote
    sample("prove", "4", proof=SKIPS, score=1.0),  # an overclaim; the vote is lost
    sample("prove", "5", outcome=Outcome.UNPARSEABLE),
]
AUTO = [
    sample("autolabel", "1", proof=RIGHT, label=1.0),
    sample("autolabel", "2", proof=SKIPS, label=0.0),
    sample("autolabel", "3", proof=FALSE, label=0.0),
    sample("autolabel", "4", proof=FALSE, label=None),
]


@pytest.mark.parametrize(
    ("name", "mean", "n"),
    [
        ("verifier_accuracy", 3 / 6, 6),
        ("verifier_balanced_accuracy", (1 / 3 + 0 / 1 + 2 / 2) / 3, 6),
        ("verifier_mean_error", (0 + 0 + 0 + 0.5 + 1 + 1) / 6, 6),
        ("analysis_faithfulness", 1 / 3, 3),
        ("right_for_wrong_reason", 1 / 3, 3),
        ("meta_accuracy", 2 / 4, 4),
        ("meta_balanced_accuracy", (1 / 2 + 1 / 2) / 2, 4),
        ("meta_caught", 2 / 2, 2),
        ("generator_true_score", (1 + 0 + 0.5 + 0.5 + 0) / 5, 5),
        ("overclaim_rate", 2 / 5, 5),
        ("verifier_minus_true", (0 + 0.5 - 0.5) / 3, 3),
        ("autolabel_precision", 2 / 3, 3),
        ("autolabel_coverage", 3 / 4, 4),
    ],
)
def test_a_metric_of_hand_made_answers(name, mean, n):
    found = measured([*VERIFY, *META, *PROVE, *AUTO])
    assert set(found) == set(held_out.METRICS)
    assert (found[name].mean, found[name].n) == (pytest.approx(mean), n)


def test_an_unreadable_analysis_is_wrong_and_an_unreadable_proof_scores_0():
    found = measured([VERIFY[-1], PROVE[-1], META[-1]])
    assert (found["verifier_accuracy"].mean, found["verifier_mean_error"].mean) == (0.0, 1.0)
    assert (found["generator_true_score"].mean, found["meta_accuracy"].mean) == (0.0, 0.0)
    assert math.isnan(found["analysis_faithfulness"].mean)
    assert math.isnan(found["verifier_minus_true"].mean)


def test_an_unreadable_rating_catches_nothing():
    lost = [dataclasses.replace(s, score=None, outcome=Outcome.LENGTH) for s in META]
    assert (measured(lost)["meta_caught"].mean, measured(lost)["meta_caught"].n) == (0.0, 2)


def answered_alike(samples, answer):
    return [dataclasses.replace(s, score=answer, label=answer) for s in samples]


@pytest.mark.parametrize(
    ("name", "best"),
    [
        ("verifier_accuracy", max),
        ("verifier_balanced_accuracy", max),
        ("verifier_mean_error", min),
        ("meta_accuracy", max),
        ("meta_balanced_accuracy", max),
        ("autolabel_precision", max),
    ],
)
def test_the_constant_beside_a_metric_is_what_the_best_constant_answer_gets(name, best):
    items = [*VERIFY, *VERIFY[2:], *META, *META[1:2], *AUTO, *AUTO[2:]]
    found = [measured(answered_alike(items, score))[name] for score in records.SCORES]
    assert [r.constant for r in found] == pytest.approx([best(r.mean for r in found)] * 3)


def test_auto_labels_are_compared_with_a_constant_where_there_is_a_label():
    before, after = measured(AUTO), measured(AUTO[:1])
    found = held_out.constants(before, after)
    assert found["autolabel_precision"] == {"before": round(1 / 3, 6), "after": 1.0}
    assert found["meta_accuracy"] == {"before": None, "after": None}  # of no items
    assert "analysis_faithfulness" not in found and "generator_true_score" not in found


def test_labels_that_training_was_given_are_judged_beside_the_best_constant_one():
    def labelled(text, score):
        proof = by_hand.proof(text, text=text, score=score)
        return dataclasses.replace(proof, statement=STATEMENT)

    given = [labelled(RIGHT, 1.0), labelled(FALSE, 1.0), labelled(SKIPS, 0.0), labelled(FALSE, 0.0)]
    found = held_out.labels_given(given, judge.ExactJudge())
    assert found == {
        "mean": 0.5,
        "se": pytest.approx(0.5 / 3**0.5, abs=1e-6),
        "n": 4,
        "constant": 0.5,
    }
    nothing = held_out.labels_given([], judge.ExactJudge())
    assert nothing == {"mean": None, "se": None, "n": 0, "constant": None}


def test_answers_of_other_roles_are_no_test_answers():
    stray = sample("judge", "1", proof=RIGHT, text=SILENT, score=0.0)
    assert measured([*VERIFY, stray])["verifier_accuracy"].mean == 0.5


def test_items_keep_their_order():
    found = measured(VERIFY[::-1])
    assert found["verifier_accuracy"].items == ("6", "5", "4", "3", "2", "1")


# Standard errors.


def ratio(value, weight=None):
    value = np.asarray(value, float)
    weight = np.ones(len(value)) if weight is None else np.asarray(weight, float)
    return Ratio(tuple(map(str, range(len(value)))), value, weight)


def test_the_error_of_a_mean_is_the_textbook_one():
    values = [0.0, 1.0, 1.0, 0.5, 0.25]
    found = ratio(values)
    assert found.mean == np.mean(values)
    assert found.se == pytest.approx(np.std(values, ddof=1) / math.sqrt(5))


def resampled(value, weight, rng, times=4000):
    """Standard deviation of sum / sum over samples of the items with replacement."""
    picked = rng.integers(0, len(value), size=(times, len(value)))
    return np.std(value[picked].sum(axis=1) / weight[picked].sum(axis=1))


def test_the_error_of_a_ratio_is_that_of_the_bootstrap():
    rng = np.random.default_rng(0)
    weight = (rng.random(300) < 0.6).astype(float)
    value = weight * (rng.random(300) < 0.3 + 0.4 * (np.arange(300) % 3 == 0))
    assert ratio(value, weight).se == pytest.approx(resampled(value, weight, rng), rel=0.05)
    assert ratio(value).se == pytest.approx(resampled(value, np.ones(300), rng), rel=0.05)


def test_the_error_of_a_paired_difference_is_that_of_the_items_own_differences():
    rng = np.random.default_rng(1)
    before = rng.random(200)
    after = before + 0.1 * rng.random(200)
    found = held_out.difference_se(ratio(before), ratio(after))
    assert found == pytest.approx(np.std(after - before, ddof=1) / math.sqrt(200))
    alone = math.hypot(ratio(before).se, ratio(after).se)
    assert found < 0.2 * alone  # the pairing is what makes it small
    assert held_out.difference_se(ratio(before), ratio(before)) == 0.0


def test_a_paired_difference_of_ratios_is_that_of_the_bootstrap():
    rng = np.random.default_rng(2)
    weights = (rng.random((2, 300)) < np.asarray([[0.5], [0.8]])).astype(float)
    values = weights * (rng.random(300) < 0.5)  # the items decide both sides
    picked = rng.integers(0, 300, size=(4000, 300))
    before, after = (
        v[picked].sum(axis=1) / w[picked].sum(axis=1) for v, w in zip(values, weights, strict=True)
    )
    found = held_out.difference_se(ratio(values[0], weights[0]), ratio(values[1], weights[1]))
    assert found == pytest.approx(np.std(after - before), rel=0.06)


def test_the_errors_of_a_mean_of_strata_are_those_of_the_bootstrap():
    rng = np.random.default_rng(3)
    strata = rng.choice([0.0, 0.5, 1.0], size=400, p=[0.15, 0.25, 0.6])
    chance = rng.random(400)  # the items decide both sides
    sides = [
        dataclasses.replace(ratio(chance < rate[(2 * strata).astype(int)]), strata=strata)
        for rate in (np.asarray([0.9, 0.6, 0.1]), np.asarray([0.5, 0.7, 0.4]))
    ]
    picked = rng.integers(0, 400, size=(4000, 400))
    drawn = [
        np.mean(
            [
                (r.value * (strata == s))[picked].sum(axis=1) / (strata == s)[picked].sum(axis=1)
                for s in records.SCORES
            ],
            axis=0,
        )
        for r in sides
    ]
    for side, means in zip(sides, drawn, strict=True):
        assert side.se == pytest.approx(np.std(means), rel=0.06)
        assert side.mean == np.mean([side.value[strata == s].mean() for s in records.SCORES])
    found = held_out.difference_se(*sides)
    assert found == pytest.approx(np.std(drawn[1] - drawn[0]), rel=0.06)


def test_a_difference_of_other_items_is_refused():
    one, other = ratio([0.0, 1.0]), ratio([0.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="are not the same"):
        held_out.difference_se(one, other)
    with pytest.raises(ValueError, match="are not the same"):
        held_out.difference_se(one, dataclasses.replace(one, items=("1", "0")))


# The table.


def test_a_table_holds_both_sides_and_the_difference():
    before = measured([*VERIFY, *META, *PROVE, *AUTO])
    better = [
        dataclasses.replace(s, text=SILENT, score=1.0) if s.target == "6" else s for s in VERIFY
    ]
    after = measured([*better, *META, *PROVE, *AUTO])
    row = held_out.compare(before, after)["verifier_accuracy"]
    assert row["before"] == {"mean": 0.5, "se": round(math.sqrt(0.25 / 5), 6), "n": 6}
    assert row["after"]["mean"] == round(4 / 6, 6)
    # One item of six moved by one.
    assert row["difference"]["mean"] == round(1 / 6, 6)
    assert row["difference"]["se"] == round(1 / 6, 6)
    assert held_out.compare(before, after)["meta_accuracy"]["difference"] == {
        "mean": 0.0,
        "se": 0.0,
    }


def test_a_metric_that_nothing_counts_for_is_none():
    silent = [VERIFY[0], VERIFY[3]]
    table = held_out.compare(measured(silent), measured(silent))
    row = table["analysis_faithfulness"]
    assert row["before"] == row["after"] == {"mean": None, "se": None, "n": 0}
    assert row["difference"] == {"mean": None, "se": None}
    assert table["meta_accuracy"]["before"] == {"mean": None, "se": None, "n": 0}


# Answers of an engine.

CONFIG = corpus.WorldConfig()
SIZE = 24
FOUND = parse.write_analysis("Step 1: not a given rule", 0.0)
MADE = {
    score: parse.write_generation("Step 1: A implies B", text)
    for score, text in ((1.0, SILENT), (0.0, FOUND))
}
RATED = parse.write_meta_analysis("All real.", 1.0)


@pytest.fixture(scope="module")
def house():
    return scripted.build([SILENT, FOUND, *MADE.values(), RATED])


@pytest.fixture(scope="module")
def test_set():
    return held_out.TestSet(
        problems=corpus.plain_problems(CONFIG, 0, "test", SIZE),
        proofs=corpus.graded_proofs(CONFIG, 0, "test", SIZE, labelled=False),
        analyses=corpus.graded_analyses(CONFIG, 0, "test", SIZE, labelled=False),
        num_autolabel=12,
        rule=reward.AutoLabelRule(num_analyses=1, num_meta=1, num_valid=1),
    )


def parts(house, test_set, verdicts, proofs, seed=0):
    verifier = house.engine({scripted.VERIFY: verdicts, scripted.META: {RATED: 1.0}})
    generator = house.engine({scripted.PROVE: proofs})
    players = held_out.Players(roles=scripted.ROLES, verifier=verifier, generator=generator)
    return list(held_out.answers(players, test_set, "after", seed, chunk=10))


def test_the_figures_of_scripted_players_are_those_of_the_script(house, test_set):
    made = parts(house, test_set, {FOUND: 1.0}, {MADE[1.0]: 1.0})
    samples = [sample for part in made for sample in part()]
    assert len({s.id for s in samples}) == len(samples) == 4 * SIZE + 3 * 12  # with their opinions
    found = measured(samples)
    exact = judge.ExactJudge()
    true = [exact.proof_score(p.statement, p.text) for p in test_set.proofs]
    written = [exact.proof_score(p.statement, "Step 1: A implies B") for p in test_set.problems]
    real = [exact.analysis_quality(p.statement, p.text, FOUND) == 1.0 for p in test_set.proofs]
    invented = [not r for r, t in zip(real, true, strict=True) if t == 0.0]
    rated = [exact.analysis_quality(a.statement, a.proof, a.text) for a in test_set.analyses]
    expected = {
        "verifier_accuracy": np.mean([t == 0.0 for t in true]),
        "verifier_balanced_accuracy": 1 / 3,
        "verifier_mean_error": np.mean(true),
        "analysis_faithfulness": np.mean(real),
        "right_for_wrong_reason": np.mean(invented),
        "meta_accuracy": np.mean([r == 1.0 for r in rated]),
        "meta_balanced_accuracy": 1 / len(set(rated)),
        "meta_caught": 0.0,
        "generator_true_score": np.mean(written),
        "overclaim_rate": np.mean([w < 1.0 for w in written]),
        "verifier_minus_true": -np.mean(written),
        "autolabel_precision": np.mean([t == 0.0 for t in true[:12]]),
        "autolabel_coverage": 1.0,
    }
    assert {n: r.mean for n, r in found.items()} == pytest.approx(expected)
    assert found["autolabel_coverage"].n == 12
    assert found["verifier_minus_true"].n == SIZE


def test_parts_may_be_made_in_any_order_or_left_out(house, test_set):
    script = {SILENT: 0.5, FOUND: 0.5}, {MADE[1.0]: 0.4, MADE[0.0]: 0.4, SILENT: 0.2}
    made = parts(house, test_set, *script)
    assert len(made) == 3 + 3 + 3 + 2
    whole = [part() for part in made]
    again = parts(house, test_set, *script)
    places = random.Random(0).sample(range(len(again)), 6)
    assert [again[place]() for place in places] == [whole[place] for place in places]
    first, second = ([s.score for s in part] for part in whole[:2])
    assert first != second  # parts do not share their noise
    other = [part() for part in parts(house, test_set, *script, seed=1)]
    assert [s.score for part in other for s in part] != [s.score for part in whole for s in part]


def test_players_are_shown_what_they_are_to_judge(house, test_set):
    verifier = house.engine({scripted.VERIFY: {FOUND: 1.0}, scripted.META: {RATED: 1.0}})
    generator = house.engine({scripted.PROVE: {MADE[1.0]: 1.0}})
    players = held_out.Players(roles=scripted.ROLES, verifier=verifier, generator=generator)
    one = dataclasses.replace(
        test_set,
        problems=test_set.problems[:1],
        proofs=test_set.proofs[:1],
        analyses=test_set.analyses[:1],
    )
    for part in held_out.answers(players, one, "after", 0):
        part()
    (problem,), (proof,), (analysis,) = one.problems, one.proofs, one.analyses
    names, shown = scripted.ROLES, scripted.shown
    on_proof = dict(statement=proof.statement, proof=proof.text)
    on_analysis = dict(statement=analysis.statement, proof=analysis.proof, analysis=analysis.text)
    own = dict(statement=problem.statement, proof="Step 1: A implies B")
    assert generator.asked == [shown(names.generator, statement=problem.statement)]
    assert verifier.asked == [
        shown(names.verifier, **on_proof),
        shown(names.meta_verifier, **on_analysis),
        shown(names.verifier, **own),
        shown(names.verifier, **on_proof),
        shown(names.meta_verifier, **on_proof, analysis=FOUND),
    ]


def test_a_machine_label_can_be_made_again_from_the_opinions_on_record(house, test_set):
    rule = reward.AutoLabelRule(num_analyses=4, num_meta=2, num_valid=2)
    script = {
        scripted.VERIFY: {FOUND: 0.5, SILENT: 0.4, MADE[1.0]: 0.1},
        scripted.META: {RATED: 0.7, SILENT: 0.3},
    }
    player = house.engine(script)
    players = held_out.Players(roles=scripted.ROLES, verifier=player, generator=player)
    asked = dataclasses.replace(test_set, problems=(), analyses=(), rule=rule)
    samples = [s for part in held_out.answers(players, asked, "after", 0) for s in part()]
    rows = [s for s in samples if s.role == held_out.AUTOLABEL]
    assert len(rows) == 12 and {s.label for s in rows} >= {None, 0.0, 1.0}
    for row in rows:
        analyses = [s for s in samples if s.role == "verifier" and s.target == row.target]
        assert len(analyses) == 4 and analyses[0].text == row.text
        judged = []
        for a in (a for a in analyses if a.score is not None):
            metas = [s for s in samples if s.role == "meta_verifier" and s.target == a.id]
            assert [m.analysis for m in metas] == [a.text] * (2 if a.score < 1.0 else 0)
            assert a.meta_votes == tuple(m.score for m in metas if m.score is not None)
            judged.append((a.score, a.meta_votes))
        assert roles.label_of(judged, rule) == row.label
    assert measured(samples)["autolabel_coverage"].n == 12  # opinions are no rows of the table


def test_a_proof_that_cannot_be_read_is_not_judged(house, test_set):
    made = parts(house, test_set, {SILENT: 1.0}, {SILENT: 1.0})
    samples = [sample for part in made for sample in part()]
    proved = [s for s in samples if s.role == held_out.PROVE]
    assert len(proved) == SIZE
    assert {(s.proof, s.votes, s.outcome) for s in proved} == {("", (), Outcome.UNPARSEABLE)}
    assert not [s for s in samples if s.role == held_out.JUDGE]
    found = measured(samples)
    assert (found["generator_true_score"].mean, found["verifier_minus_true"].n) == (0.0, 0)
