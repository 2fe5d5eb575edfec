"""What an engine decides on the host: who holds which page, and which tokens are computed next.

Plain Python, without an array and without a clock: a function of the requests and of what was
drawn, so every process of a mesh decides alike.
"""

import collections
import dataclasses
from collections.abc import Collection, Iterator, Sequence

from mathv2_jax import records


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What is compiled, and how much is kept.

    `rows` answers are decoded together, `steps` tokens between two looks at who is done. A prompt
    and its answer take at most `context` tokens; a request for more is lost, that request alone.
    The cache is `pages` pages of `page` tokens (0: as many as all rows can need); where they do
    not suffice the youngest answers begin again later. Prompts are computed in `chunks` pieces of
    `chunk` tokens at once.

    `param_dtype` is that of the parameters that sample; empty: the model's own. Another is a
    sampler that is not the trainer to the last bit: watch the metric `ratio`. `most_kept` is how
    many ids are recorded of what truncation keeps for a token, `most_stops` how many ids may end an
    answer.
    """

    param_dtype: str = ""
    rows: int = 128
    context: int = 256
    page: int = 16
    pages: int = 0
    chunk: int = 32
    chunks: int = 32
    steps: int = 16
    most_kept: int = 128
    most_stops: int = 8

    def __post_init__(self):
        if self.param_dtype not in ("", "float32", "bfloat16"):
            raise ValueError(
                f"engine.param_dtype = {self.param_dtype!r}: must be float32, bfloat16 or empty"
            )
        for name in ("rows", "page", "chunk", "chunks", "steps", "most_kept", "most_stops"):
            if getattr(self, name) < 1:
                raise ValueError(f"engine.{name} = {getattr(self, name)}: must be at least 1")
        if self.context < 2:
            raise ValueError(f"engine.context = {self.context}: must hold a prompt and an answer")
        if self.pages and self.pages < self.pages_a_row:
            raise ValueError(
                f"engine.pages = {self.pages}: a row of engine.context = {self.context} tokens may "
                f"need {self.pages_a_row} pages of {self.page}; give that many, or 0 for all rows'"
            )

    @property
    def pages_a_row(self) -> int:
        """The most that a row needs: its prompt and its own tokens each end in a page of theirs."""
        return -(-self.context // self.page) + 1


def complaint(config: EngineConfig, request: records.Request, stop_ids: Collection[int]) -> str:
    """Why a request cannot be answered; empty where it can."""
    prompt, new = len(request.prompt), request.max_tokens
    if request.messages:
        return "it holds messages, and this engine is asked in token ids"
    if not prompt or new < 1:
        return f"a prompt of {prompt} tokens with up to {new} new ones: both must be positive"
    if not all(request.stop):
        return "an empty stop string would end every answer before it begins"
    if prompt + new > config.context:
        return (
            f"a prompt of {prompt} tokens with up to {new} new ones does not fit "
            f"engine.context = {config.context}"
        )
    if len(stop_ids) > config.most_stops:
        return f"{len(stop_ids)} stop ids, engine.most_stops = {config.most_stops}"
    return ""


@dataclasses.dataclass(eq=False)
class _Node:
    """A page of prompt tokens after those of its `parent`: shared by all prompts that begin so."""

    parent: "_Node | None"
    tokens: tuple[int, ...]
    page: int
    holders: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Lease:
    """A prompt's pages; what they hold is there below slot `start`, and to be computed from it."""

    nodes: tuple[_Node, ...]
    length: int
    start: int

    @property
    def pages(self) -> list[int]:
        """In the prompt's order."""
        return [node.page for node in self.nodes]


class Pool:
    """Pages 1 to `number` of `size` slots, and which prompts' beginnings are in them.

    Pages of prompts that nobody holds stay until their room is wanted, those least recently held
    first.
    """

    def __init__(self, number: int, size: int):
        self.number, self.size = number, size
        self._free: list[int] = []
        self._nodes: dict[tuple[int, tuple[int, ...]], _Node] = {}
        self._idle: collections.OrderedDict[int, _Node] = collections.OrderedDict()
        self._clear()

    def _clear(self) -> None:
        self._free = list(range(self.number, 0, -1))
        self._nodes.clear()
        self._idle.clear()

    @property
    def available(self) -> int:
        """Pages that can be had: free ones, and those that nobody holds."""
        return len(self._free) + len(self._idle)

    @property
    def kept(self) -> int:
        """Pages of prompts that nobody holds."""
        return len(self._idle)

    def take(self) -> int | None:
        """A page; None where all are held."""
        if not self._free:
            if not self._idle:
                return None
            _, node = self._idle.popitem(last=False)
            del self._nodes[_key(node.parent, node.tokens)]
            self._free.append(node.page)
        return self._free.pop()

    def take_all(self, number: int) -> list[int] | None:
        """So many pages; None, and nothing taken, where there are fewer to be had."""
        if self.available < number:
            return None
        return [page for _ in range(number) if (page := self.take()) is not None]

    def give_all(self, pages: Sequence[int]) -> None:
        """Take pages back that were taken."""
        self._free += reversed(pages)

    def has(self, prompt: Sequence[int]) -> bool:
        """Whether all of a prompt is there."""
        parent = None
        for at in range(0, len(prompt), self.size):
            parent = self._nodes.get(_key(parent, tuple(prompt[at : at + self.size])))
            if parent is None:
                return False
        return True

    def lease(self, prompt: Sequence[int]) -> Lease | None:
        """Pages for a prompt, those that are there already shared; None where there is no room."""
        nodes: list[_Node] = []
        parent, start = None, len(prompt)
        for at in range(0, len(prompt), self.size):
            tokens = tuple(prompt[at : at + self.size])
            node = self._nodes.get(_key(parent, tokens))
            if node is None:
                page = self.take()
                if page is None:
                    self._undo(nodes, start)
                    return None
                node = _Node(parent, tokens, page)
                self._nodes[_key(parent, tokens)] = node
                start = min(start, at)
            self._idle.pop(id(node), None)
            node.holders += 1
            nodes.append(node)
            parent = node
        return Lease(tuple(nodes), len(prompt), start)

    def release(self, lease: Lease) -> None:
        """The prompt is not needed any more; what later ones share may stay."""
        for node in reversed(lease.nodes):  # so that ends of prompts go before their beginnings
            node.holders -= 1
            if not node.holders:
                self._idle[id(node)] = node

    def undo(self, lease: Lease) -> None:
        """As if it had not been given, before anything was computed."""
        self._undo(lease.nodes, lease.start)

    def forget(self) -> None:
        """No page holds anything any more. ValueError where one is held."""
        if self.available != self.number:
            raise ValueError(f"{self.number - self.available} pages are held: release them first")
        self._clear()

    def _undo(self, nodes: Sequence[_Node], start: int) -> None:
        """Nothing was computed in the pages from slot `start` on."""
        for at, node in reversed(list(enumerate(nodes))):
            node.holders -= 1
            if at * self.size >= start:
                del self._nodes[_key(node.parent, node.tokens)]
                self._free.append(node.page)
            elif not node.holders:
                self._idle[id(node)] = node


def _key(parent: _Node | None, tokens: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    return (0 if parent is None else id(parent), tokens)


@dataclasses.dataclass(frozen=True)
class Piece:
    """Tokens `begin` to `end` of a prompt, to be computed into its pages."""

    prompt: Sequence[int]
    pages: Sequence[int]
    begin: int
    end: int


def pieces(prompt: Sequence[int], pages: Sequence[int], start: int, length: int) -> Iterator[Piece]:
    """The prompt from slot `start` on, at most `length` tokens a piece."""
    for begin in range(start, len(prompt), length):
        yield Piece(prompt, pages, begin, min(begin + length, len(prompt)))
