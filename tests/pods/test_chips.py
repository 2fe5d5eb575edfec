import pytest

from mathv2_jax.pods import chips

CHIP = chips.Chip(bf16_flops=100.0, hbm_bytes=1.0, hbm_bandwidth=10.0, ici_bandwidth=5.0)


def test_estimates_are_of_the_slowest_alone_and_of_all_in_turn():
    found = chips.roofline(
        CHIP,
        model_flops=150.0,
        executed_flops=200.0,
        argument_bytes=10.0,
        sent={"all-gather": 5, "all-reduce": 5},
    )
    alone = (found.compute_seconds, found.hbm_at_least_seconds, found.ici_seconds)
    assert alone == (2.0, 1.0, 3.0)
    assert (found.overlapped_seconds, found.without_overlap_seconds) == (3.0, 6.0)
    assert (found.mfu_overlapped, found.mfu_without_overlap) == (0.5, 0.25)
    assert found.calibrated_seconds == pytest.approx(2.0 / chips.MEASURED_SHARE_OF_PEAK)


@pytest.mark.parametrize(
    ("topology", "chip", "libtpu"),
    [
        ("v5p:8x8x16", "v5p", "v5p:8x8x16"),
        ("v5p:4x4x8_twisted", "v5p", "v5p:4x4x8_twisted"),
        ("v6e:4x4", "v6e", "v6e:4x4"),
        ("v5litepod:4x4", "v5e", "v5e:4x4"),
        ("7x:2x2x1", "tpu7x", "tpu7x:2x2x1"),
        ("v7x:2x2x1", "tpu7x", "tpu7x:2x2x1"),
        ("tpu7x:2x2x1", "tpu7x", "tpu7x:2x2x1"),
        ("v6e-16", "v6e", None),
        ("v5litepod-256", "v5e", None),
        ("tpu7x-2x2x1", "tpu7x", None),
        ("7x-8", "tpu7x", None),
        ("v5p", "v5p", None),
    ],
)
def test_a_topology_is_a_chip_and_its_shape_or_cloud_tpus_name(topology, chip, libtpu):
    assert chips.chip_of(topology) is chips.CHIPS[chip]
    if libtpu is None:
        with pytest.raises(ValueError, match=f"no shape to compile for: write {chip}:SHAPE"):
            chips.libtpu_name(topology)
    else:
        assert chips.libtpu_name(topology) == libtpu


@pytest.mark.parametrize(
    "topology",
    [
        "v99:2x2",
        "v5p-garbage",
        "v5p:garbage",
        "v5p:8",
        "v5p:2x2x2x2",
        "v5p-",
        "v5p:2x2x1 ",
        "V5P",
        "",
    ],
)
def test_what_is_no_topology_is_an_error_that_names_the_forms(topology):
    for function in (chips.chip_of, chips.libtpu_name):
        with pytest.raises(
            ValueError, match=f"topology {topology!r}: must be CHIP:SHAPE.*v5p-2048"
        ):
            function(topology)


def test_devices_are_known_by_what_jax_calls_them():
    assert chips.of_device("TPU v5") is chips.CHIPS["v5p"]
    assert chips.of_device("TPU v5 lite") is chips.CHIPS["v5e"]
    assert chips.of_device("cpu") is None
