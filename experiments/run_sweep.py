"""Run a sweep's entries one after another, or print their commands for a cluster.

    python experiments/run_sweep.py --sweep=configs/sweeps/seeds.py --workdir=runs/seeds

A sweep is a file with `CONFIG`, a config file named from the repository's root, and `get_sweep()`,
which returns a mapping from names to lists of overrides such as `config.seed=1`. All configs are
built before the first run. An entry lives in WORKDIR/NAME; the same command goes on with what is
not finished. WORKDIR/results.json gathers the entries' summaries; two or more entries named
X-seed0, X-seed1, ... are also pooled: over k seeds the mean change, with standard error
sqrt(sum se^2) / k.

Exit codes: 0 all finished, 1 an entry failed, 2 bad usage or sweep, 75 preempted after a save.
"""

import dataclasses
import difflib
import json
import math
import os
import pathlib
import re
import runpy
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from etils import epath

from mathv2_jax import storage
from mathv2_jax.cli import config as config_lib
from mathv2_jax.cli import overrides as overrides_lib
from mathv2_jax.cli import shell, table
from mathv2_jax.cli import workdir as workdir_lib
from mathv2_jax.evaluation import held_out

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCHEMA = 1
SIDES = ("before", "after", "difference")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_OF_A_SEED = re.compile(r"(?P<group>.+)-seed\d+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One run of a sweep. `overrides` have the form `config.a.b=value`."""

    name: str
    config_file: str
    overrides: tuple[str, ...]
    config: config_lib.RunConfig

    def command(self, workdir: str, python: str = "python") -> list[str]:
        """The run's command, to be started in the repository's root."""
        return [
            *(python, "-m", "mathv2_jax.cli.train", f"--config={self.config_file}"),
            f"--workdir={workdir.rstrip('/')}/{self.name}",
            *(f"--{override}" for override in self.overrides),
        ]


def load(path: str) -> list[Entry]:
    """The entries of a sweep's file, in order, their configs built.

    ValueError names the entry, and the nearest field where an override sets one that is not there.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"--sweep={path}: there is no such file")
    found = runpy.run_path(path)
    config_file, get_sweep = found.get("CONFIG"), found.get("get_sweep")
    if not isinstance(config_file, str) or get_sweep is None:
        raise ValueError(f"--sweep={path}: a sweep has CONFIG = 'configs/...' and get_sweep()")
    sweep = get_sweep()
    if not isinstance(sweep, Mapping) or not sweep:
        raise ValueError(f"--sweep={path}: get_sweep() must give names with lists of overrides")
    base = overrides_lib.load(str(ROOT / config_file))
    entries = []
    for name, overrides in sweep.items():
        try:
            if not _NAME.fullmatch(name):
                raise ValueError("a name becomes a folder: letters, digits, '.', '_' and '-' only")
            config = config_lib.build(base, read_overrides(overrides))
        except ValueError as error:
            raise ValueError(f"--sweep={path}, entry {name!r}: {error}") from error
        entries.append(
            Entry(name=name, config_file=config_file, overrides=tuple(overrides), config=config)
        )
    return entries


def read_overrides(overrides: Any) -> list[tuple[str, str]]:
    """Overrides as (path, value); ValueError names one that does not begin with `config.`."""
    if isinstance(overrides, str) or not all(isinstance(o, str) for o in overrides):
        raise ValueError(f"overrides are a list of texts 'config.field=value', not {overrides!r}")
    rest, pairs = overrides_lib.split([f"--{override}" for override in overrides])
    if rest:
        raise ValueError(f"override {rest[0].removeprefix('--')!r} does not begin with 'config.'")
    return pairs


def choose(entries: Sequence[Entry], only: Sequence[str] | None) -> list[Entry]:
    """The entries named in `only`, in the sweep's order; ValueError names the nearest of a typo."""
    names = [e.name for e in entries]
    for name in only or ():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are {names}"
            raise ValueError(f"--only={name}: the sweep has no such entry{hint}")
    return [e for e in entries if not only or e.name in only]


def run_commands(commands: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Every command's exit code by name. A failure stops nothing; a preemption stops the rest.

    SIGTERM and Ctrl-C are passed on to the command that runs, which saves.
    """
    running: list[subprocess.Popen[bytes]] = []
    asked: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        asked.append(number)
        for process in running:
            process.terminate()

    codes: dict[str, int] = {}
    before = {n: signal.signal(n, pass_on) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        for place, (name, command) in enumerate(commands.items(), start=1):
            print(f"[{place}/{len(commands)}] {name}: {shlex.join(command)}", flush=True)
            process = subprocess.Popen(command, cwd=ROOT)
            running[:] = [process]
            if asked:  # in the moment before
                process.terminate()
            codes[name] = process.wait()
            running.clear()
            if codes[name]:
                print(f"{name}: exit code {codes[name]}", file=sys.stderr, flush=True)
            if codes[name] == shell.PREEMPTED or asked:
                codes[name] = shell.PREEMPTED
                break
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return codes


def collect(entries: Sequence[Entry], workdir: str) -> dict[str, Any]:
    """The summary of every finished entry by name.

    Left out, with a line that says so: a run that had another config than the sweep now gives it.
    """
    found = {}
    for entry in entries:
        folder = epath.Path(workdir) / entry.name
        if not storage.exists(folder / "summary.json"):
            continue
        asked = config_lib.identity(entry.config)
        if workdir_lib.begun_as(folder, asked) != asked:
            print(f"{entry.name}: left out, it was run with another config", file=sys.stderr)
            continue
        summary = workdir_lib.read_summary(folder)
        if summary["metrics"] is not None and set(held_out.METRICS) - set(summary["metrics"]):
            print(
                f"{entry.name}: left out, an older version wrote its summary.json; delete that "
                "file, and the sweep's command writes it anew from the records",
                file=sys.stderr,
            )
            continue
        found[entry.name] = summary
    return found


def pool(summaries: Mapping[str, Any]) -> dict[str, Any]:
    """By group of two or more entries that differ in the seed: names, and each metric over them."""
    groups: dict[str, list[str]] = {}
    for name, summary in summaries.items():
        match = _OF_A_SEED.fullmatch(name)
        if match is not None and summary["metrics"] is not None:
            groups.setdefault(match["group"], []).append(name)
    return {
        group: {
            "entries": names,
            "metrics": {
                metric: {
                    side: _pooled([summaries[n]["metrics"][metric][side] for n in names])
                    for side in SIDES
                }
                for metric in held_out.METRICS
            },
            "constants": {
                metric: _mean([summaries[n]["constants"][metric]["after"] for n in names])
                for metric in summaries[names[0]]["constants"]
            },
        }
        for group, names in groups.items()
        if len(names) > 1
    }


def _pooled(figures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    def values(name: str) -> list[float]:
        return [math.nan if f[name] is None else f[name] for f in figures]

    return held_out.pooled(values("mean"), values("se"))


def _mean(figures: Sequence[float | None]) -> float | None:
    known = [f for f in figures if f is not None]
    return sum(known) / len(known) if len(known) == len(figures) else None


def render(results: Mapping[str, Any]) -> str:
    """A block a metric: each entry's before, after and change, then the pooled ones.

    Standard errors stand behind the means; a pooled change ends with how many of its own it is,
    and with what the best constant answer gets on the items answered after.
    """
    rows = {n: e["metrics"] for n, e in results["entries"].items() if e["metrics"] is not None}
    pooled = {
        f"{group}, {len(found['entries'])} pooled": found
        for group, found in results["pooled"].items()
    }
    if not rows:
        return "no entry has figures by the exact judge"
    width = max(map(len, (*rows, *pooled)))
    every = rows | {name: found["metrics"] for name, found in pooled.items()}
    lines = [f"{'':26} {'':{width}}" + "".join(f" {side:>15}" for side in SIDES)]
    for metric in held_out.METRICS:
        for name, found in every.items():
            title = metric if name == next(iter(rows)) else ""
            cells = " ".join(table.cell(found[metric][side]) for side in SIDES)
            gap = found[metric]["difference"]
            share = f"  {gap['mean'] / gap['se']:+.1f} se" if name in pooled and gap["se"] else ""
            constant = pooled[name]["constants"].get(metric) if name in pooled else None
            share += "" if constant is None else f"  constant {constant:.3f}"
            lines.append(f"{title:26} {name:{width}} {cells}{share}")
    return "\n".join(lines)


def report(entries: Sequence[Entry], workdir: str, sweep: str) -> None:
    """Write results.json and print the table of what has finished."""
    summaries = collect(entries, workdir)
    results = {"schema": SCHEMA, "sweep": sweep, "entries": summaries, "pooled": pool(summaries)}
    path = epath.Path(workdir) / "results.json"
    storage.write_whole(path, (json.dumps(results, indent=1, sort_keys=True) + "\n").encode())
    print(f"{len(summaries)} of {len(entries)} entries have finished; {path}:")
    print(render(results), flush=True)


def make_flags() -> flags.FlagValues:
    """This program's own, since other programs have flags of these names."""
    made = flags.FlagValues()
    flags.DEFINE_string("sweep", None, "The sweep's file.", flag_values=made)
    flags.DEFINE_string("workdir", None, "Holds one workdir an entry.", flag_values=made)
    flags.DEFINE_boolean("print", False, "Print the commands only.", flag_values=made)
    flags.DEFINE_list("only", None, "Run these entries only.", flag_values=made)
    return made


def main(argv: Sequence[str]) -> int:
    """Usage errors are one line and exit code 2."""
    asked = make_flags()
    try:
        if not shell.read_flags(asked, argv, __doc__, ("sweep", "workdir")):
            return shell.FINISHED
        entries = load(asked.sweep)
        chosen = choose(entries, asked.only)
    except (ValueError, FileNotFoundError, flags.Error) as error:
        print(f"run_sweep: {error}", file=sys.stderr)
        return shell.BAD_INPUT
    if asked.print:
        print("\n".join(shlex.join(e.command(asked.workdir)) for e in chosen))
        return shell.FINISHED
    workdir = asked.workdir
    if storage.is_local(workdir):
        workdir = os.path.abspath(os.path.expanduser(workdir))
    codes = run_commands({e.name: e.command(workdir, sys.executable) for e in chosen})
    failed = {name: code for name, code in codes.items() if code}
    report(entries, workdir, asked.sweep)
    if shell.PREEMPTED in failed.values():
        print("preempted: the same command goes on from here", file=sys.stderr)
        return shell.PREEMPTED
    for name, code in failed.items():
        print(f"failed: {name} with exit code {code}", file=sys.stderr)
    return shell.FAILED if failed else shell.FINISHED


if __name__ == "__main__":
    sys.exit(main(sys.argv))
