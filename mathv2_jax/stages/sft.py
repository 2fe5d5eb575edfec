"""Supervised stages: the cold start, and rejection fine-tuning on a run's own best responses."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any

from absl import logging

from mathv2_jax import records, sharding
from mathv2_jax.data import mixture, packing, rows
from mathv2_jax.rl import auxiliary as auxiliary_lib
from mathv2_jax.rl import learner as learner_lib
from mathv2_jax.rl import optimizer as optimizer_lib
from mathv2_jax.stages import run as run_lib
from mathv2_jax.stages import steps
from mathv2_jax.text import tokenizer as tokenizer_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Batches of `rows` x `row_length` packed tokens; the mean log-probability of the assistant's
    tokens is raised, prompts count `prompt_weight` each (0: not at all). `auxiliary` weighs the
    losses of experts, indexers and further predictions beside it."""

    steps: int
    rows: int
    row_length: int
    optimizer: optimizer_lib.OptimizerConfig
    prompt_weight: float = 0.0
    auxiliary: auxiliary_lib.AuxiliaryConfig = auxiliary_lib.AuxiliaryConfig()

    def __post_init__(self):
        if min(self.steps, self.rows, self.row_length) < 1:
            raise ValueError(
                f"sft.steps = {self.steps}, rows = {self.rows}, row_length = {self.row_length}: "
                "each must be at least 1"
            )
        if not 0.0 <= self.prompt_weight <= 1.0:
            raise ValueError(f"sft.prompt_weight = {self.prompt_weight}: must lie in 0..1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftStage:
    """Cold start from `init` on the input file `demonstrations`."""

    name: str
    init: str = run_lib.FRESH
    demonstrations: str = "demonstrations"
    sft: SftConfig


def supervised_item(
    tokenizer: tokenizer_lib.Tokenizer,
    demonstration: records.Demonstration,
    prompt_weight: float,
    *,
    think: bool,
) -> packing.Item:
    """A conversation as one item; with a prompt weight the prompt is learned too.

    Where only spans of the answer are learned, the rest of it, and its end, weigh nothing.
    """
    user = tokenizer_lib.Message("user", demonstration.user)
    prompt = tokenizer.encode([user], think=think)
    whole = demonstration.assistant
    answer: list[int] = []
    if think:
        answer = [*tokenizer.encode_text(demonstration.thinking or ""), tokenizer.end_think_id]
    weights = [0.0 if demonstration.learned else 1.0] * len(answer)
    at = 0
    for start, end in (*demonstration.learned, (len(whole), len(whole))):
        for text, weight in ((whole[at:start], 0.0), (whole[start:end], 1.0)):
            ids = tokenizer.encode_text(text)
            answer += ids
            weights += [weight if demonstration.learned else 1.0] * len(ids)
        at = end
    answer.append(tokenizer.eos_id)
    weights.append(0.0 if demonstration.learned else 1.0)
    if prompt_weight:
        both = packing.Answer(
            tokens=[*prompt, *answer], weights=[prompt_weight] * len(prompt) + weights
        )
        return packing.Item(prompt=(), answers=(both,))
    return packing.Item(prompt=prompt, answers=(packing.Answer(tokens=answer, weights=weights),))


def run_stage(run: run_lib.Run, stage: SftStage) -> dict[str, Any]:
    """Train on the demonstrations; leaves the stage's variables."""
    demonstrations = run.input(stage.demonstrations, records.Demonstration)
    return train(run, stage.name, stage.init, stage.sft, demonstrations)


def train(
    run: run_lib.Run,
    name: str,
    init: str,
    config: SftConfig,
    demonstrations: Sequence[records.Demonstration],
) -> dict[str, Any]:
    """The supervised loop. Conversations longer than a row are left out, counted and reported."""
    if not demonstrations:
        raise ValueError(f"stage {name}: there is nothing to learn from, its source is empty")
    item = functools.partial(
        supervised_item,
        run.tokenizer,
        prompt_weight=config.prompt_weight,
        think=run.roles.generator.think,
    )
    only = [mixture.Phase(begin=0, weights={"demonstrations": 1.0})]
    stream = mixture.stream({"demonstrations": demonstrations}, only, run.seed_for(name)).map(item)
    learner = run.learner(
        ("sft", config.optimizer.without_rate(), config.auxiliary),
        functools.partial(_make_learner, run, config),
    )
    with steps.Loop(run, name, config.steps, learner, init) as loop:
        packed = rows.PackedRows(
            stream,
            config.rows,
            config.row_length,
            rows.Position.from_json(loop.position),
            sharding.own_rows(run.mesh, config.rows),
        )
        reader = rows.Reader(packed, run.runtime.data_workers)
        with contextlib.closing(reader):
            for step in loop.remaining():
                began = time.monotonic()
                batch = reader.read()
                waited = time.monotonic() - began
                assert batch is not None, "the stream has no end"
                rate = optimizer_lib.learning_rate(config.optimizer, step, config.steps)
                fresh = learner.step(loop.state, [learner.put(batch)], [None], rate)
                loop.advance(*fresh, [batch], reader.where, {}, [], waited)
            if reader.left_out:
                logging.warning(
                    "%s: %d items of the stream did not fit rows of %d tokens (row_length), and "
                    "were left out",
                    *(name, reader.left_out, config.row_length),
                )
            return loop.finish()


def _make_learner(run: run_lib.Run, config: SftConfig) -> learner_lib.Learner:
    trunk = dataclasses.replace(run.trunk, auxiliary=config.auxiliary)
    return learner_lib.Learner(
        trunk,
        functools.partial(learner_lib.supervised, trunk, mean=True),
        optimizer_lib.make_optimizer(config.optimizer),
        run.mesh,
        router_bias_rate=run.router_bias_rate,
    )
