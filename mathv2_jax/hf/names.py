"""The one table of names: our parameters and the tensors of the Hugging Face format, both ways.

A row says how one of our arrays is called there and how its axes lie there. Axes are words; `*`
joins axes of ours into one of theirs, in that order. Layers, and experts in a layer, are stacked in
our arrays (their leading axes) and single tensors there, which the `{}` of a name count.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np

from mathv2_jax.model.config import ModelConfig

Index = tuple[int | slice, ...]
Numbers = TypeVar("Numbers", bound=Any)  # an array of numpy or jax

VERIFIER_HEAD_FILE = "verifier_head.safetensors"
_LAYER = "model.layers.{}."
_STRIP = 16


class Row(NamedTuple):
    """One array: ours below its layer (or the trunk), theirs likewise; axes without the stack's."""

    ours: str
    axes: str
    theirs: str
    their_axes: str


TRUNK = (
    Row("embed", "vocab embed", "model.embed_tokens.weight", "vocab embed"),
    Row("unembed", "embed vocab", "lm_head.weight", "vocab embed"),
    Row("final_norm.scale", "embed", "model.norm.weight", "embed"),
)
VERIFIER_HEAD = (
    Row("verifier_head_kernel", "embed score", "verifier_head.kernel", "embed score"),
    Row("verifier_head_bias", "score", "verifier_head.bias", "score"),
)
BLOCK = (
    Row("attention_norm.scale", "embed", "input_layernorm.weight", "embed"),
    Row("mlp_norm.scale", "embed", "post_attention_layernorm.weight", "embed"),
    Row(
        "attention.kv_a",
        "embed kv_latent_and_rope",
        "self_attn.kv_a_proj_with_mqa.weight",
        "kv_latent_and_rope embed",
    ),
    Row("attention.kv_a_norm.scale", "kv_latent", "self_attn.kv_a_layernorm.weight", "kv_latent"),
    Row(
        "attention.kv_b",
        "kv_latent heads key_and_value",
        "self_attn.kv_b_proj.weight",
        "heads*key_and_value kv_latent",
    ),
    Row("attention.o", "heads value embed", "self_attn.o_proj.weight", "embed heads*value"),
)
QUERY = (Row("attention.q_b", "embed heads key", "self_attn.q_proj.weight", "heads*key embed"),)
LATENT_QUERY = (
    Row("attention.q_a", "embed q_latent", "self_attn.q_a_proj.weight", "q_latent embed"),
    Row("attention.q_a_norm.scale", "q_latent", "self_attn.q_a_layernorm.weight", "q_latent"),
    Row("attention.q_b", "q_latent heads key", "self_attn.q_b_proj.weight", "heads*key q_latent"),
)
INDEXER = (
    Row(
        "attention.indexer.q_b",
        "q_latent index_heads index_width",
        "self_attn.indexer.wq_b.weight",
        "index_heads*index_width q_latent",
    ),
    Row(
        "attention.indexer.k",
        "embed index_width",
        "self_attn.indexer.wk.weight",
        "index_width embed",
    ),
    Row(
        "attention.indexer.k_norm.scale",
        "index_width",
        "self_attn.indexer.k_norm.weight",
        "index_width",
    ),
    Row(
        "attention.indexer.k_norm.bias",
        "index_width",
        "self_attn.indexer.k_norm.bias",
        "index_width",
    ),
    Row(
        "attention.indexer.weights",
        "embed index_heads",
        "self_attn.indexer.weights_proj.weight",
        "index_heads embed",
    ),
)
DENSE = (
    Row("mlp.gate", "embed ffn", "mlp.gate_proj.weight", "ffn embed"),
    Row("mlp.up", "embed ffn", "mlp.up_proj.weight", "ffn embed"),
    Row("mlp.down", "ffn embed", "mlp.down_proj.weight", "embed ffn"),
)
ROUTER = (Row("mlp.router", "embed experts", "mlp.gate.weight", "experts embed"),)
ROUTER_BIAS = (Row("mlp.bias", "experts", "mlp.gate.e_score_correction_bias", "experts"),)
EXPERTS = (  # stacked twice
    Row("mlp.experts_gate", "embed expert", "mlp.experts.{}.gate_proj.weight", "expert embed"),
    Row("mlp.experts_up", "embed expert", "mlp.experts.{}.up_proj.weight", "expert embed"),
    Row("mlp.experts_down", "expert embed", "mlp.experts.{}.down_proj.weight", "embed expert"),
)
SHARED = (
    Row("mlp.shared.gate", "embed shared", "mlp.shared_experts.gate_proj.weight", "shared embed"),
    Row("mlp.shared.up", "embed shared", "mlp.shared_experts.up_proj.weight", "shared embed"),
    Row("mlp.shared.down", "shared embed", "mlp.shared_experts.down_proj.weight", "embed shared"),
)
MTP = (
    Row("embed_norm.scale", "embed", "enorm.weight", "embed"),
    Row("hidden_norm.scale", "embed", "hnorm.weight", "embed"),
    Row("project", "embed_twice embed", "eh_proj.weight", "embed embed_twice"),
    Row("final_norm.scale", "embed", "shared_head.norm.weight", "embed"),
)
MTP_COPIES = (  # of the trunk's, once more on disk
    Row("embed", "vocab embed", "embed_tokens.weight", "vocab embed"),
    Row("unembed", "embed vocab", "shared_head.head.weight", "vocab embed"),
)
# Buffers that some released files hold and that follow from the config.
DERIVED = (".self_attn.rotary_emb.inv_freq",)


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """The size of every axis that the table speaks of."""
    c = config
    return {
        "vocab": c.vocab_size,
        "embed": c.width,
        "embed_twice": 2 * c.width,
        "score": 3,
        "heads": c.num_heads,
        "key": c.head_key_width + c.head_rope_width,
        "value": c.head_value_width,
        "key_and_value": c.head_key_width + c.head_value_width,
        "q_latent": c.q_latent_width,
        "kv_latent": c.kv_latent_width,
        "kv_latent_and_rope": c.kv_latent_width + c.head_rope_width,
        "ffn": c.dense_width,
        "experts": c.num_experts,
        "expert": c.expert_width,
        "shared": c.num_shared_experts * c.expert_width,
        "index_heads": c.index_heads,
        "index_width": c.index_head_width,
    }


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of one tensor: our indices (those of the stack too), and its rows there."""

    index: Index
    rows: slice


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One of our arrays with the tensors that it is made of.

    `ours` is its path in the variables, `params.sparse.attention.q_b`; `stack` the leading axes
    that are single tensors there, `shape` the rest. There the axes of `shape` from `split` on stand
    before the others, which is all that matrices and heads need. A `copy` is on disk once
    more than in our tree.
    """

    ours: str
    stack: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str
    theirs: str
    first_layer: int
    their_shape: tuple[int, ...]
    split: int
    verifier_head: bool = False
    copy: bool = False

    @property
    def full_shape(self) -> tuple[int, ...]:
        """The shape of our array, a copy's without the layers that it stands in."""
        return self.shape if self.copy else (*self.stack, *self.shape)

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name there, place in the stack) of each tensor."""
        for place in np.ndindex(*self.stack):
            counted = (self.first_layer + place[0], *place[1:]) if place else ()
            yield self.theirs.format(*counted), place

    def pieces(self, place: tuple[int, ...], step: int) -> Iterator[Piece]:
        """The tensor at `place` of the stack, by `step` along our axis that leads there."""
        axis, inner = self.split, self.their_shape[0] // self.shape[self.split]
        before = () if self.copy else place
        for begin in range(0, self.shape[axis], step):
            end = min(begin + step, self.shape[axis])
            index: list[int | slice] = [slice(0, size) for size in self.shape]
            index[axis] = slice(begin, end)
            yield Piece((*before, *index), slice(begin * inner, end * inner))

    def step(self, limit: int, itemsize: int) -> int:
        """How far along that axis a piece of at most `limit` bytes reaches; 1 at the least."""
        size = self.shape[self.split]
        across = math.prod(self.shape) // size * itemsize
        return max(1, min(size, limit // across))

    def to_theirs(self, x: np.ndarray) -> np.ndarray:
        """A piece of ours (without the stack's axes) as it lies there."""
        if self.split:
            x = _transposed(x.reshape(math.prod(x.shape[: self.split]), -1))
        return x.reshape(-1, *self.their_shape[1:])

    def to_ours(self, x: np.ndarray) -> np.ndarray:
        """The inverse of `to_theirs`."""
        before, behind = self.shape[: self.split], self.shape[self.split + 1 :]
        if self.split:
            x = _transposed(x.reshape(-1, math.prod(before)))
        return x.reshape(*before, -1, *behind)


def _transposed(x: np.ndarray) -> np.ndarray:
    """A matrix transposed, in strips that a cache holds: several times as fast as at once."""
    bits = np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")
    out = np.empty(bits.shape[::-1], bits.dtype)
    for begin in range(0, bits.shape[0], _STRIP):
        out[:, begin : begin + _STRIP] = bits[begin : begin + _STRIP].T
    return out.view(x.dtype)


def table(config: ModelConfig) -> tuple[Entry, ...]:
    """Every array of the model's variables, with its tensors, in the order of the layers."""
    c = config
    entries = [_entry(c, row, "params.") for row in TRUNK]
    block = BLOCK + (LATENT_QUERY if c.q_latent_width else QUERY)
    block += INDEXER if c.index_topk else ()
    sparse = block + ROUTER + (SHARED if c.num_shared_experts else ())
    first, length = c.num_dense_layers, c.num_sparse_layers
    if first:
        entries += [_entry(c, row, "params.dense.", first, 0) for row in block + DENSE]
    if length:
        entries += _sparse(c, sparse, "sparse.", length, first)
    if c.num_mtp_layers:
        where = c.num_mtp_layers, c.num_layers
        entries += [_entry(c, row, "params.mtp.", *where) for row in MTP]
        entries += _sparse(c, sparse, "mtp.block.", *where)
        entries += [
            dataclasses.replace(_entry(c, row, "params.", *where), copy=True) for row in MTP_COPIES
        ]
    head = [_entry(c, row, "params.") for row in VERIFIER_HEAD]
    entries += [dataclasses.replace(entry, verifier_head=True, dtype="float32") for entry in head]
    return tuple(entries)


def _sparse(
    config: ModelConfig, rows: tuple[Row, ...], kind: str, length: int, first: int
) -> list[Entry]:
    entries = [_entry(config, row, f"params.{kind}", length, first) for row in rows]
    bias = [_entry(config, row, f"router.{kind}", length, first) for row in ROUTER_BIAS]
    entries += [dataclasses.replace(entry, dtype="float32") for entry in bias]
    for row in EXPERTS:
        entry = _entry(config, row, f"params.{kind}", length, first)
        entries.append(dataclasses.replace(entry, stack=(length, config.num_experts)))
    return entries


def _entry(config: ModelConfig, row: Row, ours: str, length: int = 0, first: int = 0) -> Entry:
    sizes = axis_sizes(config)
    axes, groups = row.axes.split(), [group.split("*") for group in row.their_axes.split()]
    split = axes.index(groups[0][0])
    assert [a for group in groups for a in group] == axes[split:] + axes[:split], row
    return Entry(
        ours=ours + row.ours,
        stack=(length,) if length else (),
        shape=tuple(sizes[axis] for axis in axes),
        dtype=config.param_dtype,
        theirs=_LAYER + row.theirs if length else row.theirs,
        first_layer=first,
        their_shape=tuple(math.prod(sizes[axis] for axis in group) for group in groups),
        split=split,
    )
