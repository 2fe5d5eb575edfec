"""What a compiled program sends between chips, by kind, read from its text with its loops."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "f8e4m3fn": 8, "f8e5m2": 8}
_BITS |= {f"{sign}{size}": size for sign in "su" for size in (4, 8, 16, 32, 64)}
_SHAPE = re.compile(r"\b([a-z]+[0-9]*(?:e[0-9]m[0-9][a-z]*)?)\[([0-9,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
_OPERATION = re.compile(r"(?:^|[\s)}])([a-z][a-z0-9\-]*)\(")
_CALLED = re.compile(
    r"(?:body|calls|to_apply|branch_computations|called_computations)=\{?%([\w.\-]+)"
)
_CONDITION = re.compile(r"condition=%([\w.\-]+)")
_LESS = re.compile(r"compare\(%([\w.\-]+), %([\w.\-]+)\), direction=LT")
_KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_SCOPES = re.compile(r'metadata=\{op_name="([^"]*)"')
_CONSTANT = re.compile(r"constant\((\d+)\)")


class Instruction(NamedTuple):
    """A line of the text: its name, the operation, and the line's right side."""

    name: str
    operation: str
    text: str


class Sent(NamedTuple):
    """Bytes of one chip by kind of collective; what is in loops of unknown length, counted once."""

    bytes_by_kind: dict[str, int]
    unknown_loops: tuple[str, ...]


def collectives(text: str, length: Callable[[str], float | None] = lambda scopes: None) -> Sent:
    """The bytes that one chip's collectives give it, by kind: the sizes of their results.

    Of an all-gather that is what arrives and the chip's own part; an all-reduce moves about twice
    its result. A loop counts as often as its condition, a counter from 0 below a constant, says, or
    else `length` of the scopes that it was traced in.
    One that is spread over several fusions, to go on beside their computation, stands in each of
    them with one channel, and counts once.
    """
    computations, entry = _computations(text)
    found: dict[str, float] = defaultdict(float)
    unknown: list[str] = []
    channels: set[str] = set()

    def visit(name: str, times: float, fused: bool = False) -> None:
        for one in computations[name]:
            kind = one.operation.removesuffix("-start")
            if kind in KINDS:
                channel = _CHANNEL.search(one.text) if fused else None
                if channel and channel[1] in channels:
                    continue
                channels.update(channel.groups() if channel else ())
                found[kind] += times * _bytes(one)
            elif one.operation == "while":
                scopes = _SCOPES.search(one.text)
                count = _trips(computations, one.text) or (scopes and length(scopes[1]))
                if count is None:
                    unknown.append(one.name)
                for called in _CALLED.findall(one.text):
                    visit(called, times * (count or 1))
            else:
                for called in _CALLED.findall(one.text):
                    visit(called, times, fused or one.operation == "fusion")

    visit(entry, 1)
    sizes = {kind: round(size) for kind, size in sorted(found.items())}
    return Sent(sizes, tuple(unknown))


def _computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    found: dict[str, list[Instruction]] = {}
    entry, at = "", None
    for line in text.splitlines():
        if at is None:
            head = _COMPUTATION.match(line)
            if head and line.endswith("{"):
                at = head[2]
                found[at] = []
                entry = at if head[1] else entry
        elif line.startswith("}"):
            at = None
        else:
            instruction = _INSTRUCTION.match(line)
            if instruction:
                found[at].append(_parsed(instruction[1], instruction[2]))
    if not entry:
        raise ValueError("the text holds no ENTRY computation: is it that of a compiled program?")
    return found, entry


def _parsed(name: str, text: str) -> Instruction:
    """The operation is the first word before a bracket that is no part of the result's type."""
    rest = _after_type(text)
    operation = _OPERATION.search(" " + rest)
    return Instruction(name, operation[1] if operation else "", text)


def _after_type(text: str) -> str:
    if not text.startswith("("):
        return text.partition(" ")[2]
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[at + 1 :]
    return ""


def _bytes(one: Instruction) -> int:
    """Of the result; an asynchronous start holds its operand too, which is left out."""
    rest = _after_type(one.text)
    kind = one.text[: len(one.text) - len(rest)]
    sizes = list(_sizes(kind))
    if one.operation.endswith("-start") and len(sizes) > 1:
        return sizes[1]
    return sum(sizes)


def _sizes(text: str) -> Iterator[int]:
    for dtype, shape in _SHAPE.findall(text):
        if dtype in _BITS:
            count = math.prod(int(n) for n in shape.split(",") if n)
            yield count * _BITS[dtype] // 8


def _trips(computations: dict[str, list[Instruction]], text: str) -> int | None:
    known = _KNOWN.search(text)  # said by CPUs' and GPUs' programs
    if known:
        return int(known[1])
    condition = _CONDITION.search(text)
    if condition is None or condition[1] not in computations:
        return None
    held = {one.name: one for one in computations[condition[1]]}
    for one in held.values():
        less = _LESS.search(one.text)
        if less and less[2] in held:
            constant = _CONSTANT.search(held[less[2]].text)
            if constant:
                return int(constant[1])
    return None
