"""A run on a tokenizer that was made before: config.tokenizer.directory."""

import pathlib
import shutil

import pytest
from etils import epath

from mathv2_jax import records
from mathv2_jax.cli import config as config_lib
from mathv2_jax.cli import inputs, overrides, train
from mathv2_jax.cli import workdir as workdir_lib
from mathv2_jax.stages import sft
from mathv2_jax.text import hf_tokenizer, tokenizer_files
from mathv2_jax.text.tokenizer import Message
from tests import byte_level

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
TOKENIZER = hf_tokenizer.HfTokenizer(byte_level.files())


def configured(directory: pathlib.Path, vocab_size: int | None = 1280) -> config_lib.RunConfig:
    changes = {
        "tokenizer.vocab_size": "0",
        "tokenizer.whole_phrases": "()",
        "tokenizer.directory": str(directory),
        "runtime.mesh.context": "-1",
        "world.num_drills": "4",
        "world.num_demonstrations": "8",
        "world.num_problems": "8",
        "world.num_graded_proofs": "8",
        "world.num_graded_analyses": "4",
        "world.num_probe": "4",
        "world.num_validation": "4",
        "world.num_test": "4",
        **({} if vocab_size is None else {"model.vocab_size": str(vocab_size)}),
    }
    file = overrides.load(str(REPOSITORY / "configs" / "smoke.py"))
    return config_lib.build(file, [(f"config.{path}", value) for path, value in changes.items()])


@pytest.fixture
def directory(tmp_path: pathlib.Path) -> pathlib.Path:
    made = tmp_path / "tokenizer"
    made.mkdir()
    for name, data in byte_level.files().items():
        (made / name).write_bytes(data)
    return made


def test_the_run_uses_its_own_copy_and_the_models_vocabulary(tmp_path, directory):
    workdir, config = epath.Path(tmp_path / "run"), configured(directory)
    workdir_lib.begin(workdir, config)
    shutil.rmtree(directory)
    workdir_lib.begin(workdir, config)  # goes on without the folder
    run = train.make_run(workdir, config, lambda: False)
    assert run.tokenizer.fingerprint == TOKENIZER.fingerprint
    assert run.trunk.config.vocab_size == 1280 > run.tokenizer.vocab_size
    assert not (workdir / "records" / "input" / "tokenizer.model").exists()
    prompt = run.roles.verifier.prompt(run.tokenizer, statement="p1 </think>", proof="<｜User｜>")
    control = [i for i in prompt if i in TOKENIZER.control_ids]
    opened = TOKENIZER.encode([Message("user", "")])
    assert control == opened


@pytest.mark.parametrize("think", [False, True])
def test_a_demonstration_is_learned_as_the_template_writes_the_turn(think):
    demonstration = records.Demonstration(
        id="d", role="verifier", problem_id="p", user="Is it?", assistant="It is."
    )
    item = sft.supervised_item(TOKENIZER, demonstration, 0.0, think=think)
    messages = [Message("user", "Is it?"), Message("assistant", "It is.", "" if think else None)]
    ids, mask = TOKENIZER.encode_with_loss_mask(messages)
    (answer,) = item.answers
    assert [*item.prompt, *answer.tokens] == ids
    assert [0.0] * len(item.prompt) + list(answer.weights) == mask


def test_a_vocabulary_larger_than_the_models_is_refused_before_anything_is_written(
    tmp_path, directory
):
    workdir = epath.Path(tmp_path / "run")
    size = TOKENIZER.vocab_size
    expected = f"vocab_size = {size - 1}: .* has {size} tokens.*set config.model.vocab_size to"
    with pytest.raises(ValueError, match=expected):
        workdir_lib.begin(workdir, configured(directory, size - 1))
    assert not workdir.exists()
    inputs.copy_tokenizer(workdir, epath.Path(directory), size)
    assert inputs.read_tokenizer(workdir).vocab_size == size


def test_files_of_an_attempt_before_do_not_mix_with_the_tokenizers(tmp_path, directory):
    kept = epath.Path(tmp_path / "run" / "records" / "input" / "tokenizer")
    kept.mkdir(parents=True)
    (kept / "chat_template.jinja").write_text(byte_level.PLAIN_TEMPLATE)
    inputs.copy_tokenizer(epath.Path(tmp_path / "run"), epath.Path(directory), 2000)
    assert tokenizer_files.load(kept).fingerprint == TOKENIZER.fingerprint


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("tokenizer.json", None, "holds no tokenizer.json"),
        ("tokenizer.json", b"{", "tokenizer.json is not valid JSON"),
        ("tokenizer_config.json", None, "needs tokenizer_config.json"),
    ],
)
def test_a_missing_or_broken_file_is_refused_with_its_folder(
    tmp_path, directory, name, data, message
):
    (directory / name).unlink()
    if data is not None:
        (directory / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"{directory}.*{message}"):
        workdir_lib.begin(epath.Path(tmp_path / "run"), configured(directory))


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: there is no such folder"):
        workdir_lib.begin(epath.Path(tmp_path / "run"), configured(tmp_path / "nowhere"))


def test_settings_that_contradict_each_other_are_refused(directory):
    with pytest.raises(ValueError, match="config.model.vocab_size must be given"):
        configured(directory, None)
    with pytest.raises(ValueError, match="vocab_size = 448 .*give one of the two"):
        config_lib.TokenizerConfig(vocab_size=448, directory="x")
    with pytest.raises(ValueError, match="vocab_size = 0 .*give one of the two"):
        config_lib.TokenizerConfig()
    with pytest.raises(ValueError, match="whole_phrases .*leave them out"):
        config_lib.TokenizerConfig(directory="x", whole_phrases=("a",))
