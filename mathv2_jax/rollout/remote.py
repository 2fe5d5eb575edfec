"""The same requests over a server that speaks OpenAI's chat completions: vLLM, SGLang, a vendor.

A server gives text. It gives no token ids and no log-probabilities that a trainer could hold its
own against, so its responses have none: they are for search, for evaluation and for labels, not
for a policy gradient. Each sample is one HTTP request, with a seed of its own.

`durable.Responses` keeps what was answered, so that an interrupted run asks for the rest alone.
"""

import asyncio
import collections
import contextlib
import dataclasses
import email.utils
import hashlib
import json
import os
import queue
import random
import threading
import time
import urllib.parse
from collections.abc import Callable, Collection, Generator, Sequence
from typing import Any

from absl import logging

from mathv2_jax import records
from mathv2_jax.rollout import answers, remote_config, remote_text
from mathv2_jax.rollout.remote_config import RemoteConfig as RemoteConfig

OnAnswer = Callable[[int, records.Response], None]

_FOR_ALL = (401, 402)  # the key, or what is paid for it: the same for every request
_AT_FIRST = (403, 404)  # so are these, unless the server has answered another
_AGAIN = (408, 409, 425, 429)  # and 5xx
_ENDS = {"stop": records.Finish.STOP, "length": records.Finish.LENGTH}
_NO_KEY = "none"  # what a server that asks for no key is sent


class RemoteError(RuntimeError):
    """The server answers nothing that it is asked; the message says why and what to change."""


@dataclasses.dataclass
class Stats:
    """What was asked of a server. Tokens are as far as it counted them."""

    answered: int = 0
    lost: int = 0
    cancelled: int = 0
    attempts: int = 0  # HTTP requests
    uncounted: int = 0  # answers that came without a count of tokens
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Fault(Exception):
    """One HTTP request has failed."""

    def __init__(self, what: str, *, again: bool, for_all: bool = False, wait: float | None = None):
        super().__init__(what)
        self.again, self.for_all, self.wait = again, for_all, wait


class RemoteEngine:
    """Answers requests by a server. `generate` is for one caller at a time."""

    def __init__(self, config: RemoteConfig):
        """ValueError where the key's variable is not set, ImportError without the extra."""
        try:
            import openai
        except ImportError as error:
            raise ImportError(
                "a remote server is asked with the openai package: pip install 'mathv2_jax[remote]'"
            ) from error
        self._openai: Any = openai
        self.config = config
        self.stats = Stats()
        # Of all that an answer depends on, so that none is taken for another setting's.
        asked = [config.base_url, config.model, config.limit_field, config.send_seed, config.think]
        text = json.dumps([*asked, dict(config.extra)], sort_keys=True)
        settings = hashlib.sha256(text.encode()).hexdigest()[:8]
        self.version = f"{config.version or f'{config.model}@{config.base_url}'}#{settings}"
        self._key = remote_config.read_key(config.key_env)
        server = urllib.parse.urlsplit(config.base_url)
        if (
            self._key
            and server.scheme == "http"
            and not remote_config.is_local(server.hostname or "")
        ):
            logging.warning("the key goes to %s unencrypted: use https", config.base_url)
        self._jitter = random.Random(os.getpid())
        self._reached = False  # it has answered something, if only an error
        self._cancelled: set[str] = set()
        self._lock, self._busy = threading.Lock(), threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._open: dict[str, set[asyncio.Task[Any]]] = collections.defaultdict(set)

    @property
    def tokenizer(self) -> None:
        """None: a server is asked in messages."""
        return None

    def cancel(self, request_id: str) -> None:
        """Leave a request's answers, in the `generate` that goes on or in the next, where they are
        not complete; an id that is in neither is forgotten. From any thread.
        """
        with self._lock:
            self._cancelled.add(request_id)
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._drop, request_id)

    def generate(
        self,
        requests: Sequence[records.Request],
        on_answer: OnAnswer | None = None,
        *,
        answered: Collection[tuple[int, int]] = (),
    ) -> list[list[records.Response]]:
        """`num_samples` responses for each request, in the requests' order.

        `on_answer` is told of each when it is complete, in this thread. A sample that the server
        refuses, or fails at in all attempts, comes back LOST, one that was cancelled in time
        CANCELLED. `answered` are (place, index) that are answered already and left out.

        ValueError for a request that has no messages, or asks for what a server cannot do.
        RemoteError where it refuses the key, the address or the model, or is not there at all, and
        where another thread is in a call of this engine.
        """
        if not self._busy.acquire(blocking=False):
            raise RemoteError("this engine is in a call already: give each thread one of its own")
        before = set(self._cancelled)
        try:
            return self._generate(requests, on_answer, answered)
        finally:
            self._cancelled -= before | {request.id for request in requests}
            self._busy.release()

    def _generate(
        self,
        requests: Sequence[records.Request],
        on_answer: OnAnswer | None,
        answered: Collection[tuple[int, int]],
    ) -> list[list[records.Response]]:
        for request in requests:
            _require_askable(request)
        waiting = collections.deque(
            (place, index)
            for place, request in enumerate(requests)
            for index in range(request.num_samples)
            if (place, index) not in answered
        )
        found: dict[tuple[int, int], records.Response] = {}
        with contextlib.closing(self._answers(requests, waiting)) as come:
            for place, response in come:
                found[place, response.index] = response
                if on_answer is not None:
                    on_answer(place, response)
        return [
            [found[p, i] for i in range(r.num_samples) if (p, i) in found]
            for p, r in enumerate(requests)
        ]

    def _answers(
        self, requests: Sequence[records.Request], waiting: collections.deque[tuple[int, int]]
    ) -> Generator[tuple[int, records.Response]]:
        """Answers as they come. A thread asks, so that this works inside an event loop too."""
        outcomes = queue.SimpleQueue[tuple[int, records.Response] | BaseException | None]()

        def ask() -> None:
            try:
                asyncio.run(self._ask_all(requests, waiting, outcomes.put))
                outcomes.put(None)
            except BaseException as error:  # raised where it is waited for
                outcomes.put(error)

        thread = threading.Thread(target=ask, name="remote", daemon=True)
        thread.start()
        try:
            while (outcome := outcomes.get()) is not None:
                if isinstance(outcome, BaseException):
                    raise outcome
                yield outcome
        finally:
            waiting.clear()
            with self._lock:
                if self._loop is not None:
                    self._loop.call_soon_threadsafe(self._drop)
            thread.join()

    def _drop(self, request_id: str | None = None) -> None:
        """Let go of a request's open HTTP requests, or of all; in the loop's thread."""
        ids = list(self._open) if request_id is None else [request_id]
        for name in ids:
            for task in self._open.get(name, ()):
                task.cancel()

    async def _ask_all(
        self,
        requests: Sequence[records.Request],
        waiting: collections.deque[tuple[int, int]],
        tell: Callable[[tuple[int, records.Response]], None],
    ) -> None:
        client = self._openai.AsyncOpenAI(
            base_url=self.config.base_url,
            api_key=self._key or _NO_KEY,
            max_retries=0,  # ours are counted, told and cancelled
            timeout=self.config.timeout_s,
        )

        async def work() -> None:
            while waiting:
                place, index = waiting.popleft()
                tell((place, await self._sample(client, requests[place], index)))

        with self._lock:
            self._loop = asyncio.get_running_loop()
        workers = [
            asyncio.create_task(work()) for _ in range(min(self.config.concurrency, len(waiting)))
        ]
        try:
            await asyncio.gather(*workers)
        finally:
            waiting.clear()
            for worker in workers:
                worker.cancel()
            self._drop()
            await asyncio.gather(*workers, return_exceptions=True)
            with self._lock:
                self._loop = None
            await client.close()

    async def _sample(self, client: Any, request: records.Request, index: int) -> records.Response:
        """One sample; RemoteError where no request would be answered."""
        if request.id in self._cancelled:
            return self._cancel(request, index)
        task = asyncio.create_task(self._attempts(client, request, index))
        self._open[request.id].add(task)
        try:
            await asyncio.wait({task})
        finally:
            task.cancel()
            self._open[request.id].discard(task)
            if not self._open[request.id]:
                del self._open[request.id]
        if task.cancelled():
            return self._cancel(request, index)
        try:
            response = task.result()
        except _Fault as fault:
            if fault.for_all or not self._reached:
                raise RemoteError(self._why(fault)) from None
            self.stats.lost += 1
            logging.warning("request %s, sample %d is lost: %s", request.id, index, fault)
            return answers.unanswered(request, index, records.Finish.LOST, self.version)
        self.stats.answered += 1
        return response

    def _cancel(self, request: records.Request, index: int) -> records.Response:
        self.stats.cancelled += 1
        return answers.unanswered(request, index, records.Finish.CANCELLED, self.version)

    def _why(self, fault: _Fault) -> str:
        config = self.config
        key = f"the key in ${config.key_env}" if config.key_env else "that it wants no key"
        return (
            f"{config.base_url} answers nothing: {fault}. Check remote.base_url, remote.model = "
            f"{config.model!r} and {key}"
        )

    async def _attempts(
        self, client: Any, request: records.Request, index: int
    ) -> records.Response:
        """The answer of the first attempt that succeeds; the last one's fault where none does."""
        for attempt in range(1, self.config.attempts + 1):
            try:
                return await self._attempt(client, request, index)
            except _Fault as fault:
                if not fault.again:
                    raise
                if attempt == self.config.attempts:
                    text = f"{fault}, at the last of {attempt} attempts"
                    raise _Fault(text, again=False) from None
                wait = min(self.config.backoff_s * 2 ** (attempt - 1), self.config.longest_wait_s)
                wait *= self._jitter.uniform(0.5, 1.0)  # not all at the same moment
                if fault.wait is not None:
                    wait = max(wait, min(fault.wait, self.config.longest_wait_s))
                logging.info(
                    "request %s, sample %d: %s; attempt %d in %.1f s",
                    *(request.id, index, fault, attempt + 1, wait),
                )
            await asyncio.sleep(wait)
        raise AssertionError("an attempt returns or raises")

    async def _attempt(self, client: Any, request: records.Request, index: int) -> records.Response:
        self.stats.attempts += 1
        openai = self._openai
        try:
            async with asyncio.timeout(self.config.timeout_s):
                raw = await client.chat.completions.with_raw_response.create(
                    **self._body(request, index)
                )
                data = raw.http_response.content
        except (TimeoutError, openai.APITimeoutError):
            text = f"no answer within {self.config.timeout_s} s"
            raise _Fault(text, again=True) from None
        except openai.APIStatusError as error:
            self._reached = True
            raise self._fault_of(error) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            text = f"the connection failed ({type(cause).__name__}: {self._hide(str(cause))})"
            raise _Fault(text, again=True) from None
        self._reached = True
        return self._response(request, index, data)

    def _body(self, request: records.Request, index: int) -> dict[str, Any]:
        """The arguments of the client's call; what is not OpenAI's goes where servers look."""
        config, beyond = self.config, dict(self.config.extra)
        body: dict[str, Any] = dict(
            model=config.model,
            messages=[
                {"role": role, "content": remote_text.tame(text)} for role, text in request.messages
            ],
            temperature=request.temperature,
            top_p=request.top_p,
        )
        if config.send_seed:
            seed = int.from_bytes(answers.row_key(request.seed, index).tobytes(), "little")
            body["seed"] = seed >> 33  # 31 bits: not every server takes more
        if request.stop:
            body["stop"] = list(request.stop)
        if request.top_k:
            beyond["top_k"] = request.top_k
        if request.min_p:
            beyond["min_p"] = request.min_p
        beyond[config.limit_field] = request.max_tokens
        return body | {"extra_body": beyond}

    def _fault_of(self, error: Any) -> _Fault:
        status = error.status_code
        text = " ".join(self._hide(str(error.message)).split())[:500]
        return _Fault(
            f"status {status}: {text}",
            again=status in _AGAIN or status >= 500,
            for_all=status in _FOR_ALL or (status in _AT_FIRST and not self.stats.answered),
            wait=_retry_after(error.response.headers.get("retry-after")),
        )

    def _hide(self, text: str) -> str:
        """Text of a server's or a library's, which may repeat the key."""
        return text.replace(self._key, "(the key)") if self._key else text

    def _response(self, request: records.Request, index: int, data: bytes) -> records.Response:
        try:
            body = json.loads(data)
            choice = body["choices"][0]
            message = choice["message"]
            content = message.get("content") or ""
            apart = message.get("reasoning_content") or message.get("reasoning") or ""
            ending = choice.get("finish_reason")
            if not isinstance(content, str) or not isinstance(apart, str):
                raise TypeError("content is no text")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            shown = self._hide(data.decode("utf-8", "replace"))[:200]
            raise _Fault(f"its answer is no chat completion: {shown!r}", again=True) from None
        if ending not in _ENDS:
            raise _Fault(f"its answer ended with finish_reason {ending!r}", again=False)
        thinking, final = apart, content
        if not apart:
            thinking, final = remote_text.split_thinking(content, think=self.config.think)
        return records.Response(
            request_id=request.id,
            index=index,
            token_ids=(),
            logprobs=(),
            text=content,
            final_text=final,
            thinking_text=thinking,
            finish=_ENDS[ending],
            parameter_version=self.version,
            counted_tokens=self._count(body.get("usage")),
        )

    def _count(self, usage: Any) -> int | None:
        """The answer's tokens by the server's count, which is added up; None where there is none"""
        counts = usage if isinstance(usage, dict) else {}
        made, asked = counts.get("completion_tokens"), counts.get("prompt_tokens")
        if isinstance(asked, int):
            self.stats.prompt_tokens += asked
        if isinstance(made, int):
            self.stats.completion_tokens += made
            return made
        if not self.stats.uncounted:
            logging.warning("%s does not count tokens: they show as 0", self.config.base_url)
        self.stats.uncounted += 1
        return None


def _require_askable(request: records.Request) -> None:
    if not request.messages:
        raise ValueError(
            f"request {request.id} holds token ids: a server is asked in messages, of a "
            "vocabulary of its own; roles.ask makes them for a respondent without a tokenizer"
        )
    if request.stop_ids:
        raise ValueError(
            f"request {request.id} has stop_ids = {request.stop_ids}: a server knows stop strings "
            "alone, name them in `stop`"
        )


def _retry_after(text: str | None) -> float | None:
    """Seconds from now, of a header that gives seconds or a date; None where it gives neither."""
    if not text:
        return None
    with contextlib.suppress(ValueError):
        return max(float(text), 0.0)
    with contextlib.suppress(ValueError, TypeError):
        moment = email.utils.parsedate_to_datetime(text)
        return max(moment.timestamp() - time.time(), 0.0)
    return None
