"""What a run computes on."""

import pytest

from configs.models import tiny_v32
from mathv2_jax.cli import machine
from mathv2_jax.model.config import ModelConfig
from mathv2_jax.pods import chips, counting

MODEL = ModelConfig(**tiny_v32.model())


def test_mfu_is_three_forward_passes_over_what_all_devices_could_do():
    forward = counting.model_flops(MODEL, 8, 32)
    once = forward.indexer + forward.indexer_projections
    peak = 4 * chips.CHIPS["v5p"].bf16_flops
    found = machine.share_of_peak(MODEL, "TPU v5", 4, 8, 32, 2.0)
    assert found == pytest.approx((3 * forward.total - 2 * once) / (2.0 * peak))
    assert machine.share_of_peak(MODEL, "cpu", 4, 8, 32, 2.0) is None
