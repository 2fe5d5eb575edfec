import random
import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mathv2_jax.text import parse
from mathv2_jax.world import judge, problems
from mathv2_jax.world.judge import Fault, Issue


def stated(rules, goal):
    """A problem with the fact A and the given rules."""
    found = tuple(problems.parse_rule(rule) for rule in rules)
    return str(problems.WorldProblem(facts=("A",), rules=found, goal=goal))


STATEMENT = stated(
    ["A implies B", "B implies C", "C implies D", "E implies D", "B implies F"], goal="D"
)
NOT_GIVEN, SKIPPED, UNSUPPORTED = Fault.NOT_GIVEN, Fault.SKIPPED, Fault.UNSUPPORTED
NO_GOAL = Issue(0, Fault.NO_GOAL)


def proof(*steps):
    return "\n".join(f"Step {n}: {step}" for n, step in enumerate(steps, start=1))


RIGHT = proof("A implies B", "B implies C", "C implies D")
FALSE_RULE = proof("A implies C", "C implies D")
SKIPS = proof("A implies B", "C implies D")
NO_SUPPORT = proof("A implies B", "E implies D")
WRONG_END = proof("A implies B", "B implies F")


@pytest.mark.parametrize(
    ("text", "score", "issues"),
    [
        (RIGHT, 1.0, ()),
        (proof("A implies B", "B implies F", "B implies C", "C implies D"), 1.0, ()),  # a detour
        (FALSE_RULE, 0.0, (Issue(1, NOT_GIVEN),)),  # C counts from then on: one error
        (proof("A implies D"), 0.0, (Issue(1, NOT_GIVEN),)),
        (SKIPS, 0.5, (Issue(2, SKIPPED),)),
        (proof("B implies C", "C implies D"), 0.5, (Issue(1, SKIPPED),)),
        (NO_SUPPORT, 0.0, (Issue(2, UNSUPPORTED),)),
        (proof("C implies D"), 0.0, (Issue(1, UNSUPPORTED),)),  # two steps away is no support
        (WRONG_END, 0.0, (NO_GOAL,)),
        (proof("A implies B"), 0.0, (NO_GOAL,)),
        (proof("C implies D", "A implies B"), 0.0, (NO_GOAL, Issue(1, UNSUPPORTED))),
        (proof("E implies C", "E implies D"), 0.0, (Issue(1, NOT_GIVEN), Issue(2, UNSUPPORTED))),
        (proof("B implies C", "A implies D"), 0.0, (Issue(1, SKIPPED), Issue(2, NOT_GIVEN))),
    ],
)
def test_a_proof_is_judged_step_by_step(text, score, issues):
    verdict = judge.judge_proof(STATEMENT, text)
    assert (verdict.score, set(verdict.issues)) == (score, set(issues))


def test_a_step_of_two_premises_skips_only_what_one_rule_gives():
    statement = stated(["A implies B", "B implies C", "B and C imply D"], goal="D")
    last = "B and C imply D"

    def found(*steps):
        return judge.judge_proof(statement, proof(*steps)).issues

    assert found("A implies B", "B implies C", last) == ()
    assert found("A implies B", last) == (Issue(2, SKIPPED),)
    assert found(last) == (Issue(1, UNSUPPORTED),)  # B is one rule away, C two


@pytest.mark.parametrize(
    "text",
    [
        "",
        "It is obvious.",
        "Step 1: A implies B\nHence D.",
        "Step 2: A implies B",
        "Step 1: A implies B\nStep 3: B implies C",
        "Step 01: A implies B",
        "Step 1: a implies b",
        "Step 1: A implies B.",
        "Step 1: A implies B\n\nStep 2: B implies C",
        proof(*["A implies B"] * 13),
    ],
)
def test_a_malformed_proof_scores_0(text):
    assert judge.judge_proof(STATEMENT, text) == judge.ProofVerdict(0.0, (), None)


@given(
    st.text() | st.lists(st.sampled_from(["Step 1", ": ", "A implies B", "\n", " "])).map("".join)
)
def test_any_text_can_be_judged(text):
    assert judge.judge_proof(STATEMENT, text).score in (0.0, 0.5, 1.0)
    judge.read_issues(text)


# An independent, slow judge: texts instead of records, whole closures instead of look-ups.


def slow_issues(statement, steps):
    facts, rules, goal = re.fullmatch(
        r"Given: (.*)\. Rules: (.*)\. Show: (.)\.", statement
    ).groups()
    given_rules = [text for text in re.split(r" ?\(\d+\) ?", rules) if text]

    def halves(text):
        left, right = re.split(" imply | implies ", text)
        return frozenset(left.split(" and ")), right

    def one_round(letters):
        return letters | {halves(r)[1] for r in given_rules if halves(r)[0] <= letters}

    found = set()
    for n, text in enumerate(steps):
        earlier = set(facts.split(" and ")) | {halves(before)[1] for before in steps[:n]}
        premises = halves(text)[0]
        if text not in given_rules:
            found.add((n + 1, "not a given rule"))
        elif not premises <= one_round(earlier):
            found.add((n + 1, "has no support"))
        elif not premises <= earlier:
            found.add((n + 1, "skips a step"))
    if halves(steps[-1])[1] != goal:
        found.add((0, "missing"))
    return found


def slow_score(issues):
    kinds = {fault for _, fault in issues}
    return 1.0 if not kinds else 0.5 if kinds == {"skips a step"} else 0.0


WORLDS = [
    problems.Dials(num_letters=7, depth=(1, 4)),
    problems.Dials(num_letters=9, depth=(2, 4), distractors=(0, 6), two_premises=0.5),
]


def random_steps(rng, problem):
    """Mostly given rules, near the order of the chain, some missing, some made up."""
    steps = [rule for rule in problem.chain if rng.random() < 0.8]
    for _ in range(rng.randint(0, 4)):
        premise, conclusion = rng.sample(string.ascii_uppercase[:9], 2)
        false = problems.Rule((premise,), conclusion)
        rule = rng.choice(problem.rules) if rng.random() < 0.7 else false
        steps.insert(rng.randint(0, len(steps)), rule)
    return tuple(steps) or problem.chain


def cases(number):
    rng = random.Random(7)
    for n in range(number):
        problem = problems.make_problem(rng, WORLDS[n % 2])
        yield problem, random_steps(rng, problem)


def test_an_independent_slow_judge_agrees_on_random_proofs():
    scores = []
    for problem, steps in cases(1500):
        verdict = judge.judge_proof(str(problem), judge.write_proof(steps))
        slow = slow_issues(str(problem), [str(step) for step in steps])
        assert {(i.step, i.fault.value) for i in verdict.issues} == slow
        assert verdict.score == slow_score(slow)
        assert verdict.steps == steps
        scores.append(verdict.score)
    assert min(scores.count(s) for s in (0.0, 0.5, 1.0)) > 80  # no verdict is rare here


def test_no_proof_of_what_does_not_follow_has_a_full_or_half_score():
    rng = random.Random(3)
    for n in range(600):
        problem = problems.make_problem(rng, WORLDS[n % 2])
        known = set(problem.facts)
        for _ in problem.rules:
            known |= {r.conclusion for r in problem.rules if known.issuperset(r.premises)}
        beyond = sorted(set("ABCDEFGHI") - known)
        if not beyond:
            continue
        false = problems.WorldProblem(
            facts=problem.facts, rules=problem.rules, goal=rng.choice(beyond)
        )
        steps = random_steps(rng, problem)
        assert judge.judge_proof(str(false), judge.write_proof(steps)).score == 0.0


def test_look_ups_say_what_the_judge_finds():
    for problem, steps in cases(300):
        faults = {i.step: i.fault for i in judge.judge_steps(problem, steps)}
        lookups = judge.look_up(problem, steps)
        for number, (step, lookup) in enumerate(zip(steps, lookups, strict=True), start=1):
            fault = faults.get(number)
            assert (lookup.rule is None) == (fault is NOT_GIVEN)
            if lookup.rule is not None:
                assert problem.rules[lookup.rule - 1] == step
                assert (lookup.source == judge.NOTHING) == (fault is UNSUPPORTED)
                assert lookup.source.startswith("(") == (fault is SKIPPED)
            if match := re.fullmatch(r"step (\d+)", lookup.source):
                cited = int(match[1])
                assert cited < number and steps[cited - 1].conclusion in step.premises
            if match := re.fullmatch(r"\((\d+)\)", lookup.source):
                assert problem.rules[int(match[1]) - 1].conclusion in step.premises


# Analyses.


def analysis(*findings, goal="reached"):
    lines = [f"Step {n}: {finding}" for n, finding in enumerate(findings, start=1)]
    return "\n".join([*lines, f"Goal: {goal}"])


OK = "holds"


@pytest.mark.parametrize(
    ("text", "body", "score", "quality"),
    [
        # Every named issue is real and the score follows.
        (FALSE_RULE, analysis("not a given rule", OK), 0.0, 1.0),
        (SKIPS, analysis(OK, "skips a step"), 0.5, 1.0),
        (WRONG_END, analysis(OK, OK, goal="missing"), 0.0, 1.0),
        # No issue is named: nothing can be unreasonable, real faults or not.
        (RIGHT, analysis(OK, OK, OK), 1.0, 1.0),
        (FALSE_RULE, analysis(OK, OK), 1.0, 1.0),
        # One of two real issues is named: what is missed is not judged.
        (proof("A implies C", "E implies D"), analysis("not a given rule", OK), 0.0, 1.0),
        # All named are false.
        (RIGHT, analysis(OK, "skips a step", OK), 0.5, 0.0),
        (FALSE_RULE, analysis(OK, "not a given rule"), 0.0, 0.0),
        (FALSE_RULE, analysis(OK, OK, goal="missing"), 0.0, 0.0),
        (RIGHT, analysis(OK, OK, OK, "has no support"), 0.0, 0.0),  # there is no step 4
        # Some are false.
        (FALSE_RULE, analysis("not a given rule", "has no support"), 0.0, 0.5),
        (WRONG_END, analysis("not a given rule", OK, goal="missing"), 0.0, 0.5),
        # The right step with the wrong fault.
        (FALSE_RULE, analysis("has no support", OK), 0.0, 0.5),
        (SKIPS, analysis(OK, "has no support"), 0.0, 0.5),
        # A line that says nothing, and a score that does not follow.
        (SKIPS, analysis(OK, "skips a step") + "\nI like it.", 0.5, 0.5),
        (RIGHT, "", 1.0, 0.5),
        (FALSE_RULE, analysis("not a given rule", OK), 0.5, 0.5),
        (SKIPS, analysis(OK, "skips a step"), 0.0, 0.5),
        (RIGHT, analysis(OK, OK, OK), 0.5, 0.5),
    ],
)
def test_the_quality_of_an_analysis(text, body, score, quality):
    verdict = judge.judge_analysis(STATEMENT, text, body, score)
    assert verdict.quality == quality
    assert verdict.faithful == (quality == 1.0)


def test_a_verdict_lists_what_is_named_false_and_missed():
    text = proof("A implies C", "E implies D")
    verdict = judge.judge_analysis(STATEMENT, text, analysis("not a given rule", OK), 0.0)
    assert verdict.named == (Issue(1, NOT_GIVEN),)
    assert (verdict.false, verdict.missed) == ((), (Issue(2, UNSUPPORTED),))
    verdict = judge.judge_analysis(STATEMENT, text, analysis(OK, OK, goal="missing"), 1.0)
    assert (verdict.false, verdict.score_follows) == ((NO_GOAL,), False)
    assert verdict.missed == (Issue(1, NOT_GIVEN), Issue(2, UNSUPPORTED))


def test_a_written_analysis_is_read_back_whatever_it_cites():
    for problem, steps in cases(300):
        issues = judge.judge_steps(problem, steps)
        lookups = judge.look_up(problem, steps)
        body = judge.write_analysis_body(problem, steps, lookups, issues)
        assert judge.read_issues(body) == (tuple(sorted(issues)), True)
        nowhere = [judge.Lookup(None, "", judge.NOTHING)] * len(steps)
        other = judge.write_analysis_body(problem, steps, nowhere, issues)
        assert judge.read_issues(other) == (tuple(sorted(issues)), True)
        verdict = judge.judge_analysis(
            str(problem), judge.write_proof(steps), body, judge.score_from(issues)
        )
        assert (verdict.quality, verdict.missed, verdict.false) == (1.0, (), ())


def test_an_analysis_line_repeats_its_step_and_cites():
    problem = problems.parse_statement(STATEMENT)
    steps = judge.parse_proof(proof("A implies B", "C implies D", "E implies A"))
    issues = judge.judge_steps(problem, steps)
    body = judge.write_analysis_body(problem, steps, judge.look_up(problem, steps), issues)
    assert body.split("\n") == [
        "Step 1: A implies B (1) and A from the facts: holds",
        "Step 2: C implies D (3) and C from (2): skips a step",
        "Step 3: E implies A (none): not a given rule",
        "Goal D, shown A: missing",
    ]


def test_a_citation_names_the_first_place_a_premise_comes_from():
    problem = problems.parse_statement(STATEMENT)
    steps = judge.parse_proof(proof("A implies B", "E implies B", "B implies F", "E implies A"))
    again = (*steps, *judge.parse_proof(proof("A implies B")))
    sources = [lookup.source for lookup in judge.look_up(problem, again)]
    assert sources == ["the facts", "nothing", "step 1", "nothing", "the facts"]


def test_the_exact_judge_reads_whole_analyses():
    exact = judge.ExactJudge()
    named = parse.write_analysis(analysis("not a given rule", OK), 0.0)
    silent = parse.write_analysis(analysis(OK, OK), 1.0)
    assert exact.proof_score(STATEMENT, SKIPS) == 0.5
    assert exact.analysis_quality(STATEMENT, FALSE_RULE, named) == 1.0
    assert exact.analysis_quality(STATEMENT, RIGHT, named) == 0.0
    assert exact.analysis_quality(STATEMENT, RIGHT, "It is fine.") == 0.0
    assert exact.names_issue(named) and not exact.names_issue(silent)
    assert not exact.names_issue("Step 1: not a given rule")


def test_an_issue_says_its_place():
    assert str(Issue(3, SKIPPED)) == "Step 3: skips a step"
    assert str(NO_GOAL) == "Goal: missing"
