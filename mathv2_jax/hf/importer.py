"""From a Hugging Face folder to our variables: streamed into a checkpoint, or held in memory."""

import collections
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent import futures
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mathv2_jax import checkpoint, storage
from mathv2_jax.hf import config as config_lib
from mathv2_jax.hf import drafts, folder, fp8, names, store, tensors
from mathv2_jax.model import transformer
from mathv2_jax.model.config import ModelConfig

BATCH_BYTES = 2**26  # that reach the disk together
NUM_THREADS = min(4, os.cpu_count() or 1)
_WEIGHTS = ("F32", "F16", "BF16", "F8_E4M3")
_SCALES = ("F32", "BF16", "F8_E8M0")

Progress = Callable[[int, int], None]  # bytes done, bytes in all


class Part(NamedTuple):
    """A piece of one of our arrays and the tensor that it comes from; None: it is not on disk."""

    entry: names.Entry
    name: str
    piece: names.Piece
    source: tensors.Tensor | None

    @property
    def size(self) -> int:
        """In bytes, as ours."""
        shape = self.entry.their_shape
        rows = self.piece.rows.stop - self.piece.rows.start
        across = int(np.prod(shape[1:], dtype=np.int64))
        return rows * across * jnp.dtype(self.entry.dtype).itemsize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A checked folder: its model, and every tensor in its place.

    `is_exact` where what is read equals what is stored, number by number, `is_known` where the
    reference library has the model by the same name. `notes` says what a user
    should know: fields that were ignored, tensors that lose bits.
    """

    config: ModelConfig
    tokens: Mapping[str, Any]
    entries: tuple[names.Entry, ...]
    found: Mapping[str, tensors.Tensor]
    is_exact: bool
    is_known: bool
    notes: tuple[str, ...]

    def parts(self, entry: names.Entry, limit: int = checkpoint.CHUNK_BYTES) -> Iterator[Part]:
        """The pieces of one array, each of at most `limit` bytes where it can be."""
        step = entry.step(limit, jnp.dtype(entry.dtype).itemsize)
        for name, place in entry.tensors():
            for piece in entry.pieces(place, step):
                yield Part(entry, name, piece, self.found.get(name))

    def read(self, part: Part) -> np.ndarray:
        """Ours, in its dtype; the axes of the stack are left out."""
        entry, source, dtype = part.entry, part.source, jnp.dtype(part.entry.dtype)
        if source is None:
            rows = part.piece.rows.stop - part.piece.rows.start
            x = np.zeros((rows, *entry.their_shape[1:]), dtype)
        else:
            x = self.rows(part.name, part.piece.rows)
        return entry.to_ours(x.astype(dtype, copy=False))

    def rows(self, name: str, rows: slice) -> np.ndarray:
        """Rows of a tensor as it is there, FP8 de-quantised to float32."""
        source = self.found[name]
        x = source.read_rows(rows)
        if source.dtype != "F8_E4M3":
            return x
        scale = self.found[name + fp8.SUFFIX].read_rows(slice(None))
        return fp8.dequantize(x, scale, rows.indices(source.shape[0])[0])


def open_source(path: str, dtype: str | None = None) -> Source:
    """Checks a folder without reading its numbers; ValueError lists everything that is wrong.

    `dtype`, float32 or bfloat16, is that of the parameters, by default what config.json says.
    """
    if not storage.is_local(path):
        raise ValueError(f"{path}: a Hugging Face folder is read from a local disk; copy it there")
    if not os.path.isdir(path):
        raise FileNotFoundError(f"{path} is no folder: give one with config.json and safetensors")
    read = config_lib.read(path, dtype)
    model, notes = read.model, []
    folder.require_generation_config(path, model.vocab_size)
    if read.ignored:
        notes.append(f"fields of config.json that were ignored: {', '.join(read.ignored)}")
    found = tensors.find(path)
    if model.num_mtp_layers and not any(_of_mtp(model, name) for name in found):
        notes.append(
            f"config.json promises {model.num_mtp_layers} layers of multi-token prediction, but no "
            "tensor of them is there: imported without"
        )
        model = dataclasses.replace(model, num_mtp_layers=0)
    entries = names.table(model)
    complaints = _complaints([e for e in entries if not e.verifier_head], found)
    head = os.path.join(path, names.VERIFIER_HEAD_FILE)
    if os.path.exists(head):
        held = tensors.read_header(head)
        wrong = _complaints([e for e in entries if e.verifier_head], held)
        complaints += [f"{names.VERIFIER_HEAD_FILE}: {complaint}" for complaint in wrong]
        found |= held
    if complaints:
        raise ValueError(f"{path} does not hold this model: " + "; ".join(complaints))
    if not os.path.exists(head):
        notes.append(f"there is no {names.VERIFIER_HEAD_FILE}: the verifier head starts at zero")
    held = [(entry, name) for entry in entries for name, _ in entry.tensors() if name in found]
    rounded = [
        name
        for entry, name in held
        if entry.dtype == "bfloat16" and found[name].dtype in ("F32", "F16")
    ]
    quantized = any(found[name].dtype == "F8_E4M3" for _, name in held)
    if read.fp8 and not quantized:
        notes.append("config.json speaks of FP8, but no tensor is: nothing was de-quantised")
    if rounded:
        notes.append(
            f"{len(rounded)} tensors are rounded to bfloat16, {rounded[0]} among them; "
            "--dtype=float32 keeps them"
        )
    return Source(
        config=model,
        tokens=read.tokens,
        entries=entries,
        found=found,
        is_exact=not rounded and not quantized,
        is_known=read.is_known,
        notes=tuple(notes),
    )


def _of_mtp(config: ModelConfig, name: str) -> bool:
    _, _, rest = name.partition("model.layers.")
    number = rest.partition(".")[0]
    return number.isdigit() and int(number) >= config.num_layers


def _complaints(entries: Iterable[names.Entry], found: Mapping[str, tensors.Tensor]) -> list[str]:
    missing, wrong, known = [], [], set()
    for entry in entries:
        for name, _ in entry.tensors():
            known.add(name)
            tensor = found.get(name)
            if tensor is None:
                if not entry.copy:
                    missing.append(f"{name} {list(entry.their_shape)}")
                continue
            if tensor.shape != entry.their_shape:
                wrong.append(f"{name} is {list(tensor.shape)}, not {list(entry.their_shape)}")
            if tensor.dtype not in _WEIGHTS:
                wrong.append(f"{name} is of {tensor.dtype}, not {', '.join(_WEIGHTS)}")
            if tensor.dtype != "F8_E4M3":
                continue
            if len(entry.their_shape) != 2:
                wrong.append(f"{name} is of F8_E4M3, which is for matrices")
                continue
            name += fp8.SUFFIX
            known.add(name)
            scale, shape = found.get(name), fp8.scale_shape(entry.their_shape)
            if scale is None:
                missing.append(f"{name} {list(shape)}")
            elif scale.shape != shape or scale.dtype not in _SCALES:
                wrong.append(f"{name} is {scale.dtype} {list(scale.shape)}, not F32 {list(shape)}")
    unknown = [name for name in found if name not in known and not name.endswith(names.DERIVED)]
    lists = (("missing", missing), ("of another shape or kind", wrong), ("unknown", unknown))
    return [f"{len(some)} {what}: {', '.join(some)}" for what, some in lists if some]


def convert(
    source: Source,
    path: str,
    target: epath.Path,
    progress: Progress,
    check: Callable[[epath.Path], None] | None = None,
) -> tuple[str, ...]:
    """Writes `source`, the folder at `path`, as a checkpoint with its config and tokenizer.

    Returns what a user should know: the notes of `source`, and why the tokenizer was left out if
    it cannot be used. `target` must be empty or absent; it stays so unless all went well. That
    includes `check`, which is given the new folder, still a draft. Memory holds a few pieces.
    """
    tokenizer, reason = folder.read_tokenizer(path)
    _require_equal_copies(source)
    with drafts.drafted(target) as draft:
        writer = store.Writer(draft / folder.CHECKPOINTS / str(folder.IMPORTED_STEP))
        for entry in source.entries:
            if entry.copy:
                continue
            chunk = list(entry.shape)
            chunk[entry.split] = entry.step(checkpoint.CHUNK_BYTES, jnp.dtype(entry.dtype).itemsize)
            ones = (1,) * len(entry.stack)
            writer.create(entry.ours, entry.full_shape, entry.dtype, (*ones, *chunk))
        broken = _stream(source, writer, progress)
        writer.finish(folder.IMPORTED_STEP, {"stage": "import"})
        for name, data in tokenizer.items():
            storage.write_whole(draft / folder.TOKENIZER / name, data)
        folder.write_config(draft, source.config, source.tokens)
        if check is not None:
            check(draft)
    notes = [*source.notes, *tensors.notes_of_broken(broken)]
    if reason:
        notes.append(
            f"imported without a tokenizer: {reason}. A run takes one from "
            "config.tokenizer.directory"
        )
    return tuple(notes)


def _stream(source: Source, writer: store.Writer, progress: Progress) -> set[str]:
    """The names of the tensors that hold NaN or infinity."""
    broken: set[str] = set()
    parts = [p for e in source.entries if not e.copy for p in source.parts(e)]
    total, done = sum(part.size for part in parts), 0
    pending = collections.deque(parts)
    committing: store.Batch | None = None
    with futures.ThreadPoolExecutor(NUM_THREADS) as pool:
        try:
            while pending:
                some, size = [], 0
                while pending and (not some or size + pending[0].size <= BATCH_BYTES):
                    some.append(pending.popleft())
                    size += some[-1].size
                batch = writer.batch()

                def put(part: Part, batch: store.Batch = batch) -> None:
                    x = source.read(part)
                    if not tensors.is_finite(x):
                        broken.add(part.name)
                    batch.write(part.entry.ours, part.piece.index, x)

                list(pool.map(put, some))
                if committing is not None:
                    committing.wait()
                batch.commit()
                committing = batch
                done += size
                progress(done, total)
        finally:
            if committing is not None:
                committing.wait()  # none writes into a folder that is being deleted
    return broken


def _require_equal_copies(source: Source) -> None:
    """The extra layer's own embedding and head are those of the trunk, else we cannot hold them."""
    trunk = {entry.ours: entry for entry in source.entries if not entry.copy}
    differing = set()
    for entry in source.entries:
        if not entry.copy:
            continue
        (name, _), *_ = trunk[entry.ours].tensors()
        original = source.found[name]
        for part in source.parts(entry):
            if part.source is None or part.name in differing:
                continue
            mine, theirs = (t.read_rows(part.piece.rows) for t in (original, part.source))
            if mine.dtype != theirs.dtype or mine.tobytes() != theirs.tobytes():
                differing.add(part.name)
    if differing:
        raise ValueError(
            f"{', '.join(sorted(differing))} differ from the trunk's: here the layers of "
            "multi-token prediction share its embedding and unembedding"
        )


def load(
    path: epath.PathLike, dtype: str | None = None
) -> tuple[ModelConfig, transformer.Variables]:
    """(config, variables) of a Hugging Face folder, all in memory; for small models.

    ValueError where the folder does not hold a model that we implement. `dtype` is that of the
    parameters, by default what config.json says.
    """
    source = open_source(os.fspath(path), dtype)
    _require_equal_copies(source)
    arrays: dict[str, jax.Array] = {}
    for entry in source.entries:
        if entry.copy:
            continue
        x = np.empty(entry.full_shape, jnp.dtype(entry.dtype))
        for part in source.parts(entry):
            x[part.piece.index] = source.read(part)
        arrays[entry.ours] = jax.device_put(x, may_alias=False)
    return source.config, nested(arrays)


def nested(arrays: Mapping[str, jax.Array]) -> transformer.Variables:
    """The tree of arrays named by their paths, `params.embed`."""
    tree: dict[str, Any] = {}
    for path, x in arrays.items():
        *parents, last = path.split(".")
        at = tree
        for name in parents:
            at = at.setdefault(name, {})
        at[last] = x
    return tree
