import json
import pathlib

import pytest

from mathv2_jax.text import tokenizer, tokenizer_files
from mathv2_jax.text.tokenizer import Message
from tests import byte_level

USER = [Message("user", "Let x be 12.")]


def written(folder: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def test_the_files_written_back_are_the_files_read(tmp_path):
    files = byte_level.files() | {"chat_template.jinja": byte_level.PLAIN_TEMPLATE.encode()}
    others = {"model.safetensors.index.json": b"{}", "config.json": b'{"eos_token_id": 5}'}
    loaded = tokenizer_files.load(written(tmp_path / "a", files | others))
    assert tokenizer_files.files_of(loaded) == files
    again = tokenizer_files.load(written(tmp_path / "b", tokenizer_files.files_of(loaded)))
    assert again.fingerprint == loaded.fingerprint and again.encode(USER) == loaded.encode(USER)
    assert list(tokenizer_files.read(tmp_path / "a"))[-1] == "tokenizer.json"


def test_the_end_tokens_of_the_models_config_count_where_no_generation_config_is(tmp_path):
    files = byte_level.files()
    del files["generation_config.json"]
    folder = written(tmp_path / "a", files | {"config.json": b'{"eos_token_id": [1, 9]}'})
    loaded = tokenizer_files.load(folder)
    assert loaded.stop_ids == (1, 9)
    assert tokenizer_files.from_files(tokenizer_files.files_of(loaded)).stop_ids == (1, 9)


def test_the_end_tokens_of_the_models_config_count_where_the_generation_config_names_none(tmp_path):
    generation = b'{"eos_token_id": null, "top_p": 0.9}'
    files = byte_level.files() | {"generation_config.json": generation}
    folder = written(tmp_path / "a", files | {"config.json": b'{"eos_token_id": [1, 9]}'})
    kept = json.loads(tokenizer_files.read(folder)["generation_config.json"])
    assert kept == {"eos_token_id": [1, 9], "top_p": 0.9}
    assert tokenizer_files.load(folder).stop_ids == (1, 9)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tiktoken.model": b"IQ== 0\n", "tokenization_kimi.py": b"1/0"}, "never run here"),
        ({"tokenizer.model": b"\n"}, "convert it to tokenizer.json"),
        ({"vocab.json": b"{}"}, r"no tokenizer.json, but \['vocab.json'\]"),
        (byte_level.files() | {"tokenizer.json": b"{"}, "tokenizer.json is not valid JSON"),
        (byte_level.files() | {"mathv2_tokenizer.model": b"x"}, "not a SentencePiece model"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_folder_and_the_reason(tmp_path, files, message):
    with pytest.raises(ValueError, match=f"{tmp_path}.*{message}"):
        tokenizer_files.load(written(tmp_path, files))


def test_a_broken_config_of_the_model_is_named(tmp_path):
    files = byte_level.files()
    del files["generation_config.json"]
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        tokenizer_files.load(written(tmp_path, files | {"config.json": b"{"}))


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: there is no such folder"):
        tokenizer_files.load(tmp_path / "nowhere")


def test_code_in_the_folder_is_never_run(tmp_path):
    code = f"open({str(tmp_path / 'ran')!r}, 'w')".encode()
    config = byte_level.config(auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
    files = byte_level.files() | {"tokenizer_config.json": json.dumps(config).encode()}
    folder = written(tmp_path / "a", files | {"evil.py": code, "tokenizer.pkl": b"cos\nsystem\n"})
    loaded = tokenizer_files.load(folder)
    assert isinstance(loaded, tokenizer.Tokenizer) and not (tmp_path / "ran").exists()
