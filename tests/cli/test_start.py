"""A run that trains an imported model: config.start."""

import dataclasses
import json
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from mathv2_jax.cli import config as config_lib
from mathv2_jax.cli import overrides, shell, train
from mathv2_jax.cli import start as start_lib
from mathv2_jax.cli import workdir as workdir_lib
from mathv2_jax.hf import folder
from mathv2_jax.stages import run as run_lib
from mathv2_jax.text import hf_tokenizer
from tests import byte_level, smoke
from tests.hf import checkpoints

TOKENIZER = hf_tokenizer.HfTokenizer(byte_level.files())
MODEL = dataclasses.replace(
    checkpoints.FULL,
    vocab_size=TOKENIZER.vocab_size + 2,
    max_position=256,
    q_latent_width=16,  # which the mesh divides
    kv_latent_width=12,
)
BASE = {
    "model": "{}",
    "tokenizer": "{}",
    "stages": "sft",
    "stage.sft.init": "fresh",
    "before": "",
    "after": "",
    "runtime.mesh.data": "2",
    "runtime.mesh.fsdp": "4",
    "world.num_drills": "4",
    "world.num_demonstrations": "8",
    "world.num_problems": "8",
    "world.num_graded_proofs": "8",
    "world.num_graded_analyses": "4",
    "world.num_probe": "4",
    "world.num_validation": "4",
    "world.num_test": "4",
}


def configured(start: object, **changes: str) -> config_lib.RunConfig:
    fields = BASE | {"start": str(start)} | {n.replace("__", "."): v for n, v in changes.items()}
    file = overrides.load(str(smoke.CONFIG))
    return config_lib.build(file, [(f"config.{path}", value) for path, value in fields.items()])


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> pathlib.Path:
    """A Hugging Face folder of `MODEL`, with its tokenizer."""
    at = tmp_path_factory.mktemp("released")
    checkpoints.export(checkpoints.save(at / "made", MODEL), at / "hf")
    for name, data in byte_level.files().items():
        (at / "hf" / name).write_bytes(data)
    return at / "hf"


@pytest.fixture
def imported(released, tmp_path) -> pathlib.Path:
    checkpoints.bring_in(released, tmp_path / "imported")
    return tmp_path / "imported"


def begun(workdir: pathlib.Path, config: config_lib.RunConfig) -> run_lib.Run:
    at = epath.Path(workdir)
    workdir_lib.begin(at, config)
    return train.make_run(at, config, lambda: False)


def named(variables: object) -> dict[str, jax.Array]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): x
        for path, x in jax.tree.leaves_with_path(variables)
    }


def test_the_fresh_variables_are_the_imported_ones_bit_for_bit_on_the_runs_mesh(imported, tmp_path):
    run = begun(tmp_path / "run", configured(imported))
    found = named(run.variables(run_lib.FRESH))
    assert checkpoints.bits(found) == checkpoints.bits(checkpoints.drawn(MODEL))
    kernel = found["params.unembed"]
    assert len(kernel.devices()) == 8 and not kernel.sharding.is_fully_replicated


def test_sizes_and_tokenizer_are_the_folders_and_how_to_compute_is_free(imported, tmp_path):
    config = configured(imported, model__remat="full", model__width=str(MODEL.width))
    assert config.model == dataclasses.replace(MODEL, remat="full")
    run = begun(tmp_path / "run", config)
    assert run.tokenizer.fingerprint == TOKENIZER.fingerprint
    assert run.trunk.config.vocab_size == MODEL.vocab_size > run.tokenizer.vocab_size


def test_another_param_dtype_rounds_every_parameter_but_the_verifier_heads(imported, tmp_path):
    run = begun(tmp_path / "run", configured(imported, model__param_dtype="bfloat16"))
    drawn = checkpoints.drawn(MODEL)
    want = {
        n: x if n.startswith(("router.", "params.verifier_head")) else x.astype(jnp.bfloat16)
        for n, x in drawn.items()
    }
    assert checkpoints.bits(named(run.variables(run_lib.FRESH))) == checkpoints.bits(want)


def test_another_tokenizer_can_be_named(imported, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for name, data in byte_level.files(byte_level.PLAIN_TEMPLATE).items():
        (other / name).write_bytes(data)
    config = configured(imported, tokenizer__directory=str(other))
    found = begun(tmp_path / "run", config).tokenizer.fingerprint
    assert found != TOKENIZER.fingerprint


def test_a_size_that_contradicts_the_folder_is_refused_with_both_values(imported):
    asked = dict(model__width="32", model__embedding_taps="3", model__remat="full")
    with pytest.raises(ValueError, match=r"width = 32, there 24; .*embedding_taps = 3, there 0\."):
        configured(imported, **asked)
    with pytest.raises(ValueError, match="has no field 'widht'; did you mean config.model.width"):
        configured(imported, model__widht="32")


def test_a_tokenizer_that_would_be_trained_is_refused(imported):
    with pytest.raises(ValueError, match="tokenizer.vocab_size = 300 trains a tokenizer"):
        configured(imported, tokenizer__vocab_size="300")


def test_a_folder_without_a_tokenizer_asks_for_one(tmp_path):
    checkpoints.save(tmp_path / "bare", MODEL)
    with pytest.raises(ValueError, match="without a tokenizer: give config.tokenizer.directory"):
        configured(tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer").mkdir()
    (tmp_path / "bare" / "tokenizer" / "generation_config.json").write_text('{"eos_token_id": 1}')
    with pytest.raises(ValueError, match="without a tokenizer: give config.tokenizer.directory"):
        configured(tmp_path / "bare")


def cut(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


DAMAGES = {
    "config.json is damaged": lambda at: cut(at / "config.json"),
    "neither mathv2-convert's nor": lambda at: (at / "config.json").write_text("[]"),
    "holds no config.json": lambda at: (at / "config.json").unlink(),
    "another program's model": lambda at: (at / "config.json").write_text(
        json.dumps({"schema": 1, "model": {"width": 3}, "tokens": {}})
    ),
    "holds no checkpoints": lambda at: (at / "checkpoints").rename(at / "elsewhere"),
    "its seal cannot be read": lambda at: cut(at / "checkpoints" / "0" / "seal" / "metadata"),
}


@pytest.mark.parametrize("said", DAMAGES)
def test_a_damaged_folder_is_refused_before_the_run_begins(imported, tmp_path, said):
    DAMAGES[said](imported)
    with pytest.raises(ValueError, match=f"config.start = {imported}.*{said}"):
        begun(tmp_path / "run", configured(imported))
    assert not (tmp_path / "run" / "config.json").exists()


def test_variables_that_are_not_what_was_imported_are_refused(imported, tmp_path):
    run = begun(tmp_path / "run", configured(imported))
    seal = imported / "checkpoints" / "0" / "seal" / "metadata"
    other = checkpoints.save(tmp_path / "other", MODEL, checkpoints.drawn(MODEL, 1))
    seal.write_bytes((other.checkpoints / "0" / "seal" / "metadata").read_bytes())
    with pytest.raises(ValueError, match="no sound checkpoint in .*differ from what was saved"):
        run.variables(run_lib.FRESH)


def test_a_run_goes_on_from_the_same_variables_only(imported, tmp_path):
    at, config = epath.Path(tmp_path / "run"), configured(imported)
    workdir_lib.begin(at, config)
    workdir_lib.begin(at, config)
    changed = checkpoints.drawn(MODEL)
    changed["params.embed"] = changed["params.embed"] + np.float32(1)
    (imported / "checkpoints").rename(tmp_path / "before")
    checkpoints.save(imported, MODEL, changed)
    with pytest.raises(ValueError, match=r"another config: start\.weights was '[0-9a-f]{16}'"):
        workdir_lib.begin(at, config)


def test_the_identity_of_a_run_without_start_has_no_such_field():
    assert "start" not in config_lib.identity(config_lib.build(overrides.load(str(smoke.CONFIG))))


def test_the_workdir_of_a_run_is_no_start(tmp_path, imported):
    at = tmp_path / "run"
    checkpoints.save(at / "checkpoints" / "sft", MODEL)
    (at / "checkpoints" / "sft" / folder.CHECKPOINTS).rename(at / "checkpoints" / "sft" / "final")
    identity = config_lib.identity(configured(imported))
    (at / "config.json").write_text(json.dumps({"identity": identity}))
    with pytest.raises(ValueError, match="is the workdir of a run"):
        start_lib.locate(str(at))


def test_a_missing_folder_is_one_line_and_exit_code_2(tmp_path):
    arguments = smoke.command(tmp_path / "run", f"--config.start={tmp_path / 'nowhere'}")
    done = subprocess.run(arguments, cwd=smoke.ROOT, capture_output=True, text=True)
    assert done.returncode == shell.BAD_INPUT
    (line,) = done.stderr.splitlines()
    assert f"config.start = {tmp_path / 'nowhere'}: there is no such folder" in line
    assert not (tmp_path / "run").exists()
