import dataclasses
import hashlib
import os
import random
import re
import subprocess
import sys

import pytest

from mathv2_jax import records
from mathv2_jax.text import parse, prompts
from mathv2_jax.world import corpus, judge, problems
from tools import writer_agreement

CONFIG = corpus.WorldConfig(
    num_drills=90,
    num_demonstrations=600,
    num_problems=60,
    num_graded_proofs=50,
    num_graded_analyses=40,
    num_probe=30,
    num_validation=20,
    num_test=25,
)
TEMPLATES = prompts.load("world")
STATEMENT = re.compile(r"Given: .*?\. Show: [A-Z]\.")


@pytest.fixture(scope="module")
def made():
    return corpus.make_corpus(CONFIG, 0, TEMPLATES)


def digest(made):
    lines = (records.to_lines(getattr(made, f.name)) for f in dataclasses.fields(made))
    return hashlib.sha256(b"".join(lines)).hexdigest()


def share_is(hits, number, rate):
    return abs(hits - rate * number) <= 4 * (number * rate * (1 - rate)) ** 0.5


# A function of (config, seed).

PROGRAM = """
import dataclasses, hashlib
from mathv2_jax import records
from mathv2_jax.text import prompts
from mathv2_jax.world import corpus
config = corpus.WorldConfig(**{fields})
made = corpus.make_corpus(config, 0, prompts.load("world"))
lines = (records.to_lines(getattr(made, f.name)) for f in dataclasses.fields(made))
print(hashlib.sha256(b"".join(lines)).hexdigest())
"""


def test_another_process_writes_the_same_bytes(made):
    names = [f.name for f in dataclasses.fields(CONFIG) if f.name.startswith("num_")]
    program = PROGRAM.replace("{fields}", repr({n: getattr(CONFIG, n) for n in names}))
    environment = {**os.environ, "PYTHONHASHSEED": "4"}  # sets are walked in another order
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == digest(made)


def test_another_seed_writes_other_records_of_every_kind(made):
    other = corpus.make_corpus(CONFIG, 1, TEMPLATES)
    for field in dataclasses.fields(made):
        mine, theirs = ({r.id for r in getattr(c, field.name)} for c in (made, other))
        assert len(mine & theirs) < 0.2 * len(mine), field.name


def test_more_of_one_kind_leaves_the_others_as_they_are(made):
    more = dataclasses.replace(CONFIG, num_graded_proofs=70)
    other = corpus.make_corpus(more, 0, TEMPLATES)
    assert other.proofs[:50] == made.proofs
    assert dataclasses.replace(other, proofs=made.proofs) == made


# Sizes and labels.


def test_there_is_as_much_of_each_kind_as_stated(made):
    sizes = {f.name: len(getattr(made, f.name)) for f in dataclasses.fields(made)}
    assert sizes == dict(
        problems=60,
        proofs=50,
        analyses=40,
        rule_drills=90,
        source_drills=90,
        demonstrations=600,
        probe=30,
        validation_problems=20,
        test_problems=25,
        test_proofs=25,
        test_analyses=25,
    )
    for field in dataclasses.fields(made):
        if not field.name.endswith(("demonstrations", "drills")):
            assert len({r.id for r in getattr(made, field.name)}) == sizes[field.name]


def test_the_labels_are_those_of_d_v_d_mv_and_the_probe_and_no_others(made):
    for kind, rubric in (("proofs", "I_v"), ("probe", "I_v"), ("analyses", "I_mv")):
        labels = [record.label for record in getattr(made, kind)]
        assert all((x.source, x.rubric) == ("world", rubric) for x in labels)
    assert all(record.label is None for record in (*made.test_proofs, *made.test_analyses))
    assert all(proof.self_score is None for proof in (*made.proofs, *made.test_proofs))


def test_labels_of_proofs_are_wrong_as_often_as_stated():
    config = corpus.WorldConfig(label_error=0.1)
    proofs = corpus.graded_proofs(config, 0, "train", 2000, labelled=True)
    wrong = sum(p.label.score != judge.judge_proof(p.statement, p.text).score for p in proofs)
    assert share_is(wrong, 2000, 0.1)


def test_labels_of_analyses_are_wrong_as_often_as_stated():
    config = corpus.WorldConfig(label_error=0.1)
    analyses = corpus.graded_analyses(config, 0, "train", 1000, labelled=True)
    wrong = sum(a.label.score != corpus.true_quality(a).quality for a in analyses)
    assert share_is(wrong, 1000, 0.1)


def test_without_label_error_the_judge_and_the_labels_agree():
    config = corpus.WorldConfig(label_error=0.0)
    for proof in corpus.graded_proofs(config, 0, "probe", 100, labelled=True):
        assert proof.label.score == judge.judge_proof(proof.statement, proof.text).score


def test_only_the_proofs_that_experts_grade_have_their_own_share_of_wrong_ends():
    config = corpus.WorldConfig(graded_wrong_end=0.0)

    def wrong_ends(split, *, labelled):
        proofs = corpus.graded_proofs(config, 0, split, 300, labelled=labelled)
        verdicts = [judge.judge_proof(p.statement, p.text) for p in proofs]
        return sum(i.fault is judge.Fault.NO_GOAL for v in verdicts for i in v.issues)

    assert wrong_ends("train", labelled=True) == wrong_ends("probe", labelled=True) == 0
    assert wrong_ends("test", labelled=False) > 0
    default = dataclasses.replace(config, graded_wrong_end=None)
    assert default.graded_writers() == config.writers


def test_the_truth_about_an_analysis_needs_its_format():
    (analysis,) = corpus.graded_analyses(CONFIG, 0, "test", 1, labelled=False)
    with pytest.raises(ValueError, match="is not in the verifier's format"):
        corpus.true_quality(dataclasses.replace(analysis, text="Fine."))


# Splits.


def statements(records_):
    for record in records_:
        text = record.user if isinstance(record, records.Demonstration) else record.statement
        yield STATEMENT.match(text)[0]


def test_no_held_out_problem_has_a_renamed_twin_elsewhere(made):
    kinds = {
        "train": (
            made.problems,
            made.proofs,
            made.analyses,
            made.rule_drills,
            made.source_drills,
            made.demonstrations,
        ),
        "probe": (made.probe,),
        "validation": (made.validation_problems,),
        "test": (made.test_problems, made.test_proofs, made.test_analyses),
    }
    clusters = {
        split: {
            problems.canonical_form(problems.parse_statement(statement))
            for kind in found
            for statement in statements(kind)
        }
        for split, found in kinds.items()
    }
    assert all(len(found) > 5 for found in clusters.values())
    for split, found in clusters.items():
        assert {corpus.split_of(cluster) for cluster in found} == {split}
        for other in set(clusters) - {split}:
            assert not found & clusters[other]


def test_a_problem_says_its_cluster(made):
    for problem in (*made.problems, *made.test_problems):
        form = problems.canonical_form(problems.parse_statement(problem.statement))
        assert problem.cluster == form
        assert problem.id == records.content_id("problem", problem.statement)


def test_splits_have_the_stated_shares():
    found = [corpus.split_of(str(n)) for n in range(4000)]
    for split, share in zip(corpus.SPLITS, (0.8, 0.04, 0.04, 0.12), strict=True):
        assert share_is(found.count(split), 4000, share)


# Demonstrations.

READERS = {
    "generator": parse.parse_generation,
    "refiner": parse.parse_generation,
    "verifier": parse.parse_analysis,
    "meta_verifier": parse.parse_meta_analysis,
}
ASKED = {
    "generator": "Prove it.",
    "refiner": "Improve it.",
    "verifier": "Evaluate it.",
    "meta_verifier": "Rate the evaluation.",
}


def test_every_demonstration_is_in_the_format_of_its_role(made):
    seen = set()
    for demonstration in made.demonstrations:
        assert demonstration.user.endswith(ASKED[demonstration.role])
        assert demonstration.learned == ()  # the whole answer
        assert READERS[demonstration.role](demonstration.assistant) is not None
        seen.add(demonstration.role)
    assert seen == set(ASKED)


def test_the_writers_verdicts_are_often_the_judges_and_often_not(made):
    found = writer_agreement.shares(d for d in made.demonstrations if d.role != "refiner")
    expected = {"generator": 0.79, "verifier": 0.79, "meta_verifier": 0.85}  # README has them
    assert set(found) == set(expected)
    for role, (share, number) in found.items():
        assert share_is(share * number, number, expected[role]), role


def test_the_roles_take_turns():
    config = dataclasses.replace(CONFIG, num_demonstrations=90, refine_share=0.5)
    roles = [d.role for d in corpus.make_demonstrations(config, 0, TEMPLATES)]
    assert set(roles[::3]) == {"generator", "refiner"}
    assert set(roles[1::3]) == {"verifier"} and set(roles[2::3]) == {"meta_verifier"}


@pytest.mark.parametrize("sources", [False, True])
def test_a_drill_recites_rules_and_learns_their_citations_only(made, sources):
    misquoted = 0
    for drill in made.source_drills if sources else made.rule_drills:
        (statement,) = statements([drill])
        rules = [str(rule) for rule in problems.parse_statement(statement).rules]
        assert drill.user == f"{statement}\nRecite." and drill.source == "world-drill"
        lines = drill.assistant.split("\n")
        assert len(lines) == CONFIG.drill_lines
        cited = r" \((?:\d+|none)\)" + ("| from .*" if sources else "")
        learned = [drill.assistant[start:end] for start, end in drill.learned]
        assert learned == [part for line in lines for part in re.findall(cited, line)]
        for line in lines:
            given = line.split(" (")[0].split(": ")[1] in rules
            assert given != ("(none)" in line)
            misquoted += not given
    share = CONFIG.drill_misquoted if sources else 0.0
    expected = share * len(made.rule_drills) * CONFIG.drill_lines
    assert abs(misquoted - expected) <= 4 * (expected * (1 - share)) ** 0.5


def test_a_refinement_starts_from_a_proof_whose_analysis_finds_fault():
    config = dataclasses.replace(CONFIG, num_demonstrations=300, refine_share=0.9)
    refined = 0
    for demonstration in corpus.make_demonstrations(config, 0, TEMPLATES):
        if demonstration.role == "refiner":
            refined += 1
            found = parse.parse_analysis(demonstration.user)
            assert found is not None and found.score < 1.0
            assert len(demonstration.parents) == 2
    assert refined > 30


def test_careful_writers_have_their_share_of_what_is_read_and_none_of_what_is_imitated():
    planted = dict.fromkeys(("skipped", "false_rule", "unsupported", "wrong_end"), 0.0)
    writers = dataclasses.replace(CONFIG.writers, stops=1.0, **planted)
    config = dataclasses.replace(
        CONFIG, writers=writers, careful_share=0.5, num_demonstrations=900, refine_share=0.5
    )
    lengths = {True: [], False: []}
    for demonstration in corpus.make_demonstrations(config, 0, TEMPLATES):
        generates = demonstration.role in ("generator", "refiner")
        text = demonstration.assistant if generates else demonstration.user
        steps = re.findall(r"^Step \d+: [A-Za-z ]+$", text, re.M)
        if demonstration.role != "refiner":
            lengths[generates].append(len(steps))
    assert set(lengths[True]) == {1} and len(lengths[True]) > 100
    one_step = lengths[False].count(1)  # a problem takes two steps or more
    assert share_is(one_step, len(lengths[False]), 0.5)
    graded = corpus.graded_proofs(config, 0, "train", 200, labelled=True)
    right = [judge.judge_proof(p.statement, p.text).score == 1.0 for p in graded]
    assert share_is(sum(right), 200, 0.5)


def test_a_repair_keeps_what_stands_before_the_first_fault_named_and_is_mostly_right():
    config = dataclasses.replace(CONFIG, num_demonstrations=900, refine_share=0.9, repair_share=1.0)
    right, kept, number = 0, 0, 0
    for demonstration in corpus.make_demonstrations(config, 0, TEMPLATES):
        if demonstration.role != "refiner":
            continue
        number += 1
        statement, rest = demonstration.user.split("\n", 1)
        before = rest[: rest.index(parse.ANALYSIS_OPENING)].strip()
        analysis = parse.parse_analysis(demonstration.user)
        made = parse.parse_generation(demonstration.assistant)
        assert analysis is not None and made is not None
        right += judge.judge_proof(statement, made.proof).score == 1.0
        named = judge.judge_analysis(statement, before, analysis.body, analysis.score).named
        faults = [i.step for i in named if i.step]
        steps = before.split("\n")[: min(faults) - 1 if faults else None]
        kept += made.proof.startswith("\n".join(steps))
    assert number > 100
    assert right > 0.5 * number  # of first proofs 0.35, but for planted rates
    assert kept > 0.6 * number


def test_what_is_refined_has_been_mended_up_to_as_often_as_stated():
    rates = {field.name: 0.0 for field in dataclasses.fields(CONFIG.writers)}
    writers = dataclasses.replace(CONFIG.writers, **rates | dict(stops=1.0))
    dials = dataclasses.replace(CONFIG.dials, num_letters=12, depth=(8, 8))
    config = dataclasses.replace(
        CONFIG, writers=writers, dials=dials, num_demonstrations=900, refine_share=0.9
    )
    for num_mended in (0, 3):
        config = dataclasses.replace(config, repair_share=1.0, num_mended=num_mended)
        lengths = [
            (d.user.count("\nStep ") // 2, d.assistant.count("\nStep ") // 2)
            for d in corpus.make_demonstrations(config, 0, TEMPLATES)
            if d.role == "refiner"
        ]
        before = [length for length, _ in lengths]
        for length in range(1, num_mended + 2):  # a step a time
            assert share_is(before.count(length), len(before), 1 / (num_mended + 1))
        assert all(after == length + 1 for length, after in lengths)


# Settings.


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (dict(num_test=0), "world.num_test = 0"),
        (dict(num_graded_proofs=-1), "world.num_graded_proofs = -1"),
        (dict(num_drills=0), "world.num_drills = 0"),
        (dict(refine_share=1.0), "world.refine_share = 1.0"),
        (dict(repair_share=1.1), "world.repair_share = 1.1"),
        (dict(careful_share=-0.1), "world.careful_share = -0.1"),
        (dict(num_mended=-1), "world.num_mended = -1: must be at least 0"),
        (dict(label_error=-0.1), "world.label_error = -0.1"),
        (dict(graded_wrong_end=0.9), "world.graded_wrong_end = 0.9"),
    ],
)
def test_an_impossible_size_or_share_is_named(fields, named):
    with pytest.raises(ValueError, match=named):
        corpus.WorldConfig(**fields)


ONE_STEP = problems.Dials(num_letters=4, depth=(1, 1), distractors=(0, 0))  # 12 statements
NARROW = dataclasses.replace(CONFIG, dials=ONE_STEP)
ITS_SPLIT = corpus.split_of(
    problems.canonical_form(problems.make_problem(random.Random(0), ONE_STEP))
)


def test_more_problems_than_the_dials_allow_are_refused_with_the_dials_named():
    assert len(corpus.plain_problems(NARROW, 0, ITS_SPLIT, 12)) == 12
    with pytest.raises(ValueError, match="only 12 distinct .* 13 were asked for.*dials.depth"):
        corpus.plain_problems(NARROW, 0, ITS_SPLIT, 13)


def test_a_split_that_the_dials_leave_empty_is_named():
    split = next(s for s in corpus.SPLITS if s != ITS_SPLIT)
    with pytest.raises(ValueError, match=f"belongs to the {split} split.*dials.distractors"):
        corpus.plain_problems(NARROW, 0, split, 1)
