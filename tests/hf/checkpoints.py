"""A tiny model with every part, as a checkpoint and as a Hugging Face folder."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath

from configs.models import tiny_v3, tiny_v32
from mathv2_jax import checkpoint
from mathv2_jax.hf import exporter, folder, fp8, importer, names
from mathv2_jax.model.config import ModelConfig

SMALL = dict(num_layers=3, num_experts=6, num_expert_groups=3, experts_per_token=2)
FULL = ModelConfig(**tiny_v32.model() | SMALL, num_mtp_layers=2)
PLAIN = ModelConfig(
    **tiny_v3.model()
    | SMALL
    | dict(
        q_latent_width=0,
        yarn_factor=1.0,
        yarn_original_length=4096,
        yarn_beta_fast=32.0,
        yarn_beta_slow=1.0,
        yarn_mscale=1.0,
        yarn_mscale_all_dim=1.0,
    )
)
TOKENS = {"bos_token_id": 0, "eos_token_id": 1}


def silent(done: int, total: int) -> None:
    assert 0 <= done <= total


def drawn(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Arrays by path; no two numbers are related, so that no mix-up passes."""
    rng = np.random.default_rng(seed)
    return {
        entry.ours: rng.standard_normal(entry.full_shape).astype(jnp.dtype(entry.dtype))
        for entry in names.table(config)
        if not entry.copy
    }


def save(
    at: pathlib.Path,
    config: ModelConfig,
    arrays: Mapping[str, Any] | None = None,
    steps: tuple[int, ...] = (0,),
) -> folder.Trained:
    """A folder like an import's; arrays are drawn anew for each step where none are given."""
    with checkpoint.Checkpoints(at / folder.CHECKPOINTS, keep=len(steps)) as saved:
        for step in steps:
            state = drawn(config, step) if arrays is None else arrays
            saved.save(step, {n: jnp.asarray(x) for n, x in state.items()}, {"stage": "test"})
    folder.write_config(epath.Path(at), config, TOKENS)
    return folder.locate(epath.Path(at))


def export(trained: folder.Trained, to: pathlib.Path, dtype: str = "float32", **changes) -> int:
    settings = dict(dtype=dtype, max_shard_bytes=30_000, progress=silent) | changes
    return exporter.convert(trained, epath.Path(to), **settings)[0]


def bring_in(source: pathlib.Path, to: pathlib.Path, dtype: str | None = None) -> folder.Trained:
    opened = importer.open_source(str(source), dtype)
    importer.convert(opened, str(source), epath.Path(to), silent)
    return folder.locate(epath.Path(to))


def restored(trained: folder.Trained) -> dict[str, np.ndarray]:
    """The arrays of its first step, by Checkpoints itself: fingerprints and all."""
    seal = checkpoint.read_seal(trained.checkpoints / str(trained.steps[0]))
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {
        name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=where)
        for name, (shape, dtype, _) in seal["leaves"].items()
    }
    with checkpoint.Checkpoints(trained.checkpoints) as saved:
        found = saved.restore(wanted, trained.steps[0])
    assert found is not None
    return {name: np.asarray(x) for name, x in found[0].items()}


def bits(arrays: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {n: (str(x.dtype), x.shape, np.asarray(x).tobytes()) for n, x in arrays.items()}


def read_all(at: pathlib.Path) -> dict[str, np.ndarray]:
    """Every tensor of an exported folder, read by the format's own library."""
    index = json.loads((at / "model.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for name in sorted(set(index.values())):
        found |= safetensors.numpy.load_file(at / name)
    assert {n: index[n] for n in found} == index
    return found


def rewrite(at: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Puts `tensors` in the place of all that an exported folder held, as one file."""
    for path in at.glob("model*"):
        path.unlink()
    full = {n: np.ascontiguousarray(x) for n, x in tensors.items()}
    safetensors.numpy.save_file(full, at / "model.safetensors")


def quantized(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As DeepSeek releases them: a layer's matrices but the router and the indexer's weights."""
    out = {}
    for name, x in tensors.items():
        matrix = x.ndim == 2 and ".layers." in name
        if matrix and not name.endswith(
            ("mlp.gate.weight", "weights_proj.weight", "embed_tokens.weight", "head.weight")
        ):
            out[name], out[name + fp8.SUFFIX] = fp8.quantize(x)
        else:
            out[name] = x
    return out


def files(at: pathlib.Path) -> set[str]:
    return {path.name for path in at.iterdir()}
