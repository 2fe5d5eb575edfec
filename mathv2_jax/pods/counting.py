"""FLOPs of a model, term by term, and of a traced program, with the lengths of its loops."""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from mathv2_jax.model.config import ModelConfig

# Share of the forward pass that a loss's gradient costs again: for each product, two more.
BACKWARD = 2


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
                name: value * (1 if name in once else 1 + BACKWARD)
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


def model_flops(config: ModelConfig, sequences: int, length: int, *, mtp: bool = False) -> Terms:
    """A forward pass over `sequences` of `length` tokens, each seeing those before it and itself.

    2 FLOPs for each activated parameter and token, the unembedding included and the embedding not;
    attention over min(t, k) keys; an indexer's scores over t keys, if it has something to choose.
    With `mtp` its layers too.
    """
    c, tokens = config, sequences * length
    num_mtp = c.num_mtp_layers if mtp else 0
    sparse = c.num_sparse_layers
    expert = 3 * c.width * c.expert_width
    per_sparse_mlp = expert * (c.experts_per_token + c.num_shared_experts) + c.width * c.num_experts
    further = num_mtp * (
        2 * c.width**2
        + _attention_params(c)
        + _indexer_params(c)
        + per_sparse_mlp
        + c.width * c.vocab_size
    )
    chosen = min(c.index_topk or length, length)
    pairs = sequences * (chosen * (chosen + 1) // 2 + (length - chosen) * chosen)
    causal = sequences * length * (length + 1) // 2
    head = c.num_heads * (c.head_key_width + c.head_rope_width + c.head_value_width)
    layers = c.num_layers + num_mtp
    chooses = 0 < c.index_topk < length  # else nothing need be scored
    scored = c.index_heads * c.index_head_width * causal if chooses else 0
    return Terms(
        attention_projections=2.0 * tokens * c.num_layers * _attention_params(c),
        dense_layers=2.0 * tokens * c.num_dense_layers * 3 * c.width * c.dense_width,
        routed_experts=2.0 * tokens * sparse * expert * c.experts_per_token,
        shared_experts=2.0 * tokens * sparse * expert * c.num_shared_experts,
        routers=2.0 * tokens * sparse * c.width * c.num_experts,
        indexer_projections=2.0 * tokens * c.num_layers * _indexer_params(c),
        unembedding=2.0 * tokens * c.width * c.vocab_size,
        further_layers=2.0 * tokens * further,
        attention=2.0 * pairs * head * layers,
        indexer=2.0 * scored * layers,
    )


def decode_flops(config: ModelConfig, sequences: int, past: int) -> Terms:
    """One new token of each sequence, over `past` earlier ones; attention in expanded form.

    Expanding the past anew is not counted: the absorbed form, which decodes, does not do it either.
    """
    c = config
    found = model_flops(c, sequences, 1)
    head = c.num_heads * (c.head_key_width + c.head_rope_width + c.head_value_width)
    seen = min(c.index_topk or past + 1, past + 1)
    chooses = 0 < c.index_topk <= past
    scored = c.index_heads * c.index_head_width * (past + 1) if chooses else 0
    return dataclasses.replace(
        found,
        attention=2.0 * sequences * seen * head * c.num_layers,
        indexer=2.0 * sequences * scored * c.num_layers,
    )


def prefill_flops(config: ModelConfig, sequences: int, length: int, past: int) -> Terms:
    """`length` tokens more of each sequence, after `past` earlier ones; no unembedding."""
    whole, before = (model_flops(config, sequences, n) for n in (past + length, past))
    terms = {
        name: value - getattr(before, name) for name, value in dataclasses.asdict(whole).items()
    }
    return Terms(**terms | {"unembedding": 0.0})


class Loops(NamedTuple):
    """How often a sampler's loops without a fixed length turn; None where there is no such loop."""

    turns: int | None = None  # over tokens
    blocks: float | None = None  # over pages, within attention

    def length(self, where: str) -> float | None:
        """That of the loop in the scopes `where`; None where it is not known."""
        return self.turns if _PAGED.isdisjoint(_names(where)) else self.blocks


class Executed:
    """FLOPs of matrix products that a traced program runs, by the part of the model they are of.

    Loops count by their lengths, those without a fixed one by `loops`. `whole` is of all devices
    together: what is within `shard_map` runs on each device of the axes that it maps. `unknown`
    names loops that have no length even so, counted once, and kernels that do not say what they
    cost.
    """

    def __init__(self, loops: Loops) -> None:
        self.loops = loops
        self.whole: dict[str, float] = collections.defaultdict(float)
        self.unknown: list[str] = []

    def per_chip(self, chips: int) -> dict[str, float]:
        """FLOPs of one chip by part, if the compiler splits what is not in a shard_map evenly."""
        return {name: self.whole[name] / chips for name in sorted(self.whole)}


def executed(program: Any, loops: Loops = Loops()) -> Executed:  # noqa: B008 - it is immutable
    """Counts `program`, a jaxpr, closed or not; see Executed."""
    found = Executed(loops)
    _count(getattr(program, "jaxpr", program), 1.0, "", found)
    return found


def _count(jaxpr: Any, times: float, scope: str, found: Executed) -> None:
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        stack = str(equation.source_info.name_stack)
        where = "/".join(part for part in (scope, stack) if part)
        flops = _flops(name, equation)
        if flops:
            found.whole[_part(where)] += times * flops
            continue
        inner_times = times
        if name == "scan":
            inner_times *= equation.params["length"]
        elif name == "while":
            length = found.loops.length(where)
            inner_times *= length or 1.0
            if length is None:
                found.unknown.append(where)
        elif name == "pallas_call":  # one that does not say what it costs
            found.unknown.append(where)
        elif name == "shard_map":
            sizes = equation.params["mesh"].shape
            inner_times *= math.prod(sizes[axis] for axis in equation.params["newly_manual_axes"])
        for inner in _inner(equation.params):
            _count(inner, inner_times, where, found)


def _inner(params: Mapping[str, Any]) -> list[Any]:
    """The programs within an equation; of a branch all, which is at most too much."""
    found = []
    for value in params.values():
        for leaf in jax.tree.leaves(value, is_leaf=lambda x: hasattr(x, "eqns")):
            leaf = leaf if hasattr(leaf, "eqns") else getattr(leaf, "jaxpr", None)
            if hasattr(leaf, "eqns"):
                found.append(leaf)
    return found


def _flops(name: str, equation: Any) -> float:
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        depth = math.prod(shape[axis] for axis in contracted)
        return 2.0 * depth * math.prod(equation.outvars[0].aval.shape)
    if name in ("ragged_dot", "ragged_dot_general"):
        left, right, out = (v.aval.shape for v in (*equation.invars[:2], equation.outvars[0]))
        # Rows are of one group each: the groups' axis, of the weights or of their gradient, is no
        # factor.
        if len(right) == 3:
            return 2.0 * math.prod(left) * out[-1]
        return 2.0 * math.prod(left) * right[-1]
    if name == "pallas_call" and equation.params["cost_estimate"] is not None:
        return float(equation.params["cost_estimate"].flops)
    return 0.0


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
EXPERTS, OTHER = "routed_experts", "other"
_PAGED = {"attend", "index"}


def _part(where: str) -> str:
    """`where` are names of scopes like `jvp(Trunk)/sparse/attention.indexer/...`."""
    names = _names(where)
    if "mtp" in names:
        return "attention" if "attend" in names else "further_layers"
    return next((part for word, part in _PARTS if word in names), OTHER)


def _names(where: str) -> set[str]:
    return set(re.split(r"[^A-Za-z0-9_]+", where))
