"""Chat templates of Hugging Face: a conversation rendered with its contents told from the template.

The template sees an opaque mark in the place of each content, so that nothing in a content can be
taken for what the template itself writes.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from mathv2_jax.text import tokenizer

_OPEN, _CLOSE = "\ue000", "\ue001"  # private use: around the number of a content
_MARK = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")
# What the template's own expressions may raise: divisions, endless macros, lists too long.
_FAILURES = (
    *(jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError),
    *(RuntimeError, TypeError, ValueError),
)


@dataclasses.dataclass(frozen=True)
class Piece:
    """A stretch of a rendered conversation.

    `owner` is the index of the message whose text it is, None for the template's own;
    `is_thinking` tells a message's thinking from its content.
    """

    text: str
    owner: int | None = None
    is_thinking: bool = False


@dataclasses.dataclass(frozen=True)
class _Entry:
    piece: Piece
    plain: str  # the text without the spelling of any control token


class _Opaque(str):
    """A content as the template sees it: a mark, which may be stripped and tested for emptiness."""

    _book: list[_Entry]
    _entry: _Entry

    def __new__(cls, book: list[_Entry], entry: _Entry):
        made = super().__new__(cls, f"{_OPEN}{len(book)}{_CLOSE}")
        made._book, made._entry = book, entry
        book.append(entry)
        return made

    def __bool__(self) -> bool:
        return bool(self._entry.plain)

    def strip(self, chars: str | None = None, /) -> str:
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None, /) -> str:
        return self._changed(str.lstrip, chars)

    def rstrip(self, chars: str | None = None, /) -> str:
        return self._changed(str.rstrip, chars)

    def _changed(self, change: Any, chars: str | None) -> "_Opaque":
        piece = self._entry.piece
        text = dataclasses.replace(piece, text=change(piece.text, chars))
        return _Opaque(self._book, _Entry(text, change(self._entry.plain, chars)))


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant wrote; it changes nothing in the text."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A template in Jinja, run in a sandbox without clock, files or code of the model's authors.

    `variables` are the named tokens it may write (`bos_token`, ...); `control` are the spellings
    that a content may hold and that the template must not see there.
    """

    def __init__(self, source: str, variables: Mapping[str, str], control: Sequence[str]):
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_raise_exception, strftime_now=_no_clock)
        if _OPEN in source or _CLOSE in source:
            raise ValueError(
                "the chat template holds U+E000 or U+E001, which mark contents here: replace them"
            )
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError, SyntaxError) as error:
            raise ValueError(f"the chat template is not valid Jinja: {error}") from error
        self._variables = dict(variables)
        self._control = pattern_of(control)

    def render(
        self, messages: Sequence[tokenizer.Message], *, open_assistant: bool, think: bool
    ) -> list[Piece]:
        """The conversation in pieces; with `open_assistant` the next turn of the assistant begins.

        `think` is told to the template as `thinking` and `enable_thinking`. ValueError where the
        template refuses the messages, leaves one out, or changes or tests contents otherwise than
        by stripping them and asking whether they are empty.
        """
        book: list[_Entry] = []
        seen = [
            {n: _Opaque(book, self._entry(p)) for n, p in parts.items()}
            for parts in map(_parts, range(len(messages)), messages)
        ]
        plain = [{n: v._entry.plain for n, v in fields.items()} for fields in seen]
        flags = {"add_generation_prompt": open_assistant, "thinking": think}
        written = self._run(messages, seen, flags)
        expected = self._run(messages, plain, flags)
        filled = _MARK.sub(lambda m: book[int(m[1])].plain, written)
        if filled != expected:
            raise ValueError(
                "the chat template changes or tests what messages hold; it may only write it, "
                "whole or stripped. "
                f"It wrote {_differing(expected, filled)!r}, expected was "
                f"{_differing(filled, expected)!r}; rewrite the template"
            )
        pieces = _pieces(written, book)
        kept = {p.owner for p in pieces if not p.is_thinking}
        for at, message in enumerate(messages):
            if at not in kept and message.content:
                raise ValueError(
                    f"the chat template leaves out message {at} (of role {message.role!r}); "
                    "leave it out yourself, or rewrite the template"
                )
        return pieces

    def _entry(self, piece: Piece) -> _Entry:
        plain = self._control.sub(lambda m: "x" * len(m[0]), piece.text)
        return _Entry(piece, plain)

    def _run(
        self,
        messages: Sequence[tokenizer.Message],
        texts: Sequence[Mapping[str, str]],
        flags: Mapping[str, bool],
    ) -> str:
        shown = [{"role": m.role, **text} for m, text in zip(messages, texts, strict=True)]
        try:
            return self._template.render(
                **self._variables,
                **flags,
                enable_thinking=flags["thinking"],
                messages=shown,
                tools=None,
                documents=None,
            )
        except _FAILURES as error:
            roles = [m.role for m in messages]
            raise ValueError(f"the chat template refuses roles {roles}: {error!r}") from error


def pattern_of(spellings: Sequence[str]) -> re.Pattern[str]:
    """A pattern of one group that finds the leftmost, there the longest, of `spellings`."""
    longest_first = sorted(spellings, key=len, reverse=True)
    return re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")


def _parts(at: int, message: tokenizer.Message) -> dict[str, Piece]:
    parts = {"content": Piece(message.content, at)}
    if message.thinking is not None:
        thinking = Piece(message.thinking, at, is_thinking=True)
        parts |= {"reasoning_content": thinking, "thinking": thinking}
    return parts


def _pieces(written: str, book: Sequence[_Entry]) -> list[Piece]:
    pieces = []
    for place, part in enumerate(_MARK.split(written)):
        if place % 2:
            pieces.append(book[int(part)].piece)
        elif part:
            pieces.append(Piece(part))
    return pieces


def _differing(of: str, beside: str) -> str:
    start = next((i for i, (a, b) in enumerate(zip(of, beside, strict=False)) if a != b), 0)
    return of[max(0, start - 20) : start + 40]


def _to_json(value: Any, ensure_ascii: bool = False, **settings: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **settings)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _no_clock(form: str) -> None:
    raise jinja2.TemplateError(
        f"it asks for the date ({form!r}), and the same conversation must have the same ids on "
        "every day; write a fixed date into the template"
    )
