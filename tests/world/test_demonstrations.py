import dataclasses
import functools
import random
import re

import pytest

from mathv2_jax.world import demonstrations, judge, problems
from mathv2_jax.world.demonstrations import WriterRates
from mathv2_jax.world.judge import Fault

STATED = WriterRates()
VARIED = WriterRates(overlook=0.3, invent_flawed=0.6, invent_sound=0.6, redraw=0.4)
FLAWLESS = WriterRates(**{f.name: 0.0 for f in dataclasses.fields(WriterRates)})
WORLDS = [
    problems.Dials(),
    problems.Dials(num_letters=9, distractors=(0, 6), two_premises=0.4),
]


@functools.cache
def written(rates, number, dials=WORLDS[0]):
    """Problems with a proof of each and the verdict on it."""
    rng, found = random.Random(0), []
    for _ in range(number):
        problem = problems.make_problem(rng, dials)
        proof = demonstrations.write_proof(rng, problem, rates)
        found.append((problem, proof, judge.judge_proof(str(problem), proof)))
    return found


def share_is(hits, number, rate):
    """Whether `hits` of `number` are within four standard errors of `rate`."""
    return number > 0 and abs(hits - rate * number) <= 4 * (number * rate * (1 - rate)) ** 0.5


# Proofs.


@pytest.mark.parametrize("dials", WORLDS)
@pytest.mark.parametrize("detours", [0.0, 1.0])
@pytest.mark.parametrize("fault", ["skipped", "false_rule", "unsupported", "wrong_end"])
def test_a_planted_fault_is_one(fault, detours, dials):
    rates = dataclasses.replace(FLAWLESS, detours=detours, **{fault: 1.0})
    for _, _, verdict in written(rates, 200, dials):
        found = {issue.fault for issue in verdict.issues}
        if fault == "skipped":
            assert (found, verdict.score) == ({Fault.SKIPPED}, 0.5)
            continue
        assert verdict.score == 0.0
        if fault == "false_rule":
            assert Fault.NOT_GIVEN in found
        elif fault == "wrong_end":
            assert found == {Fault.NO_GOAL}
        else:  # where a problem has no unsupported rule the proof may stop early
            assert found & {Fault.UNSUPPORTED, Fault.NO_GOAL} and Fault.NOT_GIVEN not in found


@pytest.mark.parametrize("detours", [0.0, 1.0])
def test_a_proof_without_a_planted_fault_is_right(detours):
    rates = dataclasses.replace(FLAWLESS, detours=detours)
    for problem, _, verdict in written(rates, 400):
        assert verdict.score == 1.0
        on_the_way = {*problem.facts, *(rule.conclusion for rule in problem.chain[:-1])}
        room = any(
            on_the_way.issuperset(r.premises) for r in set(problem.rules) - set(problem.chain)
        )
        assert len(verdict.steps) == len(problem.chain) + (detours == 1.0 and room)


def test_the_shares_of_right_and_flawed_proofs_are_the_stated_ones():
    verdicts = [verdict for _, _, verdict in written(STATED, 2000)]
    scores = [verdict.score for verdict in verdicts]
    assert share_is(scores.count(1.0), 2000, 0.35)
    assert share_is(scores.count(0.5), 2000, STATED.skipped)
    false_rules = sum(any(i.fault is Fault.NOT_GIVEN for i in v.issues) for v in verdicts)
    assert share_is(false_rules, 2000, STATED.false_rule)


def test_a_writer_stops_after_each_step_but_the_last_as_often_as_stated():
    rates = dataclasses.replace(FLAWLESS, stops=0.3)
    stopped = places = 0
    for problem, _, verdict in written(rates, 500):
        steps, whole = verdict.steps, len(verdict.steps) == len(problem.chain)
        assert steps == problem.chain[: len(steps)] and steps
        assert {issue.fault for issue in verdict.issues} <= {Fault.NO_GOAL}
        stopped += not whole
        places += len(steps) - whole
    assert share_is(stopped, places, 0.3)


def test_a_repair_keeps_what_stood_and_stops_after_a_new_step_or_later():
    rates = dataclasses.replace(FLAWLESS, stops=0.5)
    rng, stopped, places = random.Random(1), 0, 0
    for problem, _, verdict in written(rates, 600):
        if not verdict.issues:
            continue
        flawed = verdict.steps
        better = demonstrations.write_repair(rng, problem, list(flawed), verdict.issues, rates)
        steps = judge.judge_proof(str(problem), better).steps
        assert len(steps) > len(flawed) and steps == problem.chain[: len(steps)]
        whole = len(steps) == len(problem.chain)
        stopped += not whole
        places += len(steps) - len(flawed) - whole
    assert places > 100 and share_is(stopped, places, 0.5)


def test_a_chain_of_one_step_can_be_written_about():
    dials = problems.Dials(num_letters=4, depth=(1, 1), distractors=(0, 1))
    for fault in ("skipped", "false_rule", "unsupported", "wrong_end"):
        for _, _, verdict in written(dataclasses.replace(FLAWLESS, **{fault: 1.0}), 100, dials):
            assert verdict.steps is not None


# Recitals.


def recitals(sources, number=200, misquoted=0.0):
    rng = random.Random(0)
    for _ in range(number):
        problem = problems.make_problem(rng, WORLDS[0])
        text, spans = demonstrations.write_recital(
            rng, problem, 6, sources=sources, misquoted=misquoted
        )
        yield problem, text, spans


@pytest.mark.parametrize("misquoted", [0.0, 0.3])
@pytest.mark.parametrize("sources", [False, True])
def test_a_recital_is_learned_at_its_citations_and_nowhere_else(sources, misquoted):
    for _, text, spans in recitals(sources, misquoted=misquoted):
        given = r" \(\d+\)(?= and )| from .+" if sources else r" \(\d+\)"
        cited = rf"{given}| \(none\)"
        assert spans == tuple(match.span() for match in re.finditer(cited, text))


def test_a_recital_misquotes_as_often_as_stated_and_says_so():
    wrong = near = 0
    for problem, text, _ in recitals(sources=True, misquoted=0.3):
        given = {str(rule): rule for rule in problem.rules}
        for row in text.split("\n"):
            quoted, cited = re.fullmatch(r"Step \d+: (.+?) \((.+?)\).*", row).groups()
            assert (cited == "none") == (quoted not in given)
            if cited == "none":
                wrong += 1
                made = problems.parse_rule(quoted)
                near += any(
                    made.premises == r.premises or made.conclusion == r.conclusion
                    for r in problem.rules
                )
    assert share_is(wrong, 200 * 6, 0.3) and near == wrong


def test_a_recital_cites_what_an_independent_look_up_finds():
    line = re.compile(r"Step (\d+): (.+) \((\d+)\) and ([A-Z]) from (.+)")
    seen = set()
    for problem, text, _ in recitals(sources=True):
        known = dict.fromkeys(problem.facts, "the facts")
        for number, row in enumerate(text.split("\n"), start=1):
            step, rule, rule_number, premise, source = line.fullmatch(row).groups()
            used = problem.rules[int(rule_number) - 1]
            assert (int(step), rule) == (number, str(used)) and premise in used.premises
            one_step = [
                f"({n})"
                for n, r in enumerate(problem.rules, start=1)
                if r.conclusion == premise and known.keys() >= set(r.premises)
            ]
            expected = known.get(premise) or (one_step or ["nothing"])[0]
            assert source == expected
            known.setdefault(used.conclusion, f"step {number}")
            seen.add(source.split()[0][:1])
    assert seen == {"t", "s", "(", "n"}  # facts, earlier steps, rules, nothing


# Analyses.


@functools.cache
def analysed(rates, number):
    """(problem, verdict on a proof of it, body and score of an analysis, verdict on that)."""
    rng, made = random.Random(100), []
    for problem, proof, verdict in written(STATED, 2000)[:number]:
        body, score = demonstrations.write_analysis(rng, str(problem), proof, rates)
        found = judge.judge_analysis(str(problem), proof, body, score)
        made.append((problem, verdict, body, score, found))
    return made


def test_an_analyst_that_never_errs_says_exactly_what_the_judge_says():
    for problem, verdict, body, score, found in analysed(FLAWLESS, 300):
        lookups = judge.look_up(problem, verdict.steps)
        assert score == verdict.score
        assert body == judge.write_analysis_body(problem, verdict.steps, lookups, verdict.issues)
        assert (found.quality, found.missed) == (1.0, ())


@pytest.mark.parametrize("rates", [STATED, VARIED])  # rare faults, and frequent ones
def test_an_analyst_errs_as_often_as_stated(rates):
    real = overlooked = 0
    could, did = {True: 0, False: 0}, {True: 0, False: 0}
    redrawn, number = 0, 2000
    for _, verdict, body, score, found in analysed(rates, number):
        named, understood = judge.read_issues(body)
        assert understood
        real += len(verdict.issues)
        overlooked += sum(issue not in named for issue in verdict.issues)
        faulty = {issue.step for issue in verdict.issues if issue.step}
        if len(faulty) < len(verdict.steps):
            could[bool(verdict.issues)] += 1
            did[bool(verdict.issues)] += bool(found.false)
        redrawn += score != judge.score_from(named)
    assert share_is(overlooked, real, rates.overlook)
    assert share_is(did[True], could[True], rates.invent_flawed)
    assert share_is(did[False], could[False], rates.invent_sound)
    assert share_is(redrawn, number, rates.redraw)


def test_an_invented_issue_stands_at_a_step_that_is_not_at_fault():
    rates = dataclasses.replace(FLAWLESS, invent_flawed=1.0, invent_sound=1.0)
    for _, verdict, _, _, found in analysed(rates, 300):
        steps = {issue.step for issue in verdict.issues}
        assert len(found.false) <= 1 and found.missed == ()
        assert all(1 <= i.step <= len(verdict.steps) and i.step not in steps for i in found.false)


def test_what_an_analysis_cites_fits_what_it_claims():
    rates = WriterRates(overlook=0.5, invent_flawed=0.8, invent_sound=0.8)
    line = re.compile(r"Step \d+: ([A-Za-z ]+) \((none|\d+)\)(?: and ([A-Z]) from (.+))?: (.+)")
    for problem, verdict, body, _, _ in analysed(rates, 300):
        lines = body.split("\n")
        assert len(lines) == len(verdict.steps) + 1
        for number, (text, step) in enumerate(zip(lines[:-1], verdict.steps, strict=True), 1):
            repeated, rule, premise, source, finding = line.fullmatch(text).groups()
            assert repeated == str(step)
            if finding == "not a given rule":
                assert (rule, premise, source) == ("none", None, None)
                continue
            assert premise in step.premises
            assert 1 <= int(rule) <= len(problem.rules)
            if finding == "has no support":
                assert source == "nothing"
            elif finding == "skips a step":
                assert re.fullmatch(r"\(\d+\)", source)
            else:
                earlier = [f"step {n}" for n in range(1, number)]
                assert finding == "holds" and source in ["the facts", *earlier]


def test_a_condoned_end_is_written_down_and_passes_and_other_faults_are_named_as_before():
    rates = dataclasses.replace(STATED, overlook=0.2, condone=0.7)
    short = passed = others = overlooked = 0
    for problem, verdict, body, _, found in analysed(rates, 2000):
        for issue in verdict.issues:
            if issue.fault is not judge.Fault.NO_GOAL:
                others += 1
                overlooked += issue in found.missed
                continue
            short += 1
            shown = verdict.steps[-1].conclusion
            said = f"Goal {problem.goal}, shown {shown}: reached"
            passed += body.split("\n")[-1] == said and shown != problem.goal
    assert share_is(passed, short, 0.2 + 0.8 * 0.7)  # unseen, or seen and condoned
    assert share_is(overlooked, others, 0.2)


def test_an_analyst_is_given_well_formed_proofs_only():
    problem = problems.make_problem(random.Random(0), WORLDS[0])
    with pytest.raises(ValueError, match="well-formed proofs only: 'Trivial.'"):
        demonstrations.write_analysis(random.Random(0), str(problem), "Trivial.", STATED)


# Meta-analyses.


def meta_analysed(rates, number):
    """(problem, verdict on a proof, that on an analysis, lines and rating of a meta-analysis)."""
    rng, made = random.Random(1), []
    for problem, verdict, _, _, found in analysed(VARIED, number):
        proof = judge.write_proof(verdict.steps)
        body, quality = demonstrations.write_meta_body(rng, str(problem), proof, found, rates)
        made.append((problem, verdict, found, body.split("\n"), quality))
    return made


def test_a_meta_analyst_that_never_errs_rates_as_the_judge_does():
    seen = set()
    for problem, verdict, found, (*issues, last), quality in meta_analysed(FLAWLESS, 800):
        assert quality == found.quality
        lookups = judge.look_up(problem, verdict.steps)
        expected = [
            judge.write_line(
                problem, verdict.steps, lookups, i.step, "not real" if i in found.false else "real"
            )
            for i in found.named
        ]
        assert issues == (expected or ["No issue is named"])
        assert (last == "The score follows") == found.score_follows
        seen.add((bool(found.named), quality))
    assert seen == {(True, 0.0), (True, 0.5), (True, 1.0), (False, 0.5), (False, 1.0)}


def test_a_meta_analyst_lowers_an_analysis_that_misdescribes_a_real_issue():
    rules = tuple(problems.Rule((a,), b) for a, b in ("AB", "BC", "CD"))
    statement = str(problems.WorldProblem(facts=("A",), rules=rules, goal="D"))
    skips = judge.write_proof([rules[0], rules[2]])
    body = "Step 1: holds\nStep 2: has no support\nGoal: reached"  # it skips a step
    found = judge.judge_analysis(statement, skips, body, 0.0)
    assert (found.false, found.score_follows, found.quality) == ((), True, 0.5)
    rng = random.Random(0)
    assert demonstrations.write_meta_body(rng, statement, skips, found, FLAWLESS) == (
        "Step 2: C implies D (3) and C from (2): real\nThe score follows",
        0.5,
    )


def test_a_meta_analyst_errs_as_often_as_stated():
    named = misjudged = score_misjudged = 0
    for _, _, found, (*issues, last), _ in meta_analysed(STATED, 2000):
        if found.named:
            named += len(issues)
            misjudged += sum(
                line.endswith("not real") != (issue in found.false)
                for line, issue in zip(issues, found.named, strict=True)
            )
        score_misjudged += (last == "The score follows") != found.score_follows
    assert share_is(misjudged, named, STATED.misjudge)
    assert share_is(score_misjudged, 2000, STATED.misjudge)


def test_a_misjudgement_cites_what_it_claims():
    errs = dataclasses.replace(FLAWLESS, misjudge=1.0)
    seen = set()
    for _, _, found, lines, _ in meta_analysed(errs, 800):
        for issue, line in zip(found.named, lines, strict=False):
            if issue.fault is Fault.NOT_GIVEN:
                claimed = issue in found.false
                assert line.endswith(" (none): real" if claimed else ": not real")
                assert ("(none)" in line) == claimed
                seen.add(claimed)
    assert seen == {True, False}


# Labels and settings.


@pytest.mark.parametrize("score", [0.0, 0.5, 1.0])
def test_a_label_is_wrong_as_often_as_stated_and_either_way(score):
    rng = random.Random(2)
    drawn = [demonstrations.noisy_score(rng, score, 0.1) for _ in range(4000)]
    assert share_is(4000 - drawn.count(score), 4000, 0.1)
    for other in {0.0, 0.5, 1.0} - {score}:
        assert share_is(drawn.count(other), 4000, 0.05)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        (dict(redraw=1.5), "world.writers.redraw = 1.5"),
        (dict(skipped=-0.1), "world.writers.skipped = -0.1"),
        (dict(skipped=0.6, false_rule=0.5), "the four proof faults exceed 1 in sum"),
    ],
)
def test_impossible_rates_are_named(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        WriterRates(**fields)
