"""Auto-labelling of a generator's newest proofs."""

import numpy as np
import pytest

from mathv2_jax import records, reward, roles, storage
from mathv2_jax.stages import autolabel
from mathv2_jax.stages import run as run_lib
from mathv2_jax.text import parse
from tests import scripted
from tests.by_hand import NOISE, RATINGS, VERDICTS, sample

RULE = reward.AutoLabelRule(num_analyses=4, num_meta=1, num_valid=2)
MIXED = {
    scripted.VERIFY: {VERDICTS[0.0]: 0.3, VERDICTS[1.0]: 0.6, NOISE: 0.1},
    scripted.META: {RATINGS[1.0]: 0.6, RATINGS[0.0]: 0.4},
}


def stage(**fields):
    values = dict(
        name="label", proofs_from="gen", judge="judge", num_candidates=40, num_proofs=6, rule=RULE
    )
    return autolabel.AutolabelStage(**{**values, **fields})


def written(text):
    return parse.write_generation(text, VERDICTS[0.5])


def write(run, texts, **fields):
    """What a generator wrote, oldest first, and one opinion of its judge at the end."""
    found = [
        sample(f"gen/{step}/0/0", text, roles.GENERATOR, **fields)
        for step, text in enumerate(texts)
    ]
    found.append(sample("gen/9/0/0/verifier/0", VERDICTS[1.0]))
    parts = run.parts("gen")
    parts.write_part(storage.part_name(1), records.to_lines(found))
    parts.commit(1)


def newest(run, number):
    return [p.text for p in autolabel.newest_proofs(run, "gen", number)]


def test_the_newest_distinct_proofs_come_first(make_run):
    run = make_run()
    write(run, [written(text) for text in ("old", "first", "second", "first", "third")])
    assert newest(run, 3) == ["third", "first", "second"]
    assert newest(run, 9) == ["third", "first", "second", "old"]


def test_what_could_not_be_read_is_no_proof(make_run):
    run = make_run()
    write(run, [NOISE], outcome=records.Outcome.UNPARSEABLE)
    assert newest(run, 3) == []


def test_a_candidate_keeps_its_self_analysis_and_where_it_came_from(make_run):
    run = make_run()
    write(run, [written("mine")])
    (found,) = autolabel.newest_proofs(run, "gen", 1)
    assert (found.self_analysis, found.self_score) == (VERDICTS[0.5], 0.5)
    assert (found.source, found.parents, found.label) == ("gen", ("gen/0/0/0",), None)
    assert (found.origin.stage, found.origin.checkpoint) == ("gen", "policy@0")


@pytest.fixture
def labelled(make_run):
    run = make_run(judge=MIXED)
    write(run, [written(f"Proof {n}.") for n in range(30)])
    figures = autolabel.run_stage(run, stage())
    proofs = run.stage_records("label", records.Proof)
    proofs += run.stage_records("label-undecided", records.Proof)
    scores = {}
    for s in run.samples("label"):
        if s.role == roles.VERIFIER and s.score is not None:
            scores.setdefault(s.target, []).append(s.score)
    return figures, proofs, {name: float(np.var(values)) for name, values in scores.items()}


def test_the_hardest_to_verify_are_labelled_first_and_only_so_many(labelled):
    figures, proofs, spread = labelled
    found = [p for p in proofs if p.label is not None]
    assert len(found) == figures["labelled"] == 6
    taken = [spread[p.id] for p in found]
    assert taken == sorted(taken, reverse=True) and taken[0] > 0
    undecided = {p.id for p in proofs if p.label is None}
    decided = [s for name, s in spread.items() if name not in undecided]
    assert taken == sorted(decided, reverse=True)[:6]
    assert figures["disagreement"] == pytest.approx(np.mean(list(spread.values())), rel=0.2)
    assert {p.label.source for p in found} == {"auto"}
    assert {p.label.rater for p in found} == {"judge"}


def test_the_undecided_are_all_written_to_a_file_of_their_own(labelled):
    figures, proofs, _ = labelled
    undecided = [p for p in proofs if p.label is None]
    assert len(undecided) == figures["undecided"] > 0
    assert figures["coverage"] == pytest.approx(1 - len(undecided) / figures["candidates"])


def test_a_stage_that_is_asked_to_stop_keeps_its_parts_and_ends_as_if_it_had_not_been(make_run):
    run = make_run(judge=MIXED)
    write(run, [written(f"Proof {n}.") for n in range(autolabel.CHUNK + 6)])
    more = stage(num_candidates=autolabel.CHUNK + 6)

    def contents():
        folders = [run.workdir / "records" / name for name in ("label", "label-undecided")]
        return {p.name: p.read_bytes() for f in folders for p in sorted(f.glob("part-*.jsonl"))}

    figures, whole = autolabel.run_stage(run, more), contents()
    for name in ("label", "label-undecided"):
        (run.workdir / "records" / name).rmtree()
    stops = iter([False, True])
    run.should_stop = lambda: next(stops, False)
    with pytest.raises(run_lib.Preempted):
        autolabel.run_stage(run, more)
    assert run.parts("label").names() == [storage.part_name(1)]
    run.judge.engines[0].asked.clear()
    assert autolabel.run_stage(run, more) == figures and contents() == whole
    asked = [text for text in run.judge.engines[0].asked if text.endswith(scripted.VERIFY)]
    assert len(asked) == 6  # the second part's proofs alone
    assert autolabel.run_stage(run, more) == figures and contents() == whole


def test_without_candidates_there_is_no_mean(make_run):
    run = make_run(judge=MIXED)
    write(run, [NOISE], outcome=records.Outcome.UNPARSEABLE)
    figures = autolabel.run_stage(run, stage())
    assert figures == {"candidates": 0.0, "labelled": 0.0, "undecided": 0.0}


def test_more_labels_than_candidates_are_refused():
    with pytest.raises(ValueError, match="num_proofs = 41 must lie between 1 and"):
        stage(num_proofs=41)
