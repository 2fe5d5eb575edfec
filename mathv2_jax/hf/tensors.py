"""safetensors files: headers checked, tensors read and written by rows, no torch.

A file is eight bytes that give the header's length, the header (JSON: name, dtype, shape, place),
and the numbers, little-endian and row by row.
"""

import dataclasses
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from mathv2_jax import storage

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_OTHER_BYTES = {"F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2}
_OTHER_BYTES |= {"I8": 1, "U8": 1, "BOOL": 1, "F8_E5M2": 1}
_RUN = 2**16
_MAX_HEADER = 100_000_000
_AGAIN = "copy or download it again"
_EXPONENT = {  # all bits of it are set in NaN and infinity
    np.dtype(np.float32): np.uint32(0x7F800000),
    np.dtype(np.float16): np.uint16(0x7C00),
    np.dtype(ml_dtypes.bfloat16): np.uint16(0x7F80),
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: `dtype` as the file says it, `begin` in bytes from the file's start."""

    path: str
    dtype: str
    shape: tuple[int, ...]
    begin: int

    def read_rows(self, rows: slice) -> np.ndarray:
        """Rows of the first axis; of a scalar or with `slice(None)`, everything."""
        dtype = DTYPES[self.dtype]
        begin, end, _ = rows.indices(self.shape[0] if self.shape else 1)
        across = math.prod(self.shape[1:]) * dtype.itemsize
        data = np.empty((end - begin) * across, np.uint8)
        with open(self.path, "rb", buffering=0) as file:
            _pread(file.fileno(), data.data, self.begin + begin * across, self.path)
        shape = (end - begin, *self.shape[1:]) if self.shape else ()
        return data.view(dtype).reshape(shape)


def is_finite(x: np.ndarray) -> bool:
    """Whether no number is NaN or infinite."""
    mask = _EXPONENT[x.dtype]
    bits = np.ascontiguousarray(x).reshape(-1).view(mask.dtype)
    runs = (bits[i : i + _RUN] for i in range(0, bits.size, _RUN))  # each stays in a core's cache
    return not any(((run & mask) == mask).any() for run in runs)


def notes_of_broken(names: Iterable[str]) -> list[str]:
    """What a user should know of the tensors that hold NaN or infinity, if there are any."""
    some = sorted(names)
    return [f"{len(some)} tensors hold NaN or infinity: {', '.join(some[:5])}"] if some else []


def _pread(file: int, data: memoryview, begin: int, path: str) -> None:
    done = 0
    while done < len(data):
        read = os.preadv(file, [data[done:]], begin + done)
        if not read:
            raise ValueError(f"{path} ends at {begin + done} bytes: the file has been cut short")
        done += read


def read_header(path: str) -> dict[str, Tensor]:
    """The tensors of a file; ValueError where its header is none or says what the file is not."""
    if not os.path.isfile(path):
        raise ValueError(f"{path} is no file: safetensors are expected there")
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise ValueError(
                f"{path} is no safetensors file: a header of {length} bytes in {size}; {_AGAIN}"
            )
        text = file.read(length)
    try:
        header = storage.parse_json(text)
        if not isinstance(header, dict):
            raise TypeError(f"it is a {type(header).__name__}, not a JSON object")
        header.pop("__metadata__", None)
        found = {name: _tensor(path, name, e, 8 + length, size) for name, e in header.items()}
        _require_no_gaps({n: e["data_offsets"] for n, e in header.items()}, size - 8 - length)
        return found
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} has a damaged header: {error}; {_AGAIN}") from error


def _require_no_gaps(places: Mapping[str, Sequence[int]], size: int) -> None:
    """Each byte is of one tensor, which is the format's rule; ValueError where one is not."""
    at, before = 0, "the header"
    for name, (begin, end) in sorted(places.items(), key=lambda item: tuple(item[1])):
        if begin != at:
            raise ValueError(f"{name} begins at {begin}, but {before} ends at {at}")
        at, before = end, name
    if at != size:
        cut = ": the file has been cut short" if at > size else ""
        raise ValueError(f"{before} ends at {at} of {size} bytes{cut}")


def _tensor(path: str, name: str, entry: Mapping[str, Any], base: int, size: int) -> Tensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        width = DTYPES[dtype].itemsize if dtype in DTYPES else _OTHER_BYTES[dtype]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name} is described by {dict(entry)!r:.200}") from error
    if any(not isinstance(n, int) or n < 0 for n in (*shape, begin, end)):
        raise ValueError(f"{name} has shape {list(shape)} at {begin} to {end}")
    if end - begin != math.prod(shape) * width or base + end > size:
        cut = ": the file has been cut short" if base + end > size else ""
        raise ValueError(
            f"{name} of {dtype} {list(shape)} lies at {begin} to {end} of {size - base} bytes{cut}"
        )
    return Tensor(path, dtype, shape, base + begin)


def find(folder: str) -> dict[str, Tensor]:
    """All tensors of a model's folder, single or indexed, by name.

    FileNotFoundError where there are none; ValueError for pickled weights, for an index that its
    files do not bear out (all its faults in one), and for damaged files. Nothing is executed.
    """
    index, single = (os.path.join(folder, name) for name in (INDEX, SINGLE))
    if os.path.exists(index):
        found = _find_indexed(folder, index)
        if os.path.exists(single) and not any(t.path == single for t in found.values()):
            raise ValueError(
                f"{folder} holds {INDEX} and a {SINGLE} that is not in it, which other programs "
                "read instead: move away the one that is not meant"
            )
        return found
    if os.path.exists(single):
        return read_header(single)
    names = sorted(os.listdir(folder))
    pickled = [n for n in names if n.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))]
    if pickled:
        raise ValueError(
            f"{folder} holds {', '.join(pickled[:3])}: pickled weights can run code and are not "
            "read; convert them to safetensors first"
        )
    raise FileNotFoundError(f"{folder} holds neither {INDEX} nor {SINGLE}")


def _find_indexed(folder: str, index: str) -> dict[str, Tensor]:
    try:
        with open(index, encoding="utf-8") as file:
            places = storage.parse_json(file.read())["weight_map"]
        files = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError, IsADirectoryError) as error:
        raise ValueError(f"{index} is no index of safetensors: {error!r}; {_AGAIN}") from error
    foreign = [n for n in files if not _lies_beside(n)]
    if foreign:
        raise ValueError(
            f"{index} names {', '.join(map(repr, foreign[:3]))}: files of an index end in "
            ".safetensors and lie beside it"
        )
    absent = [n for n in files if not os.path.exists(os.path.join(folder, n))]
    if absent:
        raise FileNotFoundError(
            f"{folder} lacks {len(absent)} of the {len(files)} files that {INDEX} names: "
            f"{', '.join(absent)}"
        )
    found: dict[str, Tensor] = {}
    faults = []
    for name in files:
        held = read_header(os.path.join(folder, name))
        faults += [f"{n} is in {name} and in another file" for n in held if n in found]
        found |= held
    faults += [f"{n} is not in {f}" for n, f in places.items() if not _lies_in(found.get(n), f)]
    if faults:
        raise ValueError(f"{index} and its files differ: {'; '.join(faults)}")
    return found


def _lies_beside(name: Any) -> bool:
    named = isinstance(name, str) and os.path.basename(name) == name
    return named and name.endswith(".safetensors")


def _lies_in(tensor: Tensor | None, name: str) -> bool:
    return tensor is not None and os.path.basename(tensor.path) == name


class Writer:
    """A new safetensors file whose tensors, laid out beforehand, are written by rows in any order.

    Several threads may write. The bytes are on disk once `close` has returned.
    """

    def __init__(self, path: str, layout: Mapping[str, tuple[np.dtype, tuple[int, ...]]]):
        self._path, self._places = path, {}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (dtype, shape) in layout.items():
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {
                "dtype": CODES[dtype],
                "shape": list(shape),
                "data_offsets": [begin, end],
            }
            self._places[name] = begin
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._base = 8 + len(text)
        self._file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        try:
            os.ftruncate(self._file, self._base + end)
        except OSError as error:
            raise self._named(error) from error
        self._pwrite(memoryview(struct.pack("<Q", len(text)) + text), 0)

    def write_rows(self, name: str, x: np.ndarray, first_row: int = 0) -> None:
        """Puts `x` at `first_row` and on of tensor `name`."""
        across = math.prod(x.shape[1:]) * x.dtype.itemsize
        begin = self._base + self._places[name] + first_row * across
        self._pwrite(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data, begin)

    def _pwrite(self, data: memoryview, begin: int) -> None:
        done = 0
        while done < len(data):
            try:
                done += os.pwrite(self._file, data[done:], begin + done)
            except OSError as error:
                raise self._named(error) from error

    def _named(self, error: OSError) -> OSError:
        """The error with its file: the system does not say it of an open one."""
        return OSError(error.errno, error.strerror, self._path)

    def close(self) -> None:
        """Syncs to disk."""
        try:
            os.fsync(self._file)
        finally:
            os.close(self._file)
