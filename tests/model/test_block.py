import dataclasses

import jax
import jax.numpy as jnp

from mathv2_jax.model import cache, transformer


def test_layers_that_recompute_keep_less_for_the_backward_pass(full):
    """Bytes that XLA sets aside, at a length where activations outweigh the rest."""
    tokens_BT = jnp.zeros((2, 96), jnp.int32)
    layout = cache.plain_layout(jnp.asarray([96, 96]), 96)
    bytes_of = {}
    for name in ("none", "dots_no_batch", "full"):
        config = dataclasses.replace(full.config, remat=name, embedding_taps=0, num_layers=6)
        variables = transformer.unboxed(transformer.boxed_abstract(config))

        def total(params, config=config, variables=variables):
            out = transformer.apply(config, {**variables, "params": params}, tokens_BT, layout)
            return jnp.sum(jnp.square(out.hidden_BTD))

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), variables["router"])
        variables["router"] = zeros
        lowered = jax.jit(jax.grad(total)).lower(variables["params"])
        bytes_of[name] = lowered.compile().memory_analysis().temp_size_in_bytes
    assert bytes_of["full"] < bytes_of["dots_no_batch"] < 0.9 * bytes_of["none"]
