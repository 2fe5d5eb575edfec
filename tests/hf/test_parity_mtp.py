"""The layer of multi-token prediction beside that of the reference library, by which it drafts."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_layers import MtpModel

from mathv2_jax import hf
from mathv2_jax.model import heads, transformer
from tests.hf import checkpoints, parity

LATENT = dataclasses.replace(checkpoints.FULL, index_topk=0, index_heads=0, index_head_width=0)
TOKENS_BT = np.random.default_rng(5).integers(0, 61, (2, 20)).astype(np.int32)


def their_logits(path, num_layers):
    """Of tokens 1 and on, each joined with the trunk's state at its predecessor."""
    trunk = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    # The library knows the layer by the number that it has in DeepSeek-V3 itself, 61.
    trunk._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{num_layers}\..*"]
    layer = MtpModel.from_pretrained(trunk).eval()
    tokens = torch.from_numpy(TOKENS_BT).long()
    positions = torch.arange(1, tokens.shape[1])[None].expand(len(tokens), -1)
    with torch.no_grad():
        states = trunk.model(tokens, use_cache=False).last_hidden_state
        ahead = layer.forward_layer(0, states[:, :-1], positions, None, input_ids=tokens[:, 1:])
        return layer._project_to_logits(ahead).numpy()


@pytest.mark.parametrize("num_dense_layers", [0, 1])
@pytest.mark.parametrize("base", [checkpoints.PLAIN, LATENT], ids=["plain", "latent-yarn"])
def test_the_extra_layers_logits_are_those_of_the_reference(tmp_path, base, num_dense_layers):
    config = dataclasses.replace(
        base, num_layers=2, num_mtp_layers=1, num_dense_layers=num_dense_layers
    )
    arrays = {
        name: 0.1 * x if name.startswith("params.mtp.") and x.ndim > 2 else x
        for name, x in parity.drawn_arrays(config).items()
    }
    checkpoints.export(checkpoints.save(tmp_path / "a", config, arrays), tmp_path / "hf")
    theirs_BTV = their_logits(tmp_path / "hf", config.num_layers)
    loaded, variables = hf.load(tmp_path / "hf")
    sources_T = np.maximum(np.arange(TOKENS_BT.shape[1]) - 1, 0)
    out = transformer.apply(
        loaded,
        variables,
        jnp.asarray(TOKENS_BT),
        parity.layout_of(np.ones(TOKENS_BT.shape, bool)),
        sources_BT=jnp.asarray(np.broadcast_to(sources_T, TOKENS_BT.shape).astype(np.int32)),
        signals=transformer.Signals(mtp="on"),
    )
    assert out.further is not None
    ours_BTV = np.asarray(heads.logits(out.further.hidden_BTD[0], variables["params"]["unembed"]))
    apart = np.abs(ours_BTV[:, 1:] - theirs_BTV).max() / np.abs(theirs_BTV).max()
    assert apart < 2e-5
