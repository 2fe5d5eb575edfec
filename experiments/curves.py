"""The hacking curve: what a generator's judges say of its proofs as it trains, beside the truth.

    python experiments/curves.py --workdir=runs/world --stages=generator-1,fixed --out=curve.json

For every step of a generator stage in the embedded world, over the proofs sampled in that step
that can be read: their true score by the exact judge, the frozen verifier's votes, the generator's
own scores, and the proofs' length. A verifier that is being hacked shows as votes that rise away
from the true score. Nothing is sampled, the stages' records are read. Standard errors are over
prompts, since the answers to one prompt are alike. With matplotlib (`pip install -e
".[experiments]"`) the curves are also drawn, beside FILE.json as FILE.png.

Exit codes: 0 done, 2 bad usage or records.
"""

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags
from etils import epath

from mathv2_jax import records, reward, roles, storage
from mathv2_jax.cli import shell
from mathv2_jax.data import sources
from mathv2_jax.evaluation import held_out
from mathv2_jax.text import parse
from mathv2_jax.world import judge

SCHEMA = 1
SCORES = {"true_score": "true", "verifier_score": "verifier", "self_score": "generator itself"}
CURVES = ("parsed", *SCORES, "verifier_minus_true", "proof_characters")


def read_stage(workdir: epath.PathLike, stage: str) -> list[records.Sample]:
    """The proofs that a generator stage sampled; ValueError where it holds none."""
    folder = epath.Path(workdir) / "records" / stage
    mark = f'"kind": "{records.Sample.__name__}"'
    lines = [line for line in storage.Parts(folder).read() if mark in line]
    samples = sources.parse_lines(lines, records.Sample, str(folder))
    found = [s for s in samples if s.role == roles.GENERATOR]
    if not found:
        raise ValueError(f"{folder} holds no proofs: is {stage!r} a generator's stage that ran?")
    return found


def measure(sample: records.Sample) -> dict[str, float]:
    """What there is to say of one sample, by CURVES; only `parsed` of one that cannot be read."""
    found = parse.parse_generation(sample.text)
    if found is None or sample.outcome is not records.Outcome.PARSED:
        return {"parsed": 0.0}
    true = judge.judge_proof(sample.statement, found.proof).score
    figures = {
        "parsed": 1.0,
        "true_score": true,
        "self_score": found.self_score,
        "proof_characters": float(len(found.proof)),
    }
    if sample.votes:
        vote = reward.mean(sample.votes)
        figures |= {"verifier_score": vote, "verifier_minus_true": vote - true}
    return figures


def curves(samples: Iterable[records.Sample]) -> list[dict[str, Any]]:
    """A row a step, ascending: `step`, `n` samples, and mean and se of every curve.

    A proof without votes has no part in the verifier's curves; a curve without proofs, or an error
    over one prompt, is None.
    """
    steps: dict[int, dict[str, list[dict[str, float]]]] = {}
    for sample in samples:
        prompt = sample.id.rpartition("/")[0]
        steps.setdefault(sample.step, {}).setdefault(prompt, []).append(measure(sample))
    return [
        {
            "step": step,
            "n": sum(map(len, prompts.values())),
            **{name: _curve(prompts, name) for name in CURVES},
        }
        for step, prompts in sorted(steps.items())
    ]


def _curve(
    prompts: Mapping[str, Sequence[Mapping[str, float]]], name: str
) -> dict[str, float | None]:
    values = [[figures[name] for figures in found if name in figures] for found in prompts.values()]
    ratio = held_out.Ratio(
        tuple(prompts),
        np.asarray([sum(v) for v in values], float),
        np.asarray([len(v) for v in values], float),
    )
    return {"mean": _figure(ratio.mean), "se": _figure(ratio.se)}


def _figure(x: float) -> float | None:
    return None if math.isnan(x) else x


def render(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line a step: the means, and the verifier's excess with its standard error."""
    lines = [
        f"{'step':>5} {'n':>5} {'parsed':>7} {'true':>7} {'verifier':>9} {'self':>7} "
        f"{'verifier - true':>16} {'characters':>11}"
    ]
    for row in rows:
        gap = row["verifier_minus_true"]
        error = "" if gap["se"] is None else f" ±{gap['se']:.3f}"
        lines.append(
            f"{row['step']:>5} {row['n']:>5} {_text(row['parsed'], 7)}"
            f" {_text(row['true_score'], 7)} {_text(row['verifier_score'], 9)}"
            f" {_text(row['self_score'], 7)}"
            f" {_text(gap, 9)}{error:>7} {_text(row['proof_characters'], 11, 1)}"
        )
    return "\n".join(lines)


def _text(figure: Mapping[str, float | None], width: int, digits: int = 3) -> str:
    mean = figure["mean"]
    return f"{'-':>{width}}" if mean is None else f"{mean:>{width}.{digits}f}"


def draw(stages: Mapping[str, Sequence[Mapping[str, Any]]], path: str) -> bool:
    """Scores over steps with a band of one standard error, lengths below; a column a stage.

    False, with a line that says so, where matplotlib is not installed.
    """
    try:
        from matplotlib import figure  # pyright: ignore[reportMissingImports] - an extra
    except ImportError:
        print('no figure: matplotlib is missing, pip install -e ".[experiments]" brings it')
        return False
    page = figure.Figure(figsize=(4 * len(stages) + 1, 5.5), layout="constrained")
    axes = page.subplots(
        2, len(stages), sharex="col", sharey="row", squeeze=False, height_ratios=(3, 1)
    )
    for column, (stage, rows) in enumerate(stages.items()):
        scores, lengths = axes[:, column]
        for name, label in SCORES.items():
            _plot(scores, rows, name, label)
        _plot(lengths, rows, "proof_characters", None)
        scores.set_title(stage)
        lengths.set_xlabel("step")
        lengths.xaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].set_ylabel("mean score of sampled proofs")
    axes[1, 0].set_ylabel("characters")
    axes[0, 0].legend(loc="best")
    page.savefig(path, dpi=80)
    return True


def _plot(axes: Any, rows: Sequence[Mapping[str, Any]], name: str, label: str | None) -> None:
    shown = [row for row in rows if row[name]["mean"] is not None]
    steps = [row["step"] for row in shown]
    mean = np.asarray([row[name]["mean"] for row in shown], float)
    band = np.asarray([row[name]["se"] or 0.0 for row in shown], float)
    (line,) = axes.plot(steps, mean, label=label)
    axes.fill_between(steps, mean - band, mean + band, alpha=0.2, color=line.get_color())


def make_flags() -> flags.FlagValues:
    """This program's own, since other programs have flags of these names."""
    made = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "A run in the embedded world.", flag_values=made)
    flags.DEFINE_list("stages", None, "Generator stages, in order.", flag_values=made)
    flags.DEFINE_string("out", None, "Where the curves go: FILE.json.", flag_values=made)
    return made


def main(argv: Sequence[str]) -> int:
    """Usage errors are one line and exit code 2."""
    asked = make_flags()
    try:
        if not shell.read_flags(asked, argv, __doc__, ("workdir", "stages")):
            return shell.FINISHED
        if asked.out and not asked.out.endswith(".json"):
            raise ValueError(f"--out={asked.out}: the curves are JSON, name a file .json")
        stages = {stage: curves(read_stage(asked.workdir, stage)) for stage in asked.stages}
    except (ValueError, flags.Error) as error:
        print(f"curves: {error}", file=sys.stderr)
        return shell.BAD_INPUT
    for stage, rows in stages.items():
        print(f"{stage}\n{render(rows)}\n")
    if asked.out:
        out = os.path.abspath(asked.out) if storage.is_local(asked.out) else asked.out
        body = json.dumps({"schema": SCHEMA, "stages": stages}, indent=1) + "\n"
        storage.write_whole(out, body.encode())
        if storage.is_local(out):
            draw(stages, out.removesuffix(".json") + ".png")
    return shell.FINISHED


if __name__ == "__main__":
    sys.exit(main(sys.argv))
