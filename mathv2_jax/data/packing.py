"""Rows of tokens for training: documents and groups, packed first-fit into fixed shapes.

An item is a prompt and the answers to it. Its answers share one copy of the prompt: each sees the
prompt and itself, not its siblings (`model.cache.Layout`). A supervised document is an item with
one answer. Which hidden state predicts a token is an explicit index (`sources_BT`), so no loss
ever shifts an array.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

HEAD_SLOTS = 4  # items per row that may carry a target for the verifier head


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer: its tokens, the loss weight of each, and what the RL loss needs per token.

    `advantage` belongs to the whole answer; `old_logprobs` are the sampler's; `experts_NLA` the
    experts chosen in the rollout for each token that was fed back ([tokens, sparse layers,
    experts per token]; -1 where unknown). `allowed` are the ids that could be drawn for each token,
    None for a token where they are not known.
    """

    tokens: Sequence[int]
    weights: Sequence[float]
    old_logprobs: Sequence[float] | None = None
    advantage: float = 0.0
    experts_NLA: np.ndarray | None = None
    allowed: Sequence[Sequence[int] | None] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """A prompt, its answers, and a target for the verifier head at the prompt's last token.

    `experts_NLA` are those that the rollout sent the prompt's tokens to.
    """

    prompt: Sequence[int]
    answers: Sequence[Answer]
    head_label: float | None = None
    head_weight: float = 0.0
    experts_NLA: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.prompt) + sum(len(a.tokens) for a in self.answers)


class Batch(NamedTuple):
    """B rows of T tokens and N head targets a row: NumPy as packed, JAX arrays once on a mesh.

    Tokens of weight 0 are context or padding. `kept_LBTA` (or None) is the rollout's routing,
    `allowed_BTY` (or None) the ids that it could draw for a token; -1 where neither is known.
    """

    tokens_BT: Any
    positions_BT: Any
    segments_BT: Any
    prefixes_BT: Any
    sources_BT: Any
    weights_BT: Any
    advantages_BT: Any
    old_logprobs_BT: Any
    head_places_BN: Any
    head_labels_BN: Any  # index into records.SCORES
    head_weights_BN: Any
    kept_LBTA: Any = None
    allowed_BTY: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replay:
    """What of a rollout a batch has room for beside its tokens.

    `routing` = (sparse layers, experts per token) or None; `allowed` ids a token, 0 for none.
    """

    routing: tuple[int, int] | None = None
    allowed: int = 0


def empty_batch(rows: int, length: int, replay: Replay = Replay()) -> Batch:
    """Padding only."""
    routing, allowed = replay.routing, replay.allowed
    ints, floats = (np.int32, np.float32)
    shape, heads = (rows, length), (rows, HEAD_SLOTS)
    return Batch(
        tokens_BT=np.zeros(shape, ints),
        positions_BT=np.zeros(shape, ints),
        segments_BT=np.zeros(shape, ints),
        prefixes_BT=np.zeros(shape, ints),
        sources_BT=np.tile(np.arange(length, dtype=ints), (rows, 1)),
        weights_BT=np.zeros(shape, floats),
        advantages_BT=np.zeros(shape, floats),
        old_logprobs_BT=np.zeros(shape, floats),
        head_places_BN=np.zeros(heads, ints),
        head_labels_BN=np.zeros(heads, ints),
        head_weights_BN=np.zeros(heads, floats),
        kept_LBTA=None
        if routing is None
        else np.full((routing[0], rows, length, routing[1]), -1, ints),
        allowed_BTY=np.full((rows, length, allowed), -1, ints) if allowed else None,
    )


class Packer:
    """Fills one `Batch` first-fit. `add` says whether the item found a place."""

    def __init__(self, rows: int, length: int, replay: Replay = Replay()):
        self.batch = empty_batch(rows, length, replay)
        self.length = length
        self._used = [0] * rows
        self._segments = [0] * rows
        self._heads = [0] * rows

    def add(self, item: Item) -> bool:
        """Place an item; False where no row has room. ValueError where no row ever could."""
        size, with_head = len(item), item.head_label is not None
        if size > self.length:
            raise ValueError(
                f"an item of {size} tokens does not fit rows of {self.length}: raise the rows' "
                "length or split the group"
            )
        for row, used in enumerate(self._used):
            room = used + size <= self.length
            if room and not (with_head and self._heads[row] == HEAD_SLOTS):
                self._place(row, item)
                return True
        return False

    def _place(self, row: int, item: Item) -> None:
        b, start, prompt = self.batch, self._used[row], len(item.prompt)
        self._segments[row] += 1
        prompt_segment = self._segments[row]
        self._write(row, start, item.prompt, 0, prompt_segment, prompt_segment)
        last = start + prompt - 1
        if item.experts_NLA is not None and b.kept_LBTA is not None:
            b.kept_LBTA[:, row, start : start + prompt] = item.experts_NLA.swapaxes(0, 1)
        if item.head_label is not None and prompt:
            slot = self._heads[row]
            b.head_places_BN[row, slot] = last
            b.head_labels_BN[row, slot] = round(item.head_label * 2)
            b.head_weights_BN[row, slot] = item.head_weight
            self._heads[row] += 1
        at = start + prompt
        for answer in item.answers:
            size = len(answer.tokens)
            self._segments[row] += 1
            prefix = prompt_segment if prompt else self._segments[row]
            self._write(row, at, answer.tokens, prompt, self._segments[row], prefix)
            if size:
                b.sources_BT[row, at] = last if prompt else at
            where = slice(at, at + size)
            b.weights_BT[row, where] = answer.weights
            if not prompt and size:
                b.weights_BT[row, at] = 0.0
            b.advantages_BT[row, where] = answer.advantage
            if answer.old_logprobs is not None:
                b.old_logprobs_BT[row, where] = answer.old_logprobs
            if answer.experts_NLA is not None and b.kept_LBTA is not None:
                b.kept_LBTA[:, row, where] = answer.experts_NLA.swapaxes(0, 1)
            if answer.allowed is not None and b.allowed_BTY is not None:
                for place, ids in enumerate(answer.allowed, at):
                    b.allowed_BTY[row, place, : len(ids or ())] = ids or ()
            at += size
        self._used[row] = at

    def _write(
        self, row: int, at: int, tokens: Sequence[int], position: int, segment: int, prefix: int
    ) -> None:
        b, size = self.batch, len(tokens)
        where = slice(at, at + size)
        b.tokens_BT[row, where] = tokens
        b.positions_BT[row, where] = np.arange(position, position + size)
        b.segments_BT[row, where] = segment
        b.prefixes_BT[row, where] = prefix
        b.sources_BT[row, where] = np.arange(at - 1, at + size - 1)
        if size:
            b.sources_BT[row, at] = at


def split_item(item: Item, length: int) -> list[Item]:
    """The item as itself or, where it is longer than a row, in parts that repeat its prompt.

    The head's target stays with the first part. ValueError where a single answer does not fit.
    """
    parts: list[Item] = []
    answers: list[Answer] = []
    used = len(item.prompt)
    for answer in item.answers:
        size = len(answer.tokens)
        if len(item.prompt) + size > length:
            raise ValueError(
                f"a prompt of {len(item.prompt)} tokens with an answer of {size} does not fit rows "
                f"of {length}: raise the rows' length"
            )
        if used + size > length:
            parts.append(dataclasses.replace(item, answers=tuple(answers)))
            answers, used = [], len(item.prompt)
        answers.append(answer)
        used += size
    parts.append(dataclasses.replace(item, answers=tuple(answers)))
    return parts[:1] + [dataclasses.replace(p, head_label=None) for p in parts[1:]]


def pack_all(
    items: Sequence[Item],
    rows: int,
    length: int,
    replay: Replay = Replay(),
) -> list[Batch]:
    """As many batches as the items need, all of one shape, in the items' order."""
    batches: list[Batch] = []
    packer = Packer(rows, length, replay)
    for item in items:
        for part in split_item(item, length):
            if not packer.add(part):
                batches.append(packer.batch)
                packer = Packer(rows, length, replay)
                placed = packer.add(part)
                assert placed, "an item that fits a row fits an empty batch"
    batches.append(packer.batch)
    return batches
