"""configs/olympiad.py and the input files that a run on real data writes first."""

import functools
import pathlib
import random
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from etils import epath

from mathv2_jax import records
from mathv2_jax.cli import config as config_lib
from mathv2_jax.cli import inputs, overrides, shell, train
from mathv2_jax.data import graded, sources, store
from tests import imported

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
CONFIG = REPOSITORY / "configs" / "olympiad.py"
REAL = inputs.RealConfig(
    scales=graded.ScaleMap(pairs={"opc-5-of-7": ((0.0, 0.0), (1.0, 1.0))}),
    num_probe=2,
    num_test=1,
    num_validation=1,
    max_prompt_tokens=1500,
)
WORDS = ("let", "the", "sum", "of", "all", "odd", "primes", "below", "this", "one", "be", "even")


Written = tuple[epath.Path, dict[str, int], epath.Path]  # the run, its counts, the records


def rows_of(kind: str, number: int, **fields: Any) -> list[dict[str, Any]]:
    words = random.Random(kind)
    statements = [" ".join(words.choices(WORDS, k=20)) for _ in range(number)]
    return [dict(id=f"{kind}/{i}", problem=s, **fields) for i, s in enumerate(statements)]


def write_folder(folder: pathlib.Path) -> epath.Path:
    """Imported files in the real data's layout, with a row too long and one that is no JSON."""
    marks = dict(source="opc", proof="It is clear.", human_score=1, human_max=1, model="a/gemini-9")
    critique = dict(analysis="<verification>false</verification> A gap.", analyst="GPT-5")
    files = {
        "graded/opc.jsonl": rows_of("opc", 4, **marks),
        "graded/mathconverse.jsonl": [],
        "graded/rprover.jsonl": [],
        "graded/analyses_rprover.jsonl": rows_of(
            "judged", 2, human_agrees_with_analyst=True, **marks, **critique
        ),
        "graded/analyses_opc.jsonl": rows_of("opc", 4, analysis="Good.", issues=[], **marks),
        "problems/proof_pilot_pool.jsonl": rows_of("pool", 5),
        "problems/proofbench.jsonl": rows_of("bench", 2),
        "problems/usamo2025.jsonl": [],
        "graded/deepseek_math_v2.jsonl": rows_of("expert", 1, **marks),
    }
    files["problems/proof_pilot_pool.jsonl"][2]["problem"] += " and then" * 2000
    at = imported.write(folder / "files", files)
    with (at / "graded/opc.jsonl").open("a") as file:
        file.write('{"id": "opc/broken", \n')
    imported.store_of(at, list(files), folder / "records")
    return epath.Path(folder / "records")


def write_inputs(folder: epath.Path, workdir: epath.Path) -> dict[str, int]:
    tokenizer = functools.partial(inputs.make_tokenizer, workdir, 420, (), 1000)
    return inputs.write_real(workdir, folder, REAL, "olympiad", tokenizer)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = write_folder(tmp_path_factory.mktemp("data"))
    workdir = epath.Path(tmp_path_factory.mktemp("run"))
    return workdir, write_inputs(folder, workdir), folder


def contents(workdir: epath.Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (workdir / "records" / "input").iterdir()}


def test_every_input_file_of_the_world_is_written_and_counted(
    written: Written,
) -> None:
    workdir, counts, _ = written
    kinds = {
        "problems": records.Problem,
        "proofs": records.Proof,
        "analyses": records.Analysis,
        "demonstrations": records.Demonstration,
        "probe": records.Proof,
        "validation_problems": records.Problem,
        "test_problems": records.Problem,
        "test_proofs": records.Proof,
        "test_analyses": records.Analysis,
        "rejects": store.Reject,
    }
    folder = workdir / "records" / "input"
    assert counts == {n: len(sources.read(folder / f"{n}.jsonl", k)) for n, k in kinds.items()}
    assert counts == {
        "problems": 3,
        "proofs": 1 + 2,  # those of the judged critiques have marks too
        "analyses": 2,
        "demonstrations": 1 + (1 + 2) + 2,
        "probe": 2,
        "validation_problems": 1,
        "test_problems": 2,
        "test_proofs": 1 + 1,
        "test_analyses": 1,
        "rejects": 1 + 1 + 2,
    }


def test_rejects_name_file_line_id_and_rule(written: Written) -> None:
    path = written[0] / "records" / "input" / "rejects.jsonl"
    rejects = sources.read(path, store.Reject)
    named = {("/".join(pathlib.Path(r.file).parts[-2:]), r.line, r.rule) for r in rejects}
    assert {n for n in named if n[2] not in ("held-out", "scale")} == {
        ("graded/opc.jsonl", 5, "malformed"),
        ("problems/proof_pilot_pool.jsonl", 3, "too-long"),
    }


def test_no_tokenizer_or_demonstration_ever_saw_the_writers_name(
    written: Written,
) -> None:
    texts = list(inputs.training_texts(written[0], 1000))
    assert any("It is clear." in text for text in texts)
    assert not [text for text in texts if "gemini" in text or "GPT" in text]


def test_writing_again_after_an_interruption_gives_the_same_bytes(
    written: Written, tmp_path: pathlib.Path
) -> None:
    before = contents(written[0])
    workdir = epath.Path(tmp_path / "run")
    write_inputs(written[2], workdir)
    (workdir / "records" / "input" / "rejects.jsonl").unlink()
    assert write_inputs(written[2], workdir) == written[1]
    assert contents(workdir) == before


def test_the_config_runs_the_stages_of_quick_at_4096_tokens_or_more() -> None:
    config = config_lib.build(overrides.load(str(CONFIG)), [("config.data", "DIR")])
    quick = config_lib.build(overrides.load(str(CONFIG.with_name("quick.py"))))
    drills = ("rule-drills", "source-drills")  # exercises of the proof world
    shared = [(s.name, type(s)) for s in quick.stages if s.name not in drills]
    assert [(s.name, type(s)) for s in config.stages] == shared
    assert config.engine.context >= 4096
    for stage in config.stages:
        loop = getattr(stage, "rl", None) or getattr(stage, "sft", None)
        assert loop is None or loop.row_length >= 4096
    assert config.real is not None
    assert set(config.real.scales.pairs) == set(graded.SCALES.values()) - {records.FULL_MARKS}


@pytest.fixture
def compilation_cache() -> Iterator[None]:
    """The cache folder as it was: a run sets its own."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.parametrize("missing", ["the folder", "records", "config.data"])
def test_missing_data_are_one_clear_line_and_exit_code_2(
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    compilation_cache: None,
    missing: str,
) -> None:
    folder = tmp_path / "data"
    if missing == "records":
        folder.mkdir()
    flags = [f"--config={CONFIG}", f"--workdir={tmp_path / 'run'}"]
    flags.append("--config.runtime.mesh.context=-1")  # eight devices, and none to split rows over
    if missing != "config.data":
        flags.append(f"--config.data={folder}")
    assert train.main(["mathv2-train", *flags]) == shell.BAD_INPUT
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    reason = {"the folder": "no such folder", "records": "make them with mathv2-records --from"}
    assert reason.get(missing, missing) in said
