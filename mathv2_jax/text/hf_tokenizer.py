"""Tokenizers in the format of Hugging Face: byte-level BPE from tokenizer.json, a chat template.

Texts of messages are encoded by a tokenizer that has no added tokens at all, so that no text, not
even the spelling of `<|User|>` or `</think>`, becomes one; only the chat template places them.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import tokenizers
from tokenizers import pre_tokenizers

from mathv2_jax import storage
from mathv2_jax.text import chat_template, tokenizer
from mathv2_jax.text.chat_template import Piece
from mathv2_jax.text.tokenizer import Message

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"
TEMPLATE, GENERATION = "chat_template.jinja", "generation_config.json"
FILES = (TOKENIZER, CONFIG, TEMPLATE, GENERATION, "special_tokens_map.json")
_REQUIRED_BYTES = frozenset(range(256)) - {0xC0, 0xC1, *range(0xF5, 0x100)}  # those of UTF-8
_UNKNOWN = "\ufffd".encode()


class _Run(NamedTuple):
    ids: list[int]
    learned: bool


class HfTokenizer:
    """A byte-level BPE tokenizer with its chat template. Made by `tokenizer_files.load`.

    The ids of a conversation are those of `apply_chat_template` in transformers wherever no text
    spells an added token; an assistant's text is encoded apart from what stands around it, as it
    is when a model continues a prompt.
    """

    def __init__(self, files: Mapping[str, bytes]):
        """`files` by name: tokenizer.json, tokenizer_config.json, and those of `FILES` there are.

        ValueError names what is missing, broken or not supported in them.
        """
        self.files = {name: files[name] for name in FILES if name in files}
        digest = hashlib.sha256()
        for name, data in sorted(self.files.items()):
            digest.update(f"{name}\0{len(data)}\0".encode() + data)
        self.fingerprint = digest.hexdigest()[:16]
        spec, config = read_json(files, TOKENIZER), read_json(files, CONFIG)
        reference = _load(files[TOKENIZER].decode())
        _require_byte_level(spec)
        added = _added_tokens(spec, config)
        self._id_of = {token["content"]: int(token["id"]) for token in added}
        self.control_ids = frozenset(self._id_of.values())
        self._content = _without_added_tokens(spec, self._id_of)
        self._bytes_of = _bytes_of(spec, added)
        self.vocab_size = len(self._bytes_of)
        self.end_think_id = self._id_of.get(tokenizer.END_THINK, -1)
        self._control = chat_template.pattern_of(list(self._id_of))
        named = _named_tokens(config)
        self.stop_ids = self._find_stops(named)
        self._template = chat_template.ChatTemplate(
            _template_source(files, config), named, list(self._id_of)
        )
        self.eos_id = self._find_end_of_turn()
        bos, pad = named.get("bos_token"), named.get("pad_token")
        self.bos_id = None if bos is None else self._id_of[bos]
        self.pad_id = self.eos_id if pad is None else self._id_of[pad]
        self._require_equal_to_reference(reference)

    def __reduce__(self):
        return HfTokenizer, (self.files,)

    def encode_text(self, text: str) -> list[int]:
        """The ids of a text, none of them an added token's; ValueError at a lone surrogate."""
        encoded = self._content.encode(tokenizer.require_text(text), add_special_tokens=False)
        return encoded.ids

    def encode(
        self, messages: Sequence[Message], *, open_assistant: bool = True, think: bool = False
    ) -> list[int]:
        """The conversation as the template writes it; then, if asked, the assistant's next turn.

        ValueError where the template opens thinking and `think` is false, or the reverse.
        """
        if open_assistant:
            return _ids(self._runs(messages, self._opening(messages, think=think), set()))
        if think:
            raise ValueError("think=True opens the assistant's turn: it needs open_assistant=True")
        ids, _ = self.encode_with_loss_mask(messages)
        return ids

    def encode_with_loss_mask(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """The conversation's ids, and which of them the assistant wrote.

        Those of a last turn are its thinking with `</think>`, its content, and what the template
        writes up to the token that ends the turn. Earlier turns are as the template shows them,
        which may be without their thinking: such a turn is not learned, others are.
        """
        pieces = self._template.render(messages, open_assistant=False, think=False)
        learned = {
            at for at, m in enumerate(messages) if m.role == "assistant" and m.thinking is None
        }
        if messages and messages[-1].role == "assistant":
            pieces = self._as_written(messages, pieces)
            learned.add(len(messages) - 1)
        runs = self._runs(messages, pieces, learned)
        return _ids(runs), [run.learned for run in runs for _ in run.ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of any ids. Special tokens do not show, but those of thinking do.

        Bytes that are no UTF-8 become U+FFFD, and so do ids that the vocabulary lacks.
        """
        known = self._bytes_of
        parts = [known[i] if 0 <= i < len(known) else _UNKNOWN for i in ids]
        return b"".join(parts).decode("utf-8", "replace")

    def split_thinking(
        self, ids: Sequence[int], *, think: bool
    ) -> tuple[list[int], list[int] | None]:
        """(thinking, final) of a response: cut at the last `</think>`, which is in neither.

        Without thinking everything is final; with it and no `</think>` there is no final response.
        """
        return tokenizer.split_at_last(ids, self.end_think_id) if think else ([], list(ids))

    def _opening(self, messages: Sequence[Message], *, think: bool) -> list[Piece]:
        pieces = self._template.render(messages, open_assistant=True, think=think)
        tail = pieces[-1].text if pieces and pieces[-1].owner is None else ""
        control = self._control.findall(tail)
        opens = bool(control) and control[-1] == tokenizer.THINK
        if opens and not think:
            raise ValueError(
                "the chat template opens the assistant's turn with <think>, and thinking is not "
                "asked for: set roles.think=True, or take the <think> out of the template"
            )
        if think and (not opens or self.end_think_id < 0):
            raise ValueError(
                "thinking is asked for, and the chat template does not open the assistant's turn "
                "with <think>, or </think> is no added token: set roles.think=False, or let the "
                "template write it where `thinking` is true"
            )
        return pieces

    def _as_written(self, messages: Sequence[Message], pieces: list[Piece]) -> list[Piece]:
        """The pieces of a conversation with its last turn as its model writes it."""
        last, message = len(messages) - 1, messages[-1]
        opening = self._opening(messages[:-1], think=message.thinking is not None)
        found = [i for i, p in enumerate(pieces) if p.owner == last and not p.is_thinking]
        if not found:
            raise ValueError("the chat template leaves out an empty content of the assistant's")
        before, after = pieces[: found[-1]], pieces[found[-1] + 1 :]
        content = pieces[found[-1]]
        if message.thinking is not None:
            thinking = Piece(message.thinking, last, is_thinking=True)
            return [*opening, thinking, Piece(tokenizer.END_THINK), content, *after]
        if opening != before:
            raise ValueError(
                f"the chat template opens a turn with {opening[-1].text[-40:]!r} and shows a "
                f"written one after {before[-1].text[-40:]!r}: what is learned would not be what "
                "is sampled; make them the same in the template"
            )
        return [*opening, content, *after]

    def _runs(
        self, messages: Sequence[Message], pieces: Iterable[Piece], learned: set[int]
    ) -> list[_Run]:
        """The ids in runs; from a learned message's text to the end of its turn they are learned.

        The template's text is encoded together with the users' texts beside it, as one text.
        """
        runs: list[_Run] = []
        text: list[str] = []
        writer: int | None = None

        def flush() -> None:
            if text:
                runs.append(_Run(self.encode_text("".join(text)), writer is not None))
                text.clear()

        for piece in pieces:
            if piece.owner is not None:
                if writer not in (None, piece.owner):
                    raise ValueError(_NO_END)
                if messages[piece.owner].role == "assistant":
                    flush()
                    writer = piece.owner if piece.owner in learned else None
                    runs.append(_Run(self.encode_text(piece.text), writer is not None))
                else:
                    text.append(piece.text)
                continue
            for place, part in enumerate(self._control.split(piece.text)):
                if place % 2 == 0:
                    text += [part] if part else []
                    continue
                flush()
                runs.append(_Run([self._id_of[part]], writer is not None))
                if self._id_of[part] in self.stop_ids:
                    writer = None
        flush()
        if writer is not None:
            raise ValueError(_NO_END)
        return runs

    def _find_stops(self, named: Mapping[str, str]) -> tuple[int, ...]:
        listed = _stops_of(read_json(self.files, GENERATION) if GENERATION in self.files else {})
        found = {*listed, *({self._id_of[named["eos_token"]]} if "eos_token" in named else ())}
        if not found:
            raise ValueError(
                f"no end of text: neither {CONFIG} (eos_token) nor {GENERATION} (eos_token_id) "
                "names one; add it"
            )
        for stop in found:
            if not 0 <= stop < self.vocab_size:
                raise ValueError(
                    f"{GENERATION}: eos_token_id {stop} lies outside the vocabulary of "
                    f"{self.vocab_size} tokens; correct it"
                )
        return tuple(sorted(found))

    def _find_end_of_turn(self) -> int:
        turns = [Message("user", "x"), Message("assistant", "y")]
        pieces = self._template.render(turns, open_assistant=False, think=False)
        runs = self._runs(turns, pieces, {1})
        return [run.ids[-1] for run in runs if run.learned][-1]

    def _require_equal_to_reference(self, reference: tokenizers.Tokenizer) -> None:
        for content, i in self._id_of.items():
            if reference.token_to_id(content) != i:
                raise ValueError(
                    f"{TOKENIZER}: the added token {content!r} is given id {i}, and model.vocab or "
                    f"another one makes it {reference.token_to_id(content)}; correct the file"
                )
        messages = [Message("user", "Let x\n\n be 12.\n")]
        thinks = self._template.render(messages, open_assistant=True, think=True)
        pieces = self._template.render(messages, open_assistant=True, think=False)
        for found in (thinks, pieces):
            whole = "".join(p.text for p in found)
            expected = reference.encode(whole, add_special_tokens=False).ids
            if _ids(self._runs(messages, found, set())) != expected:
                raise ValueError(
                    f"{TOKENIZER} and the chat template give other ids for {whole!r} than "
                    "the parts of it do: this kind of tokenizer is not supported"
                )


_NO_END = (
    "the chat template ends the assistant's turn without a stop token (eos_token, or one of "
    f"eos_token_id in {GENERATION}): a model would never learn to stop; write it there"
)


def _ids(runs: Iterable[_Run]) -> list[int]:
    return [i for run in runs for i in run.ids]


def read_json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """The object in one of a tokenizer's files; ValueError names one that has none."""
    if name not in files:
        raise ValueError(f"a tokenizer of Hugging Face needs {name}; there are {sorted(files)}")
    try:
        body = storage.parse_json(files[name])
    except ValueError as error:
        raise ValueError(f"{name} is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise ValueError(f"{name} must hold a JSON object, it holds a {type(body).__name__}")
    return body


def _load(spec: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(spec)
    except Exception as error:  # the class itself is what tokenizers raises
        raise ValueError(f"{TOKENIZER} is not a tokenizer: {error}") from error


def _require_byte_level(spec: Mapping[str, Any]) -> None:
    """ValueError unless texts are cut, never changed, and come back from their ids."""
    model = spec.get("model") or {}
    rules: list[tuple[str, Any, Callable[[Any], bool]]] = [
        ("model.type", model.get("type"), lambda v: v == "BPE"),
        ("model.dropout", model.get("dropout"), lambda v: not v),
        ("model.continuing_subword_prefix", model.get("continuing_subword_prefix"), _is_empty),
        ("model.end_of_word_suffix", model.get("end_of_word_suffix"), _is_empty),
        ("normalizer", spec.get("normalizer"), lambda v: not _leaves(v, "normalizers")),
        ("pre_tokenizer", spec.get("pre_tokenizer"), _cuts_bytes),
        ("decoder", spec.get("decoder"), lambda v: _names(v, "decoders") == ["ByteLevel"]),
    ]
    for name, value, holds in rules:
        if not holds(value):
            raise ValueError(
                f"{TOKENIZER}: {name} = {json.dumps(value)[:200]} is not supported: only "
                "byte-level BPE that leaves texts as they are (no normalizer, no prefix) is"
            )
    vocab = model.get("vocab")
    if not isinstance(vocab, dict):
        raise ValueError(f"{TOKENIZER}: model.vocab must be an object of tokens and ids")
    spelt = _byte_alphabet()
    missing = [b for c, b in spelt.items() if b in _REQUIRED_BYTES and c not in vocab]
    if missing:
        raise ValueError(
            f"{TOKENIZER}: model.vocab lacks the bytes {missing[:10]}, so that some texts have no "
            "ids"
        )


def _is_empty(value: Any) -> bool:
    return value in (None, "")


def _leaves(node: Any, children: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, sequences flattened."""
    if not node:
        return []
    if node.get("type") == "Sequence":
        return [leaf for child in node.get(children, []) for leaf in _leaves(child, children)]
    return [node]


def _names(node: Any, children: str) -> list[Any]:
    return [leaf.get("type") for leaf in _leaves(node, children)]


def _cuts_bytes(node: Any) -> bool:
    leaves = _leaves(node, "pretokenizers")
    *cuts, last = leaves or [{}]
    return (
        last.get("type") == "ByteLevel"
        and not last.get("add_prefix_space", True)
        and all(c.get("type") in ("Split", "Digits") for c in cuts)
        and all(c.get("behavior") != "Removed" for c in cuts)
    )


def _added_tokens(spec: Mapping[str, Any], config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The added tokens of tokenizer.json; ValueError where tokenizer_config.json has others."""
    added = spec.get("added_tokens") or []
    for token in added:
        flags = [f for f in ("lstrip", "rstrip", "single_word") if token.get(f)]
        if flags or not token.get("content"):
            raise ValueError(
                f"{TOKENIZER}: the added token {token.get('content')!r} (id {token.get('id')}) is "
                f"empty or has {flags}, which takes in what stands beside it: not supported"
            )
    known = {token["content"]: token["id"] for token in added}
    for at, token in (config.get("added_tokens_decoder") or {}).items():
        content = token.get("content") if isinstance(token, dict) else token
        if known.get(content) != int(at):
            raise ValueError(
                f"{CONFIG} has the added token {content!r} with id {at}, {TOKENIZER} has "
                f"{known.get(content)}: they belong to different tokenizers"
            )
    for name, content in _named_tokens(config).items():
        if content not in known:
            raise ValueError(
                f"{CONFIG}: {name} {content!r} is no added token of {TOKENIZER}; add it there, "
                "or leave it out"
            )
    return added


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    named = {}
    for name, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            named[name] = content
    return named


def _without_added_tokens(
    spec: Mapping[str, Any], id_of: Mapping[str, int]
) -> tokenizers.Tokenizer:
    """The same cuts and merges, with no added token in reach: not even as an entry to merge to."""
    model = spec["model"]
    for merge in model.get("merges", []):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        for built in (left, right, left + right):
            if built in id_of:
                raise ValueError(
                    f"{TOKENIZER}: the merge of {left!r} and {right!r} involves the added token "
                    f"{built!r}, so that a text could become it: not supported"
                )
    vocab = {piece: i for piece, i in model["vocab"].items() if piece not in id_of}
    plain = {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    return _load(json.dumps({**spec, **plain, "model": {**model, "vocab": vocab}}))


def _byte_alphabet() -> dict[str, int]:
    """Each character of the byte-level alphabet with the byte that it stands for.

    Printable bytes of Latin-1 stand for themselves; the others follow from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    alphabet = {chr(b): b for b in printable}
    alphabet |= {chr(0x100 + i): b for i, b in enumerate(others)}
    if set(pre_tokenizers.ByteLevel.alphabet()) != set(alphabet):
        raise AssertionError("the byte-level alphabet of tokenizers is another one")
    return alphabet


def _bytes_of(spec: Mapping[str, Any], added: Iterable[Mapping[str, Any]]) -> list[bytes]:
    alphabet = _byte_alphabet()
    found: dict[int, bytes] = {}
    for piece, i in spec["model"]["vocab"].items():
        is_spelt = all(c in alphabet for c in piece)
        found[i] = bytes(alphabet[c] for c in piece) if is_spelt else piece.encode()
    for token in added:
        hidden = token.get("special") and token["content"] not in tokenizer.SHOWN_TOKENS
        found[token["id"]] = b"" if hidden else token["content"].encode()
    return [found.get(i, _UNKNOWN) for i in range(max(found) + 1)]


def _stops_of(config: Mapping[str, Any]) -> list[int]:
    stops = config.get("eos_token_id")
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    if not all(isinstance(stop, int) for stop in stops):
        raise ValueError(f"{GENERATION}: eos_token_id = {stops!r} must be an id or a list of ids")
    return stops


def _template_source(files: Mapping[str, bytes], config: Mapping[str, Any]) -> str:
    if TEMPLATE in files:
        return files[TEMPLATE].decode()
    named = config.get("chat_template")
    if isinstance(named, list):
        named = {t["name"]: t["template"] for t in named}.get("default")
    if not isinstance(named, str):
        raise ValueError(
            f"there is no chat template, neither {TEMPLATE} nor chat_template in {CONFIG}; put "
            f"one beside {TOKENIZER} (where a model's format is Python code, that is never run)"
        )
    return named
