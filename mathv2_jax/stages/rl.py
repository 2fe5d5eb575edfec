"""Reinforcement learning of any role: one loop, the roles and rewards passed to it as values."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
from absl import logging

from mathv2_jax import fingerprint, processes, records, roles
from mathv2_jax.model import transformer
from mathv2_jax.rl import learner as learner_lib
from mathv2_jax.rl import optimizer as optimizer_lib
from mathv2_jax.rl import placement
from mathv2_jax.rollout import durable, engine
from mathv2_jax.stages import gate, scoring, steps, task_stream, updates
from mathv2_jax.stages import groups as groups_lib
from mathv2_jax.stages import run as run_lib
from mathv2_jax.stages import tasks as tasks_lib
from mathv2_jax.stages.rl_config import RlConfig, RlStage

_GATED = 4  # groups that are drawn for the gate alone


def run_stage(run: run_lib.Run, stage: RlStage) -> dict[str, float]:
    """Train a policy on a reward; leaves the stage's variables and every sample as records."""
    config = stage.rl
    temperature = require_trainable(stage, run.roles.sampling)
    if config.updates > 1 and not config.grpo.off_policy_delta:
        logging.warning(
            "%s: rl.updates = %d without rl.grpo.off_policy_delta: the recipe masks sequences that "
            "the policy has left where a rollout serves several updates",
            *(stage.name, config.updates),
        )
    stream = task_stream.make(run, stage)
    learner = run.learner(
        ("rl", config.grpo, config.optimizer.without_rate(), config.auxiliary, temperature),
        functools.partial(_make_learner, run, config, temperature),
    )
    alarms = groups_lib.Alarms(stage.name, run.runtime.lost_alarm, run.runtime.failed_alarm)
    with steps.Loop(run, stage.name, config.steps, learner, stage.init) as loop:
        reference = make_reference(run, stage)
        sampler = _Sampler(run, stage, stream, loop)
        for step in loop.remaining():
            if not sampler.has_next():
                print(f"{stage.name}: its data end after {step} steps", flush=True)
                break
            found, sampled_at = sampler.take(step)
            if config.gate != 0.0 and step == loop.first_step:
                # Of a batch that was drawn ahead the trainer's log-probabilities differ rightly.
                drawn = found.summaries if sampled_at == step else sampler.draw(step)
                gate.check(run, stage, learner, loop.state.variables, drawn)
            packed = updates.pack_updates(run, config, found.summaries)
            rate = optimizer_lib.learning_rate(config.optimizer, step, config.steps)
            if config.ahead:
                sampler.load(step, found.position)  # before the update takes the variables over
            state, measured = updates.update(config, learner, loop.state, reference, packed, rate)
            if config.ahead:
                sampler.sample_ahead(step, found.position, state.variables)
            empty = () if any(s.has_signal for s in found.summaries) else updates.OF_ANSWERS
            measured = {name: x for name, x in measured.items() if name not in empty}
            written = groups_lib.to_samples(stage.name, step, found.groups)
            scalars = groups_lib.measure(found.summaries)
            if config.ahead:
                scalars["staleness"] = float(step - sampled_at)
            alarms.check(step + 1, scalars)
            batches = list(itertools.chain(*packed))
            after = {"next": found.position}
            loop.advance(state, measured, batches, lambda after=after: after, scalars, written)
            del state  # the loop's, to give away and to move
        figures = loop.finish()
        sampler.close()
        return figures


class _Sampler:
    """A stage's batches, one a step, drawn from its newest variables or, ahead, from those before.

    A batch that is drawn ahead is there whole before the checkpoint that it belongs to, so a run
    that goes on there trains on the same one.
    """

    def __init__(
        self, run: run_lib.Run, stage: RlStage, stream: grain.MapDataset, loop: steps.Loop
    ):
        self._run, self._stage, self._stream, self._loop = run, stage, stream, loop
        folder = run.workdir / "checkpoints" / stage.name / "responses"
        self._responses = durable.Responses(folder, run.runtime.responses_every)
        self._scores = make_scores(run, stage, self._responses)
        self._judge = make_judge(run, stage)
        self._ahead: tuple[Collected, int] | None = None
        self._version = self._now = ""  # of the variables that are sampled from, and of the newest
        self._saved = 0
        if stage.rl.ahead and run.runtime.placement.optimizer != placement.RESIDENT:
            raise ValueError(
                f"stage {stage.name}: rl.ahead samples while the optimizer is in use: it needs "
                f"runtime.placement.optimizer = {placement.RESIDENT!r}"
            )

    def has_next(self, position: int | None = None) -> bool:
        """Whether the stream has a step's tasks from there on, or from where the stage stands."""
        begin = self._loop.position.get("next", 0) if position is None else position
        return begin + self._stage.rl.groups <= len(self._stream)

    def take(self, step: int) -> tuple["Collected", int]:
        """A step's batch, and the step whose variables it was drawn from."""
        if self._ahead is not None:
            found, self._ahead = self._ahead, None
            return found
        self._begin(step)
        variables, sampled_at = self._loop.state.variables, step
        self._version = self._now = fingerprint.of_tree(variables)
        if self._stage.rl.ahead and step:
            drawn_from = self._responses.completed(self._now)
            if drawn_from is not None:
                self._version, sampled_at = drawn_from, step - 1
            else:
                logging.warning(
                    "%s: the batch of step %d that was drawn ahead is not there: it is drawn anew, "
                    "from the variables of now",
                    *(self._stage.name, step),
                )
        with self._loop.sampling():
            self._run.policy.load(variables, self._name(sampled_at))
            found = self._collect(step, self._loop.position.get("next", 0))
        return found, sampled_at

    def draw(self, step: int) -> list[groups_lib.Summary]:
        """A few answers by the variables of now, which nobody scores or keeps."""
        run, config = self._run, self._stage.rl
        position = self._loop.position.get("next", 0)

        def answer(replica: int, places: range) -> list[groups_lib.Summary]:
            asked = {place: self._stream[position + place] for place in places}
            where = (self._stage.name, step, "gate")
            drawn = _draw(run, config, asked, run.policy.engines[replica], where)
            return [
                groups_lib.unscored(task.prompt, responses)
                for task, responses in zip(asked.values(), drawn, strict=True)
            ]

        with self._loop.sampling():
            run.policy.load(self._loop.state.variables, self._name(step))
            found = run.gather(run.each(min(config.groups, _GATED), answer))
            run.policy.unload()
        return found

    def load(self, step: int, position: int) -> None:
        """Sample with a copy of the variables of now, which a step is about to change."""
        if step + 1 < self._stage.rl.steps and self.has_next(position):
            copy = jax.tree.map(jnp.copy, self._loop.state.variables)
            self._version = self._now
            self._run.policy.load(copy, self._name(step))

    def sample_ahead(self, step: int, position: int, updated: transformer.Variables) -> None:
        """Draw the next step's batch with what `load` was given, while this one's updates run.

        `updated` is what these lead to, and what will be trained on the batch.
        """
        if step + 1 < self._stage.rl.steps and self.has_next(position):
            self._begin(step + 1)
            self._ahead = self._collect(step + 1, position), step
            self._now = fingerprint.of_tree(updated)
            self._responses.complete(self._version, then=self._now)

    def close(self) -> None:
        """The stage has ended."""
        self._responses.close()

    def _name(self, step: int) -> str:
        """What responses say of the variables that they were drawn from."""
        return f"{self._stage.name}@{step}"

    def _begin(self, step: int) -> None:
        self._responses.drop_before(self._saved)
        self._saved = self._loop.saved_step  # it may still be on its way to the disk
        there = self._responses.begin(step)
        if there and processes.is_first():
            name = self._stage.name
            print(f"{name}: {there} responses of step {step + 1} were finished before", flush=True)

    def _collect(self, step: int, position: int) -> "Collected":
        led = self._run.policy.led
        policy = {
            replica: self._responses.of(engine, self._version, writes=replica in led)
            for replica, engine in self._run.policy.engines.items()
        }
        with judging(self._run, self._stage, self._judge):
            found = collect(
                self._run, self._stage, self._stream, self._scores, step, position, policy
            )
        self._run.policy.unload()
        return found


def require_trainable(stage: RlStage, sampling: Mapping[str, roles.Sampling]) -> float:
    """The temperature that the policy is sampled and trained at; `sampling` is by role.

    ValueError where its roles differ in it, sample greedily, or truncate: the trainer's
    log-probabilities would not be the sampler's.
    """
    settings = {name: sampling[name] for name in map(roles.known_as, stage.mixture)}
    temperatures = sorted({s.temperature for s in settings.values()})
    if len(temperatures) != 1 or temperatures[0] <= 0.0:
        raise ValueError(
            f"stage {stage.name}: roles {sorted(settings)} are sampled at temperatures "
            f"{temperatures}; a policy trains at one positive temperature"
        )
    truncated = {name: s.top_p for name, s in settings.items() if s.top_p < 1.0}
    if truncated and not stage.rl.keep_sampling_mask:
        raise ValueError(
            f"stage {stage.name} trains roles with top_p = {truncated}: training needs roles.NAME."
            "top_p = 1, or rl.keep_sampling_mask = True, which replays what could be drawn"
        )
    return temperatures[0]


def make_scores(
    run: run_lib.Run, stage: RlStage, responses: durable.Responses
) -> dict[int, scoring.Score]:
    """The stage's reward scheme on each replica of this process."""
    mask_length = stage.rl.on_length == "mask"
    if stage.judge is None:
        return dict.fromkeys(run.policy.engines, scoring.label_scorer(mask_length=mask_length))
    config, weights = stage.rl.judge, stage.rl.weights
    if stage.generates:
        make = functools.partial(scoring.generator_scorer, weights=weights)
    else:
        make = scoring.meta_scorer
    judges = {
        replica: responses.of(judge, stage.judge, writes=replica in run.judge.led)
        for replica, judge in run.judge.engines.items()
    }
    return {
        replica: make(judge, run.roles, config, mask_length=mask_length)
        for replica, judge in judges.items()
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
    policy: Mapping[int, durable.DurableEngine],
) -> Collected:
    """A step's groups. Each replica answers its share of the tasks and has its answers scored."""
    config = stage.rl
    found = Collected([], {}, position)
    for refill in range(config.max_refills + 1):
        missing = config.groups - sum(s.has_signal for s in found.summaries)
        missing = min(missing, len(stream) - found.position)
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
            return _answer(run, config, asked, policy[replica], scores[replica], where)

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
    policy: durable.DurableEngine,
    score: scoring.Score,
    where: Sequence[object],
) -> list[groups_lib.Group]:
    """A replica's groups of a round, whose tasks are given by their place in it."""
    responses = _draw(run, config, asked, policy, where)
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


def _draw(
    run: run_lib.Run,
    config: RlConfig,
    asked: Mapping[int, tasks_lib.Task],
    policy: engine.Engine | durable.DurableEngine,
    where: Sequence[object],
) -> list[list[records.Response]]:
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
    return policy.generate(requests, experts=config.keep_routing, kept=config.keep_sampling_mask)


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
