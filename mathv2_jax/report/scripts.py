"""Data as scripts that a page may load from disk, where browsers refuse to read anything else.

A script is one call, `report.accept(KIND, NAME, DATA);`. DATA is JSON in ASCII in which no `<`,
`>` or `&` stands, so that nothing in it ends the script, or the page that one is pasted into.
Texts that came from models are only ever values in it, never names of fields.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

CHUNK_BYTES = 500_000


def literal(data: Any) -> str:
    """`data` as JSON that is safe inside a script; ValueError where a number is not finite."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"), ensure_ascii=True)
    for mark in "<>&":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return text


def script(kind: str, name: str, data: Any) -> bytes:
    """The script that hands `data` to the page."""
    return _call(kind, name, literal(data))


def _call(kind: str, name: str, text: str) -> bytes:
    return f"report.accept({literal(kind)}, {literal(name)}, {text});\n".encode("ascii")


def chunks(entries: Iterable[Any], size: int = CHUNK_BYTES) -> Iterator[list[str]]:
    """The entries' literals in runs of about `size` bytes; an entry is never cut."""
    run, filled = list[str](), 0
    for entry in entries:
        text = literal(entry)
        if run and filled + len(text) > size:
            yield run
            run, filled = [], 0
        run.append(text)
        filled += len(text)
    if run:
        yield run


def chunk_script(literals: Sequence[str]) -> tuple[str, bytes]:
    """A chunk's name, which is a function of what it holds, and its script."""
    text = f"[{','.join(literals)}]"
    name = f"texts-{hashlib.sha256(text.encode('ascii')).hexdigest()[:16]}"
    return name, _call("texts", name, text)
