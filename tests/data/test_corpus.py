"""The input files from real data: what is mixed, what is held out, and that no row is lost."""

import collections
import dataclasses
import pathlib
import random
import string
from typing import Any

import pytest
from etils import epath

from mathv2_jax import records
from mathv2_jax.data import corpus, graded
from mathv2_jax.data import store as store_lib
from mathv2_jax.text import parse, prompts
from tests import imported

BINARY = ((0.0, 0.0), (1.0, 1.0))
MAP = graded.ScaleMap(pairs={"opc-5-of-7": BINARY, "one-reader-6-of-6": BINARY})
SMALL = corpus.RealConfig(scales=MAP, num_probe=2, num_test=1, num_validation=2)
TEMPLATES = prompts.load("olympiad")
REAL = pathlib.Path(__file__).resolve().parents[3] / "shared" / "data"

Rows = imported.Rows


def problem(name: str) -> str:
    """A statement of its own: unlike those of other names, the same for the same name."""
    words = random.Random(name)
    return " ".join("".join(words.choices(string.ascii_lowercase, k=6)) for _ in range(12))


def graded_row(name: str, writer: str, score: int, **fields: Any) -> dict[str, Any]:
    body = dict(
        id=f"opc/{name}/{writer}",
        source="opc",
        problem=problem(name),
        proof=f"A proof of {name} in way {score}, with {len(writer)} steps.",
        human_score=score,
        human_max=1,
        model=f"house/{writer}",
    )
    return {**body, **fields}


def plain_row(name: str, **fields: Any) -> dict[str, Any]:
    return {"id": name, "source": "pool", "problem": problem(name), **fields}


def real_rows() -> Rows:
    """Eight graded problems with two proofs and an analysis each, one judged critique, 12 more
    problems, two evaluation problems and an evaluation proof."""
    names = [f"graded-{n}" for n in range(8)]
    pairs = [(name, score) for name in names for score in (0, 1)]
    proofs = [graded_row(name, f"writer{score}", score) for name, score in pairs]
    listed = [
        graded_row(name, "writer0", 0, analysis="Step 2 fails.", issues=[{"category": "gap"}])
        for name in names
    ]
    critique = dict(
        analysis="<verification>false</verification> Step 1 fails.",
        analyst="GPT-5",
        human_agrees_with_analyst=True,
        human_comments=["Yes."],
    )
    expert = dict(source="deepseek_math_v2", human_max=7)
    return {
        "graded/opc.jsonl": proofs,
        "graded/mathconverse.jsonl": [],
        "graded/rprover.jsonl": [],
        "graded/analyses_rprover.jsonl": [
            graded_row("judged", "x", 0, source="rprover", **critique)
        ],
        "graded/analyses_opc.jsonl": listed,
        "problems/proof_pilot_pool.jsonl": [plain_row(f"pool-{n}") for n in range(12)],
        "problems/proofbench.jsonl": [plain_row("contest-1"), plain_row("contest-2")],
        "problems/usamo2025.jsonl": [],
        "graded/deepseek_math_v2.jsonl": [graded_row("contest-1", "w", 6, **expert)],
    }


def make(
    folder: pathlib.Path,
    rows: Rows,
    config: corpus.RealConfig = SMALL,
    withdraw: tuple[str, ...] = (),
) -> corpus.Corpus:
    """The corpus of these files, with what their import left out; files as `rows` names them."""
    files = imported.write(folder / "files", rows)
    store = imported.store_of(files, list(rows), folder / "records", withdraw)
    found = corpus.make_corpus(store, config, TEMPLATES)

    def short(named: Any) -> Any:
        return dataclasses.replace(named, file=str(pathlib.Path(named.file).relative_to(files)))

    return corpus.Corpus(
        {name: list(map(short, items)) for name, items in found.files.items()},
        list(map(short, found.rejects)),
    )


def row_id(item: corpus.Item) -> str:
    return item.record.parents[1].removeprefix(store_lib.ROW)


def rules(found: corpus.Corpus, file: str) -> collections.Counter[str]:
    return collections.Counter(r.rule for r in found.rejects if r.file == file)


def prompt_texts(found: corpus.Corpus) -> list[str]:
    """Every text that a prompt or a target may hold."""
    texts = []
    for items in found.files.values():
        for item in items:
            fields = dataclasses.asdict(item.record)
            names = ("statement", "text", "proof", "user", "assistant")
            texts += [fields[name] for name in names if name in fields]
    return texts


def test_each_kind_of_row_reaches_its_file(tmp_path: pathlib.Path) -> None:
    found = make(tmp_path, real_rows())
    counts = {name: len(items) for name, items in found.files.items()}
    assert counts == {
        "problems": 10,
        "proofs": 10,
        "analyses": 1,
        "demonstrations": 5 + 1 + 5,
        "probe": 4,
        "validation_problems": 2,
        "test_problems": 2,
        "test_proofs": 1 + 2,
        "test_analyses": 1,
    }
    assert rules(found, "graded/analyses_opc.jsonl") == {"held-out": 2}
    assert rules(found, "graded/analyses_rprover.jsonl") == {"scale": 1}  # the proof's label
    assert len(found.rejects) == 3


def test_no_training_file_shares_a_problem_with_a_held_out_one(tmp_path: pathlib.Path) -> None:
    found = make(tmp_path, real_rows())
    learned = {i.cluster for name in corpus.TRAINING for i in found.files[name]}
    held = {i.cluster for name in corpus.HELD_OUT for i in found.files[name]}
    assert len(learned) == 5 + 1 + 10 and len(held) == 2 + 1 + 2 + 2
    assert not learned & held


def test_copies_of_held_out_problems_are_left_out_of_d_p(tmp_path: pathlib.Path) -> None:
    rows = real_rows()
    copies = [plain_row(f"copy-{n}", problem=problem(f"graded-{n}")) for n in range(8)]
    rows["problems/proof_pilot_pool.jsonl"] += copies
    found = make(tmp_path, rows)
    assert rules(found, "problems/proof_pilot_pool.jsonl") == {"held-out": 2 + 1}
    assert len(found.files["problems"]) == 10 + 5


def test_labels_of_another_scale_are_left_out_without_a_map(tmp_path: pathlib.Path) -> None:
    rows = real_rows()
    reader = dict(source="mathconverse", human_max=6)
    rows["graded/mathconverse.jsonl"] = [graded_row("reader", "w", 6, **reader)]
    only_opc = graded.ScaleMap(pairs={"opc-5-of-7": BINARY})
    found = make(tmp_path, rows, dataclasses.replace(SMALL, scales=only_opc))
    scales = {i.record.label.scale for i in found.files["proofs"]}
    assert scales == {"opc-5-of-7"}
    (reject,) = [r for r in found.rejects if r.file == "graded/mathconverse.jsonl"]
    assert (reject.rule, reject.line) == ("scale", 1)
    assert "one-reader-6-of-6 is not mixed with full-marks" in reject.reason


def test_without_any_map_the_error_says_which_scale_lacks_one(tmp_path: pathlib.Path) -> None:
    config = dataclasses.replace(SMALL, scales=graded.ScaleMap())
    with pytest.raises(ValueError, match="16 scale .*opc-5-of-7 is not mixed with full-marks"):
        make(tmp_path, real_rows(), config)


def test_the_map_decides_the_labels_that_are_learned_from(tmp_path: pathlib.Path) -> None:
    halves = graded.ScaleMap(pairs={"opc-5-of-7": ((0.0, 0.0), (1.0, 0.5))})
    found = make(tmp_path, real_rows(), dataclasses.replace(SMALL, scales=halves))
    labels = [i.record.label for n in ("proofs", "probe") for i in found.files[n]]
    assert {(label.score, label.scale) for label in labels} == {
        (0.0, "opc-5-of-7"),
        (0.5, "opc-5-of-7"),
    }
    roles = {i.record.role for i in found.files["demonstrations"]}
    assert roles == {"verifier", "meta_verifier"}, "no proof of full marks is left to imitate"


@pytest.mark.parametrize("change", ["", " (Shown at a camp.)"])
@pytest.mark.parametrize("name", ["contest-1", "contest-2"])
def test_an_evaluation_problem_in_a_training_file_is_left_out_and_named(
    tmp_path: pathlib.Path, name: str, change: str
) -> None:
    rows = real_rows()
    copied = problem(name).upper() + change
    rows["problems/proof_pilot_pool.jsonl"].insert(3, plain_row("copy", problem=copied))
    rows["graded/opc.jsonl"].append(graded_row("copy", "w", 1, problem=copied))
    found = make(tmp_path, rows)
    named = [(r.file, r.line, r.id) for r in found.rejects if r.rule == "evaluation"]
    assert named == [
        ("graded/opc.jsonl", 17, "opc/copy/w"),
        ("problems/proof_pilot_pool.jsonl", 4, "copy"),
    ]
    assert {row_id(i) for i in found.files["test_problems"]} == {"contest-1", "contest-2"}


def test_judged_critiques_of_evaluation_problems_are_left_out_unless_these_are_withdrawn(
    tmp_path: pathlib.Path,
) -> None:
    rows = real_rows()
    rows["graded/analyses_rprover.jsonl"][0]["problem"] = problem("contest-1")
    with pytest.raises(
        ValueError, match=r"input/analyses\.jsonl(?s:.*)rprover\.jsonl: 1 evaluation"
    ):
        make(tmp_path, rows)
    without = make(tmp_path / "2", rows, dataclasses.replace(SMALL, judged_needed=False))
    assert not without.files["analyses"]

    found = make(tmp_path / "3", rows, withdraw=("graded/analyses_rprover.jsonl",))
    assert len(found.files["analyses"]) == 1
    assert [row_id(i) for i in found.files["test_problems"]] == ["contest-2"]
    assert rules(found, "problems/proofbench.jsonl") == {"withdrawn": 1}
    assert rules(found, "graded/deepseek_math_v2.jsonl") == {"withdrawn": 1}


def test_a_source_that_is_not_there_is_named(tmp_path: pathlib.Path) -> None:
    config = dataclasses.replace(SMALL, sources=("opc", "pol"))
    with pytest.raises(ValueError, match=r"real\.sources names pol; .* has .*opc, pool"):
        make(tmp_path, real_rows(), config)


def test_a_training_record_in_a_held_out_cluster_is_refused(tmp_path: pathlib.Path) -> None:
    found = make(tmp_path, real_rows())
    files = {**found.files, "proofs": [*found.files["proofs"], found.files["probe"][0]]}
    with pytest.raises(ValueError, match=r"graded/opc\.jsonl, line \d+ .* file proofs.* in probe"):
        corpus.require_disjoint(corpus.Corpus(files, []))


def test_demonstrations_say_what_the_graders_said(tmp_path: pathlib.Path) -> None:
    found = make(tmp_path, real_rows())
    rows = real_rows()
    by_role = collections.defaultdict(list)
    for item in found.files["demonstrations"]:
        row = rows[item.file][item.line - 1]
        by_role[item.record.role].append((row, item.record.assistant))
    for row, text in by_role["verifier"]:
        assert parse.parse_analysis(text) == ("Step 2 fails.", row["human_score"])
    for row, text in by_role["generator"]:
        written = parse.parse_generation(text)
        assert written is not None and row["human_score"] == 1
        assert (written.proof, written.self_score) == (row["proof"], 1.0)
        assert "opc-5-of-7" in written.self_analysis
    ((_, text),) = by_role["meta_verifier"]
    judged = parse.parse_meta_analysis(text)
    assert judged is not None
    assert "confirms the defect" in judged.body and "Yes." in judged.body and judged.score == 1.0


def test_an_analysis_against_the_human_verdict_is_no_demonstration(tmp_path: pathlib.Path) -> None:
    rows = real_rows()
    for row in rows["graded/analyses_opc.jsonl"]:
        row["issues"] = []
    found = make(tmp_path / "1", rows)
    assert rules(found, "graded/analyses_opc.jsonl") == {"contradiction": 5, "held-out": 2}
    for row in rows["graded/analyses_opc.jsonl"]:
        row |= dict(human_score=None, proof="Another proof.")
    found = make(tmp_path / "2", rows)
    assert rules(found, "graded/analyses_opc.jsonl") == {"no-verdict": 5, "held-out": 2}


def test_a_proof_that_the_format_cannot_hold_is_no_demonstration(tmp_path: pathlib.Path) -> None:
    rows = real_rows()
    for row in rows["graded/opc.jsonl"] + rows["graded/analyses_opc.jsonl"]:
        row["proof"] += "\n## Solution\nAgain."
    found = make(tmp_path, rows)
    assert len(found.files["proofs"]) == 10
    assert rules(found, "graded/opc.jsonl") == {"format": 5}


def test_no_prompt_names_the_writer(tmp_path: pathlib.Path) -> None:
    rows = real_rows()
    rows["graded/opc.jsonl"].append(graded_row("boast", "grandiose", 1, proof="I am Grandiose."))
    found = make(tmp_path, rows)
    assert not [t for t in prompt_texts(found) if "grandiose" in t.casefold() or "writer" in t]
    (reject,) = [r for r in found.rejects if r.file == "graded/opc.jsonl"]
    assert (reject.line, reject.rule) == (17, "malformed") and "grandiose" in reject.reason


def test_what_is_too_long_is_counted_by_the_tokenizer_and_named(tmp_path: pathlib.Path) -> None:
    rows = real_rows()
    rows["graded/opc.jsonl"][0]["proof"] += " long" * 2000
    rows["problems/proof_pilot_pool.jsonl"][4]["problem"] += " long" * 2000
    config = dataclasses.replace(SMALL, num_probe=1, max_prompt_tokens=4096)
    found = make(tmp_path, rows, config)
    long = {"graded/opc.jsonl": 1, "problems/proof_pilot_pool.jsonl": 5}
    before = found.records()

    def limited(num_tokens: Any) -> corpus.Corpus:
        return corpus.within_limits(found, config, TEMPLATES, num_tokens)

    assert limited(lambda text: 4096).records() == before
    cut = limited(len)
    named = {r.file: r.line for r in cut.rejects if r.rule == "too-long"}
    assert named == long
    assert all("tokens in" in r.reason for r in cut.rejects if r.rule == "too-long")
    lost = sum(map(len, before.values())) - sum(map(len, cut.records().values()))
    assert lost == 0, "each record left out is one reject"


def test_each_text_is_taken_once(tmp_path: pathlib.Path) -> None:
    rows = real_rows()
    rows["problems/proof_pilot_pool.jsonl"].append(plain_row("again", problem=problem("pool-1")))
    found = make(tmp_path, rows)
    (reject,) = [r for r in found.rejects if r.rule == "duplicate"]
    assert (reject.line, reject.id) == (13, "again") and "line 2" in reject.reason


def test_the_same_proof_with_another_label_is_a_conflict_and_no_duplicate(
    tmp_path: pathlib.Path,
) -> None:
    rows = real_rows()
    first = rows["graded/opc.jsonl"][0]
    flipped = {**first, "id": "flipped", "human_score": 1 - first["human_score"]}
    rows["graded/opc.jsonl"] += [flipped, {**first, "id": "same"}]
    found = make(tmp_path, rows)
    rules = {r.id: r for r in found.rejects if r.rule in ("duplicate", "conflicting-label")}
    assert {name: r.rule for name, r in rules.items()} == {
        "flipped": "conflicting-label",
        "same": "duplicate",
    }
    assert "line 1, which is a 0 (opc-5-of-7); here it is a 1" in rules["flipped"].reason


def test_too_few_graded_problems_to_hold_some_out_is_an_error(tmp_path: pathlib.Path) -> None:
    config = dataclasses.replace(SMALL, num_probe=7)
    with pytest.raises(ValueError, match="only 8 graded problems"):
        make(tmp_path, real_rows(), config)


def test_a_probe_of_one_proof_is_refused_before_the_run(tmp_path: pathlib.Path) -> None:
    enough = make(tmp_path, real_rows())
    assert corpus.require_enough(enough, SMALL) is enough
    files = {**enough.files, "probe": enough.files["probe"][:1]}
    with pytest.raises(ValueError, match=r"leave 1 records for .*probe\.jsonl, which needs 2"):
        corpus.require_enough(dataclasses.replace(enough, files=files), SMALL)


def test_the_shared_data_keep_their_stated_counts_and_lose_no_row(tmp_path: pathlib.Path) -> None:
    if not REAL.exists():
        pytest.skip("the real data are not here: ../shared/data of the checkout")
    maps = {scale: BINARY for scale in ("opc-5-of-7", "one-reader-6-of-6", "disputed-gold")}
    judged = "graded/analyses_rprover.jsonl"
    config = corpus.RealConfig(scales=graded.ScaleMap(pairs=maps))
    names = [*imported.EVALUATION, judged, *(f"graded/{name}.jsonl" for name in TRAINING)]
    names.append("problems/proof_pilot_pool.jsonl")
    store = imported.store_of(epath.Path(REAL), names, tmp_path, withdraw=(judged,))
    found = corpus.make_corpus(store, config, TEMPLATES)
    left_out = collections.Counter(
        (shown(r.file), r.rule) for r in found.rejects if r.rule not in ("format", "contradiction")
    )
    labels = collections.Counter(
        (shown(item.file), item.record.label.score)
        for name in ("proofs", "probe", "test_proofs")
        for item in found.files[name]
    )
    readme = {  # score 0 / 0.5 / 1 by data/README.md, less what the rejects name
        "graded/opc.jsonl": (167, 0, 94),
        "graded/deepseek_math_v2.jsonl": (10, 2, 39),
        "graded/mathconverse.jsonl": (11, 0, 9),
        "graded/rprover.jsonl": (7, 0, 5),
    }
    for file, counts in readme.items():
        lost = sum(number for (name, _), number in left_out.items() if name == file)
        assert sum(labels[file, score] for score in records.SCORES) == sum(counts) - lost, file
        if not lost:
            assert tuple(labels[file, score] for score in records.SCORES) == counts
    assert left_out["graded/deepseek_math_v2.jsonl", "withdrawn"] == 3
    quality = collections.Counter(i.record.label.score for i in found.files["analyses"])
    assert quality == {0.0: 5, 1.0: 7}
    held = (*corpus.HELD_OUT, *corpus.TRAINING)
    seen = {(shown(i.file), i.line) for name in held for i in found.files[name]}
    seen |= {(shown(r.file), r.line) for r in found.rejects}
    stated = {"problems/proof_pilot_pool.jsonl": 9812, "graded/analyses_opc.jsonl": 594}
    stated |= {"problems/proofbench.jsonl": 38, "problems/usamo2025.jsonl": 2, judged: 12}
    for file, number in stated.items():
        assert sum(name == file for name, _ in seen) == number, file


TRAINING = ("opc", "mathconverse", "rprover", "analyses_opc")


def shown(file: str) -> str:
    return "/".join(pathlib.Path(file).parts[-2:])
