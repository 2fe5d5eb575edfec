"""What a chip can do at most, and estimates of a program's time on it that follow.

Peaks of cloud.google.com/tpu/docs (v5e, v5p-training, v6e, tpu7x); memory of v5e, v5p and v6e as
libtpu states it when a program does not fit, which is less than is built in.
"""

import dataclasses
import re

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """Of one device of JAX; a TPU7x chip is two devices, each with a half of everything."""

    bf16_flops: float  # a second
    hbm_bytes: float
    hbm_bandwidth: float  # bytes a second
    ici_bandwidth: float  # bytes a second that arrive, over all links: half the two-way figure
    xla_flags: tuple[str, ...] = ()  # in LIBTPU_INIT_ARGS, for collectives beside computation


# Flags of libtpu, grouped as MaxText groups them (benchmarks/xla_flags_library.py). libtpu 0.0.42.1
# and 0.0.48.1 take them all, and end the process at one that they do not know. What they do to a
# time was never measured here.
#
# The weights of what comes next are gathered while this computes.
_GATHER_BESIDE = (
    "--xla_tpu_overlap_compute_collective_tc=true",
    "--xla_enable_async_all_gather=true",
)
# The same in one operation with what is computed. On v5p and v6e libtpu 0.0.48.1 compiles nothing
# with it, since results might be wrong there; 0.0.42.1 compiled it without a word.
_FUSED = (
    "--xla_tpu_enable_async_collective_fusion=true",
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
)
# The sum of gradients over replicas, which may cross slices, goes beside the backward pass.
_REDUCE_BESIDE = (
    "--xla_tpu_enable_data_parallel_all_reduce_opt=true",
    "--xla_tpu_data_parallel_opt_different_sized_ops=true",
)
# More of v6e's 128 MiB of VMEM for an operation itself, less to prefetch for the next: MaxText's
# value for models of experts.
_VMEM = ("--xla_tpu_scoped_vmem_limit_kib=81920",)

CHIPS = {
    "v5e": Chip(
        bf16_flops=197e12,
        hbm_bytes=15.75 * GIB,
        hbm_bandwidth=819e9,
        ici_bandwidth=200e9,
        xla_flags=(*_FUSED, *_GATHER_BESIDE, *_REDUCE_BESIDE),
    ),
    "v5p": Chip(
        bf16_flops=459e12,
        hbm_bytes=95.73 * GIB,
        hbm_bandwidth=2765e9,
        ici_bandwidth=600e9,
        xla_flags=(*_GATHER_BESIDE, *_REDUCE_BESIDE),
    ),
    "v6e": Chip(
        bf16_flops=918e12,
        hbm_bytes=31.24 * GIB,
        hbm_bandwidth=1638e9,
        ici_bandwidth=400e9,
        xla_flags=(*_GATHER_BESIDE, *_REDUCE_BESIDE, *_VMEM),
    ),
    "tpu7x": Chip(
        bf16_flops=2307e12 / 2,
        hbm_bytes=192 * GIB / 2,
        hbm_bandwidth=7380e9 / 2,
        ici_bandwidth=600e9 / 2,
    ),
}

# A measured step: MaxText, Llama 2 70B, 512 v5p chips, bf16, sequences of 4,096: 65.4 % MFU
# (maxtext.readthedocs.io, "Optimized models tiering"). What it recomputes is not stated there, so
# its matrix products run at that share of the peak or at more.
MEASURED_SHARE_OF_PEAK = 0.654


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
    """Of one call: seconds of each resource alone at its peak rate, and what follows. Estimates.

    `overlapped`: all at once, less than which no call can take; `without_overlap`: one after the
    other, still at peak rates, so a call may well take longer; `calibrated`: overlapped, with
    products at the share of the peak that one published step of another model reached. MFU is of
    the model's FLOPs. What is left out: see LEFT_OUT.
    """

    compute_seconds: float
    hbm_at_least_seconds: float  # every argument read once, or in each of a program's turns
    ici_seconds: float
    overlapped_seconds: float
    without_overlap_seconds: float
    calibrated_seconds: float
    mfu_overlapped: float
    mfu_without_overlap: float
    mfu_calibrated: float


LEFT_OUT = (
    "an estimate from peak rates, not measured, and no upper bound: left out are what is written "
    "to and read from memory beyond the arguments, all that is no matrix product, latencies, "
    "links that a collective does not use, and uneven loads"
)

# Names of a chip that are not its name in CHIPS: Cloud TPU's, and what is said of TPU7x.
_ALSO = {"v5litepod": "v5e", "7x": "tpu7x", "v7x": "tpu7x"}
_NAME = re.compile(r"([a-z0-9]+)(?:(:)\d+(?:x\d+){1,2}(?:_(?:un)?twisted)?|-\d+(?:x\d+){0,2})?")


def _parsed(topology: str) -> tuple[str, bool]:
    """The chip's name in CHIPS, and whether the topology is a shape of chips."""
    found = _NAME.fullmatch(topology)
    kind = found and _ALSO.get(found[1], found[1])
    if found is None or kind not in CHIPS:
        raise ValueError(
            f"topology {topology!r}: must be CHIP:SHAPE, as in v5p:8x8x16 or v6e:4x4, or for "
            f"--xla_flags CHIP or Cloud TPU's name of a type, as in v5p or v5p-2048, where CHIP is "
            f"one of {', '.join([*CHIPS, *_ALSO])}"
        )
    return kind, bool(found[2])


def chip_of(topology: str) -> Chip:
    """The chip of `v5p:8x8x16`, of Cloud TPU's name of a type, like `v5p-2048`, or of `v5p`.

    ValueError says which forms there are.
    """
    return CHIPS[_parsed(topology)[0]]


def libtpu_name(topology: str) -> str:
    """As libtpu writes a chip and a shape; ValueError where there is no shape to compile for."""
    kind, shaped = _parsed(topology)
    if not shaped:
        raise ValueError(
            f"topology {topology!r} has no shape to compile for: write {kind}:SHAPE, as in "
            "v5p:8x8x16 or v6e:4x4"
        )
    return f"{kind}:{topology.partition(':')[2]}"


# What JAX calls the devices of these chips.
_KINDS = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU7x": "tpu7x"}


def of_device(kind: str) -> Chip | None:
    """The chip of a device by its `device_kind`; None where it is none of these."""
    return CHIPS[_KINDS[kind]] if kind in _KINDS else None


def roofline(
    chip: Chip,
    *,
    model_flops: float,
    executed_flops: float,
    argument_bytes: float,
    sent: dict[str, int],
) -> Roofline:
    """For one chip's share; `sent` are bytes by kind of collective (hlo.collectives)."""
    compute = executed_flops / chip.bf16_flops
    hbm = argument_bytes / chip.hbm_bandwidth
    # What is reduced goes round once more to be known to all.
    moved = sum(size * (2 if kind == "all-reduce" else 1) for kind, size in sent.items())
    ici = moved / chip.ici_bandwidth
    overlapped, without = max(compute, hbm, ici), compute + hbm + ici
    calibrated = max(compute / MEASURED_SHARE_OF_PEAK, hbm, ici)
    at_peak = model_flops / chip.bf16_flops

    def mfu(seconds: float) -> float:
        return at_peak / seconds if seconds else 0.0

    return Roofline(
        compute_seconds=compute,
        hbm_at_least_seconds=hbm,
        ici_seconds=ici,
        overlapped_seconds=overlapped,
        without_overlap_seconds=without,
        calibrated_seconds=calibrated,
        mfu_overlapped=mfu(overlapped),
        mfu_without_overlap=mfu(without),
        mfu_calibrated=mfu(calibrated),
    )
