import json
import pathlib
from typing import Any

import jinja2
import pytest
import tokenizers
import transformers
from hypothesis import example, given
from hypothesis import strategies as st

from mathv2_jax.text import parse, sentencepiece_export, tokenizer, tokenizer_files
from mathv2_jax.text.tokenizer import Message

WORDS = "let the sum of all odd primes below this one be even  aaaa abab ababa ==== == \\\\ ((("
TEXTS = [
    "Facts: p6. Rules: p6 -> p7, p7 -> p12.\nProve it.\n\n1. since p6 and p6 -> p7, p7\n",
    *(" ".join(WORDS.split(" ")[i:]) * 3 for i in range(12)),
    "abcabdabeabfbcabca cabcab ababab aaa aaaaa aabaa ß²",
]
PHRASES = [*parse.KEY_PHRASES, "\nProve it.", " and ", "##", "=b", "b=c"]
MODEL = tokenizer.SentencePieceTokenizer.from_bytes(
    tokenizer.train(TEXTS, vocab_size=520, whole_phrases=PHRASES)
)
PIECES = sorted(MODEL.pieces())

PLAIN = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
PIECED = st.lists(
    st.sampled_from([*PIECES, *"ab= ", "\u2581", "<0x41>", "<", "\r\n"]) | PLAIN, max_size=20
).map("".join)
REPEATED = st.text(st.sampled_from("ab ="), max_size=40)
TEXT = (PIECED | REPEATED).filter(lambda t: not any(c in t for c in tokenizer.CONTROL_TOKENS))
THINKING = st.none() | TEXT


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """An exported model's folder, without its weights."""
    made = tmp_path_factory.mktemp("exported")
    for name, data in tokenizer_files.files_of(MODEL).items():
        (made / name).write_bytes(data)
    config = transformers.AutoConfig.for_model("deepseek_v3", vocab_size=MODEL.vocab_size)
    (made / "config.json").write_text(config.to_json_string())
    return made


@pytest.fixture(scope="module")
def reference(folder: pathlib.Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


@given(text=TEXT)
@example(text="ababaababab")
@example(text="a =b=c \u2581 <0x41>\n\n")
def test_transformers_gives_the_same_ids_and_text(reference, text):
    ids = MODEL.encode_text(text)
    assert reference(text, add_special_tokens=False)["input_ids"] == ids
    assert reference.decode(ids, skip_special_tokens=True) == text


def test_thinking_that_is_null_is_none():
    template = jinja2.Template(tokenizer_files.files_of(MODEL)["chat_template.jinja"].decode())
    said = {"role": "assistant", "content": "y"}
    for shown in (said, said | {"reasoning_content": None}):
        assert template.render(messages=[shown]) == "<|assistant|>y"
    assert "<think>so</think>y" in template.render(messages=[said | {"reasoning_content": "so"}])


@given(
    messages=st.lists(
        st.builds(Message, st.sampled_from(["user", "system"]), TEXT)
        | st.builds(Message, st.just("assistant"), TEXT, THINKING),
        min_size=1,
        max_size=4,
    )
)
def test_its_chat_template_gives_the_ids_of_a_conversation(reference, messages):
    shown = [
        {"role": m.role, "content": m.content, "reasoning_content": m.thinking} for m in messages
    ]

    def ids(**flags: Any) -> list[int]:
        return reference.apply_chat_template(shown, tokenize=True, return_dict=False, **flags)

    assert ids() == MODEL.encode(messages, open_assistant=False)
    assert ids(add_generation_prompt=True) == MODEL.encode(messages)
    thinking = ids(add_generation_prompt=True, thinking=True)
    assert thinking == MODEL.encode(messages, think=True)


def test_a_model_that_always_thinks_opens_thinking_by_default():
    files = tokenizer_files.files_of(MODEL, think=True)
    source = files["chat_template.jinja"].decode()
    template = transformers.utils.chat_template_utils.render_jinja_template
    shown = [[{"role": "user", "content": "x"}]]
    flags: Any = dict(chat_template=source, add_generation_prompt=True, bos_token="<s>")
    (opened,), _ = template(shown, **flags)
    (plain,), _ = template(shown, **flags, thinking=False)
    assert (opened, plain) == ("<s><|user|>x<|assistant|><think>", "<s><|user|>x<|assistant|>")


def test_the_same_tokenizer_is_read_back(folder):
    loaded = tokenizer_files.load(folder)
    assert loaded.fingerprint == MODEL.fingerprint


def test_special_tokens_keep_their_ids_and_only_those_of_thinking_show(reference):
    for token in tokenizer.CONTROL_TOKENS:
        token_id = MODEL.reserved()[token]
        assert reference.convert_tokens_to_ids(token) == token_id
        assert reference.decode([token_id], skip_special_tokens=True) == MODEL.decode([token_id])
    assert (reference.bos_token_id, reference.eos_token_id) == (MODEL.bos_id, MODEL.eos_id)
    assert (reference.pad_token_id, len(reference)) == (MODEL.pad_id, MODEL.vocab_size)


@pytest.mark.parametrize("vocab_size", [400, 700, 1500])
def test_vocabularies_of_other_sizes_are_exact_too(vocab_size):
    source = [pathlib.Path(sentencepiece_export.__file__).read_text(), *TEXTS]
    model = tokenizer.SentencePieceTokenizer.from_bytes(
        tokenizer.train(source, vocab_size=vocab_size)
    )
    files = sentencepiece_export.files_of(model, think=False)
    converted = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    sentencepiece_export.require_same(model, converted, source)


def test_a_conversion_that_changes_ids_is_refused_with_the_text():
    spec = json.loads(sentencepiece_export.files_of(MODEL, think=False)["tokenizer.json"])
    spec["model"]["merges"] = spec["model"]["merges"][:-1]
    converted = tokenizers.Tokenizer.from_str(json.dumps(spec))
    with pytest.raises(ValueError, match="no exact tokenizer.json: '.*' would have"):
        sentencepiece_export.require_same(MODEL, converted)
    with pytest.raises(ValueError, match="'q' would have"):
        sentencepiece_export.require_same(
            MODEL,
            tokenizers.Tokenizer.from_str(
                json.dumps(
                    spec
                    | {
                        "pre_tokenizer": {
                            "type": "ByteLevel",
                            "add_prefix_space": True,
                            "trim_offsets": True,
                            "use_regex": True,
                        }
                    }
                )
            ),
            ["q"],
        )
