import itertools
import random
import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mathv2_jax.world import judge, problems
from mathv2_jax.world.problems import Rule, WorldProblem

LETTER = st.sampled_from(string.ascii_uppercase)
PREMISES = st.lists(LETTER, min_size=1, max_size=3).map(tuple)
ANY_PROBLEM = st.fixed_dictionaries(
    dict(
        facts=st.lists(LETTER, min_size=1, max_size=3).map(tuple),
        rules=st.lists(st.tuples(PREMISES, LETTER), min_size=1, max_size=8),
        goal=LETTER,
    )
)
SEED = st.integers(0, 2**32)
WORLDS = [
    problems.Dials(),
    problems.Dials(depth=(1, 5), distractors=(0, 8), two_premises=0.5),
    problems.Dials(num_letters=4, depth=(1, 2), distractors=(0, 6), dead_ends=0.2),
]
WORLD = st.sampled_from(WORLDS)


def made(seed, dials):
    return problems.make_problem(random.Random(seed), dials)


def built(facts, rules, goal):
    return WorldProblem(facts=facts, rules=tuple(Rule(*rule) for rule in rules), goal=goal)


def closure(facts, rules):
    """Every letter that follows from the facts, by walking on until nothing is new."""
    known = set(facts)
    while new := {r.conclusion for r in rules if known.issuperset(r.premises)} - known:
        known |= new
    return known


@given(ANY_PROBLEM)
def test_a_statement_says_the_whole_problem(fields):
    problem = built(**fields)
    assert problems.parse_statement(str(problem)) == problem


GOOD = str(built(("A", "B"), [(("A",), "F"), (("F", "B"), "C")], "C"))


def test_a_statement_reads_as_english():
    words = re.sub(r" ?\(\d+\)", "", GOOD)
    assert words == "Given: A and B. Rules: A implies F F and B imply C. Show: C."
    assert re.findall(r"\((\d+)\)", GOOD) == ["1", "2"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Given: ", ""),
        ("Given: A and B", "Given: A, B"),
        ("Given: A", "Given: a sunny day"),
        ("(2)", "(3)"),
        ("(1)", ""),
        ("A implies F", "A imply F"),
        ("A implies F", "A and B implies F"),
        ("A implies F", "A implies f"),
        ("A implies F", "A  implies F"),
        ("Show: C.", "Show: C"),
        ("Show: C.", "Show: C.\n"),
        ("Show: C.", "Show: C. Why?"),
        (GOOD, ""),
    ],
)
def test_any_other_text_is_no_statement(old, new):
    assert old in GOOD
    with pytest.raises(ValueError, match="not a statement of the proof world"):
        problems.parse_statement(GOOD.replace(old, new))


@given(SEED, WORLD)
def test_every_problem_is_solved_by_its_chain_and_by_no_shorter_proof(seed, dials):
    problem = made(seed, dials)
    assert judge.judge_proof(str(problem), judge.write_proof(problem.chain)).score == 1.0
    assert dials.depth[0] <= len(problem.chain) <= dials.depth[1]
    assert set(problem.chain) <= set(problem.rules)
    # Fewer applications of rules than the chain has reach no goal: count them breadth first.
    reached, rounds = set(problem.facts), 0
    while problem.goal not in reached:
        reached |= {r.conclusion for r in problem.rules if reached.issuperset(r.premises)}
        rounds += 1
    assert rounds == len(problem.chain)


@given(SEED, WORLD)
def test_every_step_of_the_chain_is_needed(seed, dials):
    problem = made(seed, dials)
    for step in problem.chain:
        others = [rule for rule in problem.rules if rule != step]
        assert problem.goal not in closure(problem.facts, others)


@given(SEED, WORLD)
def test_a_problem_keeps_to_its_dials(seed, dials):
    problem = made(seed, dials)
    used = {*problem.facts, problem.goal}
    used |= {a for rule in problem.rules for a in (*rule.premises, rule.conclusion)}
    assert used <= set(string.ascii_uppercase[: dials.num_letters])
    assert len(set(problem.rules)) == len(problem.rules)
    assert len(problem.rules) - len(problem.chain) <= dials.distractors[1]
    assert all(rule.conclusion not in rule.premises for rule in problem.rules)
    two = [rule for rule in problem.chain if len(rule.premises) == 2]
    assert len(problem.facts) == 1 + len(two)
    assert dials.two_premises or not two


def test_the_shares_of_distractors_are_the_stated_ones():
    dials = problems.Dials(distractors=(1, 1), num_letters=26)
    counts, rng = {"dead end": 0, "underivable": 0, "back": 0}, random.Random(0)
    for _ in range(3000):
        problem = problems.make_problem(rng, dials)
        (extra,) = set(problem.rules) - set(problem.chain)
        on_chain = {*problem.facts, *(rule.conclusion for rule in problem.chain)}
        if extra.conclusion not in on_chain:
            counts["dead end"] += 1
        else:
            counts["back" if extra.premises[0] in on_chain else "underivable"] += 1
    for kind, share in (("dead end", 0.45), ("underivable", 0.25), ("back", 0.3)):
        assert abs(counts[kind] / 3000 - share) < 4 * (share * (1 - share) / 3000) ** 0.5


def renamed(problem, rng):
    """The same problem in other letters, its rules, facts and premises in another order."""
    names = dict(zip(string.ascii_uppercase, rng.sample(string.ascii_uppercase, 26), strict=True))

    def mixed(letters):
        return tuple(names[a] for a in rng.sample(letters, len(letters)))

    rules = [Rule(mixed(rule.premises), names[rule.conclusion]) for rule in problem.rules]
    rng.shuffle(rules)
    return WorldProblem(facts=mixed(problem.facts), rules=tuple(rules), goal=names[problem.goal])


@given(SEED, WORLD)
def test_a_name_survives_renaming_and_reordering(seed, dials):
    problem = made(seed, dials)
    other = renamed(problem, random.Random(seed + 1))
    assert problems.canonical_form(other) == problems.canonical_form(problem)


@given(ANY_PROBLEM, SEED)
def test_the_name_of_any_problem_survives_renaming_and_reordering(fields, seed):
    problem = built(**fields)
    other = renamed(problem, random.Random(seed))
    assert problems.canonical_form(other) == problems.canonical_form(problem)


@given(SEED, WORLD, st.data())
def test_a_name_changes_with_the_rules_the_facts_or_the_goal(seed, dials, data):
    problem = made(seed, dials)
    name = problems.canonical_form(problem)
    letters = sorted({a for r in problem.rules for a in (*r.premises, r.conclusion)})
    fewer = data.draw(st.integers(0, len(problem.rules) - 1))
    shorter = problem.rules[:fewer] + problem.rules[fewer + 1 :]
    changes = [
        WorldProblem(facts=problem.facts, rules=shorter, goal=problem.goal),
        WorldProblem(facts=problem.facts, rules=problem.rules, goal=problem.facts[0]),
    ]
    more = data.draw(st.sampled_from(letters))
    if more not in problem.facts:
        facts = (*problem.facts, more)
        changes.append(WorldProblem(facts=facts, rules=problem.rules, goal=problem.goal))
    for changed in changes:
        assert problems.canonical_form(changed) != name


def brute_name(problem):
    """The least of all renamings to the first letters: equal exactly for isomorphic problems."""
    letters = sorted(
        {problem.goal, *problem.facts}.union(
            *((*rule.premises, rule.conclusion) for rule in problem.rules)
        )
    )
    forms = []
    for order in itertools.permutations(range(len(letters))):
        new = dict(zip(letters, order, strict=True))
        rules = sorted(
            (sorted(new[p] for p in r.premises), new[r.conclusion]) for r in problem.rules
        )
        forms.append((sorted(new[f] for f in problem.facts), rules, new[problem.goal]))
    return str(min(forms))


def test_in_a_small_world_names_are_equal_exactly_for_renamed_problems():
    dials = problems.Dials(num_letters=5, depth=(1, 3), distractors=(0, 4), two_premises=0.3)
    rng = random.Random(0)
    pairs = {
        (brute_name(problem), problems.canonical_form(problem))
        for problem in (problems.make_problem(rng, dials) for _ in range(400))
    }
    assert len(pairs) > 60
    assert len(pairs) == len({brute for brute, _ in pairs}) == len({name for _, name in pairs})


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (dict(num_letters=3), "num_letters = 3"),
        (dict(num_letters=27), "num_letters = 27"),
        (dict(depth=(0, 2)), r"depth = \(0, 2\)"),
        (dict(depth=(3, 2)), r"depth = \(3, 2\)"),
        (dict(distractors=(3, 2)), r"distractors = \(3, 2\)"),
        (dict(distractors=(-1, 2)), r"distractors = \(-1, 2\)"),
        (dict(num_letters=6, depth=(2, 5)), r"depth = \(2, 5\) does not fit 6 letters"),
        (dict(dead_ends=-0.1), "dead_ends = -0.1"),
        (dict(from_underivable=1.2, dead_ends=0.0), "from_underivable = 1.2"),
        (dict(dead_ends=0.6, from_underivable=0.5), r"dead_ends \+ from_underivable = 1.1"),
        (dict(two_premises=2.0), "two_premises = 2.0"),
    ],
)
def test_an_impossible_dial_is_named(fields, named):
    with pytest.raises(ValueError, match=rf"world\.dials\.{named}"):
        problems.Dials(**fields)
