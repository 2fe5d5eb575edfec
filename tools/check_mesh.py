"""The shrunken run on eight virtual devices ends like the one on a single device, up to noise.

    python tools/check_mesh.py [--config=configs/smoke.py] [--mesh=data=2,fsdp=2,tensor=2]

Both runs sample with the same seeds, but rounding differs between meshes and with it, sooner or
later, every answer. So for each RL stage the mean reward and the share of answers that parse are
compared within 3 standard errors of their difference, over groups. (That the first step on one
batch is equal to 1e-5 is a test: tests/stages/test_devices.py.) Exit code 0 where all agree.
"""

import argparse
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile

from mathv2_jax import records, storage
from mathv2_jax.data import sources

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIMIT = 3.0


def train(config: str, workdir: pathlib.Path, devices: int, overrides: list[str]) -> None:
    """One run on that many virtual devices; RuntimeError with its end where it fails."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    arguments = [f"--config={config}", f"--workdir={workdir}", *overrides]
    done = subprocess.run(
        [sys.executable, "-m", "mathv2_jax.cli.train", *arguments],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"the run on {devices} devices failed:\n{done.stderr[-3000:]}")


def groups(workdir: pathlib.Path, stage: str) -> list[tuple[float, float]]:
    """Per group of an RL stage: the mean reward and the share that parsed."""
    folder = workdir / "records" / stage
    lines = list(storage.Parts(folder).read())
    found: dict[str, list[records.Sample]] = {}
    for sample in sources.parse_lines(lines, records.Sample, str(folder)):
        if sample.rewards:
            found.setdefault(sample.id.rsplit("/", 1)[0], []).append(sample)
    return [
        (
            sum(s.rewards["total"] for s in group) / len(group),
            sum(s.outcome is records.Outcome.PARSED for s in group) / len(group),
        )
        for group in found.values()
    ]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean and its standard error."""
    mean = sum(values) / len(values)
    spread = sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1)
    return mean, math.sqrt(spread / len(values))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/smoke.py")
    parser.add_argument("--mesh", default="data=2,fsdp=2,tensor=2")
    args = parser.parse_args()
    sizes = [f"--config.runtime.mesh.{size}" for size in args.mesh.split(",")]
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        one, many = pathlib.Path(folder) / "one", pathlib.Path(folder) / "many"
        train(args.config, one, 1, ["--config.runtime.mesh.data=1"])
        train(args.config, many, 8, sizes)
        stages = json.loads((one / "summary.json").read_text())["stages"]
        print(f"{'stage':16}{'':8}{'1 device':>16}{'8 devices':>16}{'apart, se':>12}")
        for stage in (name for name, figures in stages.items() if "reward" in figures):
            pair = groups(one, stage), groups(many, stage)
            for place, name in enumerate(("reward", "parsed")):
                (a, ea), (b, eb) = (mean_and_error([g[place] for g in side]) for side in pair)
                error = math.hypot(ea, eb)
                apart = abs(a - b) / error if error else (0.0 if a == b else math.inf)
                wrong += apart > LIMIT
                print(f"{stage:16}{name:8}{a:>8.3f} ±{ea:.3f}{b:>9.3f} ±{eb:.3f}{apart:>12.2f}")
    print("all within 3 standard errors" if not wrong else f"{wrong} further apart than {LIMIT} se")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
