"""What an engine has on its devices: variables, pages, and calls of the two compiled programs."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mathv2_jax import sharding
from mathv2_jax.model import cache as cache_lib
from mathv2_jax.model import transformer
from mathv2_jax.rollout import answers as answers_lib
from mathv2_jax.rollout import decode, sampling, schedule


@dataclasses.dataclass(frozen=True)
class Sizes:
    """An engine's rows, pieces of prompts and pages on a mesh, which splits all of them `parts`
    ways: each part of the rows has pages of its own.
    """

    parts: int
    rows: int
    chunks: int
    pages_a_part: int  # without the one that nobody reads

    @property
    def rows_a_part(self) -> int:
        """Rows that share pages."""
        return self.rows // self.parts

    @property
    def chunks_a_part(self) -> int:
        """Pieces of prompts of one part that are computed together."""
        return self.chunks // self.parts


def sizes_on(mesh: Mesh, config: schedule.EngineConfig) -> Sizes:
    """What the config asks for, rounded up to multiples of the mesh's parts."""
    parts = sharding.batch_ways(mesh)
    rows = -(-config.rows // parts)
    pages = rows * config.pages_a_row
    if config.pages:
        pages = max(-(-config.pages // parts), config.pages_a_row)
    return Sizes(parts, rows * parts, -(-config.chunks // parts) * parts, pages)


class Computed(NamedTuple):
    """A piece of a prompt of a part of the rows that is in its pages now.

    `head_3` is the verifier head's P(score) after its last token; `experts_TLA` are those that its
    tokens were sent to, None where not asked for.
    """

    part: int
    piece: schedule.Piece
    head_3: np.ndarray
    experts_TLA: np.ndarray | None


class Worker:
    """Variables and a cache on a mesh. Both are lazy: nothing is there before `load`."""

    def __init__(
        self, programs: decode.Programs, config: schedule.EngineConfig, mesh: Mesh, pad_id: int
    ):
        self.config, self.mesh, self.sizes = config, mesh, sizes_on(mesh, config)
        boxed = transformer.boxed_abstract(programs.config, programs.kernels)
        self.abstract = transformer.unboxed(boxed)
        self.shardings = sharding.shardings_for(boxed, mesh)
        self.programs = programs
        self._pad_id = pad_id
        number = self.sizes.parts * (self.sizes.pages_a_part + 1)
        self._empty = jax.jit(
            lambda: transformer.empty_cache(programs.config, number, config.page),
            out_shardings=pages_sharding(mesh),
        )
        self._variables: transformer.Variables | None = None
        self._cache: transformer.Cache | None = None

    def load(self, variables: transformer.Variables) -> None:
        """Compute with these, which are JAX arrays on the mesh's devices, however they lie."""
        self.unload()  # there need not be room for both
        self._variables = jax.device_put(variables, self.shardings)

    def unload(self) -> None:
        """Let go of variables and pages."""
        self._variables = self._cache = None

    def forget(self) -> None:
        """Let go of the pages; a call that failed has taken them with it."""
        self._cache = None

    @contextlib.contextmanager
    def _in_use(self) -> Iterator[tuple[transformer.Variables, transformer.Cache]]:
        """The variables and the pages, which the block gives back."""
        if self._variables is None:
            raise ValueError("this engine has no variables yet: call load before the first request")
        pages = self._cache or self._empty()
        self._cache = None  # the program takes it over
        with sharding.computing(self.mesh):
            yield self._variables, pages

    def compute(
        self, queues: Sequence[Sequence[schedule.Piece]], *, experts: bool = False
    ) -> Iterator["Computed"]:
        """Pieces of prompts into their pages, by part of the rows and in their order."""
        each = self.sizes.chunks_a_part
        for begin in range(0, max(map(len, queues)), each):
            now = [queue[begin : begin + each] for queue in queues]
            with self._in_use() as (variables, pages):
                self._cache, *found = self.programs.prefill(
                    variables, pages, self._chunks(now), experts=experts
                )
            head_R3, sent_LRTA = sharding.on_host(tuple(found))
            for part, queue in enumerate(now):
                for row, piece in enumerate(queue, part * each):
                    sent_TLA = None
                    if sent_LRTA is not None:
                        sent_TLA = sent_LRTA[:, row, : piece.end - piece.begin].swapaxes(0, 1)
                    yield Computed(part, piece, head_R3[row], sent_TLA)

    def _chunks(self, now: Sequence[Sequence[schedule.Piece]]) -> decode.Chunks:
        config, taps = self.config, self.programs.config.embedding_taps
        shape = (self.sizes.chunks, config.chunk)
        tokens = np.full(shape, self._pad_id, np.int32)
        positions, slots = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
        previous = np.zeros((*shape, taps), np.int32)
        table = np.zeros((shape[0], config.pages_a_row), np.int32)
        for part, queue in enumerate(now):
            for row, piece in enumerate(queue, part * self.sizes.chunks_a_part):
                size = piece.end - piece.begin
                tokens[row, :size] = piece.prompt[piece.begin : piece.end]
                positions[row, :size] = slots[row, :size] = np.arange(piece.begin, piece.end)
                previous[row, :size] = [
                    before(piece.prompt, at, taps) for at in range(piece.begin, piece.end)
                ]
                table[row, : len(piece.pages)] = piece.pages
        none = np.zeros((shape[0],), np.int32)
        arrays = (tokens, positions, previous, (table, slots, none, none))
        found = sharding.put(arrays, sharding.batch_sharding(self.mesh))
        return decode.Chunks(*found[:3], view=cache_lib.PageView(*found[3]))

    def advance(
        self,
        answers: Sequence[answers_lib.Answer | None],
        least: int,
        *,
        experts: bool = False,
        kept: bool = False,
    ) -> decode.Drawn:
        """Some tokens for the answers in the rows, as NumPy arrays; see decode.decode.

        They are computed by their length, the longest first, for rows that are attended to apart.
        """
        order = self._by_length(answers)
        rows = self._rows([answers[row] for row in order])
        asked = sharding.put(np.int32(least), sharding.replicated(self.mesh))
        with self._in_use() as (variables, pages):
            self._cache, drawn = self.programs.decode(
                variables,
                pages,
                rows,
                asked,
                steps=self.config.steps,
                truncate=any(a is not None and a.truncated for a in answers),
                experts=experts,
                most_kept=self.config.most_kept if kept else 0,
            )
        drawn, back = sharding.on_host(drawn), np.argsort(order)
        sent = drawn.experts_KLBA
        found = jax.tree.map(lambda x_B: x_B[back], drawn._replace(experts_KLBA=None))
        return found._replace(experts_KLBA=None if sent is None else sent[:, :, back])

    def _by_length(self, answers: Sequence[answers_lib.Answer | None]) -> list[int]:
        """The rows of each part, those that hold most tokens first."""

        def length(row: int) -> int:
            answer = answers[row]
            return 0 if answer is None else answer.lease.length + len(answer.tokens) + 1

        each = self.sizes.rows_a_part
        parts = [range(begin, begin + each) for begin in range(0, len(answers), each)]
        return [row for part in parts for row in sorted(part, key=length, reverse=True)]

    def _rows(self, answers: Sequence[answers_lib.Answer | None]) -> decode.Rows:
        config, taps, number = self.config, self.programs.config.embedding_taps, len(answers)
        ints = {name: np.zeros((number,), np.int32) for name in _INTS}
        previous = np.zeros((number, taps), np.int32)
        stops = np.full((number, config.most_stops), -1, np.int32)
        keys, temperature = np.zeros((number, 2), np.uint32), np.ones((number,), np.float32)
        top_p, min_p = np.ones((number,), np.float32), np.zeros((number,), np.float32)
        table = np.zeros((number, config.pages_a_row), np.int32)
        for row, answer in enumerate(answers):
            if answer is None:
                continue
            asked, drawn, shared = answer.request, len(answer.tokens), answer.lease.length
            own_begin = len(answer.lease.nodes)
            values = dict(
                token=answer.tokens[-1] if drawn else asked.prompt[-1],
                position=shared + drawn,
                drawn=drawn,
                limit=asked.max_tokens,
                top_k=asked.top_k,
                shared=shared,
                padded=own_begin * config.page,
            )
            for name, value in values.items():
                ints[name][row] = value
            previous[row] = _before_drawn(asked.prompt, answer.tokens, taps)
            stops[row, : len(answer.stop_ids)] = answer.stop_ids
            keys[row], temperature[row] = answer.key, asked.temperature
            top_p[row], min_p[row] = asked.top_p, asked.min_p
            table[row, :own_begin] = answer.lease.pages
            table[row, own_begin : own_begin + len(answer.own)] = answer.own
        arrays: dict[str, Any] = dict(
            token_B=ints["token"],
            previous_BW=previous,
            position_B=ints["position"],
            drawn_B=ints["drawn"],
            limit_B=ints["limit"],
            stops_BX=stops,
            keys_B2=keys,
            temperature_B=temperature,
            truncation=(top_p, ints["top_k"], min_p),
            table_BM=table,
            shared_B=ints["shared"],
            padded_B=ints["padded"],
        )
        found = sharding.put(arrays, sharding.batch_sharding(self.mesh))
        truncation = sampling.Truncation(*found.pop("truncation"))
        return decode.Rows(**found, truncation=truncation)


_INTS = ("token", "position", "drawn", "limit", "top_k", "shared", "padded")


def pages_sharding(mesh: Mesh) -> NamedSharding:
    """How pages lie: each part of the rows has its own."""
    rows = sharding.batch_sharding(mesh)
    return NamedSharding(mesh, PartitionSpec(None, *rows.spec))


def before(prompt: Sequence[int], at: int, taps: int) -> list[int]:
    """The `taps` tokens before the one at `at`, the nearest first; a first token is its own."""
    return [prompt[max(at - 1 - back, 0)] for back in range(taps)]


def _before_drawn(prompt: Sequence[int], drawn: Sequence[int], taps: int) -> list[int]:
    """Those before the token that is fed next: the last drawn one, or the prompt's last."""
    ending = (*prompt, *drawn) if len(drawn) <= taps else drawn
    if len(drawn) <= taps:
        return before(ending, len(ending) - 1, taps)
    return [drawn[-2 - back] for back in range(taps)]
