"""Finished responses of a step that has not ended, on disk: a restart asks for the others alone.

Files are whole and immutable: JSON lines, compressed, one for what was finished since the last. A
response is known by all that it is a function of: the request, its index, the variables' version
and what was recorded. Where all is as before it is taken, and never asked again.
"""

import dataclasses
import gzip
import hashlib
import json
import math
import threading
import zlib
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from absl import logging
from etils import epath

from mathv2_jax import processes, records, storage


@runtime_checkable
class Asked(Protocol):
    """Whose responses are kept: `engine.Engine`, `remote.RemoteEngine`, or whoever answers so."""

    @property
    def tokenizer(self) -> Any: ...
    def generate(self, *requests: Any, **settings: Any) -> list[list[records.Response]]: ...


@runtime_checkable
class Cancellable(Protocol):
    """Whose requests can be left while they are answered."""

    def cancel(self, request_id: str) -> None: ...


@runtime_checkable
class OnCame(Protocol):
    """Told the place of a request and a response to it, and whether it was written now."""

    def __call__(self, place: int, response: records.Response, /, *, new: bool) -> None: ...


_COMPLETE = "complete.json"


class Responses:
    """A stage's responses, in a folder for each of its steps. All processes call the same.

    What is finished is written at most `every` seconds later, by a thread where nothing else is
    finished in that time.
    """

    def __init__(self, folder: epath.PathLike, every: float):
        self._folder, self._every = epath.Path(folder), every
        self._step: epath.Path | None = None
        self._there: dict[str, records.Response] = {}
        self._parts: set[str] = set()  # whole ones
        self._lock = threading.RLock()  # of what follows
        self._fresh: list[tuple[str, records.Response]] = []
        self._written = 0
        self._timer: threading.Timer | None = None

    def of(self, engine: Asked, version: str, *, writes: bool = True) -> "DurableEngine":
        """The engine, loaded with `version`, its finished responses kept by the one that `writes`.

        `version` tells one set of variables from every other: responses are taken by it. Those of
        one replica are the same in all its processes, so one of them writes.
        """
        return DurableEngine(engine, self, version, writes)

    def begin(self, step: int) -> int:
        """Responses are of this step from now on; how many of them are there already.

        What one process could not read counts for none: all ask for the same.
        """
        self.flush()
        self._step = self._folder / f"{step:06d}"
        self._there, self._parts, self._written = {}, set(), 0
        read: dict[str, dict[str, records.Response]] = {}
        for name in storage.list_names(self._step, "part-*.jsonl.gz"):
            try:
                read[name] = _read(self._step / name)
            except (OSError, EOFError, ValueError, zlib.error) as error:
                path = self._step / name
                logging.warning("%s is damaged (%s): its responses are asked again", path, error)
        # Nobody writes before all have read.
        self._parts = set.intersection(*map(set, processes.exchange(sorted(read))))
        for name in sorted(self._parts):
            self._there |= read[name]
        return len(self._there)

    def completed(self, then: str) -> str | None:
        """The version that the step's responses were drawn from, all of which are there.

        None where they are not, or are of a run whose variables were others than `then` after that
        version's step.
        """
        assert self._step is not None
        path, found = self._step / _COMPLETE, None
        if storage.exists(path):
            try:
                body = _Complete(**storage.parse_json(storage.read_bytes(path)))
                if body.then == then and self._parts.issuperset(body.parts):
                    found = body.version
            except (OSError, TypeError, ValueError) as error:
                logging.warning("%s is damaged (%s): the step is sampled again", path, error)
        every = processes.exchange(found)
        return found if set(every) == {found} else None

    def complete(self, version: str, then: str) -> None:
        """The step has all its responses, and is to have them after a restart.

        They were drawn from `version`; the variables that are trained on them are called `then`.
        """
        assert self._step is not None
        step = self._step
        self.flush()
        processes.meet()

        def write() -> None:
            parts = storage.list_names(step, "part-*.jsonl.gz")
            body = json.dumps(dataclasses.asdict(_Complete(version, then, parts)))
            storage.write_whole(step / _COMPLETE, body.encode())

        processes.first(write)

    def flush(self) -> None:
        """Write what is finished and not written yet."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if not self._fresh or self._step is None:
                return
            lines = [json.dumps([key, records.to_json(r)]) + "\n" for key, r in self._fresh]
            name = f"part-{processes.index():04d}-{self._free_number():06d}.jsonl.gz"
            data = gzip.compress("".join(lines).encode("ascii"), mtime=0)
            storage.write_whole(self._step / name, data)
            self._fresh.clear()

    def flush_if_possible(self) -> None:
        """As `flush`; where it fails that is told, and the next one tries again."""
        try:
            self.flush()
        except Exception as error:
            logging.warning("responses could not be written, and will be tried again: %s", error)

    def drop_before(self, step: int) -> None:
        """Those of steps before this one are not needed any more."""
        if processes.is_first():
            for name in storage.list_names(self._folder, "[0-9]*"):
                if int(name) < step:
                    storage.remove_folder(self._folder / name)

    def close(self) -> None:
        """The stage has ended: nothing of it is needed."""
        with self._lock:
            self._fresh.clear()
            self.flush()
        processes.first(lambda: storage.remove_folder(self._folder))

    def get(self, key: str) -> records.Response | None:
        """The response that is there."""
        return self._there.get(key)

    def keep(self, key: str, response: records.Response) -> None:
        """A response is finished."""
        with self._lock:
            self._fresh.append((key, response))
            if self._every <= 0.0:
                self.flush()
            elif self._timer is None:
                self._timer = threading.Timer(self._every, self.flush_if_possible)
                self._timer.daemon = True
                self._timer.start()

    def _free_number(self) -> int:
        """A number that no file of this process has, of this session or of one before."""
        assert self._step is not None
        taken = storage.list_names(self._step, f"part-{processes.index():04d}-*.jsonl.gz")
        self._written = max(self._written, *(int(n.split("-")[2].split(".")[0]) for n in taken), 0)
        self._written += 1
        return self._written


@dataclasses.dataclass(frozen=True)
class _Complete:
    version: str
    then: str
    parts: Sequence[str]


def _read(path: epath.Path) -> dict[str, records.Response]:
    """A part's responses by their keys; an error of many kinds where it is damaged."""
    lines = gzip.decompress(storage.read_bytes(path)).decode("ascii").splitlines()
    if not lines:
        raise ValueError("it is empty")
    pairs = [json.loads(line) for line in lines]
    return {key: records.from_json(records.Response, text) for key, text in pairs}


@dataclasses.dataclass(frozen=True)
class DurableEngine:
    """An engine whose finished responses are kept, and taken from where they are kept."""

    engine: Asked
    responses: Responses
    version: str
    writes: bool

    @property
    def tokenizer(self) -> Any:
        """The engine's."""
        return self.engine.tokenizer

    def cancel(self, request_id: str) -> None:
        """As `Engine.cancel`, where the engine can: what it cannot leave is written to its end."""
        if isinstance(self.engine, Cancellable):
            self.engine.cancel(request_id)

    def generate(
        self,
        requests: Sequence[records.Request],
        on_answer: OnCame | None = None,
        **recorded: bool,
    ) -> list[list[records.Response]]:
        """As `Engine.generate`; `recorded` are its `experts` and `kept`.

        `on_answer` is told of those that are taken from where they are kept too, with `new` False.
        """
        keys = [_key(request, self.version, recorded) for request in requests]
        there = {
            (place, index): found
            for place, (key, request) in enumerate(zip(keys, requests, strict=True))
            for index in range(request.num_samples)
            if (found := self.responses.get(f"{key}/{index}")) is not None
        }

        def done(place: int, response: records.Response) -> None:
            whole = response.finish in (records.Finish.STOP, records.Finish.LENGTH)
            sound = all(map(math.isfinite, (*response.logprobs, *response.policy_logprobs)))
            if whole and sound and self.writes:
                self.responses.keep(f"{keys[place]}/{response.index}", response)
            if on_answer is not None:
                on_answer(place, response, new=True)

        if on_answer is not None:
            for (place, _), response in there.items():
                on_answer(place, response, new=False)

        try:
            drawn = self.engine.generate(requests, done, answered=there, **recorded)
        except BaseException:
            self.responses.flush_if_possible()  # the error that is on its way is told
            raise
        found = there | {(p, r.index): r for p, each in enumerate(drawn) for r in each}
        return [[found[p, i] for i in range(r.num_samples)] for p, r in enumerate(requests)]


def _key(request: records.Request, version: str, recorded: dict[str, bool]) -> str:
    """What a request's responses are a function of, but for their index."""
    asked = json.loads(records.to_json(dataclasses.replace(request, num_samples=1)))
    text = json.dumps([asked, version, sorted(recorded.items())], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
