"""The gate: a checkpoint and a Hugging Face folder are the same model, or it says where not.

The configs are compared, with the ids of control tokens; every tensor bit for bit, those that the
reference library does not load too; then the logits of both sides, in float32, at all places but
those that come after a near-tie of their row (hf/ties.py).
"""

import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from mathv2_jax import checkpoint
from mathv2_jax.hf import config as config_lib
from mathv2_jax.hf import exporter, folder, importer, names, store, tensors
from mathv2_jax.model import transformer
from mathv2_jax.model.config import ModelConfig

TOLERANCE = 2e-5  # of max|a-b| / max|b|, in float32
MAX_CHOSEN = 512
NEAR = 1e-6  # scores of a choice that rounding may turn round
MIN_COMPARED = 0.1  # of the places
_OF_MTP = ("params.mtp.", "router.mtp.")  # which the reference has no place for


class MismatchError(Exception):
    """The two sides are not the same model."""


class LogitDifference(NamedTuple):
    """max|a-b| / max|b| over the logits compared, and where the largest difference is."""

    relative: float
    row: int
    position: int
    token: int
    ours: float
    theirs: float
    compared: int  # places
    places: int
    reach: int  # tokens of the longest row, as far as it was compared

    def __str__(self) -> str:
        said = (
            f"max|a-b|/max|b| = {self.relative:.2e} (limit {TOLERANCE:.0e}) over {self.compared} "
            f"of {self.places} places; largest at row {self.row}, position {self.position}, token "
            f"{self.token}: ours {self.ours:.6g}, theirs {self.theirs:.6g}"
        )
        if self.compared == self.places:
            return said
        return (
            f"{said}; the other places come after a choice between scores less than {NEAR:.0e} "
            "apart, where both sides may choose differently and be right"
        )


def random_tokens(config: ModelConfig) -> np.ndarray:
    """Two rows, the same every time; longer than index_topk, so that the indexer must choose.

    Unless that is large: of many scores some are so near to each other that the two sides may
    choose differently and be right.
    """
    length = 64
    if config.index_topk <= MAX_CHOSEN:
        length = max(length, config.index_topk + 16)
    shape = (2, min(length, config.max_position))
    return np.random.default_rng(0).integers(0, config.vocab_size, shape).astype(np.int32)


def require_same(
    trained: folder.Trained, path: str, dtype: str | None, tokens_BT: Int[np.ndarray, "B T"]
) -> LogitDifference:
    """Compares the newest checkpoint of `trained` with the folder at `path`; both in memory.

    `dtype` is that of an export of `trained`; None where `trained` was imported from the folder.
    MismatchError says which fields or tensors differ, or where the logits do; ValueError where
    torch or transformers is missing.
    """
    require_reference()
    exported = dtype is not None
    source = importer.open_source(path, None if exported else trained.config.param_dtype)
    _require_same_config(trained, source, path, dtype)
    reader = store.Reader(trained.checkpoints / str(trained.steps[0]))
    variables = _variables(trained, reader, dtype)
    _require_same_tensors(variables, source, path, exported=exported)
    ours_BTV = _our_logits(trained.config, variables, tokens_BT)
    theirs_BTV, compared_BT = _their_logits(path, source, tokens_BT)
    if compared_BT.mean() < MIN_COMPARED:
        raise ValueError(
            f"--verify: only {compared_BT.sum()} of {compared_BT.size} places of {path} come "
            f"before a choice between scores less than {NEAR:.0e} apart and can be compared, at "
            f"least {MIN_COMPARED:.0%} must: give other --tokens"
        )
    found = difference(ours_BTV, theirs_BTV, compared_BT)
    if not found.relative <= TOLERANCE:  # NaN differs too
        raise MismatchError(f"{path} gives other logits than the checkpoint: {found}")
    return found


def difference(
    ours_BTV: Float[np.ndarray, "B T V"],
    theirs_BTV: Float[np.ndarray, "B T V"],
    compared_BT: Bool[np.ndarray, "B T"],
) -> LogitDifference:
    """How far `ours` are from `theirs` where compared, and where most."""
    apart_BTV = np.where(compared_BT[..., None], np.abs(ours_BTV - theirs_BTV), 0.0)
    place = np.unravel_index(int(np.argmax(apart_BTV)), apart_BTV.shape)  # the first NaN, if any
    row, position, token = (int(i) for i in place)
    relative = float(apart_BTV[place] / np.abs(theirs_BTV[compared_BT]).max())
    at = float(ours_BTV[place]), float(theirs_BTV[place])
    reach = int(np.flatnonzero(compared_BT.any(axis=0))[-1]) + 1
    counts = int(compared_BT.sum()), compared_BT.size, reach
    return LogitDifference(relative, row, position, token, *at, *counts)


def _variables(
    trained: folder.Trained, reader: store.Reader, dtype: str | None
) -> dict[str, np.ndarray]:
    """Arrays by their name in our tree, rounded like the other side's."""
    held = {}
    for entry in names.table(trained.config):
        if entry.copy:
            continue
        name = trained.prefix + entry.ours
        index = tuple(slice(0, size) for size in entry.full_shape)
        x = reader.read(name, index)
        kept = dtype is None or entry.verifier_head or entry.ours.startswith("router.")
        held[entry.ours] = x if kept else x.astype(jnp.dtype(dtype))
    reader.verify()
    return held


def _require_same_config(
    trained: folder.Trained, source: importer.Source, path: str, dtype: str | None
) -> None:
    tokens = trained.tokens
    if dtype is not None:
        _, tokens = exporter.tokenizer_of(trained, with_files=False)
    ours = config_lib.to_json(trained.config, dtype or trained.config.param_dtype, tokens)
    theirs = config_lib.to_json(source.config, source.config.param_dtype, source.tokens)
    differing = [
        f"{name} = {theirs.get(name)!r}, not {ours.get(name)!r}"
        for name in sorted(ours | theirs)
        if ours.get(name) != theirs.get(name)
    ]
    if differing:
        raise MismatchError(f"{path} is another model than the checkpoint: {'; '.join(differing)}")


def _require_same_tensors(
    variables: Mapping[str, np.ndarray], source: importer.Source, path: str, *, exported: bool
) -> None:
    """An export holds all that we write, as we write it; an import made zeros of a missing head."""
    differing: list[str] = []
    for entry in source.entries:
        for part in source.parts(entry, checkpoint.CHUNK_BYTES):
            ours = variables[entry.ours][part.piece.index]
            code = tensors.CODES[ours.dtype]
            if part.source is None:
                if exported or (ours.any() and not entry.copy):
                    differing.append(f"{part.name} (missing)")
            elif exported and part.source.dtype != code:
                differing.append(f"{part.name} ({part.source.dtype}, not {code})")
            elif source.read(part).tobytes() != ours.tobytes():
                differing.append(part.name)
    if differing:
        some = ", ".join(list(dict.fromkeys(differing))[:20])
        raise MismatchError(f"{len(set(differing))} tensors of {path} differ: {some}")


def _our_logits(
    config: ModelConfig, variables: dict[str, np.ndarray], tokens_BT: Int[np.ndarray, "B T"]
) -> Float[np.ndarray, "B T V"]:
    config = dataclasses.replace(config, param_dtype="float32", compute_dtype="float32")
    tree = importer.nested({n: jnp.asarray(x.astype(np.float32)) for n, x in variables.items()})
    run = jax.jit(lambda v, t: transformer.forward(config, v, t))
    return np.asarray(run(tree, jnp.asarray(tokens_BT)))


def require_reference() -> None:
    """ValueError where torch or transformers is missing."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"--verify compares with torch and transformers: {error}. Install the extra: "
            'pip install "mathv2_jax[hf]"'
        ) from error


def _their_logits(
    path: str, source: importer.Source, tokens_BT: Int[np.ndarray, "B T"]
) -> tuple[Float[np.ndarray, "B T V"], Bool[np.ndarray, "B T"]]:
    """Theirs, and the places before the first near-tie of each row.

    Where an import has de-quantised or rounded, the reference gets the numbers that came of it: of
    FP8 it would make bfloat16, and by blocks of other sizes where the last are not full. Likewise
    for a name of ours that it does not know, kimi_k2. No code of the folder is run.
    """
    import torch
    import transformers

    from mathv2_jax.hf import ties

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    settings: dict[str, Any] = {
        "dtype": torch.float32,
        "local_files_only": True,
        "trust_remote_code": False,
        "attn_implementation": "eager",
    }
    auto: Any = transformers.AutoModelForCausalLM
    if source.is_exact and source.is_known:
        model = auto.from_pretrained(path, **settings)
    else:
        with tempfile.TemporaryDirectory() as at:
            _write_as_imported(source, at)
            model = auto.from_pretrained(at, **settings)
    watch = ties.Watch(np.ones(tokens_BT.shape, bool))
    with torch.no_grad(), watch:
        theirs_BTV = model.eval()(torch.as_tensor(tokens_BT).long()).logits.numpy()
    return theirs_BTV, watch.untouched()


def _write_as_imported(source: importer.Source, folder: str) -> None:
    """The trunk's tensors in float32, each number as the import has it, and our config of it."""
    body = config_lib.to_json(
        dataclasses.replace(source.config, num_mtp_layers=0), "float32", source.tokens
    )
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
        json.dump(body, file)
    wanted = [
        (name, jnp.dtype(entry.dtype))
        for entry in source.entries
        if not entry.verifier_head and not entry.ours.startswith(_OF_MTP)
        for name, _ in entry.tensors()
    ]
    layout = {name: (np.dtype(np.float32), source.found[name].shape) for name, _ in wanted}
    writer = tensors.Writer(os.path.join(folder, tensors.SINGLE), layout)
    try:
        for name, dtype in wanted:
            x = source.rows(name, slice(None)).astype(dtype).astype(np.float32)
            writer.write_rows(name, x)
    finally:
        writer.close()


def parse_tokens(text: str, config: ModelConfig) -> np.ndarray:
    """Rows of ids, `1,2,3;4,5,6`; ValueError where they are none of the model's or ragged."""
    try:
        rows = [[int(i) for i in row.split(",")] for row in text.split(";")]
    except ValueError as error:
        raise ValueError(f"--tokens={text!r:.80}: write ids like 1,2,3;4,5,6") from error
    _require_tokens(rows, config)
    return np.asarray(rows, np.int32)


def _require_tokens(rows: Sequence[Sequence[int]], config: ModelConfig) -> None:
    if len({len(row) for row in rows}) != 1:
        lengths = sorted({len(row) for row in rows})
        raise ValueError(f"--tokens: rows of {lengths} ids, all must be equally long")
    wrong = [i for row in rows for i in row if not 0 <= i < config.vocab_size]
    if wrong:
        raise ValueError(f"--tokens: {wrong[0]} is no token of a vocabulary of {config.vocab_size}")
