"""The reference library's models beside ours: random weights, its top-k choices, its logits.

Weights are drawn so that nothing is symmetric or hidden: norm scales about one, router biases large
enough to change the choice, and a router whose scores spread.
"""

import copy
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from mathv2_jax import hf
from mathv2_jax.hf import ties
from mathv2_jax.model import attention, block, cache, heads, layers, transformer
from mathv2_jax.model.config import ModelConfig
from tests.hf import checkpoints

# The reference's sampled thread pool fights with the tests that run beside it.
torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()


def reference_config(c: ModelConfig) -> Any:
    """The same shape as transformers writes it."""
    rope: dict[str, Any] = dict(rope_type="default", rope_theta=c.rope_theta)
    if c.yarn_factor > 1:
        rope |= dict(
            rope_type="yarn",
            factor=c.yarn_factor,
            original_max_position_embeddings=c.yarn_original_length,
            beta_fast=c.yarn_beta_fast,
            beta_slow=c.yarn_beta_slow,
            mscale=c.yarn_mscale,
            mscale_all_dim=c.yarn_mscale_all_dim,
        )
    fields: dict[str, Any] = dict(
        vocab_size=c.vocab_size,
        hidden_size=c.width,
        intermediate_size=c.dense_width,
        moe_intermediate_size=c.expert_width,
        num_hidden_layers=c.num_layers,
        first_k_dense_replace=c.num_dense_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_heads,
        n_shared_experts=c.num_shared_experts,
        n_routed_experts=c.num_experts,
        num_experts_per_tok=c.experts_per_token,
        n_group=c.num_expert_groups,
        topk_group=c.expert_groups_per_token,
        routed_scaling_factor=c.routed_scaling,
        norm_topk_prob=c.normalize_expert_weights,
        q_lora_rank=c.q_latent_width or None,
        kv_lora_rank=c.kv_latent_width,
        qk_nope_head_dim=c.head_key_width,
        qk_rope_head_dim=c.head_rope_width,
        v_head_dim=c.head_value_width,
        rms_norm_eps=c.norm_eps,
        rope_parameters=rope,
        max_position_embeddings=c.max_position,
        num_nextn_predict_layers=c.num_mtp_layers,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    if not c.index_topk:
        return transformers.DeepseekV3Config(**fields)
    return transformers.DeepseekV32Config(
        **fields,
        index_topk=c.index_topk,
        index_n_heads=c.index_heads,
        index_head_dim=c.index_head_width,
    )


def drawn_reference(c: ModelConfig, seed: int, *, halved: bool = False) -> Any:
    """A float32 model of the reference; `halved` rounds every weight to a bfloat16 value."""
    config = reference_config(c)
    kind = (
        transformers.DeepseekV32ForCausalLM if c.index_topk else transformers.DeepseekV3ForCausalLM
    )
    model = kind(config).eval()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, tensor in sorted(model.state_dict().items()):
            noise = rng.standard_normal(tuple(tensor.shape)).astype(np.float32)
            value = torch.from_numpy(_scaled(name, noise))
            if halved and not name.endswith("e_score_correction_bias"):
                value = value.bfloat16().float()
            tensor.copy_(value)
    return model


def drawn_arrays(c: ModelConfig) -> dict[str, np.ndarray]:
    """Ours by path: the trunk as the reference draws it; numbers in the layers it does not have."""
    _, trunk = as_ours(drawn_reference(c, 0))
    found = {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(x)
        for path, x in jax.tree.leaves_with_path(trunk)
        if "verifier" not in str(path)
    }
    return checkpoints.drawn(c) | found


def in_bfloat16(model: Any) -> Any:
    """The model cast as transformers loads a bfloat16 checkpoint: the router bias stays float32."""
    biases = {n: b.clone() for n, b in model.named_buffers() if n.endswith("correction_bias")}
    rotation = model.model.rotary_emb.inv_freq.clone()
    model = model.to(torch.bfloat16)
    for name, bias in biases.items():
        model.get_submodule(name.rpartition(".")[0]).e_score_correction_bias = bias
    model.model.rotary_emb.inv_freq = rotation
    return model


def _scaled(name: str, noise: np.ndarray) -> np.ndarray:
    if "norm" in name:
        return (0.0 if name.endswith("bias") else 1.0) + 0.3 * noise
    if name.endswith("e_score_correction_bias"):
        return 0.2 * noise
    if "embed_tokens" in name:
        return noise
    spread = 2.0 if name.endswith("mlp.gate.weight") else 1.0
    return spread * noise * noise.shape[-1] ** -0.5


def as_ours(model: Any) -> tuple[ModelConfig, transformer.Variables]:
    """What the package reads from the folder that the reference writes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return hf.load(folder)


def gradients_as_ours(model: Any) -> Any:
    """The parameters' gradients in our tree: the model with each in its parameter's place."""
    slopes = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            found = parameter.grad
            slopes.get_parameter(name).copy_(torch.zeros(()) if found is None else found)
    return as_ours(slopes)[1]["params"]


class TopK(ties.Watch):
    """Notes the choices of a pass and its near-ties, or replays choices noted before."""

    def __init__(self, real_BT: np.ndarray, replayed: list[torch.Tensor] | None = None):
        super().__init__(real_BT)
        self.replayed = replayed
        self.chosen: list[torch.Tensor] = []

    def choice(self, scores, out):
        self.chosen.append(out[1])
        if self.replayed is None:
            return super().choice(scores, out)
        kept = self.replayed[len(self.chosen) - 1]
        return torch.return_types.topk((scores.gather(-1, kept.long()), kept))

    def experts_LBTA(self) -> np.ndarray:
        """The experts chosen in each sparse layer; groups and indexers choose between them."""
        routers = [chosen for chosen in self.chosen if chosen.ndim == 2][1::2]
        return np.stack([c.reshape(*self.real_BT.shape, -1).numpy() for c in routers]).astype("i4")

    def picked_LBTS(self) -> np.ndarray:
        """What the indexer of each layer lets a token attend to, where causality does too."""
        length = self.real_BT.shape[1]
        picks = [c for c in self.chosen if c.ndim == 3 and c.shape[:2] == self.real_BT.shape]
        masks = [
            torch.zeros(*c.shape[:2], length).scatter(-1, c.long(), 1.0).numpy() for c in picks
        ]
        return np.tril(np.stack(masks)) > 0


def reference_logits(
    model: Any, tokens_BT: np.ndarray, real_BT: np.ndarray, mode: TopK
) -> np.ndarray:
    """Its logits in float32, padding masked; positions count from the row's start."""
    with torch.no_grad(), mode:
        out = model(
            input_ids=torch.from_numpy(tokens_BT).long(),
            attention_mask=torch.from_numpy(real_BT).long(),
            use_cache=False,
        )
    return out.logits.float().numpy()


def layout_of(real_BT: np.ndarray) -> cache.Layout:
    """One sequence a row, padded on either side, positions from the row's start."""
    segments_BT = jnp.asarray(real_BT.astype(np.int32))
    steps_T = jnp.arange(real_BT.shape[1], dtype=jnp.int32)
    return cache.Layout(
        jnp.broadcast_to(steps_T[None, :], segments_BT.shape), segments_BT, segments_BT
    )


def our_logits(
    config: ModelConfig,
    variables: transformer.Variables,
    tokens_BT: Any,
    layout: cache.Layout,
    kept_LBTA: Any = None,
) -> Any:
    """Ours, in float32."""
    out = transformer.apply(config, variables, tokens_BT, layout, kept_LBTA=kept_LBTA)
    return heads.logits(out.hidden_BTD, variables["params"]["unembed"])


def our_logits_with_picks(
    config: ModelConfig,
    variables: transformer.Variables,
    tokens_BT: Any,
    layout: cache.Layout,
    kept_LBTA: Any,
    picked_LBTS: Any,
) -> Any:
    """`our_logits`, layer by layer: each attends to the tokens that it is given as picked."""
    params = variables["params"]
    x_BTD = params["embed"].astype(config.compute_dtype)[tokens_BT]
    for layer, picked_BTS in enumerate(picked_LBTS):
        at = layer - config.num_dense_layers
        sparse, kind = at >= 0, "sparse" if at >= 0 else "dense"
        at = at if sparse else layer
        own = {
            name: jax.tree.map(lambda x, i=at: x[i], tree[kind])
            for name, tree in variables.items()
            if kind in tree
        }

        def attend(q, k, v, layout, scale, index, picked_BTS=picked_BTS):
            return attention.mixed(q, k, v, picked_BTS, scale), None

        module = block.Block(config, block.Kernels(attend=attend), block.Signals(), sparse)
        kept_BTA = kept_LBTA[at] if sparse else None
        (x_BTD, _), _ = module.apply(own, (x_BTD, None), None, kept_BTA, layout, None)
    norm = layers.RMSNorm(config.norm_eps, config.param_dtype)
    return heads.logits(norm.apply({"params": params["final_norm"]}, x_BTD), params["unembed"])
