"""Compare what several arms of a run answered to the same held-out items, pooled over seeds.

    python experiments/arms.py --workdirs=runs/world-0,runs/world-1,runs/world-2 \
        --arms=after-fixed,after-loop,after-score --out=result.json

An arm is an answer stage of runs in the embedded world; the first one is what the others are
compared with. The exact judge measures the written records, nothing is sampled. Differences are
paired by item within a seed; pooled over k seeds they are means of the seeds' differences with
standard error sqrt(sum se^2) / k, so they speak about these seeds' runs. The workdirs must be runs
of one config that differ in the seed, and in nothing else.

Exit codes: 0 done, 2 bad usage or records.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from etils import epath

from mathv2_jax import records, storage
from mathv2_jax.cli import shell
from mathv2_jax.data import sources
from mathv2_jax.evaluation import held_out
from mathv2_jax.world import judge

Measured = Mapping[str, held_out.Ratio]


def require_seeds_of_one_config(workdirs: Sequence[str]) -> None:
    """ValueError where two runs have one seed, or differ in more than the seed."""
    first: dict[str, Any] = {}
    seeds: dict[int, str] = {}
    for workdir in workdirs:
        path = epath.Path(workdir) / "config.json"
        if not storage.exists(path):
            raise ValueError(f"--workdirs: {workdir} is no run, it has no config.json")
        identity = json.loads(storage.read_bytes(path))["identity"]
        seed = identity.pop("seed")
        if seed in seeds:
            raise ValueError(
                f"--workdirs: {seeds[seed]} and {workdir} both have seed {seed}: one run a "
                "seed, or the same answers count twice"
            )
        seeds[seed] = workdir
        first = first or identity
        unlike = [n for n in {**first, **identity} if first.get(n) != identity.get(n)]
        if unlike:
            raise ValueError(
                f"--workdirs: {workdirs[0]} and {workdir} differ in more than the seed, in config."
                f"{', config.'.join(unlike)}: pool runs of one config"
            )


def measure_arm(workdir: str, stage: str) -> Measured:
    """The metrics of an answer stage; ValueError where it wrote no answers to the test set."""
    folder = epath.Path(workdir) / "records" / stage
    mark = f'"kind": "{records.Sample.__name__}"'
    lines = [line for line in storage.Parts(folder).read() if mark in line]
    samples = sources.parse_lines(lines, records.Sample, str(folder))
    found = held_out.measure(samples, judge.ExactJudge())
    if not any(ratio.items for ratio in found.values()):
        raise ValueError(
            f"{folder} holds no answers to the test set: is {stage!r} an answer stage that ran?"
        )
    return found


def compare(seeds: Sequence[Mapping[str, Measured]], arms: Sequence[str]) -> dict[str, Any]:
    """By metric: every arm's level, and its difference from the first arm, by seed and pooled."""
    result: dict[str, Any] = {}
    for metric in held_out.METRICS:
        rows: dict[str, Any] = {}
        for arm in arms:
            found = [seed[arm][metric] for seed in seeds]
            base = [seed[arms[0]][metric] for seed in seeds]
            gaps = [f.mean - b.mean for f, b in zip(found, base, strict=True)]
            errors = [held_out.difference_se(b, f) for f, b in zip(found, base, strict=True)]
            rows[arm] = {
                "level": held_out.pooled([f.mean for f in found], [f.se for f in found]),
                "seeds": [_figure(f.mean) for f in found],
                "n": sum(f.n for f in found),
                "difference": held_out.pooled(gaps, errors),
                "seed_differences": [
                    {"mean": _figure(g), "se": _figure(e)}
                    for g, e in zip(gaps, errors, strict=True)
                ],
            }
        result[metric] = rows
    return result


def _figure(x: float) -> float | None:
    return None if math.isnan(x) else x


def render(result: Mapping[str, Any], arms: Sequence[str]) -> str:
    """Levels, and differences from the first arm with the number of their standard errors."""
    lines = [f"{'':24}" + "".join(f"{arm:>32}" for arm in arms)]
    for metric, rows in result.items():
        cells = []
        for arm in arms:
            level, gap = rows[arm]["level"], rows[arm]["difference"]
            text = "-" if level["mean"] is None else f"{level['mean']:.3f} ±{level['se']:.3f}"
            if arm != arms[0] and gap["mean"] is not None and gap["se"]:
                text += f" ({gap['mean']:+.3f}, {gap['mean'] / gap['se']:+.1f} se)"
            cells.append(f"{text:>32}")
        lines.append(f"{metric:24}" + "".join(cells))
    return "\n".join(lines)


def make_flags() -> flags.FlagValues:
    """This program's own, since other programs have flags of these names."""
    made = flags.FlagValues()
    flags.DEFINE_list("workdirs", None, "One workdir a seed.", flag_values=made)
    flags.DEFINE_list("arms", None, "Answer stages; the first: baseline.", flag_values=made)
    flags.DEFINE_string("out", None, "Where the figures go, as JSON.", flag_values=made)
    return made


def main(argv: Sequence[str]) -> int:
    """Usage and input errors are one line and exit code 2."""
    asked = make_flags()
    try:
        if not shell.read_flags(asked, argv, __doc__, ("workdirs", "arms")):
            return shell.FINISHED
        arms = asked.arms
        if len(set(arms)) < len(arms):
            raise ValueError(f"--arms={','.join(arms)}: name each arm once")
        require_seeds_of_one_config(asked.workdirs)
        seeds = [{arm: measure_arm(w, arm) for arm in arms} for w in asked.workdirs]
        result = compare(seeds, arms)
    except (ValueError, flags.Error) as error:
        print(f"arms: {error}", file=sys.stderr)
        return shell.BAD_INPUT
    print(render(result, arms))
    if asked.out:
        body = {"arms": arms, "seeds": len(seeds), "metrics": result}
        storage.write_whole(asked.out, (json.dumps(body, indent=1) + "\n").encode())
    return shell.FINISHED


if __name__ == "__main__":
    sys.exit(main(sys.argv))
