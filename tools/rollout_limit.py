"""What bounds a rollout on this machine, and what an engine's time goes into; of bench_rollout."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rollout_calls  # beside this file
import torch

from mathv2_jax.model import cache, grouped, paged, transformer
from mathv2_jax.model.config import ModelConfig
from mathv2_jax.pods import counting
from mathv2_jax.rollout import sampling, schedule


def _products(c: ModelConfig, rows: int) -> list[tuple[int, tuple[int, int, int, int]]]:
    """(how many a step, (batch, rows, inner, outer)) of the products with weights."""
    key = c.head_key_width + c.head_rope_width
    query_in = c.q_latent_width or c.width
    each = -(-rows * c.experts_per_token // c.num_experts)
    shared = c.num_shared_experts * c.expert_width
    found = [
        (c.num_layers, (1, rows, query_in, c.num_heads * key)),
        (c.num_layers, (1, rows, c.width, c.kv_latent_width + c.head_rope_width)),
        (c.num_layers, (c.num_heads, rows, c.head_key_width, c.kv_latent_width)),
        (c.num_layers, (c.num_heads, rows, c.kv_latent_width, c.head_value_width)),
        (c.num_layers, (1, rows, c.num_heads * c.head_value_width, c.width)),
        (2 * c.num_dense_layers, (1, rows, c.width, c.dense_width)),
        (c.num_dense_layers, (1, rows, c.dense_width, c.width)),
        (2 * c.num_sparse_layers, (c.num_experts, each, c.width, c.expert_width)),
        (c.num_sparse_layers, (c.num_experts, each, c.expert_width, c.width)),
        (2 * c.num_sparse_layers, (1, rows, c.width, shared)),
        (c.num_sparse_layers, (1, rows, shared, c.width)),
        (c.num_sparse_layers, (1, rows, c.width, c.num_experts)),
        (1, (1, rows, c.width, c.vocab_size)),
    ]
    if c.q_latent_width:
        found.append((c.num_layers, (1, rows, c.width, c.q_latent_width)))
    return [(number, shape) for number, shape in found if number and min(shape)]


def seconds_of(call: Callable[[], Any], at_least: float = 0.03) -> float:
    """Seconds of a call, the least of three means over calls that fill `at_least`."""
    call()
    means = []
    for _ in range(3):
        calls, began = 0, time.perf_counter()
        while (taken := time.perf_counter() - began) < at_least or not calls:
            call()
            calls += 1
        means.append(taken / calls)
    return min(means)


def _product_seconds(shape: tuple[int, int, int, int]) -> tuple[float, float]:
    """(XLA's, torch's) of one float32 product."""
    batch, rows, inner, outer = shape
    draw = np.random.default_rng(0)
    left = draw.standard_normal((batch, rows, inner), np.float32)
    right = draw.standard_normal((batch, inner, outer), np.float32)
    if batch == 1:
        left, right = left[0], right[0]
    x, y = jnp.asarray(left), jnp.asarray(right)
    a, b = torch.from_numpy(left), torch.from_numpy(right)
    product = jax.jit(jnp.matmul)
    ours = seconds_of(lambda: jax.block_until_ready(product(x, y)))
    return ours, seconds_of(lambda: torch.matmul(a, b))


def limit(
    c: ModelConfig, prompts: Sequence[int], answers: Sequence[tuple[int, int]], rows: int
) -> dict[str, float]:
    """Tokens/s if nothing but the model's matrix products took time, at the rate of their shapes.

    `prompts` are the tokens of each, computed once without the unembedding; `answers` are (tokens
    of the prompt, tokens of the answer). FLOPs are those of pods/counting.py, attention in expanded
    form.
    """
    whole = 0.0
    for prompt in prompts:
        terms = counting.model_flops(c, 1, prompt - 1)
        whole += terms.total - terms.unembedding
    for prompt, answer in answers:
        whole += counting.model_flops(c, 1, answer, past=prompt - 1).total
    a_token = whole / sum(answer for _, answer in answers)
    done, xla, best = 0.0, 0.0, 0.0
    for number, shape in _products(c, rows):
        ours, theirs = _product_seconds(shape)
        done += 2.0 * number * float(np.prod(shape))
        xla += number * ours
        best += number * min(ours, theirs)
    large = min(_product_seconds((1, 1024, 1024, 1024)))
    return {
        "tokens_per_second": done / best / a_token,
        "flops_per_token": a_token,
        "flops_per_second": done / best,
        "flops_per_second_of_xla": done / xla,
        "flops_per_second_of_a_large_product": 2.0 * 1024**3 / large,
        "products_of_a_step_seconds": xla,
    }


def gap(parts: dict[str, float], bound: dict[str, float], tokens: int) -> dict[str, float]:
    """A pass of ours in seconds, by what it goes into; they sum to it."""
    at_limit = tokens / bound["tokens_per_second"]
    return {
        "the limit: matrix products of what counts": at_limit,
        "decoding what counts, beyond the limit": parts["useful"] - at_limit,
        "rows that were done before their call ended": parts["done"],
        "rows without an answer": parts["empty"],
        "prompts (their products are in the limit)": parts["prefill"],
        "host: between the calls": parts["host"],
    }


def step_parts(
    programs: rollout_calls.Timed,
    variables: transformer.Variables,
    limits: schedule.EngineConfig,
    bound: Any,
) -> dict[str, float]:
    """Seconds of what a step of decoding does over all its layers, each part timed alone.

    Attention is of all rows over slots up to the furthest of the last pass's mean step.
    """
    c, rows = programs.config, limits.rows
    draw = np.random.default_rng(0)

    def random(*shape: int) -> jax.Array:
        return jnp.asarray(draw.standard_normal(shape, np.float32))

    drawn = jax.jit(lambda logits, noise, heat: sampling.sample(logits, noise, heat)[:3])
    asked = random(rows, c.vocab_size), jnp.full((rows,), 0.5), jnp.ones((rows,))
    found = {"sampling": seconds_of(lambda: jax.block_until_ready(drawn(*asked)))}
    if c.num_sparse_layers:
        layer = jax.tree.map(lambda x: x[0], variables["params"]["sparse"]["mlp"])
        names = ("experts_gate", "experts_up", "experts_down")
        weights = grouped.ExpertWeights(*(layer[name] for name in names))
        ids = np.argsort(draw.random((rows, c.num_experts)), axis=1)[:, : c.experts_per_token]
        given = random(rows, c.width), jnp.asarray(ids, jnp.int32)
        mixed = jax.jit(programs.kernels.experts)
        shares = jnp.ones((rows, c.experts_per_token))
        alone = seconds_of(lambda: jax.block_until_ready(mixed(*given, shares, weights)))
        found["routed experts, their products among it"] = c.num_sparse_layers * alone
    alone = _attention_seconds(c, limits, programs.reach, programs.kernels.slots)
    found[f"attention over {programs.reach} slots"] = c.num_layers * alone
    found["products with weights (by XLA, those of experts too)"] = bound[
        "products_of_a_step_seconds"
    ]
    return found | {"a whole step, in the engine": programs.seconds_a_step}


def _attention_seconds(
    c: ModelConfig, limits: schedule.EngineConfig, reach: int, slots: int
) -> float:
    rows, a_row = limits.rows, limits.pages_a_row
    one = dataclasses.replace(c, num_layers=1, num_dense_layers=1)
    pages = transformer.empty_cache(one, rows * a_row + 1, limits.page).dense
    assert pages is not None
    table_BM = 1 + jnp.arange(rows * a_row, dtype=jnp.int32).reshape(rows, a_row)
    none_B = jnp.zeros((rows,), jnp.int32)
    at_BT = jnp.full((rows, 1), min(reach, limits.context - 1), jnp.int32)
    view = cache.PageView(table_BM, at_BT, none_B, none_B)
    q_BTHK = jnp.ones((rows, 1, c.num_heads, c.head_key_width))
    q_BTHR = jnp.ones((rows, 1, c.num_heads, c.head_rope_width))
    both = c.head_key_width + c.head_value_width
    kv_b_CHX = jnp.ones((c.kv_latent_width, c.num_heads, both))

    @jax.jit
    def attended(pages: cache.Pages, view: cache.PageView) -> jax.Array:
        held = paged.Held(pages, jnp.int32(0), view, slots)
        return paged.attend(q_BTHK, q_BTHR, kv_b_CHX, held, 1.0)

    return seconds_of(lambda: jax.block_until_ready(attended(pages, view)))
