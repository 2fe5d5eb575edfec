"""The gate before training: does the trainer give sampled tokens the sampler's log-probabilities?

Everything that a policy gradient does rests on that. The usual faults (attended padding, another
temperature, a truncated distribution, experts chosen anew, stale pages) show here, before a step.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from absl import logging

from mathv2_jax import processes, sharding
from mathv2_jax.data import packing
from mathv2_jax.model import transformer
from mathv2_jax.rl import learner as learner_lib
from mathv2_jax.stages import groups as groups_lib
from mathv2_jax.stages import run as run_lib
from mathv2_jax.stages import steps, updates
from mathv2_jax.stages.rl_config import RlStage

FLOAT32, BFLOAT16 = 1e-3, 0.2  # what a token's log-probabilities may differ by, unless told
_ALL = "tokens"
_BY_CHANCE = 2  # first or last tokens that may be apart in any case


class GateError(RuntimeError):
    """The trainer and the sampler part; the message says where."""


@dataclasses.dataclass(frozen=True)
class Gap:
    """|trainer - sampler| over the tokens of answers, in nats: how large, and how often too large.

    `apart` is how many are above `bound` and of how many, of all tokens and of answers' first and
    last; `row` and `time` are the place of the largest in the batch.
    """

    mean: float
    largest: float
    apart: Mapping[str, tuple[int, int]]
    not_finite: int
    bound: float
    row: int
    time: int
    first: int  # where the answer that the largest is in first parts by more than the bound
    sampler: float
    trainer: float

    @property
    def tokens(self) -> int:
        """How many were compared."""
        return self.apart[_ALL][1]

    @property
    def beyond(self) -> float:
        """The share of tokens above the bound."""
        return self.apart[_ALL][0] / self.tokens

    def fault(self, share: float) -> str:
        """What is wrong where more than a `share` is apart; empty where nothing is.

        A fault of one place, as the first token, is a small share of all: so first and last tokens
        are held to it too, two of them excepted, which chance may bring.
        """
        if self.not_finite:
            return f"{self.not_finite} of {self.tokens} log-probabilities are not finite"
        for name, (apart, number) in self.apart.items():
            if apart > max(share * number, 0 if name == _ALL else _BY_CHANCE):
                return f"of {name} {apart} in {number} are more than {self.bound} apart"
        return ""

    def describe(self) -> str:
        """The figures in a line."""
        return (
            f"trainer and sampler differ by {self.mean:.1e} in log-probability per token (mean of "
            f"{self.tokens}), {self.largest:.1e} at most, and in {self.beyond:.2%} of tokens by "
            f"more than {self.bound}"
        )

    def where(self, batch: packing.Batch, decode: Callable[[Sequence[int]], str]) -> str:
        """The token at which they differ most, in words."""
        row_T, segments_T = batch.tokens_BT[self.row], batch.segments_BT[self.row]
        begin = int(np.flatnonzero(segments_T == segments_T[self.time])[0])
        before = decode(row_T[max(begin, self.time - 12) : self.time].tolist())
        return (
            f"They part most at token {self.time - begin + 1} of an answer (row {self.row}, place "
            f"{self.time}), {decode([int(row_T[self.time])])!r} after {before!r}: sampler "
            f"{self.sampler:.4f}, trainer {self.trainer:.4f}; that answer parts first at its token "
            f"{self.first - begin + 1}."
        )


def measure(batch: packing.Batch, trainer_BT: np.ndarray, bound: float) -> Gap | None:
    """The gap of a batch (of NumPy arrays) that the trainer has scored; None of no tokens.

    Figures that are not finite count as infinitely far.
    """
    real_BT = batch.weights_BT > 0
    if not real_BT.any():
        return None
    gap_BT = np.abs(trainer_BT.astype(np.float64) - batch.old_logprobs_BT)
    finite_BT = np.isfinite(gap_BT)
    gap_BT = np.where(real_BT, np.where(finite_BT, gap_BT, np.inf), 0.0)
    # Of one answer are the tokens of one segment that count.
    own_BT = np.pad(np.where(real_BT, batch.segments_BT, 0), ((0, 0), (1, 1)))
    inner_BT = own_BT[:, 1:-1]
    places = {
        _ALL: real_BT,
        "first tokens of answers": real_BT & (inner_BT != own_BT[:, :-2]),
        "last tokens of answers": real_BT & (inner_BT != own_BT[:, 2:]),
    }
    row, time = map(int, np.unravel_index(np.argmax(gap_BT), gap_BT.shape))
    own_T = real_BT[row] & (batch.segments_BT[row] == batch.segments_BT[row, time])
    parted = np.flatnonzero(own_T & (gap_BT[row] > bound))
    return Gap(
        mean=float(gap_BT[real_BT].mean()),
        largest=float(gap_BT[row, time]),
        apart={n: (int((gap_BT[at] > bound).sum()), int(at.sum())) for n, at in places.items()},
        not_finite=int((real_BT & ~finite_BT).sum()),
        bound=bound,
        row=row,
        time=time,
        first=int(parted[0]) if parted.size else time,
        sampler=float(batch.old_logprobs_BT[row, time]),
        trainer=float(trainer_BT[row, time]),
    )


def bound_of(run: run_lib.Run, stage: RlStage) -> float:
    """The bound that is set, or that of the least precise of the sampler and the trainer."""
    if stage.rl.gate is not None:
        return stage.rl.gate
    trainer = run.trunk.config.param_dtype
    exact = {trainer, run.engine_config.param_dtype or trainer} == {"float32"}
    return FLOAT32 if exact else BFLOAT16


def check(
    run: run_lib.Run,
    stage: RlStage,
    learner: learner_lib.Learner,
    variables: transformer.Variables,
    summaries: Sequence[groups_lib.Summary],
) -> Gap | None:
    """Have the trainer score the first batch of answers; GateError where it parts from the sampler.

    The batch is kept under inspect/ then.
    """
    replay = updates.replay_of(stage.rl, run.trunk.config, run.engine_config)
    batch = updates.pack(stage.rl, summaries, replay)[0]
    trainer_BT = sharding.on_host(learner.logprobs(variables, learner.put(batch)))
    gap = measure(batch, trainer_BT, bound_of(run, stage))
    if gap is None:
        logging.warning("%s: no answer was sampled that the trainer could score", stage.name)
        return None
    print(f"{stage.name}: {gap.describe()}", flush=True)
    fault = gap.fault(stage.rl.gate_share)
    if fault:
        folder = run.workdir / "inspect" / f"{stage.name}-gate"
        processes.first(lambda: steps.write_batches(folder, [batch]))
        raise GateError(
            f"{stage.name}: the trainer's log-probabilities are not the sampler's, so rewards "
            f"would teach something else: {fault}, at most {stage.rl.gate_share:.2%} may be. "
            f"{gap.describe()}. "
            f"{gap.where(batch, run.tokenizer.decode)} The batch is in {folder}. A sampler in "
            "other dtypes or with other kernels than the trainer's is the usual reason "
            "(engine.param_dtype, in a new workdir), else experts chosen anew (rl.keep_routing = "
            f"True replays them, with --restart_stage={stage.name}); rl.gate = 0 trains all the "
            "same"
        )
    return gap
