"""The share of their steps' time that supervised stages of runs waited for their data.

python experiments/data/waits.py WORKDIR... --out=FILE
"""

import argparse
import json
import pathlib

STEP, INPUT = "time/step_seconds", "time/input_seconds"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("workdirs", nargs="+", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    found = {}
    for workdir in args.workdirs:
        for stage, spent in json.loads((workdir / "timing.json").read_text())["sections"].items():
            if INPUT in spent:
                share = spent[INPUT] / spent[STEP]
                found[f"{workdir.name}/{stage}"] = {
                    "steps": spent["steps"],
                    "step_seconds": spent[STEP],
                    "input_seconds": spent[INPUT],
                    "share": share,
                }
                print(f"{workdir.name}/{stage}: {100 * share:.2f} % of {spent[STEP]:.1f} s")
    if not found:
        raise SystemExit(f"no supervised stage among {', '.join(map(str, args.workdirs))}")
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
