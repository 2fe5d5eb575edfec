"""Answers in the making: what a row of the engine has drawn so far."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from mathv2_jax import records
from mathv2_jax.rollout import decode, schedule
from mathv2_jax.text import tokenizer as tokenizer_lib


def row_key(seed: int, index: int) -> np.ndarray:
    """Key data (two uint32) of one answer, a function of the request's seed and its index."""
    return np.random.SeedSequence([seed, index]).generate_state(2)


def unanswered(
    request: records.Request, index: int, finish: records.Finish, version: str
) -> records.Response:
    """What comes back for a sample that was lost or cancelled."""
    return records.Response(
        request_id=request.id,
        index=index,
        token_ids=(),
        logprobs=(),
        text="",
        final_text=None,
        thinking_text="",
        finish=finish,
        parameter_version=version,
    )


@dataclasses.dataclass(eq=False)
class Answer:
    """One answer in a row: the pages that it holds, of its prompt and its own, and what it drew.

    `experts` and `kept` are by token, as far as they were asked for; the first experts are those of
    the prompt's last token.
    """

    place: int
    index: int
    request: records.Request
    stop_ids: Sequence[int]
    part: int
    lease: schedule.Lease
    key: np.ndarray
    own: list[int] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    policy_logprobs: list[float] = dataclasses.field(default_factory=list)
    experts: list[np.ndarray] = dataclasses.field(default_factory=list)  # [layers, a token's]
    kept: list[tuple[int, ...] | None] = dataclasses.field(default_factory=list)

    def pages_at(self, drawn: int, size: int) -> int:
        """Pages of its own that it needs to draw so many tokens: the last is never fed."""
        return -(-min(drawn, self.request.max_tokens) // size)

    @property
    def truncated(self) -> bool:
        """Whether its request leaves tokens out."""
        asked = self.request
        return asked.top_p < 1.0 or asked.top_k > 0 or asked.min_p > 0.0

    def extend(self, drawn: decode.Drawn, row: int, *, kept: bool) -> None:
        """What its row drew."""
        count = int(drawn.count_B[row])
        self.tokens += drawn.tokens_BK[row, :count].tolist()
        self.logprobs += drawn.logprobs_BK[row, :count].tolist()
        self.policy_logprobs += drawn.policy_logprobs_BK[row, :count].tolist()
        if drawn.experts_KLBA is not None:
            self.experts += list(drawn.experts_KLBA[:count, :, row])
        if kept and self.truncated:
            self.kept += _kept(drawn, row, count)

    def cut(self, tokenizer: tokenizer_lib.Tokenizer, first: int) -> bool:
        """End with the token that completes a stop string, if any does: whether one did.

        Tokens before `first` were looked at.
        """
        if not self.request.stop:
            return False
        back = max(len(s.encode()) for s in self.request.stop) + 8  # tokens, of a byte at least
        for end in range(first + 1, len(self.tokens) + 1):
            text = tokenizer.decode(self.tokens[max(0, end - back) : end])
            if any(stop in text for stop in self.request.stop):
                for drawn in (self.tokens, self.logprobs, self.policy_logprobs):
                    del drawn[end:]
                del self.experts[end:], self.kept[end:]
                return True
        return False


def _kept(drawn: decode.Drawn, row: int, count: int) -> list[tuple[int, ...] | None]:
    """The ids that truncation kept for each token; None where there were more than are recorded."""
    assert drawn.kept_BKY is not None and drawn.num_kept_BK is not None
    most = drawn.kept_BKY.shape[-1]
    return [
        tuple(ids[:number].tolist()) if number <= most else None
        for ids, number in zip(
            drawn.kept_BKY[row, :count], drawn.num_kept_BK[row, :count], strict=True
        )
    ]
