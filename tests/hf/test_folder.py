"""Tokenizers travel as they are or not at all."""

import json
import pathlib

import pytest
import transformers
from etils import epath

from mathv2_jax.hf import exporter, folder, importer
from mathv2_jax.text import tokenizer_files
from tests import byte_level
from tests.hf import checkpoints
from tests.hf.checkpoints import PLAIN, bring_in, export, save


@pytest.fixture
def released(tmp_path):
    """An exported folder of a model with room for the tokenizer of `byte_level`."""
    export(save(tmp_path / "a", PLAIN), tmp_path / "hf")
    return tmp_path / "hf"


def put(at: pathlib.Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (at / name).write_bytes(data)


def imported(released: pathlib.Path, to: pathlib.Path) -> tuple[folder.Trained, str]:
    """The import, and all its notes."""
    opened = importer.open_source(str(released))
    notes = importer.convert(opened, str(released), epath.Path(to), checkpoints.silent)
    return folder.locate(epath.Path(to)), "; ".join(notes)


UNUSABLE = {
    "tiktoken.model alone does not say": {
        "tiktoken.model": b"IQ== 0",
        "tokenizer_config.json": b'{"auto_map": {"AutoTokenizer": ["tokenization_x.X", null]}}',
        "tokenization_x.py": b"1/0",
    },
    "tokenizer.json is not valid JSON": byte_level.files() | {"tokenizer.json": b"{broken"},
    "it holds no tokenizer.json": {},
    "its files are damaged: AttributeError": byte_level.files()
    | {"tokenizer_config.json": b'{"added_tokens_decoder": [1], "chat_template": "x"}'},
    "its files are damaged: TypeError": {
        n: b'{"chat_template": [1]}' if n == "tokenizer_config.json" else data
        for n, data in byte_level.files().items()
        if n != "chat_template.jinja"
    },
}


@pytest.mark.parametrize("said", UNUSABLE)
def test_a_tokenizer_that_cannot_be_used_is_left_out_with_a_note(released, tmp_path, said):
    put(released, UNUSABLE[said] | {"generation_config.json": b'{"top_p": 0.9, "eos_token_id": 5}'})
    trained, notes = imported(released, tmp_path / "b")
    assert f"imported without a tokenizer: {said}" in notes and "tokenizer.directory" in notes
    export(trained, tmp_path / "again")
    names = checkpoints.files(tmp_path / "again")
    assert not {name for name in names if "token" in name}
    generation = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert generation == {"top_p": 0.9, "eos_token_id": 5}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"{broken", "generation_config.json is not valid JSON"),
        (b"[]", "must hold a JSON object"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"eos_token_id": [5, 999]}', r"eos_token_id = \[5, 999\]: no id of a vocabulary of 61"),
    ],
)
def test_a_damaged_generation_config_is_an_error_of_the_import(released, tmp_path, text, said):
    put(released, {"generation_config.json": text})
    with pytest.raises(ValueError, match=said + ".*mend it or take it away"):
        imported(released, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_tokenizer_that_can_be_used_travels_byte_for_byte(released, tmp_path):
    put(released, byte_level.files())
    trained, notes = imported(released, tmp_path / "b")
    assert "tokenizer" not in notes
    export(trained, tmp_path / "again")
    for name, data in byte_level.files().items():
        assert (tmp_path / "again" / name).read_bytes() == data


def test_an_export_does_not_point_to_code_that_is_not_there(released, tmp_path):
    files = byte_level.files(
        tokenizer_class="Other", auto_map={"AutoTokenizer": ["tokenization_x.Other", None]}
    )
    put(released, files)
    export(bring_in(released, tmp_path / "b"), tmp_path / "again")
    text = "Let $n$ be 12."
    there = transformers.AutoTokenizer.from_pretrained(tmp_path / "again", local_files_only=True)
    assert there.encode(text, add_special_tokens=False) == tokenizer_files.load(
        tmp_path / "again"
    ).encode_text(text)
    body = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    assert "auto_map" not in body and body["eos_token"] == byte_level.SPECIAL[1]


def test_ends_of_a_text_that_only_config_json_names_reach_the_generation_config(released, tmp_path):
    """transformers stops at those of generation_config.json alone where that file is there."""
    put(released, byte_level.files() | {"generation_config.json": b'{"do_sample": true}'})
    body = json.loads((released / "config.json").read_text()) | {"eos_token_id": [1, 9]}
    (released / "config.json").write_text(json.dumps(body))
    trained = bring_in(released, tmp_path / "b")
    assert tokenizer_files.load(tmp_path / "b" / "tokenizer").stop_ids == (1, 9)
    export(trained, tmp_path / "again")
    generation = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert generation == {"do_sample": True, "eos_token_id": [1, 9]}
    body = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (body["bos_token_id"], body["eos_token_id"]) == (0, [1, 9])


def test_an_export_without_its_tokenizer_keeps_the_ids(released, tmp_path):
    put(released, byte_level.files())
    trained = bring_in(released, tmp_path / "b")
    export(trained, tmp_path / "again", with_tokenizer=False)
    assert not {name for name in checkpoints.files(tmp_path / "again") if "token" in name}
    _, ids = exporter.tokenizer_of(trained)
    body = json.loads((tmp_path / "again" / "config.json").read_text())
    assert {name: body[name] for name in ids} == ids and ids["eos_token_id"] == 1


DAMAGED = {
    "tokens: eos_token_id = 999": lambda body: body | {"tokens": {"eos_token_id": 999}},
    "tokens: eos_token_id = 'no object'": lambda body: body | {"tokens": [1]},
    "its identity has no 'stages'": lambda _: {"identity": {}},
    "its identity has no string": lambda _: {"identity": {"stages": ["x"]}},
}


@pytest.mark.parametrize("said", DAMAGED)
def test_a_damaged_config_of_a_checkpoint_is_an_error_that_names_it(tmp_path, said):
    save(tmp_path / "a", PLAIN)
    config = tmp_path / "a" / "config.json"
    config.write_text(json.dumps(DAMAGED[said](json.loads(config.read_text()))))
    with pytest.raises(ValueError, match=rf"a/config\.json is damaged: {said}"):
        folder.locate(epath.Path(tmp_path / "a"))
    config.write_text('{"identity": []}')
    with pytest.raises(ValueError, match="neither mathv2-convert's nor mathv2-train's"):
        folder.locate(epath.Path(tmp_path / "a"))
