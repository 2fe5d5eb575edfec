"""The result table of a run, as text."""

from collections.abc import Mapping
from typing import Any

from mathv2_jax import metrics

_TITLES = {
    "verifier_accuracy": "verifier: score equals the true one",
    "verifier_balanced_accuracy": "verifier: the same, each true score alike",
    "verifier_mean_error": "verifier: mean |score - true|  (lower is better)",
    "analysis_faithfulness": "analyses that name issues: faithful",
    "right_for_wrong_reason": "right scores for a wrong reason  (lower is better)",
    "meta_accuracy": "meta-verifier: rating equals the true one",
    "meta_balanced_accuracy": "meta-verifier: the same, each true rating alike",
    "meta_caught": "meta-verifier: faulty analyses rated below 1",
    "generator_true_score": "generator: true score of its proofs",
    "overclaim_rate": "generator: claims 1 wrongly  (lower is better)",
    "verifier_minus_true": "verifier minus true, on those proofs  (near 0)",
    "autolabel_precision": "auto-labels of test proofs: correct",
    "autolabel_coverage": "auto-labels of test proofs: share decided",
}


def render(summary: Mapping[str, Any], seconds: Mapping[str, float], compile_seconds: float) -> str:
    """Metrics before and after with standard errors, n, and what the best constant answer gets on
    the same items (on those answered after); then where the time went.

    `seconds` are by stage and hold the `compile_seconds`.
    """
    lines: list[str] = []
    if summary["metrics"] is None:
        names = summary["compared"].values()
        reason = "no exact judge for this data" if any(names) else "no stages to compare"
        lines.append(f"{reason}: the stages' own figures are in summary.json")
    else:
        lines.append(
            f"{'by the exact judge, on held-out items':50} {'before':>15} {'after':>15}"
            f" {'change':>15} {'n':>6} {'constant':>9}"
        )
        for name, title in _TITLES.items():
            row = summary["metrics"][name]
            constant = summary["constants"].get(name, {"after": None})["after"]
            lines.append(
                f"{title:50} {cell(row['before'])} {cell(row['after'])} "
                f"{cell(row['difference'])} {row['after']['n']:>6}"
                + ("" if constant is None else f" {constant:>9.3f}")
            )
    for name, row in summary.get("labels", {}).items():
        title = f"labels that {name} gave to training: correct"
        constant = "" if row["constant"] is None else f" {row['constant']:>9.3f}"
        lines.append(f"{title:50} {'':15} {cell(row)} {'':15} {row['n']:>6}{constant}")
    total = sum(seconds.values(), start=0.0)
    shown = "  ".join(f"{name} {metrics.duration(value)}" for name, value in seconds.items())
    compiling = f"of which {metrics.duration(compile_seconds)} compiling"
    timed = f"time {metrics.duration(total)}, {compiling}:  {shown}"
    lines += ["", timed if seconds else "no times: timing.json is missing or empty"]
    return "\n".join(lines)


def cell(figure: Mapping[str, Any]) -> str:
    """`mean` and `se` of a figure, 15 characters wide."""
    if figure["mean"] is None:
        return f"{'-':>15}"
    spread = "" if figure["se"] is None else f" ±{figure['se']:.3f}"
    return f"{figure['mean']:>8.3f}{spread:>7}"
