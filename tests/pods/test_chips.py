import pytest

from mathv2_jax.pods import chips

CHIP = chips.Chip(bf16_flops=100.0, hbm_bytes=1.0, hbm_bandwidth=10.0, ici_bandwidth=5.0)


def test_bounds_are_of_the_slowest_alone_and_of_all_in_turn():
    found = chips.roofline(
        CHIP,
        model_flops=150.0,
        executed_flops=200.0,
        argument_bytes=10.0,
        sent={"all-gather": 5, "all-reduce": 5},
    )
    assert (found.compute, found.hbm_at_least, found.ici) == (2.0, 1.0, 3.0)
    assert (found.overlapped, found.in_turn) == (3.0, 6.0)
    assert (found.mfu_overlapped, found.mfu_in_turn) == (0.5, 0.25)
    assert found.calibrated == pytest.approx(2.0 / chips.MEASURED_SHARE_OF_PEAK)


def test_a_chip_is_that_of_its_topology():
    assert chips.chip_of("v5p:8x8x16").bf16_flops == 459e12
    assert chips.chip_of("v6e-16") is chips.CHIPS["v6e"]
    assert chips.chip_of("v5litepod-256") is chips.CHIPS["v5e"]
    with pytest.raises(ValueError, match="'v99:2x2': chips are v5e, v5p, v6e, tpu7x"):
        chips.chip_of("v99:2x2")


def test_devices_are_known_by_what_jax_calls_them():
    assert chips.of_device("TPU v5") is chips.CHIPS["v5p"]
    assert chips.of_device("TPU v5 lite") is chips.CHIPS["v5e"]
    assert chips.of_device("cpu") is None
