import copy
import json
import pickle
from typing import Any

import pytest
import transformers
from hypothesis import example, given
from hypothesis import strategies as st

from mathv2_jax.text import hf_tokenizer, tokenizer
from mathv2_jax.text.tokenizer import Message
from tests import byte_level

TEMPLATES = {
    "thinking": byte_level.THINKING_TEMPLATE,
    "plain": byte_level.PLAIN_TEMPLATE,
    "always": byte_level.ALWAYS_THINKING,
    "lines": byte_level.LINES_TEMPLATE,
}
MADE = {n: hf_tokenizer.HfTokenizer(byte_level.files(t)) for n, t in TEMPLATES.items()}
TOKENIZER = MADE["thinking"]
REFERENCE: Any = transformers.PreTrainedTokenizerFast(
    tokenizer_object=transformers.PreTrainedTokenizerFast(
        tokenizer_object=hf_tokenizer.tokenizers.Tokenizer.from_str(json.dumps(byte_level.spec()))
    ).backend_tokenizer,
    bos_token=byte_level.SPECIAL[0],
    eos_token=byte_level.SPECIAL[1],
    pad_token=byte_level.SPECIAL[1],
)
IDS = {t: TOKENIZER._id_of[t] for t in byte_level.ADDED}
PAD = byte_level.SPECIAL[2]
ENDS = [Message("user", "x"), Message("assistant", "y")]

PLAIN = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
FRAGMENTS = [
    "<",
    ">",
    "<th",
    "ink>",
    "｜",
    "\n",
    " ",
    "  ",
    "\r\n",
    "integer",
    "12",
    "\ue0000\ue001",
]
PIECED = st.lists(st.sampled_from(FRAGMENTS) | PLAIN, max_size=8).map("".join)
WITHOUT_SPECIAL = PIECED.filter(lambda text: not any(t in text for t in byte_level.ADDED))
ANY_TEXT = st.lists(st.sampled_from([*byte_level.ADDED, *FRAGMENTS]) | PLAIN, max_size=8).map(
    "".join
)


def conversations(texts: st.SearchStrategy[str]) -> st.SearchStrategy[list[Message]]:
    turns = st.tuples(st.builds(Message, st.just("user"), texts), said(texts)).map(list)
    system = st.lists(st.builds(Message, st.just("system"), texts), max_size=1)
    return st.builds(
        lambda first, pairs, last: [*first, *(m for pair in pairs for m in pair), last],
        system,
        st.lists(turns, max_size=2),
        st.builds(Message, st.just("user"), texts),
    )


def said(texts: st.SearchStrategy[str]) -> st.SearchStrategy[Message]:
    return st.builds(Message, st.just("assistant"), texts)


def reference_ids(messages: list[Message], template: str, **flags: Any) -> list[int]:
    shown = [{"role": m.role, "content": m.content} for m in messages]
    return REFERENCE.apply_chat_template(
        shown, chat_template=template, tokenize=True, return_dict=False, **flags
    )


@given(conversations(WITHOUT_SPECIAL), st.sampled_from(["thinking", "plain", "always"]))
def test_a_conversation_has_the_ids_of_transformers(messages, name):
    made, template = MADE[name], TEMPLATES[name]
    for think in {"thinking": (False, True), "plain": (False,), "always": (True,)}[name]:
        expected = reference_ids(messages, template, add_generation_prompt=True, thinking=think)
        assert made.encode(messages, think=think) == expected
    expected = reference_ids(messages, template, add_generation_prompt=False)
    assert made.encode(messages, open_assistant=False) == expected


@given(st.lists(st.builds(Message, st.just("user"), WITHOUT_SPECIAL), min_size=1, max_size=3))
@example([Message("user", "\n\nx\n"), Message("user", " ")])
def test_text_of_the_template_beside_a_content_is_merged_with_it_as_transformers_does(messages):
    expected = reference_ids(messages, TEMPLATES["lines"], add_generation_prompt=True)
    assert MADE["lines"].encode(messages) == expected


@given(ANY_TEXT)
def test_a_text_has_the_ids_of_transformers_with_no_token_added(text):
    body = byte_level.spec() | {"added_tokens": []}
    bare = hf_tokenizer.tokenizers.Tokenizer.from_str(json.dumps(body))
    assert TOKENIZER.encode_text(text) == bare.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def full_size():
    """DeepSeek-V3's size: 128,000 learned pieces and its 818 added tokens."""
    return hf_tokenizer.HfTokenizer(byte_level.files(body=byte_level.full_size()))


@pytest.mark.parametrize("name", ["lines", "thinking", "full_size"])
def test_no_added_token_in_a_text_becomes_one(name, request):
    made = MADE.get(name) or request.getfixturevalue(name)
    assert len(byte_level.ADDED) > 800
    assert (made.vocab_size > 128_800) == (name == "full_size")
    thinks = name != "lines"
    thought = "" if thinks else None
    blank = [Message("system", ""), Message("user", ""), Message("assistant", "", thought)]
    control = [i for i in made.encode_with_loss_mask(blank)[0] if i in made.control_ids]
    for token in byte_level.ADDED:
        for text in (token, f"a{token}", f"{token}{token} b"):
            ids = made.encode_text(text)
            assert not made.control_ids.intersection(ids) and made.decode(ids) == text
        answer = Message("assistant", token, token if thinks else None)
        messages = [Message("system", token), Message("user", token), answer]
        ids, _ = made.encode_with_loss_mask(messages)
        assert [i for i in ids if i in made.control_ids] == control
        said = made.decode([i for i in ids if i not in made.control_ids])
        assert said.count(token) == (4 if thinks else 3)


@given(conversations(ANY_TEXT), ANY_TEXT, st.none() | ANY_TEXT)
def test_the_sampled_response_follows_its_prompt_as_in_training(messages, content, thought):
    answer = Message("assistant", content, thought)
    prompt = TOKENIZER.encode(messages, think=thought is not None)
    ids, mask = TOKENIZER.encode_with_loss_mask([*messages, answer])
    assert ids[: len(prompt)] == prompt
    assert all(mask[len(prompt) :]) and ids[-1] == TOKENIZER.eos_id
    thinking, final = TOKENIZER.split_thinking(ids[len(prompt) :], think=thought is not None)
    assert TOKENIZER.decode(thinking) == (thought or "")
    assert final is not None and TOKENIZER.decode(final) == content


@given(conversations(ANY_TEXT))
def test_the_loss_mask_covers_what_the_assistant_wrote_and_nothing_else(messages):
    ids, mask = TOKENIZER.encode_with_loss_mask(messages)
    written = []
    for message in messages:
        if message.role == "assistant":
            written += [*TOKENIZER.encode_text(message.content), TOKENIZER.eos_id]
    assert [i for i, kept in zip(ids, mask, strict=True) if kept] == written


def test_an_earlier_turn_that_the_template_shows_without_its_thinking_is_not_learned():
    messages = [*ENDS[:1], Message("assistant", "y", "so"), *ENDS]
    ids, mask = TOKENIZER.encode_with_loss_mask(messages)
    turn = [*TOKENIZER.encode_text("y"), TOKENIZER.eos_id]
    assert ids.count(TOKENIZER.eos_id) == 2 and IDS["<think>"] not in ids
    assert [i for i, kept in zip(ids, mask, strict=True) if kept] == turn


def test_a_conversation_written_by_hand():
    bos, eos, _ = (IDS[t] for t in byte_level.SPECIAL)
    user, assistant = IDS["<｜User｜>"], IDS["<｜Assistant｜>"]
    think, end = IDS["<think>"], IDS["</think>"]
    x, y, so = (TOKENIZER.encode_text(t) for t in ("x", "y", "so"))
    assert TOKENIZER.encode(ENDS[:1], think=True) == [bos, user, *x, assistant, think]
    assert TOKENIZER.encode(ENDS[:1]) == [bos, user, *x, assistant, end]
    ids, mask = TOKENIZER.encode_with_loss_mask([ENDS[0], Message("assistant", "y", "so")])
    assert ids == [bos, user, *x, assistant, think, *so, end, *y, eos]
    assert mask == [False] * (4 + len(x)) + [True] * (len(so) + len(y) + 2)
    assert (TOKENIZER.eos_id, TOKENIZER.pad_id, TOKENIZER.stop_ids) == (eos, eos, (eos,))
    assert TOKENIZER.end_think_id == end
    assert TOKENIZER.vocab_size == len(REFERENCE)


def test_the_text_that_always_follows_an_opening_belongs_to_the_prompt():
    made = MADE["always"]
    ids, mask = made.encode_with_loss_mask([ENDS[0], Message("assistant", "y", "\nso\n")])
    prompt = made.encode(ENDS[:1], think=True)
    assert ids[: len(prompt)] == prompt and mask == [i >= len(prompt) for i in range(len(ids))]
    assert made.decode(ids[len(prompt) :]) == "\nso\n</think>y"


@given(st.lists(st.integers(-3, TOKENIZER.vocab_size + 3)))
def test_any_ids_decode_to_text(ids):
    TOKENIZER.decode(ids).encode("utf-8")


@given(ANY_TEXT)
def test_decoding_gives_the_text_back(text):
    assert TOKENIZER.decode(TOKENIZER.encode_text(text)) == text


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1)))
def test_ids_decode_as_transformers_decodes_them(ids):
    assert TOKENIZER.decode(ids) == REFERENCE.decode(ids, skip_special_tokens=True)


def test_of_the_control_tokens_those_of_thinking_show_even_where_they_are_special():
    body = byte_level.spec()
    for token in body["added_tokens"]:
        token["special"] = True
    made = hf_tokenizer.HfTokenizer(byte_level.files(body=body))
    assert made.decode([IDS["<think>"], IDS["<｜User｜>"], IDS["</think>"]]) == "<think></think>"
    assert made.encode_text("</think>") == TOKENIZER.encode_text("</think>")


def test_thinking_is_split_at_the_last_closing_token():
    end = TOKENIZER.end_think_id
    assert TOKENIZER.split_thinking([20, end, 21, end, 22], think=True) == ([20, end, 21], [22])
    assert TOKENIZER.split_thinking([20, 21], think=True) == ([20, 21], None)
    assert TOKENIZER.split_thinking([20, end, 21], think=False) == ([], [20, end, 21])


def test_it_is_what_a_run_needs_and_travels_by_pickle():
    twin = pickle.loads(pickle.dumps(TOKENIZER))
    assert isinstance(twin, tokenizer.Tokenizer)
    assert twin.fingerprint == TOKENIZER.fingerprint != MADE["plain"].fingerprint
    assert twin.encode(ENDS, think=True) == TOKENIZER.encode(ENDS, think=True)


def test_every_end_token_of_the_generation_config_stops_a_response():
    files = byte_level.files() | {"generation_config.json": b'{"eos_token_id": [1, 7]}'}
    made = hf_tokenizer.HfTokenizer(files)
    assert made.stop_ids == (1, 7) and made.eos_id == 1


def test_the_end_token_is_the_one_that_ends_a_turn():
    eot = IDS["<|EOT|>"]
    template = byte_level.PLAIN_TEMPLATE.replace("eos_token", "'<|EOT|>\n'")
    files = byte_level.files(template)
    files |= {"generation_config.json": json.dumps({"eos_token_id": [1, eot]}).encode()}
    made = hf_tokenizer.HfTokenizer(files)
    assert made.eos_id == eot
    ids, mask = made.encode_with_loss_mask(ENDS)
    assert ids[-2:] == [eot, *made.encode_text("\n")] and mask[-2:] == [True, False]


def test_thinking_that_the_template_does_not_open_is_refused():
    with pytest.raises(ValueError, match="does not open .* roles.think=False"):
        MADE["plain"].encode(ENDS[:1], think=True)
    with pytest.raises(ValueError, match="opens .* with <think>.* roles.think=True"):
        MADE["always"].encode(ENDS[:1])
    with pytest.raises(ValueError, match="open_assistant"):
        TOKENIZER.encode(ENDS, open_assistant=False, think=True)


def test_a_turn_that_is_opened_otherwise_than_it_is_shown_is_refused():
    template = byte_level.PLAIN_TEMPLATE.replace("{{ '<｜Assistant｜>' }}", "{{ '<｜User｜>' }}")
    with pytest.raises(ValueError, match="what is learned would not be what is sampled"):
        hf_tokenizer.HfTokenizer(byte_level.files(template)).encode_with_loss_mask(ENDS)


def test_a_lone_surrogate_is_refused_with_its_position():
    with pytest.raises(ValueError, match="at position 2 "):
        TOKENIZER.encode_text("ab\udfff")


def changed(path: str, value: Any) -> dict[str, Any]:
    body = copy.deepcopy(byte_level.spec())
    *parents, last = path.split(".")
    place = body
    for name in parents:
        place = place[int(name) if isinstance(place, list) else name]
    place[last] = value
    return body


UNSUPPORTED = {
    "normalizer": {"type": "NFC"},
    "model.type": "Unigram",
    "model.dropout": 0.1,
    "model.end_of_word_suffix": "</w>",
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True},
    "pre_tokenizer.pretokenizers.0": {
        "type": "Split",
        "pattern": {"String": "x"},
        "behavior": "Removed",
        "invert": False,
    },
    "decoder": {"type": "Fuse"},
}


@pytest.mark.parametrize("path", sorted(UNSUPPORTED))
def test_a_tokenizer_that_changes_text_is_refused(path):
    body = changed("normalizer", None)
    if path.startswith("pre_tokenizer."):
        body["pre_tokenizer"]["pretokenizers"][0] = UNSUPPORTED[path]
    else:
        body = changed(path, UNSUPPORTED[path])
    with pytest.raises(ValueError, match="tokenizer.json"):
        hf_tokenizer.HfTokenizer(byte_level.files(body=body))


def test_a_merge_that_builds_an_added_token_is_refused():
    body = byte_level.spec()
    body["added_tokens"].append(body["added_tokens"][0] | {"content": "th", "id": 0})
    body["model"]["vocab"].setdefault("th", len(body["model"]["vocab"]))
    body["added_tokens"][-1]["id"] = body["model"]["vocab"]["th"]
    body["model"]["merges"].append(["t", "h"])
    with pytest.raises(ValueError, match="involves the added token 'th'"):
        hf_tokenizer.HfTokenizer(byte_level.files(body=body))


def test_an_added_token_in_the_vocabulary_is_out_of_reach_of_a_whole_word():
    body = json.loads(json.dumps(byte_level.spec()).replace(json.dumps(PAD)[1:-1], "zzz"))
    body["model"]["ignore_merges"] = True
    made = hf_tokenizer.HfTokenizer(byte_level.files(body=body))
    assert 2 in made.control_ids and made.encode_text("zzz") == made.encode_text("z") * 3


def test_a_vocabulary_without_all_bytes_is_refused():
    body = byte_level.spec()
    del body["model"]["vocab"]["Ġ"]
    body["model"]["merges"] = []
    with pytest.raises(ValueError, match=r"lacks the bytes \[32\]"):
        hf_tokenizer.HfTokenizer(byte_level.files(body=body))


def test_an_added_token_that_takes_in_its_neighbours_is_refused():
    body = byte_level.spec()
    body["added_tokens"][5]["rstrip"] = True
    with pytest.raises(ValueError, match="'<｜place▁holder▁no▁2｜>' .*rstrip"):
        hf_tokenizer.HfTokenizer(byte_level.files(body=body))


def test_an_id_that_is_another_tokens_is_refused():
    body = byte_level.spec()
    body["added_tokens"][-1]["id"] += 5
    with pytest.raises(ValueError, match="is given id"):
        hf_tokenizer.HfTokenizer(byte_level.files(body=body))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(eos_token="<end>"), "eos_token '<end>' is no added token"),
        (dict(added_tokens_decoder={"5": {"content": "<think>"}}), "different tokenizers"),
        (dict(chat_template=None), "there is no chat template"),
        (dict(chat_template="{% for %}"), "not valid Jinja"),
        (dict(chat_template="{% for m in messages %}{{ m.content }}{% endfor %}"), "a stop token"),
        (dict(chat_template="{{ messages[0].content }}"), "leaves out message 1"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(changes, message):
    files = byte_level.files() | {
        "tokenizer_config.json": json.dumps(byte_level.config(**changes)).encode()
    }
    with pytest.raises(ValueError, match=message):
        hf_tokenizer.HfTokenizer(files)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("tokenizer.json", b"{", "tokenizer.json is not valid JSON"),
        ("tokenizer.json", b"[]", "must hold a JSON object"),
        ("tokenizer.json", b'{"model": {}}', "tokenizer.json is not a tokenizer"),
        ("tokenizer_config.json", b"\xff\xfe\xff", "tokenizer_config.json is not valid JSON"),
        ("generation_config.json", b'{"eos_token_id": "a"}', "an id or a list of ids"),
        ("generation_config.json", b'{"eos_token_id": 99999}', "outside the vocabulary"),
    ],
)
def test_a_broken_file_is_named(name, data, message):
    with pytest.raises(ValueError, match=message):
        hf_tokenizer.HfTokenizer(byte_level.files() | {name: data})


def test_a_missing_file_is_named():
    files = byte_level.files()
    del files["tokenizer_config.json"]
    with pytest.raises(ValueError, match="needs tokenizer_config.json"):
        hf_tokenizer.HfTokenizer(files)
    files = byte_level.files(eos_token=None, pad_token=None)
    del files["generation_config.json"]
    with pytest.raises(ValueError, match="no end of text"):
        hf_tokenizer.HfTokenizer(files)


def test_chat_template_jinja_goes_before_the_field_of_the_config():
    files = byte_level.files() | {"chat_template.jinja": byte_level.PLAIN_TEMPLATE.encode()}
    made = hf_tokenizer.HfTokenizer(files)
    assert made.encode(ENDS[:1]) == MADE["plain"].encode(ENDS[:1])
    listed = [{"name": "tool_use", "template": "{{ x }}"}]
    listed.append({"name": "default", "template": byte_level.PLAIN_TEMPLATE})
    made = hf_tokenizer.HfTokenizer(byte_level.files(template=listed))
    assert made.encode(ENDS[:1]) == MADE["plain"].encode(ENDS[:1])
