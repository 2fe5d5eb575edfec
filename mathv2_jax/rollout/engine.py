"""The engine: requests in, responses out, over compiled prefill and decode programs.

An engine is bound to one parameter set. Requests are grouped by compiled shape (prompt bucket,
answers a prompt, answer bucket, truncation, stop ids) in their order, so which program answers a
request, and when it stops, depends on that request alone.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding

from mathv2_jax import records, sharding
from mathv2_jax.model import transformer
from mathv2_jax.rollout import decode
from mathv2_jax.text import tokenizer as tokenizer_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Compiled shapes: answers decoded together, and the lengths that prompts and answers are
    padded to. A prompt or limit longer than the last bucket is lost, that request alone.

    `param_dtype` is that of the parameters that sample; empty: the model's own. Another is a
    sampler that is not the trainer to the last bit: watch the metric `ratio`.
    """

    param_dtype: str = ""
    rows: int = 128
    prompt_buckets: tuple[int, ...] = (64, 128)
    answer_buckets: tuple[int, ...] = (32, 64)

    def __post_init__(self):
        if self.param_dtype not in ("", "float32", "bfloat16"):
            raise ValueError(
                f"engine.param_dtype = {self.param_dtype!r}: must be float32, bfloat16 or empty"
            )
        if self.rows < 1:
            raise ValueError(f"engine.rows = {self.rows}: must be at least 1")
        for name in ("prompt_buckets", "answer_buckets"):
            sizes = getattr(self, name)
            if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
                raise ValueError(f"engine.{name} = {sizes}: must be positive and ascending")


def _bucket(size: int, buckets: Sequence[int]) -> int | None:
    return next((b for b in buckets if size <= b), None)


def prompts_per_call(config: EngineConfig, together: int, mesh: Mesh) -> int:
    """Prompts of one compiled call, each answered `together` times: a multiple of rows' ways."""
    ways = sharding.batch_ways(mesh)
    return max(1, config.rows // together // ways) * ways


def row_key(seed: int, index: int) -> np.ndarray:
    """Key data (two uint32) of one answer, a function of the request's seed and its index."""
    return np.random.SeedSequence([seed, index]).generate_state(2)


class _Shape(NamedTuple):
    """What requests that are answered in one call have in common."""

    prompt: int
    together: int
    slots: int
    truncate: bool
    stop_ids: tuple[int, ...]


class Engine:
    """Answers requests with the variables last given to `load`; see the module's text.

    `think` says whether answers begin inside thinking, which decides `final_text`.
    """

    def __init__(
        self,
        programs: decode.Programs,
        tokenizer: tokenizer_lib.Tokenizer,
        engine_config: EngineConfig,
        mesh: Mesh,
        *,
        think: bool = False,
    ):
        self.tokenizer, self.limits = tokenizer, engine_config
        self.mesh, self.think = mesh, think
        self.num_prompt_tokens = 0
        self.num_answer_tokens = 0
        boxed = transformer.boxed_abstract(programs.config, programs.kernels)
        self.abstract = transformer.unboxed(boxed)
        self.shardings = sharding.shardings_for(boxed, mesh)
        self._variables: transformer.Variables | None = None
        self._version = ""
        self._programs = programs
        self._cancelled: set[str] = set()

    def load(self, variables: transformer.Variables, version: str) -> None:
        """Answer with these variables from now on; `version` is written into every response.

        They are JAX arrays on the devices of the engine's mesh, however they lie there.
        """
        self._variables = jax.device_put(variables, self.shardings)
        self._version = version

    def unload(self) -> None:
        """Let go of the variables."""
        self._variables = None

    def cancel(self, request_id: str) -> None:
        """Leave a request's answers, in the `generate` that goes on or in the next, where they have
        not begun; an id that is in neither is forgotten.

        From any thread, in any one process of the engine's mesh.
        """
        self._cancelled.add(request_id)

    def generate(self, requests: Sequence[records.Request]) -> list[list[records.Response]]:
        """`num_samples` responses for each request, in the requests' order.

        ValueError before the first `load`. A request that no bucket holds comes back LOST, one that
        was cancelled in time CANCELLED.
        """
        answers: list[list[records.Response]] = [[] for _ in requests]
        shapes: dict[_Shape, list[int]] = {}
        for at, request in enumerate(requests):
            prompt = _bucket(len(request.prompt), self.limits.prompt_buckets)
            slots = _bucket(request.max_tokens, self.limits.answer_buckets)
            if not request.prompt or prompt is None or slots is None or request.max_tokens < 1:
                logging.warning(
                    "request %s is lost: a prompt of %d tokens with up to %d new ones; the "
                    "buckets are %s and %s",
                    request.id,
                    len(request.prompt),
                    request.max_tokens,
                    self.limits.prompt_buckets,
                    self.limits.answer_buckets,
                )
                answers[at] = [
                    self._unanswered(request, i, records.Finish.LOST)
                    for i in range(request.num_samples)
                ]
                continue
            together = min(request.num_samples, self.limits.rows)
            stop_ids = tuple(sorted({*self.tokenizer.stop_ids, *request.stop_ids}))
            shape = _Shape(prompt, together, slots, request.top_p < 1.0, stop_ids)
            shapes.setdefault(shape, []).append(at)
        for shape, places in shapes.items():
            jobs = [
                (at, first)
                for at in places
                for first in range(0, requests[at].num_samples, shape.together)
            ]
            per_call = self._prompts_per_call(shape.together)
            for begin in range(0, len(jobs), per_call):
                chunk = jobs[begin : begin + per_call]
                asked = [(requests[at], first) for at, first in chunk]
                for (at, _), found in zip(chunk, self._run(asked, shape), strict=True):
                    answers[at].extend(found)
        self._cancelled.clear()  # an id that nobody asked about is not kept for ever
        return answers

    def first_opinions(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """The verifier head's P(0), P(0.5), P(1) at the end of each prompt: [prompts, 3].

        ValueError names a prompt that no bucket holds.
        """
        opinions = np.zeros((len(prompts), 3), np.float32)
        shapes: dict[int, list[int]] = {}
        for at, prompt in enumerate(prompts):
            bucket = _bucket(len(prompt), self.limits.prompt_buckets)
            if bucket is None:
                raise ValueError(
                    f"prompt {at} has {len(prompt)} tokens: the longest bucket is "
                    f"{self.limits.prompt_buckets[-1]}"
                )
            shapes.setdefault(bucket, []).append(at)
        per_call = self._prompts_per_call(1)
        for bucket, places in shapes.items():
            for begin in range(0, len(places), per_call):
                chunk = places[begin : begin + per_call]
                ids, lengths = self._pad([prompts[at] for at in chunk], bucket, per_call)
                found = self._call_prefill(ids, lengths).head_P3
                opinions[chunk] = sharding.on_host(found)[: len(chunk)]
        return opinions

    def _prompts_per_call(self, together: int) -> int:
        return prompts_per_call(self.limits, together, self.mesh)

    def _pad(
        self, prompts: Sequence[Sequence[int]], bucket: int, number: int
    ) -> tuple[np.ndarray, np.ndarray]:
        ids = np.full((number, bucket), self.tokenizer.pad_id, np.int32)
        lengths = np.ones((number,), np.int32)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
            lengths[row] = len(prompt)
        return ids, lengths

    def _call_prefill(self, ids: np.ndarray, lengths: np.ndarray) -> decode.Prefilled:
        if self._variables is None:
            raise ValueError("this engine has no variables yet: call load before the first request")
        rows = sharding.batch_sharding(self.mesh)
        with sharding.computing(self.mesh):
            return self._programs.prefill(
                self._variables, sharding.put(ids, rows), sharding.put(lengths, rows)
            )

    def _run(
        self, jobs: Sequence[tuple[records.Request, int]], shape: _Shape
    ) -> list[list[records.Response]]:
        """One compiled call; `jobs` are requests with the index of their first answer.

        Which of them are cancelled the processes of the mesh agree on before it.
        """
        wanted = [range(first, min(first + shape.together, r.num_samples)) for r, first in jobs]
        flags = np.array([request.id in self._cancelled for request, _ in jobs])
        cancelled = sharding.any_of(flags, self.mesh)
        left = records.Finish.CANCELLED
        if cancelled.all():
            return [
                [self._unanswered(request, i, left) for i in indices]
                for (request, _), indices in zip(jobs, wanted, strict=True)
            ]
        together, number = shape.together, self._prompts_per_call(shape.together)
        ids, lengths = self._pad([r.prompt for r, _ in jobs], shape.prompt, number)
        rows, everywhere = sharding.batch_sharding(self.mesh), sharding.replicated(self.mesh)
        settings = _settings(jobs, cancelled, number, together, rows)
        prefilled = self._call_prefill(ids, lengths)
        with sharding.computing(self.mesh):
            decoded = self._programs.decode(
                self._variables,
                prefilled,
                sharding.put(lengths, rows),
                settings,
                sharding.put(np.asarray(shape.stop_ids, np.int32), everywhere),
                slots=shape.slots,
                truncate=shape.truncate,
            )
        host = sharding.on_host(decoded)
        found: list[list[records.Response]] = []
        for place, ((request, first), indices) in enumerate(zip(jobs, wanted, strict=True)):
            if cancelled[place]:
                found.append([self._unanswered(request, i, left) for i in indices])
                continue
            self.num_prompt_tokens += len(request.prompt)
            row = place * together - first
            found.append([self._response(request, i, host, row + i) for i in indices])
        return found

    def _response(
        self, request: records.Request, index: int, decoded: Any, row: int
    ) -> records.Response:
        length = int(decoded.length_B[row])
        token_ids = tuple(int(t) for t in decoded.tokens_BN[row, :length])
        self.num_answer_tokens += length
        stopped = bool(decoded.stopped_B[row])
        thinking, final = self.tokenizer.split_thinking(token_ids, think=self.think)
        return records.Response(
            request_id=request.id,
            index=index,
            token_ids=token_ids,
            logprobs=tuple(float(x) for x in decoded.logprobs_BN[row, :length]),
            text=self.tokenizer.decode(token_ids),
            final_text=None if final is None else self.tokenizer.decode(final),
            thinking_text=self.tokenizer.decode(thinking),
            finish=records.Finish.STOP if stopped else records.Finish.LENGTH,
            parameter_version=self._version,
        )

    def _unanswered(
        self, request: records.Request, index: int, finish: records.Finish
    ) -> records.Response:
        return records.Response(
            request_id=request.id,
            index=index,
            token_ids=(),
            logprobs=(),
            text="",
            final_text=None,
            thinking_text="",
            finish=finish,
            parameter_version=self._version,
        )


def _settings(
    jobs: Sequence[tuple[records.Request, int]],
    cancelled: np.ndarray,
    number: int,
    together: int,
    rows: NamedSharding,
) -> decode.RowSettings:
    keys = np.zeros((number, together, 2), np.uint32)
    temperature = np.ones((number, together), np.float32)
    top_p = np.ones((number, together), np.float32)
    limit = np.zeros((number, together), np.int32)
    for place, (request, first) in enumerate(jobs):
        temperature[place], top_p[place] = request.temperature, request.top_p
        for i in range(min(together, request.num_samples - first)):
            keys[place, i] = row_key(request.seed, first + i)
            limit[place, i] = 0 if cancelled[place] else request.max_tokens
    flat = (keys.reshape(-1, 2), temperature.reshape(-1), top_p.reshape(-1), limit.reshape(-1))
    return decode.RowSettings(*(sharding.put(x, rows) for x in flat))
