"""Near-ties in the top-k choices of a reference model, seen while it runs. Needs torch.

Routers and indexers choose the k best of their scores. Where the last that is chosen and the first
that is left out are nearer than rounding (an indexer's scores are often exactly 0), two libraries
may choose differently and both be right; from there on their logits say nothing about the weights.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from torch.overrides import TorchFunctionMode

from mathv2_jax.hf.verify import NEAR


class Tie(NamedTuple):
    """A place where the last chosen and the first left out are nearer than `NEAR`."""

    call: int  # the how-manieth top-k of the pass
    row: int
    time: int
    gap: float


class Watch(TorchFunctionMode):
    """Sees every top-k of a pass over [B, T] tokens, `real_BT` of which are no padding.

    The two best scores of a group are summed, so a tie there changes nothing and is not noted.
    """

    def __init__(self, real_BT: Bool[np.ndarray, "B T"]):
        super().__init__()
        self.real_BT, self.calls = real_BT, 0
        self.ties: list[Tie] = []
        self.smallest = np.inf

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func not in (torch.topk, torch.Tensor.topk):
            return out
        best_of_group = args[0].ndim == 3 and tuple(args[0].shape[:2]) != self.real_BT.shape
        return out if best_of_group else self.choice(args[0], out)

    def choice(self, scores: torch.Tensor, out: Any) -> Any:
        """Notes one choice's near-ties; what it returns is what the model goes on with."""
        self.calls += 1
        k = out[1].shape[-1]
        if k < scores.shape[-1]:
            last_two = scores.detach().topk(k + 1, dim=-1).values[..., -2:].float().numpy()
            self._note(last_two.reshape(*self.real_BT.shape, 2).astype(np.float64))
        return out

    def _note(self, last_two_BT2: np.ndarray) -> None:
        last, next_one = last_two_BT2[..., 0], last_two_BT2[..., 1]
        counts = self.real_BT & (next_one > -1e30)  # else fewer than k + 1 may be chosen
        gap_BT = np.where(counts, last - np.where(counts, next_one, 0.0), np.inf)
        self.smallest = min(self.smallest, float(gap_BT.min()))
        for row, time in np.argwhere(gap_BT < NEAR):
            self.ties.append(Tie(self.calls - 1, int(row), int(time), float(gap_BT[row, time])))

    def untouched(self) -> Bool[np.ndarray, "B T"]:
        """Real places that do not come after a near-tie of their row, nor have one."""
        compared_BT = self.real_BT.copy()
        for tie in self.ties:
            compared_BT[tie.row, tie.time :] = False
        return compared_BT

    def report(self) -> str:
        """All near-ties, and how near the nearest choice of the pass came to one."""
        listed = "".join(
            f"\n    top-k {t.call}, row {t.row}, token {t.time}: {t.gap:.1e}" for t in self.ties
        )
        return f"{len(self.ties)} near-ties, smallest gap {self.smallest:.1e}{listed}"
