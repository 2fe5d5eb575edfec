"""Text to token ids and back: SentencePiece models, and conversations made of control tokens.

Every text without lone surrogates survives `decode(encode_text(text))` unchanged, and no text
encodes to a control token: only `encode` places those. Training and encoding run on integers
(BPE), so that a text has the same ids on every machine.
"""

import dataclasses
import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import sentencepiece

USER, ASSISTANT, SYSTEM = "<|user|>", "<|assistant|>", "<|system|>"
THINK, END_THINK = "<think>", "</think>"
PAD, UNK, BOS, EOS = "<pad>", "<unk>", "<s>", "</s>"
ROLE_TOKENS = {"user": USER, "assistant": ASSISTANT, "system": SYSTEM}
CONTROL_TOKENS = (PAD, UNK, BOS, EOS, USER, ASSISTANT, SYSTEM, THINK, END_THINK)
SHOWN_TOKENS = (THINK, END_THINK)  # the control tokens that decoded text shows

_SPACE = "\u2581"  # SentencePiece writes a space so; the character itself goes through its bytes
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_NUM_BYTES = 256


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn. `thinking`, of an assistant's turn only, stands before its content."""

    role: str
    content: str
    thinking: str | None = None

    def __post_init__(self):
        if self.role not in ROLE_TOKENS:
            raise ValueError(f"role {self.role!r} of a message is not user, assistant or system")
        if self.thinking is not None and self.role != "assistant":
            raise ValueError(f"a message of role {self.role!r} has no thinking, only assistant's")


@runtime_checkable
class Tokenizer(Protocol):
    """What a run needs of a tokenizer; this module's, and `hf_tokenizer.HfTokenizer`.

    No text encodes to one of `control_ids`; any ids decode. Tokenizers of one `fingerprint` are
    the same; they travel to worker processes by pickle. `stop_ids` end a response, `eos_id` is the
    one of them that ends a turn of the assistant's. `end_think_id` is -1 where the vocabulary has
    no `</think>`, and thinking is refused by `encode`.
    """

    @property
    def fingerprint(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def control_ids(self) -> frozenset[int]: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def stop_ids(self) -> tuple[int, ...]: ...
    @property
    def end_think_id(self) -> int: ...

    def encode_text(self, text: str) -> list[int]: ...

    def encode(
        self, messages: Sequence[Message], *, open_assistant: bool = True, think: bool = False
    ) -> list[int]: ...

    def encode_with_loss_mask(
        self, messages: Sequence[Message]
    ) -> tuple[list[int], list[bool]]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def split_thinking(
        self, ids: Sequence[int], *, think: bool
    ) -> tuple[list[int], list[int] | None]: ...


def train(texts: Iterable[str], *, vocab_size: int, whole_phrases: Sequence[str] = ()) -> bytes:
    """A SentencePiece BPE model (its proto) learned from `texts`; the same input, the same bytes.

    Each of `whole_phrases` is one token wherever it stands, and so is a newline; digits stand
    alone; what the vocabulary lacks is written in bytes. The vocabulary is smaller than
    `vocab_size` where the texts hold no more to merge.
    """
    phrases = ["\n", *(p for p in dict.fromkeys(whole_phrases) if p != "\n")]
    for phrase in phrases:
        if not phrase or _SPACE in phrase or phrase in CONTROL_TOKENS or _BYTE.fullmatch(phrase):
            raise ValueError(
                f"whole phrase {phrase!r} is empty, holds U+2581 or is spelt like a control token "
                "or a byte token; leave it out"
            )
        require_text(phrase)
    fixed = len(CONTROL_TOKENS) + len(phrases) + _NUM_BYTES
    lines = [line for text in texts for line in require_text(text).splitlines() if line]
    if not lines:
        raise ValueError("a tokenizer is trained on text: the texts given hold no line")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,
            required_chars=_SPACE,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            pad_piece=PAD,
            unk_piece=UNK,
            bos_piece=BOS,
            eos_piece=EOS,
            control_symbols=list(CONTROL_TOKENS[4:]),
            user_defined_symbols=[phrase.replace(" ", _SPACE) for phrase in phrases],
            max_sentence_length=1 << 30,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"vocab_size {vocab_size} does not hold {fixed} fixed tokens (control tokens, whole "
            f"phrases, bytes) and the texts' characters; raise it: {error}"
        ) from error
    return model.getvalue()


class SentencePieceTokenizer:
    """A SentencePiece model with this project's control tokens. Made by `from_bytes`."""

    def __init__(self, model: bytes):
        self.model_bytes = model
        self.fingerprint = hashlib.sha256(model).hexdigest()[:16]
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.load_from_serialized_proto(model)
        except RuntimeError as error:
            raise ValueError(f"not a SentencePiece model ({len(model)} bytes): {error}") from error
        self.vocab_size: int = self._processor.vocab_size()
        control = {token: self._find(token) for token in CONTROL_TOKENS}
        self.control_ids = frozenset(control.values())
        self.pad_id, self.bos_id, self.eos_id = control[PAD], control[BOS], control[EOS]
        self.stop_ids = (self.eos_id,)
        self.think_id, self.end_think_id = control[THINK], control[END_THINK]
        self._role_ids = {role: control[token] for role, token in ROLE_TOKENS.items()}
        self._bytes_of = [self._piece_bytes(i) for i in range(self.vocab_size)]
        self._escaped_space = [self._byte_id(b) for b in _SPACE.encode()]
        self._require_lossless()

    def __reduce__(self):
        return SentencePieceTokenizer, (self.model_bytes,)

    @classmethod
    def from_bytes(cls, model: bytes) -> "SentencePieceTokenizer":
        """ValueError where `model` is no SentencePiece model, or not such as `train` makes."""
        return cls(model)

    def reserved(self) -> dict[str, int]:
        """Control tokens and tokens of single bytes, as they are spelt."""
        ids = [i for i in range(self.vocab_size) if self._is_reserved(i)]
        return {self._processor.id_to_piece(i): i for i in ids}

    def pieces(self) -> dict[str, int]:
        """The tokens of text, phrases before the bytes' tokens and learned pieces after them."""
        ids = [i for i in range(self.vocab_size) if not self._is_reserved(i)]
        return {self._processor.id_to_piece(i).replace(_SPACE, " "): i for i in ids}

    def score(self, token_id: int) -> float:
        """Of the pieces that two neighbours could be joined to, that of the best score wins."""
        return self._processor.get_score(token_id)

    def encode_text(self, text: str) -> list[int]:
        """The ids of a text, none of them a control token's; ValueError at a lone surrogate."""
        first, *others = require_text(text).split(_SPACE)
        ids = list(self._processor.encode(first))
        for part in others:
            ids += self._escaped_space
            ids += self._processor.encode(part)
        return ids

    def encode(
        self,
        messages: Sequence[Message],
        *,
        open_assistant: bool = True,
        think: bool = False,
    ) -> list[int]:
        """bos and the messages; then, if asked, the opening of the assistant's next turn."""
        ids, _ = self.encode_with_loss_mask(messages)
        if open_assistant:
            ids.append(self._role_ids["assistant"])
            if think:
                ids.append(self.think_id)
        elif think:
            raise ValueError("think=True opens the assistant's turn: it needs open_assistant=True")
        return ids

    def encode_with_loss_mask(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """The conversation's ids, and which of them the assistant wrote.

        Those are its thinking with `</think>`, its content and its eos; the role token and
        `<think>` belong to the prompt.
        """
        ids, mask = [self.bos_id], [False]
        for message in messages:
            prompt, written = [self._role_ids[message.role]], []
            if message.thinking is not None:
                prompt.append(self.think_id)
                written += [*self.encode_text(message.thinking), self.end_think_id]
            written += self.encode_text(message.content)
            if message.role == "assistant":
                written.append(self.eos_id)
            ids += prompt + written
            mask += [False] * len(prompt) + [message.role == "assistant"] * len(written)
        return ids, mask

    def decode(self, ids: Sequence[int]) -> str:
        """The text of any ids. Of the control tokens only the two of thinking show.

        Bytes that are no UTF-8, as a model may write them, become U+FFFD; so do ids beyond the
        vocabulary, as a model with a padded one may sample them.
        """
        known, unknown = self._bytes_of, "\ufffd".encode()
        parts = [known[i] if 0 <= i < len(known) else unknown for i in ids]
        return b"".join(parts).decode("utf-8", "replace")

    def split_thinking(
        self, ids: Sequence[int], *, think: bool
    ) -> tuple[list[int], list[int] | None]:
        """(thinking, final) of a response: cut at the last `</think>`, which is in neither.

        Without thinking everything is final; with it and no `</think>` there is no final response.
        """
        return split_at_last(ids, self.end_think_id) if think else ([], list(ids))

    def _find(self, token: str) -> int:
        found = self._processor.piece_to_id(token)
        control = self._processor.is_unknown if token == UNK else self._processor.is_control
        if self._processor.id_to_piece(found) != token or not control(found):
            raise ValueError(
                f"the SentencePiece model has no control token {token}; tokenizer.train makes "
                "models that have"
            )
        return found

    def _is_reserved(self, token_id: int) -> bool:
        return token_id in self.control_ids or self._processor.is_byte(token_id)

    def _byte_id(self, byte: int) -> int:
        found = self._processor.piece_to_id(f"<0x{byte:02X}>")
        if not self._processor.is_byte(found):
            raise ValueError("the SentencePiece model has no byte fallback; train it with it")
        return found

    def _piece_bytes(self, token_id: int) -> bytes:
        piece = self._processor.id_to_piece(token_id)
        if token_id in self.control_ids or self._processor.is_control(token_id):
            return piece.encode() if piece in SHOWN_TOKENS else b""
        if self._processor.is_byte(token_id):
            return bytes([int(piece[1:-1], 16)])
        return piece.replace(_SPACE, " ").encode()

    def _require_lossless(self):
        probe = "  A \u00e9\ufb01\u00bd\n\n\tx  y \r\n "
        if self.decode(self.encode_text(probe)) != probe:
            raise ValueError(
                "the SentencePiece model changes text (spaces, newlines or characters); train it "
                "with identity normalisation, no dummy prefix and all its whitespace"
            )


def split_at_last(ids: Sequence[int], end: int) -> tuple[list[int], list[int] | None]:
    """What stands before and after the last `end`; without one, (all of it, None)."""
    ids = list(ids)
    cut = next((i for i in reversed(range(len(ids))) if ids[i] == end), None)
    return (ids, None) if cut is None else (ids[:cut], ids[cut + 1 :])


def require_text(text: str) -> str:
    """The text itself; ValueError at a lone surrogate."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"lone surrogate {text[error.start]!r} at position {error.start} is no text; "
            "replace it before encoding"
        ) from error
    return text
