"""The settings of reinforcement learning: a step's (`RlConfig`) and a stage's (`RlStage`)."""

import dataclasses
import math
from collections.abc import Mapping

from mathv2_jax import reward as reward_lib
from mathv2_jax import roles
from mathv2_jax.data import mixture as mixture_lib
from mathv2_jax.rl import auxiliary as auxiliary_lib
from mathv2_jax.rl import grpo as grpo_lib
from mathv2_jax.rl import optimizer as optimizer_lib
from mathv2_jax.stages import scoring

INPUT_PROOFS = "proofs"  # the input file of D_v
LENGTH_REWARDS = ("zero", "mask")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RlConfig:
    """A step: `groups` prompts, `samples` responses each, one update on rows of `row_length`.

    Groups without signal (all rewards equal) are counted and refilled in stream order in at most
    `max_refills` rounds; then the step trains on what there is. With `updates` above 1 the groups
    are divided, in their order, among so many updates; `grpo.off_policy_delta` is for that.

    With `ahead` the next step's batch is drawn while a step's updates run, from the variables that
    they begin with: every batch but a run's first is one step stale (metric `staleness`; an
    answer's `checkpoint` says whose it is). It takes a copy of the parameters.

    `keep_routing` sends tokens to the experts that the rollout sent them to; `keep_sampling_mask`
    has the softmax over the ids that could be drawn, which truncated sampling needs. The reference
    of a KL term reads the same experts and ids. `gate` bounds how far the trainer's log-probability
    of a sampled token may lie from the sampler's when a stage begins, or goes on: of at most
    `gate_share` of the tokens, and of answers' first and last ones, it may be more, or the run
    stops. None is 1e-3 in float32 and 0.2 where either has bfloat16 parameters; 0 asks for no such
    check.

    `on_length`: a response cut at
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
    updates: int = 1
    ahead: bool = False
    keep_routing: bool = False
    keep_sampling_mask: bool = False
    gate: float | None = None
    gate_share: float = 0.01
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
        for name in ("steps", "groups", "rows", "row_length", "updates"):
            if getattr(self, name) < 1:
                raise ValueError(f"rl.{name} = {getattr(self, name)}: must be at least 1")
        if self.samples < 2:
            raise ValueError(f"rl.samples = {self.samples}: a group needs at least 2")
        if self.updates > self.groups:
            raise ValueError(
                f"rl.updates = {self.updates}: each needs a group, rl.groups = {self.groups}"
            )
        if not (0.0 <= (self.gate or 0.0) < math.inf and 0.0 <= self.gate_share < 1.0):
            raise ValueError(
                f"rl.gate = {self.gate}, rl.gate_share = {self.gate_share}: a difference of "
                "log-probabilities, not negative, and a share of tokens in 0..1"
            )
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
class Change:
    """Other weights, once `after` tasks of the stage have been drawn."""

    after: int
    mixture: Mapping[str, float]
    fresh_share: float = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How a stage's tasks are drawn beside their weights.

    `schedule` changes these as the stage goes on. A record is drawn 1 + `hardness` x the
    disagreement of the votes behind its label (records.Label.hardness) times as often as one
    without any. A source that has been gone through begins again, in another order (`exhausted`
    repeat), leaves its weight to the others (drop), or ends the stage (stop), as it does where all
    are dropped. With `buckets` above 1 so many steps' tasks are sorted by the length of their
    prompts, and each step gets prompts of like length.
    """

    schedule: tuple[Change, ...] = ()
    hardness: float = 0.0
    exhausted: str = mixture_lib.REPEAT
    buckets: int = 1

    def __post_init__(self):
        if self.exhausted not in mixture_lib.EXHAUSTED:
            raise ValueError(
                f"data.exhausted = {self.exhausted!r}: must be one of {mixture_lib.EXHAUSTED}"
            )
        if not 0.0 <= self.hardness < math.inf:
            raise ValueError(f"data.hardness = {self.hardness}: must not be negative")
        if self.buckets < 1:
            raise ValueError(f"data.buckets = {self.buckets}: must be at least 1")
        begins = [0, *(change.after for change in self.schedule)]
        if sorted(set(begins)) != begins:
            raise ValueError(
                f"data.schedule changes after {begins[1:]} tasks: each later than the one before"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RlStage:
    """One RL stage. `mixture` weighs the roles that the policy trains in, `data` says what else
    decides which tasks are drawn.

    `judge` names the stage whose variables judge: with verifier tasks it turns R_meta on, with
    generator tasks it is the frozen verifier. A generator that is shown an earlier attempt is the
    role `refiner` (ours); `attempts_from` names the stages whose attempts and analyses that report
    issues it is shown; where they hold none, the others have its weight. `proofs` names what D_v is
    made of: the input file and any auto-labelling stages; `fresh_share` is the weight of the latter
    in it. Those that hold no labelled proof leave their weight to the others.
    """

    name: str
    init: str
    mixture: Mapping[str, float]
    judge: str | None = None
    proofs: tuple[str, ...] = (INPUT_PROOFS,)
    fresh_share: float = 0.5
    attempts_from: tuple[str, ...] = ()
    data: DataConfig = DataConfig()
    rl: RlConfig

    def __post_init__(self):
        for mixture, fresh_share in (
            (self.mixture, self.fresh_share),
            *((change.mixture, change.fresh_share) for change in self.data.schedule),
        ):
            self._check_weights(mixture, fresh_share)
        for change in self.data.schedule:
            if set(change.mixture) - set(self.mixture):
                raise ValueError(
                    f"stage {self.name}: data.schedule weighs {dict(change.mixture)}: a role that "
                    "comes later stands in the mixture from the start, with weight 0"
                )
        if self.generates and self.judge is None:
            raise ValueError(f"stage {self.name}: a generator needs a judge, name its stage")
        if self.generates and set(self.mixture) - {roles.GENERATOR, roles.REFINER}:
            raise ValueError(f"stage {self.name}: a generator trains alone, against a frozen judge")
        if (roles.REFINER in self.mixture) != bool(self.attempts_from):
            raise ValueError(
                f"stage {self.name}: mixture {dict(self.mixture)}, attempts_from = "
                f"{self.attempts_from}: a refiner is shown attempts of the stages that "
                "attempts_from names; give both or neither"
            )

    @property
    def generates(self) -> bool:
        """Whether the policy writes proofs."""
        return bool({roles.GENERATOR, roles.REFINER} & set(self.mixture))

    def _check_weights(self, mixture: Mapping[str, float], fresh_share: float) -> None:
        known = (*roles.NAMES, roles.REFINER)
        unknown = sorted(set(mixture) - set(known))
        if unknown or not mixture:
            raise ValueError(
                f"stage {self.name}: mixture {dict(mixture)} must weigh some of {known}"
            )
        weights = mixture.values()
        if not all(0.0 <= w < math.inf for w in weights) or not any(weights):
            raise ValueError(
                f"stage {self.name}: mixture {dict(mixture)}: a weight must not be negative, and "
                "one must be positive"
            )
        if not 0.0 <= fresh_share <= 1.0:
            raise ValueError(f"stage {self.name}: fresh_share = {fresh_share} must lie in 0..1")
