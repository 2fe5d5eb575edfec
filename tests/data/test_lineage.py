"""The tree of what a record was made of."""

import pathlib

import pytest
from etils import epath

from mathv2_jax import records, storage
from mathv2_jax.data import importing, lineage
from mathv2_jax.data import store as store_lib

ORIGIN = records.Origin(stage="gen", step=2, checkpoint="gen@1", template="t1", seed=0)
PROOF = records.Proof(
    id="aaaa1",
    problem_id="prob",
    statement="Show it.",
    text="It is so.",
    source="gen",
    origin=ORIGIN,
    parents=("gen/2/0/1",),
    label=records.Label(score=0.5, source="auto", rater="ver", votes=(0.5, 1.0, 0.5)),
)


def sample(name, role, target, **fields):
    body = dict(
        id=name,
        role=role,
        stage="gen",
        step=2,
        problem_id="prob",
        target=target,
        index=0,
        statement="Show it.",
        proof="",
        analysis="",
        text="It is so.",
        outcome=records.Outcome.PARSED,
        finish=records.Finish.STOP,
        num_tokens=4,
        checkpoint="gen@1",
    )
    return records.Sample(**{**body, **fields})


def test_an_auto_labelled_proof_leads_to_its_sample_its_problem_and_the_analyses_behind(tmp_path):
    votes = [
        sample("lab/0", "verifier", "aaaa1", stage="lab", score=0.5, meta_votes=(1.0, 0.0)),
        sample("lab/1", "verifier", "aaaa1", stage="lab", score=1.0),
    ]
    for name, items in (
        ("gen", [sample("gen/2/0/1", "generator", "prob", rewards={"total": 0.7})]),
        ("lab", [*votes, PROOF]),
    ):
        parts = storage.Parts(tmp_path / name)
        parts.write_part(storage.part_name(1), records.to_lines(items))
        parts.commit(1)
    problem = records.Problem(id="prob", statement="Show it.", source="world", cluster="c")
    storage.write_whole(tmp_path / "input" / "problems.jsonl", records.to_lines([problem]))
    tree = lineage.tree("aaa", lineage.known(lineage.read(epath.Path(tmp_path))))
    assert tree == [
        "Proof aaaa1 [gen] It is so.",
        "|- label 0.5: auto by ver, I_v, full-marks, votes 0.5 1 0.5",
        "|- made by stage gen step 2 checkpoint gen@1 template t1 seed 0",
        "|- Sample gen/2/0/1 [gen] It is so.",
        "|  |- generator at gen@1, step 2 of gen: parsed; rewards total 0.7",
        "|  `- Problem prob [world] Show it.",
        "|- Problem prob [world] Show it. (see above)",
        "|- Sample lab/0 [lab] It is so.",
        "|  |- verifier at gen@1, step 2 of lab: says 0.5; meta-votes 1 0",
        "|  |- Problem prob [world] Show it. (see above)",
        "|  `- Proof aaaa1 [gen] It is so. (see above)",
        "`- Sample lab/1 [lab] It is so.",
        "   |- verifier at gen@1, step 2 of lab: says 1",
        "   |- Problem prob [world] Show it. (see above)",
        "   `- Proof aaaa1 [gen] It is so. (see above)",
    ]


def test_an_imported_proof_leads_to_its_line_and_its_rows_id(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"id": "r7", "problem": "Show.", "proof": "So.", "score": 1}\n')
    store = store_lib.Store(tmp_path / "records")
    config = importing.ImportConfig(scale="full-marks")
    importing.import_files(store, [epath.Path(path)], config)
    (proof,) = store.of(records.Proof)
    tree = lineage.tree(proof.id, lineage.known(lineage.read(store.folder)))
    number = proof.parents[0].partition(":")[0]
    assert tree[:4] == [
        f"Proof {proof.id} [mine] So.",
        "|- label 1: human, I_v, full-marks",
        f"|- line 1 of {path} (import {number})",
        "|- r7 (the row's own id)",
    ]


def test_an_id_that_is_none_or_several_is_an_error(tmp_path):
    found = ({"abc1": PROOF, "abd2": PROOF}, {})
    with pytest.raises(ValueError, match="2 records, such as abc1 and abd2 here begin so"):
        lineage.tree("ab", found)
    with pytest.raises(ValueError, match="no record here; did you mean abc1"):
        lineage.tree("abc9", found)
    with pytest.raises(ValueError, match="holds no records"):
        list(lineage.read(epath.Path(pathlib.Path(tmp_path))))
