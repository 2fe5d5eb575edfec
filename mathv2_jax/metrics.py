"""What a stage measures, step by step: a progress line, TensorBoard, and JSON lines.

The JSON lines are a function of the run alone. Whatever depends on the clock goes to
`timing.json`, and to TensorBoard, only. What a run waits for is said while it waits.
"""

import collections
import dataclasses
import difflib
import json
import math
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, SupportsFloat

import tensorboardX
from etils import epath
from jax import monitoring

from mathv2_jax import storage

TIMING_SCHEMA = 1
TIME_PREFIX = "time/"  # scalars of this prefix depend on the clock
MFU, MEMORY_GIB = "time/mfu", "time/memory_gib"
_LEVELS = (MFU, MEMORY_GIB)  # those that are no amounts of time

# On a progress line: the short name, and the digits behind the point (None: one digit and an
# exponent). Lines of 120 columns hold all of them.
_SHORT: dict[str, tuple[str, int | None]] = {
    "reward": ("rew", 2),
    "reward/score": ("score", 2),
    "reward/proof": ("proof", 2),
    "reward/self": ("self", 2),
    "reward/meta": ("meta", 2),
    "entropy": ("ent", 2),
    "kl": ("kl", None),
    "zero_signal": ("zero", 2),
    "length": ("len", 0),
    "outcome/parsed": ("ok", 2),
    "outcome/length": ("cut", 2),
    "outcome/lost": ("lost", 2),
    "loss": ("loss", 3),
    "gradient_norm": ("grad", 3),
}
_FAILURES = ("outcome/length", "outcome/lost")  # shown where there are any
_COMPONENT = "reward/"
# Every scalar that a stage reports: what a progress line may be asked to show.
NAMES = (
    *_SHORT,
    *("reward/format", "reward/honesty", "outcome/unparseable"),
    *("score", "lost_votes", "left_group"),
    *("tokens", "learning_rate", "head_loss", "router_peak_load", "expert_overflow"),
    *("clipped", "dropped", "ratio", "importance"),
    *("staleness", "kept_unknown"),
)
_WINDOW = 20  # steps over which the rate of tokens is taken
_COMPILING = "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """How a stage reports; every field is a runtime one."""

    flush_every: int = 50  # steps; a checkpoint flushes too
    # Scalars on the progress line of a step with a reward, and of one without.
    shown: tuple[str, ...] = (
        "reward",
        "reward/score",
        "reward/proof",
        "reward/self",
        "reward/meta",
        "entropy",
        "kl",
        "zero_signal",
        "length",
        "outcome/parsed",
        *_FAILURES,
    )
    shown_supervised: tuple[str, ...] = ("loss", "gradient_norm")
    tensorboard: bool = True

    def __post_init__(self):
        if self.flush_every < 1:
            raise ValueError(f"flush_every={self.flush_every} steps: give a positive number")
        for field in ("shown", "shown_supervised"):
            for name in getattr(self, field):
                if name not in NAMES:
                    near = difflib.get_close_matches(name, NAMES, n=1)
                    hint = f"; did you mean {near[0]!r}?" if near else f"; there are {NAMES}"
                    raise ValueError(
                        f"runtime.metrics.{field}: no stage reports a scalar {name!r}{hint}"
                    )


def stages_of(lines: Sequence[str], path: epath.PathLike) -> list[str]:
    """The stage of each line of `metrics.jsonl`; ValueError names one that is damaged."""
    stages = []
    for number, line in enumerate(lines, start=1):
        try:
            stages.append(json.loads(line)["stage"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number} is damaged ({error}): take the line out; every stage keeps "
                "its own rows in the folder metrics"
            ) from error
    return stages


class MetricWriter:
    """The scalars of one stage, written by one process into `workdir`.

    `resume_from` is the step of the checkpoint that the stage goes on from: what lies beyond it
    is dropped, so None drops all. Call `flush` before a checkpoint is saved, so that no step
    before it is lost, and `finish` at the end of the stage.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        stage: str,
        *,
        total_steps: int | None = None,
        resume_from: int | None = None,
        config: MetricsConfig | None = None,
    ):
        self._workdir = epath.Path(workdir)
        self._stage = stage
        self._total_steps = total_steps
        self._config = config or MetricsConfig()
        self._last = -1 if resume_from is None else resume_from
        self._rows: list[dict[str, Any]] = []
        self._parts = storage.Parts(self._workdir / "metrics" / stage)
        self._go_back_to(self._last)
        self._board = None
        if self._config.tensorboard:
            folder = self._workdir / "tensorboard" / stage
            self._board = tensorboardX.SummaryWriter(str(folder), purge_step=self._last + 1)
        self._before = read_timing(self._workdir).get(stage, {})
        self._spent: dict[str, float] = collections.defaultdict(float)
        self._began = time.monotonic()
        self._first: tuple[int, float] | None = None
        # (moment, tokens up to it) of the last steps; the first step's own time is compilation.
        self._moments = collections.deque[tuple[float, float]](maxlen=_WINDOW + 1)

    def write(
        self, step: int, scalars: Mapping[str, SupportsFloat], at: float | None = None
    ) -> None:
        """Records a step and prints its line.

        Steps only grow; ValueError otherwise. `time/...` scalars are taken for clock-dependent
        ones; `timing.json` sums them up, but for levels. `tokens`, the number handled in the step,
        gives the line its tokens per second, over the last steps of this session. `at` is the
        step's moment on the monotonic clock, by default now: give it where steps are written some
        time after they were taken.
        """
        if step <= self._last:
            raise ValueError(
                f"step {step} of {self._stage} comes after step {self._last}; steps only grow, "
                "and resume_from goes back"
            )
        values = {name: float(value) for name, value in scalars.items()}
        taken = sorted({"stage", "step"} & set(values))
        if taken:
            raise ValueError(f"scalar name {taken[0]!r} is taken by the row itself; rename it")
        self._last = step
        lasting = {n: _plain(v) for n, v in values.items() if not n.startswith(TIME_PREFIX)}
        self._rows.append({"stage": self._stage, "step": step, **lasting})
        now = time.monotonic() if at is None else at
        self._spent["steps"] += 1
        self._spent["tokens"] += values.get("tokens", 0.0)
        rate = self._rate(now) if "tokens" in values else None
        for name, value in values.items():
            if name.startswith(TIME_PREFIX) and name not in _LEVELS:
                self._spent[name] += value
        self._show(step, values, rate, now)
        if len(self._rows) >= self._config.flush_every:
            self.flush()

    def flush(self) -> None:
        """Puts every step written so far on disk."""
        if self._rows:
            step = self._rows[-1]["step"]
            self._parts.write_part(storage.part_name(step), _to_lines(self._rows))
            self._parts.commit(step)
            self._rows = []
        if self._board is not None:
            self._board.flush()
        spent = {**self._spent, "seconds": time.monotonic() - self._began}
        write_timing(
            self._workdir,
            self._stage,
            {name: self._before.get(name, 0.0) + value for name, value in spent.items()},
        )

    def finish(self) -> None:
        """Flushes, puts the stage's lines into `metrics.jsonl`, and closes.

        Lines of the stage that are there already are replaced in their place.
        """
        self.flush()
        self.close()
        path = self._workdir / "metrics.jsonl"
        lines = storage.read_bytes(path).decode().splitlines() if storage.exists(path) else []
        mine = [stage == self._stage for stage in stages_of(lines, path)]
        at = mine.index(True) if True in mine else len(lines)
        before = lines[:at]
        after = [line for line, is_mine in zip(lines[at:], mine[at:], strict=True) if not is_mine]
        merged = [*before, *self._parts.read(), *after]
        storage.write_whole(path, "".join(line + "\n" for line in merged).encode())

    def close(self) -> None:
        """Ends TensorBoard's thread; what was not flushed is dropped."""
        if self._board is not None:
            self._board.close()
            self._board = None

    def _go_back_to(self, step: int) -> None:
        """Drops what lies beyond `step`, and cuts the part that spans it."""
        names = self._parts.names()
        end = max((s for s in map(storage.part_step, names) if s <= step), default=-1)
        if end < step and any(storage.part_step(name) > step for name in names):
            rows = [json.loads(line) for line in self._parts.read()]
            kept = [row for row in rows if end < row["step"] <= step]
            if kept:
                self._parts.write_part(storage.part_name(step), _to_lines(kept))
        self._parts.discard_after(step)

    def _rate(self, now: float) -> float | None:
        """Tokens a second since the oldest remembered step; None at the session's first."""
        self._moments.append((now, self._spent["tokens"]))
        (began, before), (_, total) = self._moments[0], self._moments[-1]
        return (total - before) / (now - began) if now > began else None

    def _show(self, step: int, values: Mapping[str, float], rate: float | None, now: float) -> None:
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
            if rate is not None:
                self._board.add_scalar(TIME_PREFIX + "tokens_per_second", rate, step)
        total = "" if self._total_steps is None else f"/{self._total_steps}"
        words = [f"{self._stage} {step}{total}"]
        config = self._config
        rewarded = "reward" in values or "zero_signal" in values  # every answer may be unrewarded
        figures = _figures(values, config.shown if rewarded else config.shown_supervised)
        words += [figures] if figures else []
        pace_words = [] if rate is None else [f"{_rounded(rate)} tok/s"]
        if self._first is None:
            self._first = step, now  # its own time is mostly compilation: not counted
        elif self._total_steps is not None:
            pace = (now - self._first[1]) / (step - self._first[0])
            pace_words.append(f"{duration(pace * max(self._total_steps - step, 0))} left")
        words += [" ".join(pace_words)] if pace_words else []
        print("  ".join(words), flush=True)


class NoWriter:
    """In place of a MetricWriter, in a process that leaves writing to another."""

    def write(
        self, step: int, scalars: Mapping[str, SupportsFloat], at: float | None = None
    ) -> None:
        """Nothing."""

    def flush(self) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def make_writer(
    workdir: epath.PathLike, stage: str, *, writes: bool, **settings: Any
) -> MetricWriter | NoWriter:
    """A MetricWriter with its `settings`, in the one process that `writes`."""
    return MetricWriter(workdir, stage, **settings) if writes else NoWriter()


class CompileTime:
    """A context manager in which JAX's compiling (or loading of compiled programs) is timed.

    `seconds` is the sum so far. A program that takes more than `patience` seconds is named while
    it is waited for, again each time its wait has doubled, and at its end.
    """

    def __init__(self, patience: float = 5.0):
        self.seconds = 0.0
        self._patience = patience
        self._running: dict[int, threading.Event] = {}  # by the thread that compiles

    def __enter__(self) -> "CompileTime":
        monitoring.register_scalar_listener(self._begin)
        monitoring.register_event_duration_secs_listener(self._end)
        return self

    def __exit__(self, *unused: object) -> None:
        monitoring.unregister_scalar_listener(self._begin)
        monitoring.unregister_event_duration_listener(self._end)
        for done in self._running.values():
            done.set()

    def _begin(self, event: str, value: float | int, **kwargs: Any) -> None:
        if event == _COMPILING:
            done = self._running[threading.get_ident()] = threading.Event()
            watch = (kwargs.get("fun_name", "a program"), done)
            threading.Thread(target=self._watch, args=watch, daemon=True).start()

    def _end(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        if event == _COMPILING:
            done = self._running.pop(threading.get_ident(), None)
            if done is not None:
                done.set()
            self.seconds += duration_secs
            if duration_secs > self._patience:
                name = kwargs.get("fun_name", "a program")
                print(f"compiled {name} in {duration(duration_secs)}", flush=True)

    def _watch(self, name: str, done: threading.Event) -> None:
        began, patience = time.monotonic(), self._patience
        while not done.wait(patience):
            waited = time.monotonic() - began
            print(f"compiling {name}: {duration(waited)} so far", flush=True)
            patience = waited


class PartProgress:
    """Says how many of a stage's `total` parts are done, at most every `every` seconds."""

    def __init__(self, stage: str, total: int, every: float = 10.0):
        self._stage, self._total, self._every = stage, total, every
        self._said = time.monotonic()

    def done(self, number: int) -> None:
        """`number` parts are done by now."""
        now = time.monotonic()
        if now - self._said >= self._every:
            self._said = now
            print(f"{self._stage}: {number} of {self._total} parts", flush=True)


def read(workdir: epath.PathLike, stage: str) -> Iterator[dict[str, Any]]:
    """The rows of a stage, finished or not: `stage`, `step`, and its scalars as floats."""
    for line in storage.Parts(epath.Path(workdir) / "metrics" / stage).read():
        row = json.loads(line)
        yield {n: v if n in ("stage", "step") else float(v) for n, v in row.items()}


def write_timing(
    workdir: epath.PathLike, section: str, values: Mapping[str, SupportsFloat]
) -> None:
    """Puts what the clock said about a stage, or another piece of work, into `timing.json`."""
    sections = {**read_timing(workdir), section: {n: float(v) for n, v in values.items()}}
    body = {"schema": TIMING_SCHEMA, "sections": sections}
    text = json.dumps(body, indent=1, sort_keys=True) + "\n"
    storage.write_whole(epath.Path(workdir) / "timing.json", text.encode())


def read_timing(workdir: epath.PathLike) -> dict[str, dict[str, float]]:
    """What `timing.json` holds by section, nothing where there is none; ValueError names damage."""
    path = epath.Path(workdir) / "timing.json"
    if not storage.exists(path):
        return {}
    try:
        body = json.loads(storage.read_bytes(path))
        if body["schema"] != TIMING_SCHEMA:
            raise ValueError(f"schema {body['schema']!r}, this program reads {TIMING_SCHEMA}")
        return body["sections"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); it holds times only: delete it to go on"
        ) from error


def duration(seconds: float) -> str:
    """`seconds` to read: 42s, 3m07s, 2h05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def _figures(values: Mapping[str, float], shown: tuple[str, ...]) -> str:
    """Reward and its components, a wider gap, and the rest."""
    present = [n for n in shown if n in values and not (n in _FAILURES and values[n] == 0.0)]
    rewards = [n for n in present if f"{n}/".startswith(_COMPONENT)]
    groups = (rewards, [n for n in present if n not in rewards])
    return "  ".join(
        " ".join(f"{_SHORT.get(n, (n, 0))[0]} {_figure(n, values[n])}" for n in group)
        for group in groups
        if group
    )


def _figure(name: str, value: float) -> str:
    """As few characters as will do: .49, 112, 3e-4."""
    if name not in _SHORT:
        return f"{value:.4g}"
    digits = _SHORT[name][1]
    if digits is None:
        return "0" if value == 0.0 else re.sub(r"e([+-])0", r"e\1", f"{value:.0e}")
    return re.sub(r"^(-?)0\.", r"\1.", f"{value:.{digits}f}")


def _rounded(rate: float) -> str:
    """940, 2.4k, 31k."""
    if rate < 999.5:
        return f"{rate:.0f}"
    return f"{rate / 1000:.1f}k" if rate < 9_950 else f"{rate / 1000:,.0f}k"


def _plain(value: float) -> float | str:
    """A float as JSON holds it: those that are not finite as text that float() reads."""
    return value if math.isfinite(value) else str(value)


def _to_lines(rows: list[dict[str, Any]]) -> bytes:
    lines = (json.dumps(row, sort_keys=True, allow_nan=False) + "\n" for row in rows)
    return "".join(lines).encode()
