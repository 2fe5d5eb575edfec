"""Seconds of each stage of two runs of one config, by when their reports were written.

    python experiments/sampler_speed/times.py --before=DIR --now=DIR [--out=FILE.json]

The first stage's are not known: nothing says when a run began but its log.
"""

import argparse
import json
import pathlib


def seconds(workdir: pathlib.Path) -> dict[str, float]:
    """By stage, in their order; a stage ends with its stage.json."""
    ends = {p.parent.name: p.stat().st_mtime for p in workdir.glob("records/*/stage.json")}
    names = sorted(ends, key=lambda name: ends[name])
    return {name: ends[name] - ends[before] for before, name in zip(names, names[1:], strict=False)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--before", type=pathlib.Path, required=True)
    parser.add_argument("--now", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    before, now = seconds(args.before), seconds(args.now)
    if before.keys() != now.keys():
        raise SystemExit(
            f"{args.before} and {args.now} have other stages: {sorted(before)}, {sorted(now)}"
        )
    found = {name: {"before": before[name], "now": now[name]} for name in before}
    total = {"before": sum(before.values()), "now": sum(now.values())}
    for name, each in (found | {"all of these": total}).items():
        share = each["now"] / each["before"]
        print(f"{name:16}{each['before']:>8.0f} s{each['now']:>8.0f} s{share:>7.2f}")
    if args.out:
        body = {"stages": found, "total": total}
        args.out.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
