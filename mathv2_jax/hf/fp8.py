"""FP8 weights with one scale for each block of 128 x 128, as DeepSeek releases them."""

import ml_dtypes
import numpy as np

BLOCK = 128
SUFFIX = "_scale_inv"  # the scales of x.weight are x.weight_scale_inv
_VALUE = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a matrix's scales; blocks at its edges may be smaller."""
    return tuple(-(-size // BLOCK) for size in shape)


def dequantize(codes: np.ndarray, scale: np.ndarray, first_row: int = 0) -> np.ndarray:
    """Rows `first_row` and on of a matrix in float32: each value of e4m3 times its block's scale.

    `codes` are those rows (uint8 or float8_e4m3fn), `scale` the scales of the whole matrix.
    """
    values = _VALUE[codes.view(np.uint8)]
    rows = np.arange(first_row, first_row + codes.shape[0]) // BLOCK
    scale = scale.astype(np.float32)
    for block in range(scale.shape[1]):
        columns = slice(block * BLOCK, (block + 1) * BLOCK)
        values[:, columns] *= scale[rows, block][:, None]
    return values


def quantize(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(codes, scales): each block's largest value becomes e4m3's largest, 448.

    Scales are powers of two, so that `dequantize` of the codes is exact in bfloat16.
    """
    rows, columns = scale_shape(matrix.shape)
    codes = np.empty(matrix.shape, ml_dtypes.float8_e4m3fn)
    scales = np.ones((rows, columns), np.float32)
    for row in range(rows):
        for column in range(columns):
            at = tuple(slice(i * BLOCK, (i + 1) * BLOCK) for i in (row, column))
            block = matrix[at].astype(np.float32)
            largest = float(np.abs(block).max())
            if largest > 0:
                scales[row, column] = 2.0 ** np.ceil(np.log2(largest / 448.0))
            codes[at] = (block / scales[row, column]).astype(ml_dtypes.float8_e4m3fn)
    return codes, scales
