"""Finished responses of a step that has not ended, on disk: a restart asks for the others alone.

Files are whole and immutable: JSON lines, compressed, one for what was finished since the last. A
response is known by all that it is a function of: the request, its index, the variables' version
and what was recorded. Where all is as before it is taken, and never asked again.
"""

import dataclasses
import gzip
import hashlib
import json
import time
from collections.abc import Sequence
from typing import Any

from absl import logging
from etils import epath

from mathv2_jax import processes, records, storage
from mathv2_jax.rollout import engine as engine_lib
from mathv2_jax.rollout import remote

Asked = engine_lib.Engine | remote.RemoteEngine
_COMPLETE = "complete.json"


class Responses:
    """A stage's responses, in a folder for each of its steps. All processes call the same.

    What is finished is written when `every` seconds have passed since the last time.
    """

    def __init__(self, folder: epath.PathLike, every: float):
        self._folder, self._every = epath.Path(folder), every
        self._step: epath.Path | None = None
        self._there: dict[str, records.Response] = {}
        self._fresh: list[tuple[str, records.Response]] = []
        self._written, self._moment = 0, time.monotonic()
        self._damaged = False

    def of(self, engine: Asked, version: str, *, writes: bool = True) -> "DurableEngine":
        """The engine, loaded with `version`, its finished responses kept by the one that `writes`.

        Those of one replica are the same in all its processes, so one of them writes.
        """
        return DurableEngine(engine, self, version, writes)

    def begin(self, step: int) -> int:
        """Responses are of this step from now on; how many of them are there already."""
        self.flush()
        self._step = self._folder / f"{step:06d}"
        self._there, self._written, self._damaged = {}, 0, False
        for name in storage.list_names(self._step, "part-*.jsonl.gz"):
            path = self._step / name
            try:
                lines = gzip.decompress(storage.read_bytes(path)).decode("ascii").splitlines()
                if not lines:
                    raise ValueError("it is empty")
                pairs = [json.loads(line) for line in lines]
                found = {key: records.from_json(records.Response, text) for key, text in pairs}
            except (OSError, EOFError, ValueError) as error:
                logging.warning("%s is damaged (%s): its responses are asked again", path, error)
                self._damaged = True
                continue
            self._there |= found
        processes.meet()  # nobody writes before all have read
        return len(self._there)

    def is_complete(self, version: str) -> bool:
        """Whether the step has all its responses, drawn from these variables."""
        assert self._step is not None
        path = self._step / _COMPLETE
        if self._damaged or not storage.exists(path):
            return False
        try:
            return storage.parse_json(storage.read_bytes(path)) == {"version": version}
        except ValueError as error:
            logging.warning("%s is damaged (%s): the step is sampled again", path, error)
            return False

    def complete(self, version: str) -> None:
        """The step has all its responses, and is to have them after a restart."""
        assert self._step is not None
        step = self._step
        self.flush()
        processes.meet()
        body = json.dumps({"version": version}).encode()
        processes.first(lambda: storage.write_whole(step / _COMPLETE, body))

    def flush(self) -> None:
        """Write what is finished and not written yet."""
        if self._fresh and self._step is not None:
            lines = [json.dumps([key, records.to_json(r)]) + "\n" for key, r in self._fresh]
            name = f"part-{processes.index():04d}-{self._free_number():06d}.jsonl.gz"
            data = gzip.compress("".join(lines).encode("ascii"), mtime=0)
            storage.write_whole(self._step / name, data)
        self._fresh.clear()
        self._moment = time.monotonic()

    def drop_before(self, step: int) -> None:
        """Those of steps before this one are not needed any more."""
        if processes.is_first():
            for name in storage.list_names(self._folder, "[0-9]*"):
                if int(name) < step:
                    storage.remove_folder(self._folder / name)

    def close(self) -> None:
        """The stage has ended: nothing of it is needed."""
        self._fresh.clear()
        processes.first(lambda: storage.remove_folder(self._folder))

    def get(self, key: str) -> records.Response | None:
        """The response that is there."""
        return self._there.get(key)

    def keep(self, key: str, response: records.Response) -> None:
        """A response is finished."""
        self._fresh.append((key, response))
        if time.monotonic() - self._moment >= self._every:
            self.flush()

    def _free_number(self) -> int:
        """A number that no file of this process has, of this session or of one before."""
        assert self._step is not None
        taken = storage.list_names(self._step, f"part-{processes.index():04d}-*.jsonl.gz")
        self._written = max(self._written, len(taken)) + 1
        return self._written


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

    def generate(
        self, requests: Sequence[records.Request], **recorded: bool
    ) -> list[list[records.Response]]:
        """As `Engine.generate`; `recorded` are its `experts` and `kept`."""
        keys = [_key(request, self.version, recorded) for request in requests]
        there = {
            (place, index): found
            for place, (key, request) in enumerate(zip(keys, requests, strict=True))
            for index in range(request.num_samples)
            if (found := self.responses.get(f"{key}/{index}")) is not None
        }

        def done(place: int, response: records.Response) -> None:
            whole = response.finish in (records.Finish.STOP, records.Finish.LENGTH)
            if whole and self.writes:
                self.responses.keep(f"{keys[place]}/{response.index}", response)

        try:
            drawn = self.engine.generate(requests, done, answered=there, **recorded)
        except BaseException:
            self.responses.flush()
            raise
        found = there | {(p, r.index): r for p, each in enumerate(drawn) for r in each}
        return [[found[p, i] for i in range(r.num_samples)] for p, r in enumerate(requests)]


def _key(request: records.Request, version: str, recorded: dict[str, bool]) -> str:
    """What a request's responses are a function of, but for their index."""
    asked = json.loads(records.to_json(dataclasses.replace(request, num_samples=1)))
    text = json.dumps([asked, version, sorted(recorded.items())], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
