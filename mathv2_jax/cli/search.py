"""mathv2-search: proofs for problems, by sequential refinement or high-compute search.

mathv2-search --problems=FILE --engine=checkpoint:DIR[#STAGE[@STEP]]|openai:URL#MODEL --workdir=DIR
              [--verifier_engine=...] [--config.field=value ...]

FILE holds problems as JSON lines, CSV or Parquet: records of ours, or rows with a field `problem`.
The same command goes on with a search wherever it stopped, with another budget too. The workdir
holds best.jsonl, the best proof of each problem so far, summary.json, and every proof and analysis
in records/search.

  --config.method=pool     high-compute search (config.pool: proofs, verifications, best, analyses,
                           rounds, adaptive, ...); one-shot with --config.pool.rounds=0
  --config.method=refine   sequential refinement (config.refine: threads, attempts, verifications)
  --config.budget.tokens=, .answers=, .hours=   where to stop, with the best so far

Exit codes: 0 finished or out of budget, 75 preempted after a save, 2 bad usage or input, 1 failure.
"""

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags
from etils import epath

from mathv2_jax import metrics, records, roles, storage
from mathv2_jax.cli import config as config_lib
from mathv2_jax.cli import engines, search_config, session, shell
from mathv2_jax.cli import overrides as overrides_lib
from mathv2_jax.cli import players as players_lib
from mathv2_jax.cli import workdir as workdir_lib
from mathv2_jax.search import asking, outcome, problems, rounds
from mathv2_jax.search import run as run_lib

_ASKED = flags.FlagValues()
_PROBLEMS = flags.DEFINE_string("problems", None, "A file of problems.", flag_values=_ASKED)
_ENGINE = flags.DEFINE_string("engine", None, "Who writes, and verifies.", flag_values=_ASKED)
_VERIFIER = flags.DEFINE_string(
    "verifier_engine", None, "Who verifies, where that is another.", flag_values=_ASKED
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the search lives; the same one continues it.", flag_values=_ASKED
)
_CACHE = flags.DEFINE_string(
    "compilation_cache",
    None,
    "Folder of compiled programs. Default: compilation_cache beside the workdir.",
    flag_values=_ASKED,
)


def main(argv: Sequence[str]) -> int:
    """Usage and input errors are one line and exit code 2; what is a bug keeps its traceback."""
    return session.ended("mathv2-search", functools.partial(_main, argv))


def _main(argv: Sequence[str]) -> int:
    rest, overrides = overrides_lib.split(argv)
    required = (_PROBLEMS.name, _ENGINE.name, _WORKDIR.name)
    _ASKED.unparse_flags()  # one process may call it often
    if not shell.read_flags(_ASKED, rest, __doc__, required):
        return shell.FINISHED
    asked = Asked.of_flags(overrides)
    with session.signals_stop():
        return search(asked, shell.absolute(_WORKDIR.value or ""))


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the command line asks for."""

    problems: list[records.Problem]
    players: players_lib.Players

    @property
    def config(self) -> search_config.SearchConfig:
        """The settings."""
        return self.players.config

    @classmethod
    def of_flags(cls, overrides: Sequence[tuple[str, str]]) -> "Asked":
        """ValueError or FileNotFoundError where a flag names what is not there."""
        writer = engines.parse(_ENGINE.name, _ENGINE.value or "")
        verifier = engines.parse(_VERIFIER.name, _VERIFIER.value) if _VERIFIER.value else writer
        players = players_lib.Players.of(writer, verifier, overrides)
        return cls(problems.read(shell.absolute(_PROBLEMS.value or "")), players)

    def identity(self) -> dict[str, Any]:
        """What is searched; see `search_config.identity`."""
        digest = hashlib.sha256(records.to_lines(self.problems)).hexdigest()[:16]
        return search_config.identity(self.config, digest, self.players.names)


def search(asked: Asked, workdir: epath.Path) -> int:
    """One search from its problems to its table; or what is left of it."""
    config = asked.config
    cache = _CACHE.value or str(workdir.parent / "compilation_cache")
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    with session.holding(workdir, "mathv2-search"):
        _begin(asked, workdir)
        before = metrics.read_timing(workdir).get(rounds.STAGE, {}).get("seconds", 0.0)
        meter = asking.Meter(config.budget, before)
        folders = run_lib.Folders(
            samples=workdir / "records" / rounds.STAGE, responses=workdir / "responses"
        )
        responses = run_lib.open_responses(folders, config.runtime.responses_every)
        made = run_lib.Search(
            search_config.make_method(config),
            asked.problems,
            folders,
            responses,
            meter,
            config.at_once,
            thinking=config.runtime.thinking,
        )
        if not made.at_work():
            print("this search is finished; nothing was changed", flush=True)
            print(outcome.table(outcome.summarise(made)))
            return shell.FINISHED
        progress = Progress(made, workdir, config.runtime.progress_every)
        spent = meter.exceeded()
        if not spent:
            opened = asked.players.open()
            try:
                spent = made.run(_players(asked, opened, responses, progress), progress.recorded)
            finally:
                progress.write()
        progress.write(finished=True)
        if spent:
            print(f"stopped: {spent}; more of it goes on from here", flush=True)
        print(outcome.table(outcome.summarise(made)))
    return shell.FINISHED


def _players(
    asked: Asked,
    opened: dict[engines.Spec, engines.Opened],
    responses: Any,
    progress: "Progress",
) -> rounds.Players:
    config, meter = asked.config, progress.search.meter
    first_opinions = opened[asked.players.verifier].first_opinions
    if config.method == search_config.POOL:
        config.pool.require_head(first_opinions)

    def counted(spec: engines.Spec) -> asking.Counted:
        own = opened[spec]
        engine = responses.of(own.engine, own.version)
        return asking.Counted(engine, meter, config.runtime.call, progress.came)

    return rounds.Players(
        roles=roles.make_roles(config.roles),
        generator=counted(asked.players.writer),
        verifier=counted(asked.players.verifier),
        first_opinions=first_opinions,
        call=config.runtime.call,
        moved=progress.moved,
    )


def _begin(asked: Asked, workdir: epath.Path) -> None:
    """Write config and problems of a new search, or check that this one may go on."""
    identity, path = asked.identity(), workdir / "config.json"
    if storage.exists(path):
        try:
            saved = storage.parse_json(storage.read_bytes(path))["search"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged, or not of a search ({error!r}): take another workdir"
            ) from error
        for where, old, new in config_lib.differences(saved, identity, "config"):
            raise ValueError(
                f"this workdir was begun with another search: {where} was {old}, now {new}. Take "
                "another workdir, or the old value; only config.runtime, config.remote and "
                "config.budget may change"
            )
    body = {
        "schema": search_config.SCHEMA,
        "search": identity,
        "runtime": config_lib.plain(asked.config.runtime),
        "budget": config_lib.plain(asked.config.budget),
        "commit": workdir_lib.code_commit(),
    }
    storage.write_whole(path, (json.dumps(body, indent=1, sort_keys=True) + "\n").encode())
    target = workdir / "records" / "input" / "problems.jsonl"
    storage.write_whole(target, records.to_lines(asked.problems))


class Progress:
    """What is told while a search goes on, and its best proofs so far on disk."""

    def __init__(self, made: run_lib.Search, workdir: epath.Path, every: float):
        self.search, self._workdir, self._every = made, workdir, every
        self._told = self._began = time.monotonic()
        self._answers = 0  # that were written since the search went on
        self._written = 0.0

    def came(self, number: int) -> None:
        """Answers came."""
        self._answers += number
        if time.monotonic() - self._told >= self._every:
            self._told = time.monotonic()
            print(f"  {self._answers:,} answers since the start, {self._whole()}", flush=True)

    def moved(self) -> None:
        """Pools have changed."""
        if time.monotonic() - self._written >= self._every:
            self.write()

    def recorded(self) -> None:
        """A round of every problem at work is on disk."""
        for made in self.search.last:
            print(outcome.line(self.search, made), flush=True)
        print(f"  {self._whole()}", flush=True)
        self.write()

    def _whole(self) -> str:
        made, spent = self.search, self.search.meter.spent
        done = sum(made.method.is_done(p) for p in made.pools)
        left = sum(made.method.most_left(p) for p in made.pools)
        rate = self._answers / max(time.monotonic() - self._began, 1e-3)
        until = f", at most {metrics.duration(left / rate)} left" if rate > 0 else ""
        return (
            f"{done} of {len(made.pools)} problems done, {spent.answers:,} answers, "
            f"{spent.tokens:,} tokens in {metrics.duration(made.meter.seconds)}{until}"
        )

    def write(self, *, finished: bool = False) -> None:
        """The best so far, and the time that it took."""
        self._written = time.monotonic()
        best = outcome.best_proofs(self.search)
        storage.write_whole(self._workdir / "best.jsonl", records.to_lines(best))
        seconds = {"seconds": self.search.meter.seconds}
        metrics.write_timing(self._workdir, rounds.STAGE, seconds)
        if finished:
            body = json.dumps(outcome.summarise(self.search), indent=1, sort_keys=True) + "\n"
            storage.write_whole(self._workdir / "summary.json", body.encode())


def run() -> None:
    """The console script."""
    shell.run(main)


if __name__ == "__main__":
    run()
