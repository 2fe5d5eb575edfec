"""Kill a shrunken run with SIGKILL at random moments, go on, and compare with an uninterrupted one.

    python tools/check_resume.py [--kills=20] [--config=configs/smoke.py] [--seed=0]

Says which bytes differ in summary.json, in the records and in every stage's variables; exit code 0
only where none does. Whatever depends on the clock (timing.json, tensorboard) is not compared.
"""

import argparse
import hashlib
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
FINISHED = 0


def command(config: str, workdir: pathlib.Path) -> list[str]:
    """The command line of a run; its programs are compiled once for all runs."""
    cache = workdir.parent / "compilation_cache"
    return [
        sys.executable,
        "-m",
        "mathv2_jax.cli.train",
        f"--config={config}",
        f"--workdir={workdir}",
        f"--compilation_cache={cache}",
    ]


def run_until(arguments: list[str], log: pathlib.Path, seconds: float | None) -> bool:
    """Run, with SIGKILL after `seconds`; whether it finished by itself. RuntimeError on failure."""
    with log.open("ab") as out:
        process = subprocess.Popen(arguments, cwd=ROOT, stdout=out, stderr=out)
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return False
    if code != FINISHED:
        raise RuntimeError(f"a run ended with code {code}; its log:\n{log.read_text()[-4000:]}")
    return True


def digests(workdir: pathlib.Path) -> dict[str, str]:
    """sha256 by path: summary, records, metrics, and the seals that fingerprint all variables."""
    found = {}
    paths = [workdir / "summary.json", workdir / "metrics.jsonl"]
    paths += sorted((workdir / "records").rglob("part-*.jsonl"))
    paths += sorted((workdir / "records").rglob("stage.json"))
    paths += sorted((workdir / "checkpoints").glob("*/final/*/seal/metadata"))
    for path in paths:
        found[str(path.relative_to(workdir))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def stage_of(log: pathlib.Path) -> str:
    """The stage in whose output a log ends."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if ": stage " in line]
    return lines[-1].split(":")[0] if lines else "(before the first stage)"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--config", default="configs/smoke.py")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where the runs are kept (default: a temporary folder)")
    args = parser.parse_args()
    moments = random.Random(args.seed)
    folder = pathlib.Path(args.folder or tempfile.mkdtemp(prefix="check_resume_"))
    folder.mkdir(parents=True, exist_ok=True)
    reference = folder / "reference"
    run_until(command(args.config, reference), folder / "warm.log", None)
    second = folder / "second"
    began = time.monotonic()
    run_until(command(args.config, second), folder / "second.log", None)
    whole = time.monotonic() - began
    print(
        f"uninterrupted, twice: the second, with compiled programs, took {whole:.0f} s", flush=True
    )
    expected = digests(reference)
    wrong = compare(expected, digests(second), "a second uninterrupted run")
    kills, runs = 0, 0
    while kills < args.kills:
        runs += 1
        workdir, log = folder / f"killed-{runs}", folder / f"killed-{runs}.log"
        finished = False
        while not finished:
            delay = moments.uniform(2.0, max(whole / 2, 6.0)) if kills < args.kills else None
            finished = run_until(command(args.config, workdir), log, delay)
            if not finished:
                kills += 1
                print(f"kill {kills} after {delay:.1f} s, in {stage_of(log)}", flush=True)
        wrong += compare(expected, digests(workdir), f"run {runs}, after {kills} kills in all")
    print(
        f"{kills} kills over {runs} runs, {len(expected)} files and sets of variables compared: "
        f"{wrong} differ"
    )
    return 1 if wrong else FINISHED


def compare(expected: dict[str, str], found: dict[str, str], what: str) -> int:
    """Print the names that differ; how many do."""
    names = sorted(set(expected) | set(found))
    different = [name for name in names if expected.get(name) != found.get(name)]
    print(f"{what}: {len(names) - len(different)} of {len(names)} equal", flush=True)
    for name in different[:20]:
        print(f"  differs: {name}")
    return len(different)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main())
