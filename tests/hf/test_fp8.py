import ml_dtypes
import numpy as np
import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from mathv2_jax.hf import fp8

SHAPES = [(128, 128), (5, 7), (130, 257), (256, 300)]


def matrix(shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
def test_each_value_is_multiplied_by_the_scale_of_its_block(shape):
    codes, _ = fp8.quantize(matrix(shape))
    scale = np.random.default_rng(1).uniform(1, 2, fp8.scale_shape(shape)).astype(np.float32)
    found = fp8.dequantize(codes, scale)
    for row, column in np.ndindex(shape):
        want = codes[row, column].astype(np.float32) * scale[row // 128, column // 128]
        assert found[row, column] == want


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_dequantized_like_the_whole(shape):
    codes, scale = fp8.quantize(matrix(shape))
    whole = fp8.dequantize(codes, scale)
    for begin in (0, 1, shape[0] - 1, min(129, shape[0] - 1)):
        np.testing.assert_array_equal(fp8.dequantize(codes[begin:], scale, begin), whole[begin:])


@pytest.mark.parametrize("shape", SHAPES)
def test_quantizing_errs_by_a_sixteenth_at_most_and_only_once(shape):
    x = matrix(shape)
    y = fp8.dequantize(*fp8.quantize(x))
    largest = np.abs(x).max()
    assert (np.abs(y - x) <= np.abs(x) / 16 + largest * 2.0**-15).all()
    np.testing.assert_array_equal(fp8.dequantize(*fp8.quantize(y)), y)
    np.testing.assert_array_equal(y.astype(ml_dtypes.bfloat16).astype(np.float32), y)


def test_scales_of_other_types_are_read_as_numbers():
    codes = np.asarray([[1.5, -448.0]], ml_dtypes.float8_e4m3fn)
    scale = np.asarray([[0.25]], ml_dtypes.float8_e8m0fnu)
    np.testing.assert_array_equal(fp8.dequantize(codes, scale), [[0.375, -112.0]])


def test_the_reference_library_gives_the_same_numbers():
    """Of whole blocks: of others it takes blocks of another size."""
    draw = np.random.default_rng(4)
    codes, scales = fp8.quantize(draw.standard_normal((256, 384)).astype(np.float32))
    scales *= draw.uniform(0.7, 1.4, scales.shape).astype(np.float32)
    theirs = Fp8Dequantize(None)._dequantize_one(
        torch.from_numpy(codes.view(np.uint8)).view(torch.float8_e4m3fn),
        torch.from_numpy(scales),
        torch.float32,
    )
    np.testing.assert_array_equal(fp8.dequantize(codes, scales), theirs.numpy())
