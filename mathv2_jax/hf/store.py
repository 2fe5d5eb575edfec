"""A checkpoint's arrays by pieces: read from what any mesh has written, written as Orbax reads.

No array is ever held whole. Every piece that is read or written counts towards its array's
fingerprint, so that what is read is known to be what was saved.
"""

import contextlib
import json
import math
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import tensorstore
from etils import epath

from mathv2_jax import checkpoint, fingerprint, storage
from mathv2_jax.hf import names

_HANDLERS = "orbax.checkpoint._src.handlers."
# Decoded chunks that are kept for the next piece, which may share them where another mesh chose
# the chunks.
_CACHE_BYTES = 2**26


# TensorStore's words for faults that leave a checkpoint what it is.
_OF_THE_SYSTEM = ("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNAVAILABLE")


class DamagedError(ValueError):
    """A checkpoint does not hold what was saved in it."""


class Reader:
    """The leaves of one step of a checkpoint.

    ValueError (DamagedError where files are at fault) for a seal that cannot be read or is of
    another format.
    """

    def __init__(self, step_folder: epath.Path):
        self._folder = step_folder
        try:
            self.seal = checkpoint.read_seal(step_folder)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError) as error:
            raise DamagedError(f"{step_folder}: its seal cannot be read: {error}") from error
        checkpoint.require_format(self.seal, str(step_folder))
        self.leaves: dict[str, tuple[tuple[int, ...], np.dtype]] = {
            name: (tuple(shape), jnp.dtype(dtype))
            for name, (shape, dtype, _) in self.seal["leaves"].items()
        }
        self._context = tensorstore.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})
        self._opened: dict[str, Any] = {}
        self._prints: Counter[str] = Counter()
        self._seen: Counter[str] = Counter()
        self._lock = threading.Lock()

    def chunk(self, name: str) -> tuple[int, ...]:
        """The shape of the pieces that a leaf is stored in."""
        return tuple(self._open(name).chunk_layout.read_chunk.shape)

    def read(self, name: str, index: names.Index, *, again: bool = False) -> np.ndarray:
        """A piece of a leaf; all threads may call it. `again` if the piece has been read before."""
        try:
            x = self._open(name)[index].read().result()
        except ValueError as error:
            if any(word in str(error) for word in _OF_THE_SYSTEM):
                raise OSError(f"{self._folder}: {name} cannot be read: {error}") from error
            raise DamagedError(f"{self._folder}: {name} cannot be read: {error}") from error
        if not again:
            shape, _ = self.leaves[name]
            begin, whole = _begin_and_whole(index, shape)
            added = fingerprint.of_part(x.reshape(whole), begin, shape)
            with self._lock:
                self._prints[name] += added
                self._seen[name] += x.size
        return x

    def verify(self) -> None:
        """DamagedError names a leaf, read to its end, that is not what was saved."""
        for name, seen in self._seen.items():
            shape, _ = self.leaves[name]
            if seen != math.prod(shape):
                raise AssertionError(f"{name}: {seen} of {math.prod(shape)} numbers were read")
            if self._prints[name] % 2**32 != self.seal["leaves"][name][2]:
                raise DamagedError(f"{self._folder}: {name} differs from what was saved")

    def _open(self, name: str) -> Any:
        with self._lock:
            if name not in self._opened:
                spec = checkpoint.array_spec(self._folder / "state", name)
                spec["fill_missing_data_reads"] = False
                try:
                    opened = tensorstore.open(spec, open=True, context=self._context).result()
                except ValueError as error:
                    raise DamagedError(f"{self._folder}: {name} is not there: {error}") from error
                self._opened[name] = opened
            return self._opened[name]


class Writer:
    """A new step of a checkpoint, which does not exist before `finish`.

    Pieces are written within `batch()`: those of one batch reach the disk together.
    """

    def __init__(self, step_folder: epath.Path):
        self.folder = step_folder
        self._stores: dict[str, Any] = {}
        self._leaves: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        self._chunks: dict[str, tuple[int, ...]] = {}
        self._prints: Counter[str] = Counter()
        self._lock = threading.Lock()
        # One for all arrays: they share a database, and would write its tree past each other.
        self._context = tensorstore.Context()
        (step_folder / "state").mkdir(parents=True, exist_ok=True)

    def create(self, name: str, shape: Sequence[int], dtype: Any, chunk: Sequence[int]) -> None:
        """Declares a leaf; every piece of it is to be written."""
        self._leaves[name] = tuple(shape), jnp.dtype(dtype)
        self._chunks[name] = tuple(chunk)
        if not math.prod(shape):
            return  # as Checkpoints does: the seal knows all that it holds
        metadata = {
            "shape": list(shape),
            "chunks": list(chunk),
            "compressor": {"id": "zstd", "level": 1},
        }
        spec = checkpoint.array_spec(self.folder / "state", name)
        spec |= {"metadata": metadata, "dtype": jnp.dtype(dtype).name}
        spec["store_data_equal_to_fill_value"] = True
        self._stores[name] = tensorstore.open(spec, create=True, context=self._context)

    def batch(self) -> "Batch":
        """Pieces to be committed together."""
        with _writing(self.folder):
            for store in self._stores.values():
                store.result()
        return Batch(self)

    def write(self, name: str, index: names.Index, x: np.ndarray, transaction: Any) -> None:
        """Puts one piece, once; all threads may call it."""
        shape, dtype = self._leaves[name]
        assert x.dtype == dtype, f"{name}: {x.dtype} for {dtype}"
        begin, whole = _begin_and_whole(index, shape)
        x = np.ascontiguousarray(x)
        store = self._stores[name].result()
        with _writing(self.folder):
            store.with_transaction(transaction)[index].write(x).result()
        added = fingerprint.of_part(x.reshape(whole), begin, shape)
        with self._lock:
            self._prints[name] += added

    def finish(self, step: int, position: Mapping[str, Any]) -> None:
        """Seals the step; it exists from now on."""
        leaves = {
            name: [list(shape), str(dtype), self._prints[name] % 2**32]
            for name, (shape, dtype) in self._leaves.items()
        }
        body = {
            "format": checkpoint.FORMAT_VERSION,
            "step": step,
            "position": dict(position),
            "leaves": leaves,
        }
        self._write_json("state/_METADATA", self._orbax_tree())
        self._write_json("state/array_metadatas/process_0", self._orbax_arrays())
        storage.write_whole(self.folder / "seal" / "metadata", storage.seal(body))
        now = time.time_ns()
        self._write_json(
            "_CHECKPOINT_METADATA",
            {
                "item_handlers": {
                    "seal": f"{_HANDLERS}json_checkpoint_handler.JsonCheckpointHandler",
                    "state": f"{_HANDLERS}standard_checkpoint_handler.StandardCheckpointHandler",
                },
                "metrics": {},
                "performance_metrics": {},
                "init_timestamp_nsecs": now,
                "commit_timestamp_nsecs": now,
                "custom_metadata": {},
            },
        )

    def _write_json(self, name: str, body: Mapping[str, Any]) -> None:
        storage.write_whole(self.folder / name, json.dumps(body).encode())

    def _orbax_tree(self) -> dict[str, Any]:
        tree = {
            str((name,)): {
                "key_metadata": [{"key": name, "key_type": 2}],
                "value_metadata": {
                    "value_type": "jax.Array",
                    "skip_deserialize": False,
                    "write_shape": list(self._leaves[name][0]),
                },
            }
            for name in self._stores
        }
        return {
            "tree_metadata": tree,
            "use_ocdbt": True,
            "use_zarr3": False,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }

    def _orbax_arrays(self) -> dict[str, Any]:
        arrays = [
            {
                "array_metadata": {
                    "param_name": name,
                    "write_shape": list(self._leaves[name][0]),
                    "chunk_shape": list(self._chunks[name]),
                    "ext_metadata": None,
                }
            }
            for name in self._stores
        ]
        return {"array_metadatas": arrays}


class Batch:
    """Pieces of one transaction: in memory until it is committed."""

    _committing: Any

    def __init__(self, writer: Writer):
        self._writer = writer
        self._transaction = tensorstore.Transaction()

    def write(self, name: str, index: names.Index, x: np.ndarray) -> None:
        """As `Writer.write`."""
        self._writer.write(name, index, x, self._transaction)

    def commit(self) -> None:
        """Starts writing; `wait` waits for its end."""
        self._committing = self._transaction.commit_async()

    def wait(self) -> None:
        """Until what `commit` started is on disk; OSError where it cannot be."""
        with _writing(self._writer.folder):
            self._committing.result()


@contextlib.contextmanager
def _writing(folder: epath.Path) -> Iterator[None]:
    """What TensorStore says of the file system is no fault of the arrays or of the user."""
    try:
        yield
    except ValueError as error:
        raise OSError(f"{folder} cannot be written: {error}") from error


def _begin_and_whole(
    index: names.Index, shape: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where a piece begins, and its shape with the axes that `index` takes one place of."""
    ranges = [
        (i, i + 1) if isinstance(i, int) else i.indices(size)[:2]
        for i, size in zip(index, shape, strict=True)
    ]
    return tuple(b for b, _ in ranges), tuple(e - b for b, e in ranges)
