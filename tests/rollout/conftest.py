"""A tokenizer, a tiny model and compiled programs that every test of the rollout shares."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mathv2_jax import sharding
from mathv2_jax.model import cache, transformer
from mathv2_jax.model.config import ModelConfig
from mathv2_jax.rollout import decode, engine, schedule
from mathv2_jax.text import tokenizer as tokenizer_lib

LINES = ["Prove that 1 + 1 = 2.", "The proof is complete and rigorous.", "A gap at step 3."]


@pytest.fixture(scope="session")
def tokenizer() -> tokenizer_lib.SentencePieceTokenizer:
    """Bytes, control tokens and a few merges."""
    model = tokenizer_lib.train(LINES, vocab_size=300)
    return tokenizer_lib.SentencePieceTokenizer.from_bytes(model)


@pytest.fixture(scope="session")
def config(tokenizer) -> ModelConfig:
    """A dense and two sparse layers, by scan, and embedding taps."""
    return ModelConfig(
        vocab_size=tokenizer.vocab_size,
        width=16,
        num_layers=3,
        num_heads=2,
        kv_latent_width=8,
        head_key_width=4,
        head_rope_width=4,
        head_value_width=4,
        dense_width=16,
        expert_width=8,
        num_experts=4,
        experts_per_token=2,
        embedding_taps=2,
    )


@pytest.fixture(scope="session")
def variables(config) -> Any:
    """Every array drawn: no norm scale is one, no router bias and no head is zero."""
    draw = np.random.default_rng(1)

    def one(path, leaf):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return (centre + 0.3 * draw.normal(size=leaf.shape)).astype(np.float32)

    shapes = transformer.unboxed(transformer.boxed_abstract(config))
    return jax.tree_util.tree_map_with_path(one, shapes)


@pytest.fixture(scope="session")
def mesh():
    return sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="session")
def place(config, mesh) -> Callable[[Any], Any]:
    """Variables laid out for the mesh as an engine lays them out."""
    shardings = sharding.shardings_for(transformer.boxed_abstract(config), mesh)
    return lambda given: jax.device_put(given, shardings)


@pytest.fixture(scope="session")
def programs(config) -> decode.Programs:
    return decode.Programs(config, transformer.Kernels())


@pytest.fixture(scope="session")
def make_engine(programs, tokenizer, mesh, variables) -> Callable[..., engine.Engine]:
    """An engine of eight rows, loaded with `given` variables or those of the session."""
    limits = schedule.EngineConfig(rows=8, context=22, page=4, chunk=4, chunks=4, steps=4)

    def make(given: Any = variables, version: str = "sft@3", **settings: Any) -> engine.Engine:
        made = engine.Engine(programs, tokenizer, limits, mesh, **settings)
        made.load(given, version)
        return made

    return make


@pytest.fixture(scope="session")
def states(config, variables) -> Callable[[Sequence[int]], np.ndarray]:
    """Hidden states [T, D] after every token of one sequence, by a plain pass.

    The sequence is padded on its right to one length, which a causal model does not see.
    """
    length = 22

    @jax.jit
    def run(variables, tokens_BT):
        layout = cache.plain_layout(jnp.full((1,), length), length)
        sources_BT = cache.plain_sources(tokens_BT)
        previous_BTW = cache.previous_tokens(tokens_BT, sources_BT, config.embedding_taps)
        out = transformer.apply(config, variables, tokens_BT, layout, previous_BTW=previous_BTW)
        return out.hidden_BTD

    def one(ids: Sequence[int]) -> np.ndarray:
        padded = np.zeros((1, length), np.int32)
        padded[0, : len(ids)] = ids
        return np.asarray(run(variables, padded))[0, : len(ids)]

    return one


@pytest.fixture(scope="session")
def forward(states, variables) -> Callable[[Sequence[int]], np.ndarray]:
    """Logits [T, V] after every token of one sequence, by a plain pass."""
    return lambda ids: states(ids) @ variables["params"]["unembed"]
