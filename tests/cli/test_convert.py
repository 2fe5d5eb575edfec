"""The command: what it makes, and how it says no."""

import builtins
import dataclasses
import json
import logging
import os
import pathlib
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from etils import epath

from mathv2_jax import checkpoint
from mathv2_jax.cli import config as config_lib
from mathv2_jax.cli import convert, overrides, shell
from mathv2_jax.hf import folder, verify
from mathv2_jax.text import sentencepiece_export, tokenizer, tokenizer_files
from tests import byte_level
from tests.hf import checkpoints, parity

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def command(capsys):
    """The command in this process: (exit code, what it printed, its errors)."""

    def run(*arguments):
        flags.FLAGS.unparse_flags()
        for name in ("from_hf", "to_hf", "checkpoint", "stage", "step", "dtype", "tokens"):
            flags.FLAGS[name].unparse()
        for name in ("verify", "tokenizer", "max_shard_size"):
            flags.FLAGS[name].unparse()
        code = convert.main(["mathv2-convert", *arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    at = tmp_path_factory.mktemp("trained") / "a"
    checkpoints.save(at, checkpoints.FULL, steps=(3, 7))
    return at


def test_out_and_in_again(command, trained, tmp_path):
    code, out, err = command(
        f"--to_hf={tmp_path / 'hf'}", f"--checkpoint={trained}", "--dtype=float32"
    )
    assert code == shell.FINISHED and "exported step 7" in out and "100%" in err
    code, out, _ = command(f"--from_hf={tmp_path / 'hf'}", f"--checkpoint={tmp_path / 'b'}")
    assert code == shell.FINISHED and "imported" in out
    back = folder.locate(epath.Path(tmp_path / "b"))
    assert checkpoints.bits(checkpoints.restored(back)) == checkpoints.bits(
        checkpoints.drawn(checkpoints.FULL, 7)
    )


def test_a_step_can_be_chosen_and_the_weights_are_bfloat16_unless_told(command, trained, tmp_path):
    code, out, _ = command(
        f"--to_hf={tmp_path / 'hf'}", f"--checkpoint={trained}", "--step=3", "--max_shard_size=9KB"
    )
    assert code == shell.FINISHED and "exported step 3" in out
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert len(list((tmp_path / "hf").glob("model-*"))) > 5


BAD = {
    "must be given": ["--checkpoint=x"],
    "--from_hf=DIR": ["--from_hf=x", "--to_hf=y", "--checkpoint=z"],
    "unexpected argument": ["--to_hf=y", "--checkpoint=z", "extra"],
    "no config.json": ["--to_hf=y", "--checkpoint=z"],
    "config.json": ["--from_hf=y", "--checkpoint=z"],
    "leave them out": ["--from_hf=y", "--checkpoint=z", "--step=3"],
    "--notokenizer and": ["--from_hf=y", "--checkpoint=z", "--notokenizer"],
    "--max_shard_size choose": ["--from_hf=y", "--checkpoint=z", "--max_shard_size=1KB"],
    "--checkpoint= is empty": ["--from_hf=y", "--checkpoint="],
    "--from_hf= is empty": ["--from_hf= ", "--checkpoint=z"],
    "give both or neither": ["--to_hf=y", "--checkpoint=z", "--tokens=1"],
    "float32": ["--to_hf=y", "--checkpoint=z", "--dtype=float8"],
    "Unknown command line flag": ["--to_huggingface=y"],
}


@pytest.mark.parametrize(("said", "arguments"), BAD.items(), ids=BAD)
def test_bad_usage_is_one_line_and_exit_code_2(command, tmp_path, monkeypatch, said, arguments):
    monkeypatch.chdir(tmp_path)
    code, _, err = command(*arguments)
    assert code == shell.BAD_INPUT and said in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--step=4"], "no checkpoint of step 4"),
        (["--stage=x"], "no stages"),
        (["--max_shard_size=big"], "size 'big'"),
    ],
)
def test_what_a_checkpoint_does_not_have_is_bad_input(command, trained, tmp_path, arguments, said):
    code, _, err = command(f"--to_hf={tmp_path / 'hf'}", f"--checkpoint={trained}", *arguments)
    assert code == shell.BAD_INPUT and said in err
    assert not list(tmp_path.iterdir())


def test_a_difference_is_exit_code_1(command, trained, tmp_path):
    target = tmp_path / "hf"
    arguments = [f"--to_hf={target}", f"--checkpoint={trained}", "--dtype=float32"]
    assert command(*arguments)[0] == shell.FINISHED
    held = checkpoints.read_all(target)
    name = "model.layers.4.eh_proj.weight"
    held[name] = held[name] * 2
    checkpoints.rewrite(target, held)
    before = checkpoints.files(target)
    code, _, err = command(*arguments, "--verify")
    assert code == shell.FAILED and name in err
    assert checkpoints.files(target) == before


@pytest.fixture(scope="module")
def comparable(tmp_path_factory):
    """A checkpoint whose logits the reference library gives too."""
    at = tmp_path_factory.mktemp("comparable") / "a"
    config = dataclasses.replace(checkpoints.FULL, num_layers=2, num_mtp_layers=1)
    checkpoints.save(at, config, parity.drawn_arrays(config))
    return at


def test_an_export_and_an_import_are_verified_while_they_are_drafts(command, comparable, tmp_path):
    out_of = [f"--to_hf={tmp_path / 'hf'}", f"--checkpoint={comparable}", "--verify"]
    code, out, err = command(*out_of)
    assert code == shell.FINISHED, err
    assert out.index("verified: every tensor is the same; max|a-b|") < out.index("exported step 0")
    assert "indexer" not in out
    code, out, err = command(*out_of, "--tokens=1,2,3;4,5,6")
    assert code == shell.FINISHED and "verified" in out and "exported" not in out, err
    assert "3 tokens, all that was compared of a row, do not exceed index_topk = 7" in out
    code, out, err = command(
        f"--from_hf={tmp_path / 'hf'}", f"--checkpoint={tmp_path / 'b'}", "--verify"
    )
    assert code == shell.FINISHED, err
    assert out.index("verified") < out.index("imported")
    assert checkpoints.files(tmp_path) == {"hf", "b"}


def test_what_differs_does_not_come_into_being(command, comparable, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "TOLERANCE", -1.0)  # as if no two logits were near enough
    code, out, err = command(f"--to_hf={tmp_path / 'hf'}", f"--checkpoint={comparable}", "--verify")
    assert code == shell.FAILED and "gives other logits" in err and "exported" not in out
    assert not list(tmp_path.iterdir())
    assert command(f"--to_hf={tmp_path / 'hf'}", f"--checkpoint={comparable}")[0] == shell.FINISHED
    code, out, err = command(
        f"--from_hf={tmp_path / 'hf'}", f"--checkpoint={tmp_path / 'b'}", "--verify"
    )
    assert code == shell.FAILED and "gives other logits" in err and "imported" not in out
    assert checkpoints.files(tmp_path) == {"hf"}


def without_torch(name, *args, real=builtins.__import__, **kwargs):
    if name == "torch":
        raise ImportError("No module named 'torch'")
    return real(name, *args, **kwargs)


@pytest.mark.parametrize("way", ["out", "in"])
@pytest.mark.parametrize("said", ["no token of a vocabulary", "mathv2_jax[hf]"])
def test_what_a_check_needs_is_missed_before_anything_is_written(
    command, trained, tmp_path, monkeypatch, way, said
):
    source = tmp_path / "source"
    command(f"--to_hf={source}", f"--checkpoint={trained}")
    new = tmp_path / "new"
    out_of = [f"--to_hf={new}", f"--checkpoint={trained}"]
    into = [f"--from_hf={source}", f"--checkpoint={new}"]
    if "token" in said:
        tokens = ["--tokens=1,61"]
    else:
        tokens = []
        monkeypatch.setattr(builtins, "__import__", without_torch)
    code, _, err = command(*(out_of if way == "out" else into), "--verify", *tokens)
    assert code == shell.BAD_INPUT and said in err
    assert "GB" not in err  # no progress
    assert checkpoints.files(tmp_path) == {"source"}


@pytest.fixture
def handled():
    """Sets a signal's handler for one test, whatever this process has inherited."""
    before = {}

    def put(number, handler):
        before[number] = signal.signal(number, handler)

    yield put
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("way", "number", "code"),
    [("out", signal.SIGTERM, 143), ("in", signal.SIGTERM, 143), ("in", signal.SIGHUP, 129)],
)
def test_a_signal_leaves_nothing_half_written(
    command, trained, tmp_path, monkeypatch, handled, way, number, code
):
    source = tmp_path / "source"
    command(f"--to_hf={source}", f"--checkpoint={trained}")
    monkeypatch.setattr(convert.Bar, "__call__", lambda *_: os.kill(os.getpid(), number))
    handled(number, signal.SIG_DFL)
    new = tmp_path / "new"
    out_of = [f"--to_hf={new}", f"--checkpoint={trained}"]
    into = [f"--from_hf={source}", f"--checkpoint={new}"]
    with pytest.raises(SystemExit) as ended:
        command(*(out_of if way == "out" else into))
    assert ended.value.code == code
    assert checkpoints.files(tmp_path) == {"source"}
    assert signal.getsignal(number) == signal.SIG_DFL


def test_a_hang_up_that_nohup_has_left_out_stays_so(
    command, trained, tmp_path, monkeypatch, handled
):
    monkeypatch.setattr(convert.Bar, "__call__", lambda *_: os.kill(os.getpid(), signal.SIGHUP))
    handled(signal.SIGHUP, signal.SIG_IGN)
    code, _, _ = command(f"--to_hf={tmp_path / 'hf'}", f"--checkpoint={trained}")
    assert code == shell.FINISHED


@pytest.mark.parametrize("asked", ["--help", "--helpfull", "-h", "--help=true"])
def test_help_is_no_failure(command, asked):
    code, out, _ = command(asked)
    assert code == shell.FINISHED and "Exit codes" in out
    assert "--max_shard_size: Of one safetensors file." in out


def test_a_target_below_a_file_is_named(command, trained, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = command(f"--to_hf={tmp_path / 'file' / 'hf'}", f"--checkpoint={trained}")
    assert code == shell.BAD_INPUT and "lies below a file" in err and "Traceback" not in err


@pytest.mark.parametrize("way", ["out", "in"])
def test_a_disk_that_takes_no_more_is_a_failure_in_one_line(command, trained, tmp_path, way):
    source, new = tmp_path / "source", tmp_path / "deep" / "new"
    command(f"--to_hf={source}", f"--checkpoint={trained}")
    out_of = [f"--to_hf={new}", f"--checkpoint={trained}"]
    into = [f"--from_hf={source}", f"--checkpoint={new}"]
    limited = ["bash", "-c", 'ulimit -f 30; exec "$@"', "bash"]  # files of at most 30 KiB
    program = [sys.executable, "-m", "mathv2_jax.cli.convert"]
    ended = subprocess.run(
        [*limited, *program, *(out_of if way == "out" else into)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    said = ended.stderr.splitlines()[-1]
    assert ended.returncode == shell.FAILED and said.startswith("mathv2-convert: "), ended.stderr
    assert ".new.draft" in said and "too large" in said.lower() and "Traceback" not in ended.stderr
    assert checkpoints.files(tmp_path) == {"source"}


def test_tensors_that_hold_no_numbers_are_noted_both_ways(command, tmp_path):
    arrays = checkpoints.drawn(checkpoints.PLAIN)
    arrays["params.final_norm.scale"][3] = np.nan
    checkpoints.save(tmp_path / "a", checkpoints.PLAIN, arrays)
    said = "note: 1 tensors hold NaN or infinity: model.norm.weight"
    code, out, _ = command(f"--to_hf={tmp_path / 'hf'}", f"--checkpoint={tmp_path / 'a'}")
    assert code == shell.FINISHED and said in out
    code, out, _ = command(f"--from_hf={tmp_path / 'hf'}", f"--checkpoint={tmp_path / 'b'}")
    assert code == shell.FINISHED and said in out


def test_what_is_only_compared_cannot_be_asked_to_be_otherwise(command, comparable, tmp_path):
    out_of = [f"--to_hf={tmp_path / 'hf'}", f"--checkpoint={comparable}"]
    into = [f"--from_hf={tmp_path / 'hf'}", f"--checkpoint={tmp_path / 'b'}"]
    assert command(*out_of)[0] == command(*into)[0] == shell.FINISHED
    for arguments, said in (
        ([*out_of, "--notokenizer"], "is only compared"),
        ([*out_of, "--max_shard_size=1KB"], "is only compared"),
        ([*into, "--dtype=float32"], "in bfloat16, and is only compared"),
    ):
        code, _, err = command(*arguments, "--verify")
        assert code == shell.BAD_INPUT and said in err


@pytest.fixture
def workdir(tmp_path):
    """As a run leaves it: the variables of its first stage, train states of its second."""
    smoke = overrides.load(str(ROOT / "configs" / "smoke.py"))
    config = config_lib.build(smoke, [("config.model.embedding_taps", "0")])
    texts = ["Prove that 4 is even.", "It is twice 2."] * 3
    made = tokenizer.SentencePieceTokenizer.from_bytes(tokenizer.train(texts, vocab_size=300))
    model = dataclasses.replace(config.model, vocab_size=made.vocab_size)
    at = tmp_path / "run"
    first, second = (at / "checkpoints" / stage.name for stage in config.stages[:2])
    with checkpoint.Checkpoints(first / "final") as saved:
        saved.save(9, on_device(checkpoints.drawn(model, 9)), {})
    with checkpoint.Checkpoints(second / "steps") as saved:
        for step in (1, 2):
            state = {f"variables.{n}": x for n, x in checkpoints.drawn(model, step).items()}
            saved.save(step, on_device(state | {"step": np.asarray(step, np.int32)}), {})
    (at / "records" / "input").mkdir(parents=True)
    (at / "records" / "input" / "tokenizer.model").write_bytes(made.model_bytes)
    (at / "config.json").write_text(json.dumps({"identity": config_lib.identity(config)}))
    return at, [stage.name for stage in config.stages[:2]], model


def on_device(arrays):
    return {name: jnp.asarray(x) for name, x in arrays.items()}


def embedding(at):
    return checkpoints.read_all(at)["model.embed_tokens.weight"]


def test_a_run_is_exported_by_stage_and_step_with_its_tokenizer(command, workdir, tmp_path):
    at, stages, model = workdir
    asked = [([], 2), (["--step=1"], 1), ([f"--stage={stages[0]}"], 9)]
    for number, (arguments, step) in enumerate(asked):
        target = tmp_path / str(number)
        code, out, err = command(
            f"--to_hf={target}", f"--checkpoint={at}", "--dtype=float32", *arguments
        )
        assert code == shell.FINISHED and f"exported step {step}" in out, err
        want = checkpoints.drawn(model, step)["params.embed"]
        np.testing.assert_array_equal(embedding(target), want)
    made = checkpoints.files(tmp_path / "0")
    assert {"generation_config.json", "tokenizer.json", "chat_template.jinja"} <= made
    body = json.loads((tmp_path / "0" / "config.json").read_text())
    assert (body["bos_token_id"], body["eos_token_id"], body["pad_token_id"]) == (2, 3, 0)
    assert body["vocab_size"] == model.vocab_size
    loaded = tokenizer_files.load(tmp_path / "0")
    assert loaded.vocab_size == model.vocab_size
    code, _, err = command(f"--to_hf={tmp_path / 'x'}", f"--checkpoint={at}", "--stage=no")
    assert code == shell.BAD_INPUT and "stage 'no' has no checkpoints" in err


def test_a_damaged_newest_seal_of_a_run_is_passed_over(command, workdir, tmp_path, caplog):
    at, stages, model = workdir
    steps = at / "checkpoints" / stages[1] / "steps"
    arguments = [f"--checkpoint={at}", "--dtype=float32"]
    cut(steps / "2" / "seal" / "metadata")
    with caplog.at_level(logging.WARNING):
        code, out, err = command(f"--to_hf={tmp_path / 'hf'}", *arguments)
    assert code == shell.FINISHED and "exported step 1" in out, err
    assert f"damaged checkpoint, {steps / '2'}: its seal cannot be read" in caplog.text
    np.testing.assert_array_equal(
        embedding(tmp_path / "hf"), checkpoints.drawn(model, 1)["params.embed"]
    )
    cut(steps / "1" / "seal" / "metadata")
    code, _, err = command(f"--to_hf={tmp_path / 'no'}", *arguments)
    assert code == shell.BAD_INPUT and f"no sound checkpoint in {steps}" in err
    assert f"{steps / '1'}: its seal" in err and f"{steps / '2'}: its seal" in err


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def test_the_end_of_a_text_outlasts_training(command, workdir, tmp_path):
    """A run keeps its tokenizer's files, and nothing else of the model that it began from."""
    at, _, _ = workdir
    files = byte_level.files() | {"generation_config.json": b'{"temperature": 0.6}'}
    kept = at / "records" / "input" / "tokenizer"
    kept.mkdir()
    for name, data in files.items():
        (kept / name).write_bytes(data)
    code, _, err = command(f"--to_hf={tmp_path / 'hf'}", f"--checkpoint={at}")
    assert code == shell.FINISHED, err
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    body = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert {name: body[name] for name in ids} == ids
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert generation == ids | {"temperature": 0.6}


def test_a_tokenizer_that_has_no_exact_form_can_be_left_out(
    command, workdir, tmp_path, monkeypatch
):
    at, _, _ = workdir
    monkeypatch.setattr(sentencepiece_export, "_merges", lambda model, learned: [])
    code, _, err = command(f"--to_hf={tmp_path / 'hf'}", f"--checkpoint={at}")
    assert code == shell.BAD_INPUT and "mathv2-convert --notokenizer" in err
    code, out, err = command(f"--to_hf={tmp_path / 'hf'}", f"--checkpoint={at}", "--notokenizer")
    assert code == shell.FINISHED and "has no tokenizer" in out, err
    assert not {name for name in checkpoints.files(tmp_path / "hf") if "token" in name}
    for name in ("config.json", "generation_config.json"):
        body = json.loads((tmp_path / "hf" / name).read_text())
        assert (body["bos_token_id"], body["eos_token_id"], body["pad_token_id"]) == (2, 3, 0)


def test_a_run_with_embedding_taps_is_refused_by_their_name(command, smoke_workdir, tmp_path):
    code, _, err = command(f"--to_hf={tmp_path / 'hf'}", f"--checkpoint={smoke_workdir}")
    assert code == shell.BAD_INPUT and "embedding_taps = 3" in err
    assert not list(tmp_path.iterdir())


def test_the_command_runs_by_its_name(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mathv2_jax.cli.convert", "--to_hf=x", f"--checkpoint={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == shell.BAD_INPUT and "no config.json" in done.stderr
