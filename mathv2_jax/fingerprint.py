"""32 bits that tell whether an array is, bit for bit, what it was.

A fingerprint is a sum over the words of an array, each mixed with its place: so it is the same for
every sharding, and may be summed up part by part. One changed word always shows; a garbled block
does but for one in 2^32.
"""

import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_SMALL = 2**24  # bytes of an array that is fingerprinted on the host
_SEED = np.uint32(0x9E3779B9)
_RUN = 2**16  # words that are fingerprinted at a time: they stay in a core's cache
_RAMP = np.arange(_RUN, dtype=np.uint32)
_LONG = 2**20  # words that are fingerprinted at a time by a compiled program, four times as fast


def of_arrays(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    """The fingerprint of each array, large ones' computed where they lie."""
    small = {n: a for n, a in arrays.items() if a.is_fully_addressable and a.nbytes <= _SMALL}
    large = {n: on_device(a) for n, a in arrays.items() if n not in small}
    prints = {name: on_host(a) for name, a in jax.device_get(small).items()}
    return prints | {name: int(value) for name, value in jax.device_get(large).items()}


def of_tree(tree: Any) -> str:
    """One word for all arrays of a tree, with their places in it."""
    leaves = jax.tree.leaves_with_path(tree)
    prints = of_arrays({jax.tree_util.keystr(path): leaf for path, leaf in leaves})
    return hashlib.sha256(repr(sorted(prints.items())).encode()).hexdigest()[:16]


def on_host(x: np.ndarray) -> int:
    """As `on_device`, without a program to compile for every shape."""
    return of_part(x, (0,) * x.ndim, x.shape)


def of_part(part: np.ndarray, begin: Sequence[int], shape: Sequence[int]) -> int:
    """What the part that begins at `begin` adds to the fingerprint of an array of `shape`.

    The parts' sum, modulo 2^32, is the array's fingerprint.
    """
    whole = part.ndim  # from this axis on the part is as wide as the array
    while whole and part.shape[whole - 1] == shape[whole - 1]:
        whole -= 1
    led = part.shape[: max(whole - 1, 0)]  # each of these places begins a run of words in the array
    runs = np.ascontiguousarray(part).reshape(math.prod(led), -1)
    words = runs.view(_word(runs.dtype))
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    first = sum(b * s for b, s in zip(begin, strides, strict=True))
    total = 0
    for run, place in zip(words, np.ndindex(*led), strict=True):
        at = first + sum(p * s for p, s in zip(place, strides, strict=False))
        total += _of_run(run, at * (words.shape[1] // max(runs.shape[1], 1)))
    return total % 2**32


def _of_run(words: np.ndarray, at: int) -> int:
    first, total = 0, 0
    cpu = _cpu() if words.size >= _LONG else None
    if cpu is not None:
        first = words.size // _LONG * _LONG
        runs = ((words[i : i + _LONG], np.uint32((at + i) % 2**32)) for i in range(0, first, _LONG))
        total = sum(int(_of_long_run(*jax.device_put(run, cpu))) for run in runs)
    places, spare = np.empty((2, min(_RUN, words.size)), np.uint32)
    for begin in range(first, words.size, _RUN):
        some = words[begin : begin + _RUN]
        h, other = places[: some.size], spare[: some.size]
        np.add(_RAMP[: some.size], np.uint32((int(_SEED) + at + begin) % 2**32), out=h)
        _mix_in_place(h, other)
        np.bitwise_xor(h, some, out=h)
        _mix_in_place(h, other)
        total += int(np.add.reduce(h, dtype=np.uint64))
    return total


@functools.cache
def _cpu() -> Any:
    """The host as a device of JAX; None where the process was told to do without."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


@jax.jit
def _of_long_run(words: jax.Array, at: jax.Array) -> jax.Array:
    places = jnp.arange(words.size, dtype=jnp.uint32) + (at + _SEED)
    return jnp.sum(_mix(words.astype(jnp.uint32) ^ _mix(places)), dtype=jnp.uint32)


def _mix_in_place(h: np.ndarray, other: np.ndarray) -> None:
    """`_mix`, in `h`; `other` is overwritten."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        np.right_shift(h, np.uint32(shift), out=other)
        np.bitwise_xor(h, other, out=h)
        if factor != 1:
            np.multiply(h, np.uint32(factor), out=h)


@jax.jit
def on_device(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        words = x.astype(jnp.uint32)
    else:
        words = jax.lax.bitcast_convert_type(x, _word(x.dtype)).astype(jnp.uint32)
    places = jnp.full(words.shape, _SEED)
    for axis in range(words.ndim):
        stride = np.uint32(math.prod(words.shape[axis + 1 :]) % 2**32)
        places += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * stride
    return jnp.sum(_mix(words ^ _mix(places)), dtype=jnp.uint32)


def _word(dtype: np.dtype) -> type[np.unsignedinteger]:
    return {1: np.uint8, 2: np.uint16}.get(dtype.itemsize, np.uint32)


def _mix(h: jax.Array) -> jax.Array:
    """The finalizer of MurmurHash3, a permutation of 32-bit words."""
    once = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    twice = (once ^ (once >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return twice ^ (twice >> np.uint32(16))
