import pickle
import subprocess
import sys

import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st

from mathv2_jax.text import parse, tokenizer
from mathv2_jax.text.tokenizer import Message

TEXTS = [
    "Facts: p6. Rules: p6 -> p7, p7 -> p12.\nProve it.\n\n1. since p6 and p6 -> p7, p7\n",
    "Let $n \\geq 2$ be an integer, and suppose that $n^2 + 1 = 2026$.\tThen  n = 45.",
    "Für jede reelle Zahl x gilt x² ≥ 0.",
]
PHRASES = [*parse.KEY_PHRASES, "\nProve it.", " and ", "##"]
MODEL = tokenizer.train(TEXTS, vocab_size=400, whole_phrases=PHRASES)
TOKENIZER = tokenizer.SentencePieceTokenizer.from_bytes(MODEL)

SPELLINGS = [*tokenizer.CONTROL_TOKENS, "<0x41>", "\u2581", "\u2585", "\ufffd", "\x00", "\t"]
PLAIN = st.text(st.characters(exclude_categories=["Cs"]))
PIECED = st.lists(
    st.sampled_from([*SPELLINGS, *PHRASES, " ", "  ", "\n", "\r\n"]) | PLAIN, max_size=20
).map("".join)
ANY_TEXT = PLAIN | PIECED
ROLES = st.sampled_from(["user", "system"])
ASSISTANT = st.builds(Message, st.just("assistant"), ANY_TEXT, st.none() | ANY_TEXT)
CONVERSATION = st.lists(st.builds(Message, ROLES, ANY_TEXT) | ASSISTANT, max_size=4)


@given(ANY_TEXT)
@example("a \u2581 b\u2581\u2581")
@example("".join(SPELLINGS))
def test_decoding_gives_the_text_back(text):
    assert TOKENIZER.decode(TOKENIZER.encode_text(text)) == text


@given(ANY_TEXT, PIECED)
def test_no_text_encodes_to_a_control_token(text, spelled):
    ids = TOKENIZER.encode_text(text + "".join(SPELLINGS) + spelled)
    assert not TOKENIZER.control_ids.intersection(ids)
    assert all(0 <= i < TOKENIZER.vocab_size for i in ids)


@given(st.lists(st.integers(0, TOKENIZER.vocab_size + 3)))
def test_any_ids_decode_to_text(ids):
    TOKENIZER.decode(ids).encode("utf-8")


@given(CONVERSATION)
def test_the_loss_mask_covers_what_the_assistant_wrote_and_nothing_else(messages):
    ids, mask = TOKENIZER.encode_with_loss_mask(messages)
    assert ids == TOKENIZER.encode(messages, open_assistant=False)
    masked = [i for i, kept in zip(ids, mask, strict=True) if kept]
    written = []
    for message in messages:
        if message.role == "assistant":
            if message.thinking is not None:
                written += [*TOKENIZER.encode_text(message.thinking), TOKENIZER.end_think_id]
            written += [*TOKENIZER.encode_text(message.content), TOKENIZER.eos_id]
    assert masked == written


@given(CONVERSATION, ASSISTANT)
def test_the_sampled_response_follows_its_prompt_as_in_training(messages, answer):
    think = answer.thinking is not None
    prompt = TOKENIZER.encode(messages, think=think)
    ids, mask = TOKENIZER.encode_with_loss_mask([*messages, answer])
    assert ids[: len(prompt)] == prompt
    assert all(mask[len(prompt) :])
    thinking, final = TOKENIZER.split_thinking(ids[len(prompt) :], think=think)
    assert TOKENIZER.decode(thinking) == (answer.thinking or "")
    assert final is not None and TOKENIZER.decode(final) == answer.content


def test_a_conversation_written_by_hand():
    def plain(text):
        return TOKENIZER.encode_text(text)

    messages = [Message("system", "s"), Message("user", "x"), Message("assistant", "y")]
    system, user, assistant = 6, 4, 5
    turns = [2, system, *plain("s"), user, *plain("x"), assistant, *plain("y"), 3]
    assert TOKENIZER.encode(messages, open_assistant=False) == turns
    assert TOKENIZER.encode(messages) == [*turns, assistant]
    assert TOKENIZER.encode(messages, think=True) == [*turns, assistant, TOKENIZER.think_id]
    assert TOKENIZER.decode([*turns, assistant, TOKENIZER.think_id]) == "sxy<think>"


def test_the_control_tokens_have_the_documented_ids():
    assert (TOKENIZER.pad_id, TOKENIZER.bos_id, TOKENIZER.eos_id) == (0, 2, 3)
    assert TOKENIZER.control_ids == frozenset(range(9))
    assert (TOKENIZER.think_id, TOKENIZER.end_think_id) == (7, 8)


@pytest.mark.parametrize("phrase", [*PHRASES, "\n"])
def test_a_whole_phrase_is_one_token_wherever_it_stands(phrase):
    (phrase_id,) = TOKENIZER.encode_text(phrase)
    assert phrase_id in TOKENIZER.encode_text(f"q{phrase}q")


def test_of_two_phrases_the_longer_wins():
    assert len(TOKENIZER.encode_text("## Solution")) == 1
    assert len(TOKENIZER.encode_text("## S")) == 3


def test_digits_are_tokens_of_their_own():
    assert len(TOKENIZER.encode_text("2026")) == 4
    assert len(TOKENIZER.encode_text("p12")) == 3


def test_a_frequent_word_becomes_one_token():
    model = tokenizer.train(["perpendicular lines\n" * 50], vocab_size=400)
    learned = tokenizer.SentencePieceTokenizer.from_bytes(model)
    assert len(learned.encode_text("perpendicular")) == 1


def test_thinking_is_split_at_the_last_closing_token():
    end = TOKENIZER.end_think_id
    assert TOKENIZER.split_thinking([20, end, 21, end, 22], think=True) == ([20, end, 21], [22])
    assert TOKENIZER.split_thinking([20, 21, end], think=True) == ([20, 21], [])
    assert TOKENIZER.split_thinking([20, 21], think=True) == ([20, 21], None)
    assert TOKENIZER.split_thinking([20, end, 21], think=False) == ([], [20, end, 21])


def test_the_spelling_of_a_closing_token_does_not_end_the_thinking():
    ids = TOKENIZER.encode_text("so </think> or not")
    assert TOKENIZER.split_thinking(ids, think=True) == (ids, None)


@pytest.mark.parametrize(("text", "position"), [("\ud800", 0), ("ab\udfff", 2)])
def test_a_lone_surrogate_is_refused_with_its_position(text, position):
    with pytest.raises(ValueError, match=f"at position {position} "):
        TOKENIZER.encode_text(text)
    with pytest.raises(ValueError, match=f"at position {position} "):
        tokenizer.train([text], vocab_size=400)


def test_bytes_that_are_no_character_show_as_the_replacement_character():
    first, second = TOKENIZER.encode_text("\u03c0")  # in no training text: written in bytes
    assert TOKENIZER.decode([first]) == "\ufffd"
    assert TOKENIZER.decode([first, second]) == "\u03c0"
    assert TOKENIZER.decode([TOKENIZER.vocab_size, -1]) == "\ufffd\ufffd"


def test_another_process_learns_the_same_model():
    program = (
        "import hashlib, sys; from mathv2_jax.text import tokenizer\n"
        f"model = tokenizer.train({TEXTS!a}, vocab_size=400, whole_phrases={PHRASES!a})\n"
        "print(hashlib.sha256(model).hexdigest()[:16])"
    )
    for seed in ("1", "2"):
        found = subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert found.stdout.strip() == TOKENIZER.fingerprint


def test_a_tokenizer_travels_to_a_worker_process_as_its_model():
    twin = pickle.loads(pickle.dumps(TOKENIZER))
    assert twin.model_bytes == MODEL and twin.fingerprint == TOKENIZER.fingerprint
    assert twin.encode_text(TEXTS[1]) == TOKENIZER.encode_text(TEXTS[1])


def test_texts_that_hold_little_give_a_smaller_vocabulary():
    model = tokenizer.train(["ab"], vocab_size=10_000)
    assert tokenizer.SentencePieceTokenizer.from_bytes(model).vocab_size < 300


def test_a_long_line_is_learned_from_like_any_other():
    model = tokenizer.train(["perpendicular " * 2000], vocab_size=300)
    learned = tokenizer.SentencePieceTokenizer.from_bytes(model)
    assert len(learned.encode_text("perpendicular")) == 1


def test_a_vocabulary_too_small_for_its_fixed_tokens_is_refused():
    with pytest.raises(ValueError, match="vocab_size 100 does not hold 266 fixed tokens"):
        tokenizer.train(["abc"], vocab_size=100)


@pytest.mark.parametrize("phrase", ["", "<think>", "<s>", "a\u2581b", "<0x0A>"])
def test_a_phrase_that_cannot_be_a_token_is_refused(phrase):
    with pytest.raises(ValueError, match="leave it out"):
        tokenizer.train(["abc"], vocab_size=400, whole_phrases=[phrase])


@pytest.mark.parametrize("texts", [[], ["", "\n\n"]])
def test_training_needs_text(texts):
    with pytest.raises(ValueError, match="no line"):
        tokenizer.train(texts, vocab_size=400)


@pytest.mark.parametrize("model", [b"", b"no model"])
def test_bytes_that_are_no_model_are_refused(model):
    with pytest.raises(ValueError, match="SentencePiece model"):
        tokenizer.SentencePieceTokenizer.from_bytes(model)


def foreign_model(tmp_path, **settings) -> bytes:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(tmp_path / "foreign"),
        vocab_size=400,
        hard_vocab_limit=False,
        model_type="bpe",
        minloglevel=2,
        **settings,
    )
    return (tmp_path / "foreign.model").read_bytes()


def test_a_model_without_the_control_tokens_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no control token <pad>"):
        tokenizer.SentencePieceTokenizer.from_bytes(foreign_model(tmp_path))


def test_a_model_that_changes_spaces_is_refused(tmp_path):
    model = foreign_model(
        tmp_path,
        pad_id=0,
        unk_id=1,
        bos_id=2,
        eos_id=3,
        control_symbols=list(tokenizer.CONTROL_TOKENS[4:]),
        byte_fallback=True,
    )
    with pytest.raises(ValueError, match="changes text"):
        tokenizer.SentencePieceTokenizer.from_bytes(model)


def test_a_role_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="'tool'"):
        Message("tool", "x")
    with pytest.raises(ValueError, match="thinking"):
        Message("user", "x", "hm")
    with pytest.raises(ValueError, match="open_assistant"):
        TOKENIZER.encode([], open_assistant=False, think=True)
