"""An engine's calls of its two programs, timed, and a tokenizer that costs nothing; for benchmarks.

Times are wall seconds of calls that end before the next begins.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mathv2_jax.model import transformer
from mathv2_jax.model.config import ModelConfig
from mathv2_jax.rollout import decode


class Call(NamedTuple):
    """One call of decode: rows in use as it began, steps, tokens that count, the furthest slot."""

    seconds: float
    active: int
    steps: int
    tokens: int
    reach: int


class Timed(decode.Programs):
    """An engine's programs, with the time of each call; `look` is called before each decode."""

    def __init__(self, config: ModelConfig, look: Callable[[], None] = lambda: None):
        super().__init__(config, transformer.Kernels())
        self.look = look
        self.calls: list[Call] = []
        self.prefills: list[float] = []
        self._prefill, self._decode = self.prefill, self.decode
        self.prefill, self.decode = self._timed_prefill, self._timed_decode  # pyright: ignore[reportAttributeAccessIssue] - called alike

    def clear(self) -> None:
        """Forget the calls so far."""
        self.calls.clear()
        self.prefills.clear()

    def _timed_prefill(self, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        found = jax.block_until_ready(self._prefill(*args, **kwargs))
        self.prefills.append(time.perf_counter() - began)
        return found

    def _timed_decode(self, *args: Any, **kwargs: Any) -> Any:
        self.look()
        rows = args[2]
        active_B = np.asarray(rows.limit_B > rows.drawn_B)
        slots_B = np.asarray(rows.padded_B + rows.position_B - rows.shared_B)
        began = time.perf_counter()
        found = jax.block_until_ready(self._decode(*args, **kwargs))
        taken = time.perf_counter() - began
        count_B = np.asarray(found[1].count_B)
        steps = int(count_B.max())
        reach = int(slots_B[active_B].max()) + steps // 2
        self.calls.append(Call(taken, int(active_B.sum()), steps, int(count_B.sum()), reach))
        return found

    def parts(self, seconds: float, rows: int) -> dict[str, float]:
        """Seconds of a pass of so many seconds: they sum to it."""
        found = dict.fromkeys(("prefill", "empty", "done", "useful"), 0.0)
        found["prefill"] = sum(self.prefills)
        for call in self.calls:
            a_row = call.seconds / (rows * call.steps)
            found["empty"] += a_row * (rows - call.active) * call.steps
            found["done"] += a_row * (call.active * call.steps - call.tokens)
            found["useful"] += a_row * call.tokens
        return found | {"host": seconds - sum(found.values())}

    @property
    def reach(self) -> int:
        """The furthest slot of a mean step, which all rows' attention goes up to."""
        steps = sum(call.steps for call in self.calls)
        return round(sum(call.reach * call.steps for call in self.calls) / steps)

    @property
    def seconds_a_step(self) -> float:
        """Of decoding."""
        return sum(call.seconds for call in self.calls) / sum(call.steps for call in self.calls)


class Unread:
    """A tokenizer for tokens that nobody reads: no token ends anything, and all text is empty."""

    fingerprint, control_ids, stop_ids = "unread", frozenset(), ()
    pad_id, eos_id, end_think_id = 0, -1, -1

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def decode(self, ids: Sequence[int]) -> str:
        return ""

    def split_thinking(self, ids: Sequence[int], *, think: bool) -> tuple[list[int], list[int]]:
        return [], list(ids)
