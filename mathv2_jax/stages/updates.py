"""A step's updates: groups as rows, what of the rollout is replayed, and the learner's calls."""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mathv2_jax.data import packing
from mathv2_jax.model.config import ModelConfig
from mathv2_jax.rl import grpo as grpo_lib
from mathv2_jax.rl import learner as learner_lib
from mathv2_jax.rl import placement
from mathv2_jax.rollout import schedule
from mathv2_jax.stages import groups as groups_lib
from mathv2_jax.stages import run as run_lib
from mathv2_jax.stages.rl_config import RlConfig

# Means over answers with a signal.
OF_ANSWERS = ("kl", "entropy", "clipped", "dropped", "ratio", "importance")
_NOTHING = packing.Replay()


def pack_updates(
    run: run_lib.Run, config: RlConfig, summaries: Sequence[groups_lib.Summary]
) -> list[list[packing.Batch]]:
    """The micro-batches of each update of a step."""
    replay = replay_of(config, run.trunk.config, run.engine_config)
    count = config.updates
    bounds = [len(summaries) * number // count for number in range(count + 1)]
    parts = [summaries[begin:end] for begin, end in itertools.pairwise(bounds)]
    return [pack(config, [trained(s) for s in part], replay) for part in parts]


def trained(summary: groups_lib.Summary) -> groups_lib.Summary:
    """Without answers where there is no signal."""
    if summary.has_signal:
        return summary
    return dataclasses.replace(summary, answers=(), advantages=())


def replay_of(
    config: RlConfig, model: ModelConfig, engine_config: schedule.EngineConfig
) -> packing.Replay:
    """What of a rollout the trainer replays."""
    routed = config.keep_routing and model.num_sparse_layers > 0
    return packing.Replay(
        routing=(model.num_sparse_layers, model.experts_per_token) if routed else None,
        allowed=engine_config.most_kept if config.keep_sampling_mask else 0,
    )


def update(
    config: RlConfig,
    learner: learner_lib.Learner,
    state: learner_lib.TrainState,
    reference: placement.ParameterSet | None,
    packed: Sequence[Sequence[packing.Batch]],
    rate: float,
) -> tuple[learner_lib.TrainState, dict[str, jax.Array]]:
    """A step's updates on its micro-batches, and the mean of what they measured.

    Log-probabilities that stay are those of before the first. `tokens` are all; `finite` is 1 where
    every update was; what is of answers is a mean over the updates that have answers.
    """
    heard = [any((batch.weights_BT > 0).any() for batch in batches) for batches in packed]
    flat = [learner.put(batch) for batch in itertools.chain(*packed)]
    initial = logprobs_of(reference, learner, flat)
    needs_own = config.grpo.importance_cap > 0 and len(packed) > 1
    own = [learner.logprobs(state.variables, b) if needs_own else None for b in flat]
    anchors = list(map(grpo_lib.Anchors, initial, own))
    found: list[dict[str, jax.Array]] = []
    for batches in packed:
        now, flat = flat[: len(batches)], flat[len(batches) :]
        fixed, anchors = anchors[: len(batches)], anchors[len(batches) :]
        state, measured = learner.step(state, now, fixed, rate)
        found.append(measured)
    if len(found) == 1:
        return state, found[0]
    each = {name: jnp.stack([one[name] for one in found]) for name in found[0]}
    joined = {"tokens": jnp.sum, "expert_overflow": jnp.sum, "finite": jnp.min}
    if any(heard):
        of_answers = np.flatnonzero(heard)
        joined |= dict.fromkeys(OF_ANSWERS, lambda x: jnp.mean(x[of_answers]))
    return state, {name: joined.get(name, jnp.mean)(x) for name, x in each.items()}


def logprobs_of(
    reference: placement.ParameterSet | None,
    learner: learner_lib.Learner,
    batches: Sequence[packing.Batch],
) -> list[jax.Array | None]:
    """The reference's log-probabilities of each batch, which are put; it is not needed after."""
    if reference is None:
        return [None] * len(batches)
    with reference.in_use() as initial:
        return [learner.logprobs(initial, batch) for batch in batches]


def pack(
    config: RlConfig,
    groups: Sequence[groups_lib.Summary],
    replay: packing.Replay = _NOTHING,
) -> list[packing.Batch]:
    """Groups as rows; every verifier task also gives the head its target."""
    lengths = [[len(drawn.tokens) for drawn in g.answers] for g in groups]
    weights = grpo_lib.token_weights(lengths, config.grpo)
    labelled = [g for g in groups if g.head_label is not None]
    items = []
    for group, token_weights in zip(groups, weights, strict=True):
        answers = [
            packing.Answer(
                tokens=drawn.tokens,
                weights=[weight] * len(drawn.tokens),
                old_logprobs=drawn.logprobs,
                advantage=advantage,
                experts_NLA=drawn.routing_NLA,
                allowed=drawn.kept,
            )
            for drawn, weight, advantage in zip(
                group.answers, token_weights, group.advantages, strict=True
            )
        ]
        trust = config.head_auto_weight if group.auto else config.head_weight
        if answers or group.head_label is not None:
            items.append(
                packing.Item(
                    prompt=group.prompt,
                    answers=tuple(answers),
                    head_label=group.head_label,
                    head_weight=trust / max(len(labelled), 1),
                    experts_NLA=_prompt_routing(group),
                )
            )
    return packing.pack_all(items, config.rows, config.row_length, replay)


def _prompt_routing(group: groups_lib.Summary) -> np.ndarray | None:
    """The experts of a prompt's tokens; the last was fed with its answers, all to the same."""
    fed = [drawn.experts for drawn in group.answers if drawn.experts is not None]
    if group.prompt_experts is None or not fed:
        return None
    return np.concatenate([group.prompt_experts.array(), fed[0].array()[:1]])
