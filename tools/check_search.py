"""mathv2-search is killed at random moments, and ends as if it had not been.

    python tools/check_search.py --run=WORKDIR [--kills=20] [--problems=6] [--engine=both]

WORKDIR is a finished run of mathv2-train; configs/smoke.py will do, for a server with
--config.model.embedding_taps=0, which Hugging Face's format has no place for. Its model searches,
from its checkpoint, which is seeded, or exported to that format behind `transformers serve` on
127.0.0.1, which is not. The search is ended by SIGKILL so many times, and each time the same
command goes on. With seeds its records must be those of a search that was left alone, byte for
byte. Without them no answer may be recorded twice or be missing, and none that was on disk is asked
for again: the answers on the way when the process died are counted. Exit code 0 where all holds.
"""

import argparse
import collections
import hashlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SETTINGS = (
    "--config.pool.proofs=8",
    "--config.pool.verifications=8",
    "--config.pool.best=4",
    "--config.pool.analyses=2",
    "--config.pool.rounds=4",
    "--config.at_once=4",
    "--config.runtime.responses_every=0",
    "--config.runtime.call=64",
)


def command(problems: pathlib.Path, engine: str, workdir: pathlib.Path, *more: str) -> list[str]:
    """A search with SETTINGS; programs are compiled once for all of them."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(workdir.parent / "compilation_cache"))
    return [
        *(sys.executable, "-m", "mathv2_jax.cli.search"),
        *(f"--problems={problems}", f"--engine={engine}", f"--workdir={workdir}"),
        *(f"--compilation_cache={cache}", *SETTINGS, *more),
    ]


def run(arguments: list[str]) -> float:
    """Seconds that a command took; RuntimeError with its errors where it fails."""
    began = time.monotonic()
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return time.monotonic() - began


def kill_while_running(
    arguments: list[str], workdir: pathlib.Path, kills: int, chance: random.Random
) -> int:
    """Starts a search again and again, and kills it each time once some more answers are on disk;
    how often it was killed before it ended."""
    for kill in range(kills):
        with subprocess.Popen(
            arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            aim, before = chance.randrange(1, 12), on_disk(workdir)
            while process.poll() is None and len(on_disk(workdir) - before) < aim:
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
            _, errors = process.communicate()
        if process.returncode != -signal.SIGKILL:
            if process.returncode:
                raise RuntimeError(errors[-3000:])
            return kill
    return kills


def on_disk(workdir: pathlib.Path) -> set[str]:
    """Files of answers and of records."""
    return {str(p) for name in ("responses", "records") for p in workdir.glob(f"{name}/**/part-*")}


def digests(workdir: pathlib.Path) -> dict[str, str]:
    """What a search leaves, by the sha256 of its files; the clock's alone are left out."""
    kept = [*workdir.glob("records/**/part-*"), workdir / "summary.json", workdir / "best.jsonl"]
    return {str(p.relative_to(workdir)): hashlib.sha256(p.read_bytes()).hexdigest() for p in kept}


def samples(workdir: pathlib.Path) -> list[dict[str, object]]:
    """Its records, as they stand."""
    parts = sorted(workdir.glob("records/search/part-*.jsonl"))
    return [json.loads(line) for p in parts for line in p.read_text().splitlines()]


def faults(workdir: pathlib.Path) -> list[str]:
    """What is wrong with the records of a finished search: doubled, missing, or of nothing."""
    found = samples(workdir)
    ids = collections.Counter(s["id"] for s in found)
    wrong = [f"{name} is recorded {number} times" for name, number in ids.items() if number > 1]
    wrong += [
        f"{s['id']} judges nothing"
        for s in found
        if s["target"] not in ids and s["role"] == "verifier"
    ]
    votes = collections.Counter(s["target"] for s in found if s["role"] == "verifier")
    for name in votes:
        numbers = sorted(
            s["index"] for s in found if s["role"] == "verifier" and s["target"] == name
        )
        if numbers != list(range(8)):
            wrong.append(f"{name} has votes {numbers}")
    summary = json.loads((workdir / "summary.json").read_text())
    if summary["spent"]["answers"] != len(found):
        wrong.append(f"{summary['spent']['answers']} answers were counted, {len(found)} are there")
    return wrong


def with_checkpoint(
    run_dir: pathlib.Path, problems: pathlib.Path, at: pathlib.Path, kills: int
) -> list[str]:
    """Kills with a seeded engine."""
    engine = f"checkpoint:{run_dir}"
    seconds = run(command(problems, engine, at / "whole"))
    arguments = command(problems, engine, at / "killed")
    killed = kill_while_running(arguments, at / "killed", kills, random.Random(0))
    run(arguments)
    expected, found = digests(at / "whole"), digests(at / "killed")
    differing = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
    answers = len(samples(at / "whole"))
    print(
        f"checkpoint: {answers} answers in {seconds:.0f} s; killed {killed} times, then finished: "
        f"{len(expected) - len(differing)} of {len(expected)} files are the same",
        flush=True,
    )
    return [f"{name} differs" for name in differing] + faults(at / "killed")


def with_server(
    run_dir: pathlib.Path, problems: pathlib.Path, at: pathlib.Path, kills: int
) -> list[str]:
    """Kills with `transformers serve`, whose answers are counted on the way."""
    from tests import faulty
    from tools import check_serve

    target = at / "hf"
    convert = [sys.executable, "-m", "mathv2_jax.cli.convert"]
    run([*convert, f"--to_hf={target}", f"--checkpoint={run_dir}", "--dtype=float32"])
    with check_serve.serving(time.monotonic() + 240.0) as url:
        _warm(f"{url}/v1", target)
        between = faulty.Server(upstream=f"{url}/v1")
        with faulty.serving(between) as proxy:
            more = _roles(run_dir)
            engine = f"openai:{proxy}#{target}"
            arguments = command(problems, engine, at / "served", *more)
            killed = kill_while_running(arguments, at / "served", kills, random.Random(1))
            seconds = run(arguments)
    recorded = len(samples(at / "served"))
    answered = sum(between.answered.values())
    print(
        f"transformers serve: {recorded} answers recorded, {answered} given: "
        f"{answered - recorded} were on the way when the search was killed, {killed} times; the "
        f"last session took {seconds:.0f} s",
        flush=True,
    )
    wrong = faults(at / "served")
    if answered - recorded > killed * 4:  # HTTP requests that are open at once
        wrong.append(f"{answered - recorded} answers are not recorded")
    return wrong


def _warm(url: str, model: pathlib.Path) -> None:
    """Has a server load its model: asked by many at once it may never come to that."""
    from mathv2_jax import records
    from mathv2_jax.rollout import remote

    config = remote.RemoteConfig(base_url=url, model=str(model), key_env="", timeout_s=240.0)
    asked = (("user", "Prove it."),)
    request = records.Request(id="warm", messages=asked, num_samples=1, seed=0, max_tokens=2)
    remote.RemoteEngine(config).generate([request])


def _roles(run_dir: pathlib.Path) -> list[str]:
    """The roles of a run as settings: a server does not bring them along."""
    roles = json.loads((run_dir / "config.json").read_text())["identity"]["roles"]
    flat = {"templates": roles["templates"]}
    for name in ("generator", "verifier", "meta_verifier"):
        flat |= {f"{name}.{field}": value for field, value in roles[name].items()}
    # The server answers one after the other, those of vanished clients too: few are asked at once.
    remote = {"key_env": "''", "timeout_s": 120.0, "backoff_s": 0.2, "concurrency": 4}
    return [
        *(f"--config.roles.{name}={value}" for name, value in flat.items()),
        *(f"--config.remote.{name}={value}" for name, value in remote.items()),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=pathlib.Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--problems", type=int, default=6)
    parser.add_argument("--engine", choices=("checkpoint", "serve", "both"), default="both")
    asked = parser.parse_args()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        at = pathlib.Path(folder)
        lines = (asked.run / "records/input/test_problems.jsonl").read_bytes().splitlines(True)
        problems = at / "problems.jsonl"
        problems.write_bytes(b"".join(lines[: asked.problems]))
        if asked.engine != "serve":
            wrong += with_checkpoint(asked.run.resolve(), problems, at, asked.kills)
        if asked.engine != "checkpoint":
            wrong += with_server(asked.run.resolve(), problems, at, asked.kills)
    print("\n".join(wrong) if wrong else "no fault")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
