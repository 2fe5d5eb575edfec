import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mathv2_jax import fingerprint

DTYPES = ["float32", "bfloat16", "int32", "bool", "uint8"]


def make(dtype, shape=(8, 16, 6)):
    rng = np.random.default_rng(5)
    x = rng.normal(size=shape).astype(np.float32)
    x.reshape(-1)[:4] = [np.nan, np.inf, -0.0, 1e-42]  # bits that a comparison of values misses
    return np.asarray(
        rng.integers(0, 2, shape) if dtype in ("bool", "uint8", "int32") else x
    ).astype(jnp.dtype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fingerprint_is_the_same_on_host_and_device_for_every_sharding(dtype):
    x = make(dtype)
    want = fingerprint.on_host(x)
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    for spec in (PartitionSpec(), PartitionSpec("x", "y"), PartitionSpec(("x", "y"))):
        split = jax.device_put(x, NamedSharding(mesh, spec))
        assert int(fingerprint.on_device(split)) == want
        assert fingerprint.of_arrays({"x": split}) == {"x": want}


@pytest.mark.parametrize("shape", [(), (5,), (70_000,), (3, 40_000), (2, 3, 4, 5)])
def test_the_fingerprint_on_host_is_that_on_device_for_every_shape(shape):
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    assert fingerprint.on_host(x) == int(fingerprint.on_device(jnp.asarray(x)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8"])
def test_the_compiled_program_for_long_runs_gives_what_numpy_gives(dtype, monkeypatch):
    length = 2 * fingerprint._LONG + 70_003
    x = np.random.default_rng(3).integers(0, 200, (2, length)).astype(jnp.dtype(dtype))
    with jax.transfer_guard("disallow_explicit"), jax.transfer_guard("disallow"):
        found = fingerprint.of_part(x[1:, 5:], (1, 5), x.shape)
    monkeypatch.setattr(fingerprint, "_cpu", lambda: None)
    assert found == fingerprint.of_part(x[1:, 5:], (1, 5), x.shape)


def test_the_fingerprint_shows_changed_moved_and_zeroed_words():
    x = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    swapped, zeroed, flipped = x.copy(), x.copy(), x.copy()
    swapped[[0, 32]] = x[[32, 0]]
    zeroed[8:16] = 0
    flipped.view(np.uint32)[63, 63] ^= 1
    prints = [fingerprint.on_host(y) for y in (x, x.T, swapped, zeroed, flipped)]
    assert len(set(prints)) == 5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_parts_of_an_array_add_up_to_its_fingerprint(dtype, axis):
    x = np.random.default_rng(2).normal(size=(4, 6, 10)).astype(jnp.dtype(dtype))
    total = 0
    for begin in range(0, x.shape[axis], 3):
        at = tuple(slice(begin, begin + 3) if a == axis else slice(None) for a in range(3))
        starts = [begin if a == axis else 0 for a in range(3)]
        total += fingerprint.of_part(x[at], starts, x.shape)
    corner = fingerprint.of_part(x[1:3, 2:5, 4:9], (1, 2, 4), x.shape)
    rows = [
        fingerprint.of_part(x[i : i + 1, j : j + 1, 4:9], (i, j, 4), x.shape)
        for i in (1, 2)
        for j in (2, 3, 4)
    ]
    assert total % 2**32 == fingerprint.on_host(x)
    assert corner == sum(rows) % 2**32
