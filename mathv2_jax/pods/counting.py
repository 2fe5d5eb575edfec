"""FLOPs of a model, term by term, and of a traced program, with the lengths of its loops."""

import dataclasses
import math
import re
from typing import Any, NamedTuple

from mathv2_jax.model.config import ModelConfig
from mathv2_jax.pods import flops, tiles

# Forward passes that a loss's gradient costs: for each product, two more.
_GRADIENT = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Terms:
    """FLOPs of one forward pass over some sequences, by what they are of; two a multiply-add."""

    attention_projections: float
    dense_layers: float
    routed_experts: float
    shared_experts: float
    routers: float
    indexer_projections: float
    unembedding: float
    further_layers: float  # multi-token prediction, all of it but its attention
    attention: float  # scores and weighted sums over min(t, k) keys, in expanded form
    indexer: float  # its scores over all earlier tokens

    @property
    def total(self) -> float:
        """Their sum."""
        return sum(dataclasses.asdict(self).values())

    def scaled(self, times: float) -> "Terms":
        """So many passes."""
        return Terms(**{name: times * value for name, value in dataclasses.asdict(self).items()})

    def trained(self, *, aligned: bool) -> "Terms":
        """A forward and a backward pass; an indexer without a loss has no backward pass."""
        once = ("indexer_projections", "indexer") if not aligned else ()
        return Terms(
            **{
                name: value * (1 if name in once else 1 + _GRADIENT)
                for name, value in dataclasses.asdict(self).items()
            }
        )


def _attention_params(c: ModelConfig) -> int:
    key = c.head_key_width + c.head_rope_width
    query_from = c.q_latent_width or c.width
    query = c.width * c.q_latent_width + query_from * c.num_heads * key
    latent = c.width * (c.kv_latent_width + c.head_rope_width)
    expanded = c.kv_latent_width * c.num_heads * (c.head_key_width + c.head_value_width)
    return query + latent + expanded + c.num_heads * c.head_value_width * c.width


def _indexer_params(c: ModelConfig) -> int:
    if not c.index_topk:
        return 0
    width = c.index_heads * c.index_head_width
    return c.q_latent_width * width + c.width * (c.index_head_width + c.index_heads)


def model_flops(
    config: ModelConfig,
    sequences: int,
    length: int,
    *,
    past: int = 0,
    longest: int | None = None,
    mtp: bool = False,
) -> Terms:
    """A forward pass over `length` tokens more of `sequences` that have `past` tokens already.

    Each token sees those before it and itself. 2 FLOPs for each activated parameter and token, the
    unembedding included and the embedding not; attention over min(t, k) keys, in expanded form; an
    indexer's scores over t keys. With `mtp` its layers too.

    An indexer counts only where a sequence, of which `longest` is as long as it may become (None:
    what it is now), has more tokens than are picked: else all are, and nothing need be scored. So
    do its projections, of all tokens, since later ones choose among them. Nothing is counted for
    expanding the past anew: absorbed attention does not do it either.
    """
    c, tokens = config, sequences * length
    num_mtp = c.num_mtp_layers if mtp else 0
    sparse = c.num_sparse_layers
    chooses = 0 < c.index_topk < (past + length if longest is None else longest)
    indexer = _indexer_params(c) if chooses else 0
    expert = 3 * c.width * c.expert_width
    per_sparse_mlp = expert * (c.experts_per_token + c.num_shared_experts) + c.width * c.num_experts
    further = num_mtp * (
        2 * c.width**2 + _attention_params(c) + indexer + per_sparse_mlp + c.width * c.vocab_size
    )
    pairs = sequences * _pairs(past, length, c.index_topk or past + length)
    scored = sequences * _pairs(past, length, past + length) if chooses else 0
    head = c.num_heads * (c.head_key_width + c.head_rope_width + c.head_value_width)
    layers = c.num_layers + num_mtp
    return Terms(
        attention_projections=2.0 * tokens * c.num_layers * _attention_params(c),
        dense_layers=2.0 * tokens * c.num_dense_layers * 3 * c.width * c.dense_width,
        routed_experts=2.0 * tokens * sparse * expert * c.experts_per_token,
        shared_experts=2.0 * tokens * sparse * expert * c.num_shared_experts,
        routers=2.0 * tokens * sparse * c.width * c.num_experts,
        indexer_projections=2.0 * tokens * c.num_layers * indexer,
        unembedding=2.0 * tokens * c.width * c.vocab_size,
        further_layers=2.0 * tokens * further,
        attention=2.0 * pairs * head * layers,
        indexer=2.0 * scored * c.index_heads * c.index_head_width * layers,
    )


def _pairs(past: int, length: int, most: int) -> int:
    """Sum of min(t, most) over t from past + 1 to past + length."""

    def upto(t: int) -> int:
        few = min(t, most)
        return few * (few + 1) // 2 + (t - few) * most

    return upto(past + length) - upto(past)


class Loops(NamedTuple):
    """How often a sampler's loops without a fixed length turn; None where there is no such loop."""

    turns: int | None = None  # over tokens
    blocks: float | None = None  # over pages, within attention

    def length(self, where: str) -> float | None:
        """That of the loop in the scopes `where`; None where it is not known."""
        return self.turns if _PAGED.isdisjoint(_names(where)) else self.blocks


class Executed:
    """FLOPs of matrix products that a traced program runs, by the part of the model they are of.

    Loops count by their lengths, those without a fixed one by `loops`. All is of all devices
    together: what is within `shard_map` runs on each device of the axes that it maps. `by_pass`
    tells apart what is of the forward pass, what is computed anew for the backward pass, and that.
    A kernel counts by what it declares; what its tiles cost beyond that, where groups' rows fill
    the share `filled`, is the part EDGES. `unknown` names loops that have no length even so,
    counted once, and kernels that do not say what they cost.
    """

    def __init__(self, loops: Loops, filled: float) -> None:
        self.loops, self.filled = loops, filled
        self.by_pass: dict[str, dict[str, float]] = {}
        self.unknown: list[str] = []

    @property
    def whole(self) -> dict[str, float]:
        """FLOPs by part."""
        return {part: sum(passes.values()) for part, passes in self.by_pass.items()}

    def per_chip(self, chips: int) -> dict[str, float]:
        """FLOPs of one chip by part, if the compiler splits what is not in a shard_map evenly."""
        return {name: x / chips for name, x in sorted(self.whole.items())}

    def add(self, part: str, where: str, number: float) -> None:
        """So many FLOPs more of a part, in the scopes `where`."""
        if number:
            passes = self.by_pass.setdefault(part, dict.fromkeys(PASSES, 0.0))
            passes[_pass(where)] += number


def executed(program: Any, loops: Loops = Loops(), filled: float = 1.0) -> Executed:  # noqa: B008 - it is immutable
    """Counts `program`, a jaxpr, closed or not; see Executed."""
    found = Executed(loops, filled)
    _count(getattr(program, "jaxpr", program), 1.0, "", found)
    return found


def _count(jaxpr: Any, times: float, scope: str, found: Executed) -> None:
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        stack = str(equation.source_info.name_stack)
        where = "/".join(part for part in (scope, stack) if part)
        inner_times = times
        if name == "scan":
            inner_times *= equation.params["length"]
        elif name == "while":
            length = found.loops.length(where)
            inner_times *= length or 1.0
            if length is None:
                found.unknown.append(where)
        elif name == "pallas_call":
            _count_kernel(equation, times, where, found)
            continue
        elif name == "shard_map":
            sizes = equation.params["mesh"].shape
            inner_times *= math.prod(sizes[axis] for axis in equation.params["newly_manual_axes"])
        found.add(_part(where), where, times * flops.of_equation(equation))
        for inner in flops.inner(equation.params):
            _count(inner, inner_times, where, found)


def _count_kernel(equation: Any, times: float, where: str, found: Executed) -> None:
    cost = equation.params["cost_estimate"]
    if cost is None:
        found.unknown.append(where)
        return
    declared = float(cost.flops)
    found.add(_part(where), where, times * declared)
    by_tiles = tiles.expected(equation, found.filled)
    found.add(EDGES, where, times * max(0.0, by_tiles - found.filled * declared))


# Parts by the names of the model's scopes; the first of which one is found counts.
_PARTS = (
    ("unembed", "unembedding"),
    ("experts", "routed_experts"),
    ("index", "indexer"),  # within attend; its projections are in attention.indexer
    ("attend", "attention"),
    ("indexer", "indexer_projections"),
    ("attention", "attention_projections"),
    ("shared", "shared_experts"),
    ("sparse", "routers"),
    ("dense", "dense_layers"),
)
EXPERTS, EDGES, OTHER = "routed_experts", "edges_of_tiles", "other"
FORWARD, ANEW, BACKWARD = PASSES = ("forward", "computed_anew", "backward")
_PAGED = {"attend", "index"}


def _part(where: str) -> str:
    """`where` are names of scopes like `jvp(Trunk)/sparse/attention.indexer/...`."""
    names = _names(where)
    if "mtp" in names:
        return "attention" if "attend" in names else "further_layers"
    return next((part for word, part in _PARTS if word in names), OTHER)


def _pass(where: str) -> str:
    """By the names that JAX gives to what differentiation and rematerialisation make."""
    names = _names(where)
    if "rematted_computation" in names:
        return ANEW
    return BACKWARD if "transpose" in names else FORWARD


def _names(where: str) -> set[str]:
    return set(re.split(r"[^A-Za-z0-9_]+", where))
