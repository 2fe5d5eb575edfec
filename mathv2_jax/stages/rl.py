"""Reinforcement learning of any role: one loop, the roles and rewards passed to it as values."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import jax
from absl import logging

from mathv2_jax import records, roles
from mathv2_jax import reward as reward_lib
from mathv2_jax.data import packing, sources
from mathv2_jax.rl import auxiliary as auxiliary_lib
from mathv2_jax.rl import grpo as grpo_lib
from mathv2_jax.rl import learner as learner_lib
from mathv2_jax.rl import optimizer as optimizer_lib
from mathv2_jax.rl import placement
from mathv2_jax.stages import groups as groups_lib
from mathv2_jax.stages import run as run_lib
from mathv2_jax.stages import scoring, steps
from mathv2_jax.stages import tasks as tasks_lib

INPUT_PROOFS = "proofs"  # the input file of D_v
LENGTH_REWARDS = ("zero", "mask")
OF_ANSWERS = ("kl", "entropy", "clipped", "dropped", "ratio")  # means over answers with a signal


@dataclasses.dataclass(frozen=True, kw_only=True)
class RlConfig:
    """A step: `groups` prompts, `samples` responses each, one update on rows of `row_length`.

    Groups without signal (all rewards equal) are counted and refilled in stream order in at most
    `max_refills` rounds; then the step trains on what there is. `on_length`: a response cut at
    its own limit earns 0 (`zero`) or leaves its group (`mask`). `head_weight` and
    `head_auto_weight` weigh human and automatic labels in the verifier head's loss, `auxiliary` the
    losses of experts, indexers and further predictions.
    """

    steps: int
    groups: int = 16
    samples: int = 8
    rows: int = 16
    row_length: int = 384
    max_refills: int = 0
    on_length: str = "zero"
    optimizer: optimizer_lib.OptimizerConfig
    grpo: grpo_lib.GrpoConfig = dataclasses.field(default_factory=grpo_lib.GrpoConfig)
    judge: scoring.JudgeConfig = dataclasses.field(default_factory=scoring.JudgeConfig)
    weights: reward_lib.GeneratorWeights = dataclasses.field(
        default_factory=reward_lib.GeneratorWeights
    )
    head_weight: float = 1.0
    head_auto_weight: float = 0.5
    auxiliary: auxiliary_lib.AuxiliaryConfig = auxiliary_lib.AuxiliaryConfig()

    def __post_init__(self):
        for name in ("steps", "groups", "rows", "row_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"rl.{name} = {getattr(self, name)}: must be at least 1")
        if self.samples < 2:
            raise ValueError(f"rl.samples = {self.samples}: a group needs at least 2")
        if self.max_refills < 0:
            raise ValueError(f"rl.max_refills = {self.max_refills}: must not be negative")
        if self.on_length not in LENGTH_REWARDS:
            raise ValueError(f"rl.on_length = {self.on_length!r}: must be one of {LENGTH_REWARDS}")
        for name in ("head_weight", "head_auto_weight"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"rl.{name} = {getattr(self, name)}: must not be negative")
        if self.auxiliary.indexer and self.auxiliary.indexer_stage == "dense":
            raise ValueError(
                "rl.auxiliary.indexer_stage = 'dense': the sampler's attention is sparse, and the "
                "trainer's must be too; warm up in a supervised stage"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RlStage:
    """One RL stage. `mixture` weighs the roles that the policy trains in.

    `judge` names the stage whose variables judge: with verifier tasks it turns R_meta on, with
    generator tasks it is the frozen verifier. `proofs` names what D_v is made of: the input file
    and any auto-labelling stages; `fresh_share` is the weight of the latter in it. Those that hold
    no labelled proof leave their weight to the others.
    """

    name: str
    init: str
    mixture: Mapping[str, float]
    judge: str | None = None
    proofs: tuple[str, ...] = (INPUT_PROOFS,)
    fresh_share: float = 0.5
    rl: RlConfig

    def __post_init__(self):
        unknown = sorted(set(self.mixture) - set(roles.NAMES))
        if unknown or not self.mixture:
            raise ValueError(
                f"stage {self.name}: mixture {dict(self.mixture)} must weigh some of {roles.NAMES}"
            )
        weights = self.mixture.values()
        if not all(0.0 <= w < math.inf for w in weights) or not any(weights):
            raise ValueError(
                f"stage {self.name}: mixture {dict(self.mixture)}: a weight must not be negative, "
                "and one must be positive"
            )
        if not 0.0 <= self.fresh_share <= 1.0:
            raise ValueError(
                f"stage {self.name}: fresh_share = {self.fresh_share} must lie in 0..1"
            )
        if roles.GENERATOR in self.mixture and self.judge is None:
            raise ValueError(f"stage {self.name}: a generator needs a judge, name its stage")
        if roles.GENERATOR in self.mixture and len(self.mixture) > 1:
            raise ValueError(f"stage {self.name}: a generator trains alone, against a frozen judge")


def run_stage(run: run_lib.Run, stage: RlStage) -> dict[str, float]:
    """Train a policy on a reward; leaves the stage's variables and every sample as records."""
    config = stage.rl
    temperature = require_trainable(stage, run.roles.sampling)
    stream = task_stream(run, stage)
    scores = make_scores(run, stage)
    learner = run.learner(
        ("rl", config.grpo, config.optimizer.without_rate(), config.auxiliary, temperature),
        functools.partial(_make_learner, run, config, temperature),
    )
    alarms = groups_lib.Alarms(stage.name, run.runtime.lost_alarm, run.runtime.failed_alarm)
    judge = make_judge(run, stage)
    with steps.Loop(run, stage.name, config.steps, learner, stage.init) as loop:
        reference = make_reference(run, stage)
        position = loop.position.get("next", 0)
        for step in loop.remaining():
            with loop.sampling(), judging(run, stage, judge):
                run.policy.load(loop.state.variables, f"{stage.name}@{step}")
                found = collect(run, stage, stream, scores, step, position)
                run.policy.unload()
            packed = pack(config, found.summaries)
            batches = [learner.put(b) for b in packed]
            references = logprobs_of(reference, learner, batches)
            rate = optimizer_lib.learning_rate(config.optimizer, step, config.steps)
            state, measured = learner.step(loop.state, batches, references, rate)
            empty = () if any(s.has_signal for s in found.summaries) else OF_ANSWERS
            measured = {name: x for name, x in measured.items() if name not in empty}
            written = groups_lib.to_samples(stage.name, step, found.groups)
            scalars = groups_lib.measure(found.summaries)
            alarms.check(step + 1, scalars)
            position = found.position
            loop.advance(state, measured, packed, {"next": position}, scalars, written)
            del state  # the loop's, to give away and to move
        return loop.finish()


def require_trainable(stage: RlStage, sampling: Mapping[str, roles.Sampling]) -> float:
    """The temperature that the policy is sampled and trained at; `sampling` is by role.

    ValueError where its roles differ in it, sample greedily, or truncate: the trainer's
    log-probabilities would not be the sampler's.
    """
    settings = {name: sampling[name] for name in stage.mixture}
    temperatures = sorted({s.temperature for s in settings.values()})
    if len(temperatures) != 1 or temperatures[0] <= 0.0:
        raise ValueError(
            f"stage {stage.name}: roles {sorted(settings)} are sampled at temperatures "
            f"{temperatures}; a policy trains at one positive temperature"
        )
    truncated = {name: s.top_p for name, s in settings.items() if s.top_p < 1.0}
    if truncated:
        raise ValueError(
            f"stage {stage.name} trains roles with top_p = {truncated}: training needs roles.NAME."
            "top_p = 1, since the trainer does not replay truncated distributions"
        )
    return temperatures[0]


def make_scores(run: run_lib.Run, stage: RlStage) -> dict[int, scoring.Score]:
    """The stage's reward scheme on each replica of this process."""
    mask_length = stage.rl.on_length == "mask"
    if stage.judge is None:
        return dict.fromkeys(run.policy.engines, scoring.label_scorer(mask_length=mask_length))
    config, weights = stage.rl.judge, stage.rl.weights
    if roles.GENERATOR in stage.mixture:
        make = functools.partial(scoring.generator_scorer, weights=weights)
    else:
        make = scoring.meta_scorer
    return {
        replica: make(judge, run.roles, config, mask_length=mask_length)
        for replica, judge in run.judge.engines.items()
    }


def make_judge(run: run_lib.Run, stage: RlStage) -> placement.ParameterSet | None:
    """The judge's parameters as its engines take them, where there is a judge."""
    name = stage.judge
    if name is None:
        return None
    return placement.ParameterSet(
        lambda: run.judge.hand_over(run.variables(name)), run.runtime.placement.judge
    )


def make_reference(run: run_lib.Run, stage: RlStage) -> placement.ParameterSet | None:
    """The parameters that the stage began with, where a KL term looks at them."""
    if not stage.rl.grpo.kl_coefficient:
        return None
    return placement.ParameterSet(
        lambda: run.variables(stage.init), run.runtime.placement.reference
    )


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


@contextlib.contextmanager
def judging(
    run: run_lib.Run, stage: RlStage, judge: placement.ParameterSet | None
) -> Iterator[None]:
    """The judge's engines answer for the block."""
    if judge is None or stage.judge is None:
        yield
        return
    with judge.in_use() as spread:
        run.judge.use(spread, stage.judge)
        yield
        run.judge.unload()


def task_stream(run: run_lib.Run, stage: RlStage) -> grain.MapDataset:
    """The stage's tasks as one endless stream by weight: element i is a function of (seed, i)."""
    found: dict[str, list[tasks_lib.Task]] = {}
    weights: dict[str, float] = {}
    for name, weight in stage.mixture.items():
        role = run.roles.named(name)
        if name == roles.GENERATOR:
            problems = run.input("problems", records.Problem)
            found[name] = tasks_lib.generator_tasks(role, run.tokenizer, problems)
            weights[name] = weight
        elif name == roles.META_VERIFIER:
            analyses = run.input("analyses", records.Analysis)
            found[name] = tasks_lib.meta_verifier_tasks(role, run.tokenizer, analyses)
            weights[name] = weight
        else:
            labelled = _labelled_proofs(run, stage)
            for source, share in _proof_shares(stage, labelled).items():
                key = f"{name}:{source}"
                found[key] = tasks_lib.verifier_tasks(role, run.tokenizer, labelled[source])
                weights[key] = weight * share
    for name, items in found.items():
        room = [
            len(t.prompt) + t.role.sampling.max_tokens
            <= min(run.engine_config.context, stage.rl.row_length)
            for t in items
        ]
        limit = (
            "engine.context and row_length with an answer at full length: engine.context = "
            f"{run.engine_config.context}, row_length = {stage.rl.row_length}"
        )
        steps.report_left_out(f"{stage.name}/{name}", room.count(False), len(items), limit)
        found[name] = [t for t, fits in zip(items, room, strict=True) if fits]
    return sources.stream(found, weights, run.seed_for(stage.name, "tasks"))


def _labelled_proofs(run: run_lib.Run, stage: RlStage) -> dict[str, list[records.Proof]]:
    """D_v by where it comes from; sources without a labelled proof are reported and left out."""
    found = {}
    for source in stage.proofs:
        proofs = (
            run.input(source, records.Proof)
            if source == INPUT_PROOFS
            else run.stage_records(source, records.Proof)
        )
        found[source] = [p for p in proofs if p.label is not None]
        if not found[source]:
            logging.warning("%s: %s holds no labelled proof", stage.name, source)
    return {source: labelled for source, labelled in found.items() if labelled}


def _proof_shares(stage: RlStage, sources_left: Collection[str]) -> dict[str, float]:
    """The sources' weights, which sum to 1, or to 0 where only weightless ones are left."""
    fresh = [p for p in sources_left if p != INPUT_PROOFS]
    shares = {p: stage.fresh_share / len(fresh) for p in fresh}
    if INPUT_PROOFS in sources_left:
        shares[INPUT_PROOFS] = 1.0 - stage.fresh_share if fresh else 1.0
    total = sum(shares.values())
    return {p: share / total if total else 0.0 for p, share in shares.items()}


class Collected(NamedTuple):
    """A step's groups in stream order, and where the stream stands afterwards.

    `groups` are those that this process speaks for, by their place among all.
    """

    summaries: list[groups_lib.Summary]
    groups: dict[int, groups_lib.Group]
    position: int


def collect(
    run: run_lib.Run,
    stage: RlStage,
    stream: Any,
    scores: Mapping[int, scoring.Score],
    step: int,
    position: int,
) -> Collected:
    """A step's groups. Each replica answers its share of the tasks and has its answers scored."""
    config = stage.rl
    found = Collected([], {}, position)
    for refill in range(config.max_refills + 1):
        missing = config.groups - sum(s.has_signal for s in found.summaries)
        if not missing:
            break
        where = (stage.name, step, refill)

        def answer(
            replica: int,
            places: range,
            where: tuple[object, ...] = where,
            start: int = found.position,
        ) -> list[groups_lib.Group]:
            asked = {place: stream[start + place] for place in places}
            return _answer(run, config, asked, replica, scores[replica], where)

        own = run.each(missing, answer)
        summaries = run.gather({place: groups_lib.summarise(g) for place, g in own.items()})
        before = len(found.summaries)
        found.groups.update({before + place: group for place, group in own.items()})
        found = found._replace(
            summaries=found.summaries + summaries, position=found.position + missing
        )
    return found


def _answer(
    run: run_lib.Run,
    config: RlConfig,
    asked: Mapping[int, tasks_lib.Task],
    replica: int,
    score: scoring.Score,
    where: Sequence[object],
) -> list[groups_lib.Group]:
    """A replica's groups of a round, whose tasks are given by their place in it."""
    requests = [
        records.Request(
            id="/".join(map(str, (*where, at))),
            prompt=task.prompt,
            num_samples=config.samples,
            seed=run.seed_for(*where, at),
            max_tokens=task.role.sampling.max_tokens,
            temperature=task.role.sampling.temperature,
            top_p=task.role.sampling.top_p,
        )
        for at, task in asked.items()
    ]
    responses = run.policy.engines[replica].generate(requests)
    flat = [
        scoring.Answered(task, roles.understand(task.role, response))
        for task, found in zip(asked.values(), responses, strict=True)
        for response in found
    ]
    scored = score(flat, (run.seed, *where, "judge"), min(asked) * config.samples)
    return [
        groups_lib.make_group(flat[begin:end], scored[begin:end], config.grpo.advantage)
        for begin, end in ((at, at + config.samples) for at in range(0, len(flat), config.samples))
    ]


def pack(config: RlConfig, groups: Sequence[groups_lib.Summary]) -> list[packing.Batch]:
    """Groups with signal as rows; every verifier task also gives the head its target."""
    lengths = [[len(tokens) for tokens, _ in g.answers] for g in groups]
    weights = grpo_lib.token_weights(lengths, config.grpo)
    labelled = [g for g in groups if g.head_label is not None]
    items = []
    for group, token_weights in zip(groups, weights, strict=True):
        answers = [
            packing.Answer(
                tokens=tokens,
                weights=[weight] * len(tokens),
                old_logprobs=logprobs,
                advantage=advantage,
            )
            for (tokens, logprobs), weight, advantage in zip(
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
                )
            )
    return packing.pack_all(items, config.rows, config.row_length)


def _make_learner(run: run_lib.Run, config: RlConfig, temperature: float) -> learner_lib.Learner:
    trunk = dataclasses.replace(run.trunk, auxiliary=config.auxiliary)
    loss = functools.partial(learner_lib.policy_gradient, trunk, config.grpo, temperature)
    return learner_lib.Learner(
        trunk,
        loss,
        optimizer_lib.make_optimizer(config.optimizer),
        run.mesh,
        router_bias_rate=run.router_bias_rate,
        temperature=temperature,
    )
