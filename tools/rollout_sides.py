"""Three ways to answer with one exported model, of bench_rollout: ours, and transformers' two."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import rollout_calls  # beside this file
import torch
import transformers
from transformers.generation import configuration_utils, stopping_criteria
from transformers.generation.continuous_batching.utils import WorkloadHints

from mathv2_jax import hf, records, sharding
from mathv2_jax.rollout import engine, schedule

WAYS = ("grouped_mm", "batched_mm", "eager")
MOST_COPIED_BYTES = 4 << 30
GREEDY_TOKENS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """What is run: the model, how many prompts and answers, and how long they are."""

    model: dict[str, Any]
    prompts: int
    samples: int
    prompt_tokens: tuple[int, int]  # least and most
    median: int
    most: int
    part: int  # the fewest requests that a batch size of `generate` is tried on
    page: int
    chunk: int
    steps: int


class Job(NamedTuple):
    """One answer: its prompt, and how many tokens it gets."""

    prompt: tuple[int, ...]
    length: int


class Side(Protocol):
    """One way to answer. `counts` are the tokens that each job got in the last run.

    `way` names how transformers multiplies by experts, once that is chosen.
    """

    sizes: tuple[int, ...]
    counts: list[int]
    way: str

    def prepare(self, size: int) -> None:
        """Compile, warm up, and choose whatever else there is to choose at this size."""

    def use(self, way: str) -> None:
        """Go back to a way that was chosen, which another side may have changed."""

    def run(self, jobs: Sequence[Job], seconds: float = math.inf) -> float:
        """Seconds for all jobs; infinite, and the rest left, where it is longer than they may be.

        Ours is not given up.
        """
        ...


class Ours:
    """The engine; its size is its number of rows."""

    def __init__(self, path: str, scale: Scale, rows: tuple[int, ...]):
        self.sizes, self.scale, self.counts, self.way = rows, scale, [], ""
        self.config, self.variables = hf.load(path)
        self.mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
        self.programs = rollout_calls.Timed(self.config)

    def prepare(self, size: int) -> None:
        s = self.scale
        self.limits = schedule.EngineConfig(
            rows=size,
            context=s.prompt_tokens[1] + s.most,
            page=s.page,
            chunk=s.chunk,
            chunks=max(1, size // 8),
            steps=s.steps,
        )
        tokenizer: Any = rollout_calls.Unread(self.config.vocab_size)
        self.engine = engine.Engine(self.programs, tokenizer, self.limits, self.mesh)
        self.engine.load(self.variables, "warm")
        self.engine.generate([_request(0, Job(tuple(range(1, 1 + s.prompt_tokens[1])), 2))])

    def use(self, way: str) -> None:
        pass  # it has one

    def run(self, jobs: Sequence[Job], seconds: float = math.inf) -> float:
        self.engine.load(self.variables, "timed")
        self.engine.stats = engine.Stats()
        self.programs.clear()
        requests = [_request(at, job) for at, job in enumerate(jobs)]
        began = time.perf_counter()
        found = self.engine.generate(requests)
        taken = time.perf_counter() - began
        self.counts = [len(response.token_ids) for (response,) in found]
        return taken

    def greedy(self, prompt: tuple[int, ...]) -> list[int]:
        asked = dataclasses.replace(_request(0, Job(prompt, GREEDY_TOKENS)), temperature=0.0)
        return list(self.engine.generate([asked])[0][0].token_ids)


def _request(at: int, job: Job) -> records.Request:
    return records.Request(
        id=str(at), prompt=job.prompt, num_samples=1, seed=at, max_tokens=job.length
    )


class _Lengths(stopping_criteria.StoppingCriteria):
    """Ends each row of a batch at its own length, and all of them when the time is over.

    `ended` are the tokens that each row had when it was ended.
    """

    def __init__(self, jobs: Sequence[Job], start: int, end: float):
        self.start, self.end, self.late = start, end, False
        self.lengths = torch.tensor([job.length for job in jobs])
        self.ended = torch.zeros_like(self.lengths)

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.late |= time.perf_counter() > self.end
        drawn = input_ids.shape[1] - self.start
        over = (drawn >= self.lengths) | self.late
        self.ended[over & (self.ended == 0)] = drawn
        return over


class Theirs:
    """transformers' model on the same folder, and `generate`; its size is a batch's rows."""

    def __init__(self, path: str, scale: Scale, batches: tuple[int, ...]):
        self.sizes, self.scale, self.counts, self.way = batches, scale, [], ""
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32
        ).eval()

    def prepare(self, size: int) -> None:
        self.size = size
        jobs = [Job(tuple(range(1, 1 + self.scale.prompt_tokens[1])), 8)] * size
        self.way = fastest_way(self.model, jobs, self.run)

    def use(self, way: str) -> None:
        self.model.set_experts_implementation(way)

    def run(self, jobs: Sequence[Job], seconds: float = math.inf) -> float:
        self.counts, began = [], time.perf_counter()
        for at in range(0, len(jobs), self.size):
            if not self._batch(jobs[at : at + self.size], began + seconds):
                return math.inf
        return time.perf_counter() - began

    def _batch(self, jobs: Sequence[Job], end: float) -> bool:
        width = max(len(job.prompt) for job in jobs)
        ids = torch.full((len(jobs), width), 0)
        mask = torch.zeros_like(ids)
        for row, (prompt, _) in enumerate(jobs):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        stop = _Lengths(jobs, width, end)
        self.model.generate(
            ids,
            attention_mask=mask,
            generation_config=self.sampling(max(job.length for job in jobs)),
            stopping_criteria=stopping_criteria.StoppingCriteriaList([stop]),
        )
        self.counts += stop.ended.tolist()
        return not stop.late

    def sampling(self, most: int, *, greedy: bool = False) -> Any:
        """Temperature 1 over the whole vocabulary, without a token that ends."""
        return transformers.GenerationConfig(
            do_sample=not greedy,
            temperature=None if greedy else 1.0,
            top_k=None if greedy else 0,
            top_p=None if greedy else 1.0,
            max_new_tokens=most,
            pad_token_id=0,
            eos_token_id=None,
        )

    def greedy(self, prompt: tuple[int, ...]) -> list[int]:
        ids = torch.tensor([prompt])
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=self.sampling(GREEDY_TOKENS, greedy=True),
        )
        return out[0, len(prompt) :].tolist()


class Continuous:
    """transformers' continuous batching; its size is the most requests of a forward pass."""

    def __init__(self, theirs: Theirs, requests: tuple[int, ...], *, mended: bool = True):
        self.sizes, self.theirs, self.scale = requests, theirs, theirs.scale
        self.mended, self.counts, self.way = mended, [], ""

    def prepare(self, size: int) -> None:
        self.size = size
        jobs = [Job(tuple(range(1, 1 + self.scale.prompt_tokens[1])), 8)] * size
        self.way = fastest_way(self.theirs.model, jobs, self.run)

    def use(self, way: str) -> None:
        self.theirs.use(way)

    def run(self, jobs: Sequence[Job], seconds: float = math.inf) -> float:
        """RuntimeError with its own words where the generation fails."""
        model, page = self.theirs.model, 2 * self.scale.page
        longest = self.scale.prompt_tokens[1] + self.scale.most
        settings = configuration_utils.ContinuousBatchingConfig(
            page_size=page,
            num_blocks=(self.size + 1) * (longest // page + 2),
            max_batch_tokens=self.size + 2 * self.scale.prompt_tokens[1],
            max_requests_per_batch=self.size,
            seed=0,
        )
        sampling = self.theirs.sampling(self.scale.most)
        sampling.eos_token_id = -1
        hints = WorkloadHints(
            max_prompt_length=self.scale.prompt_tokens[1],
            max_generated_length=self.scale.most,
            num_requests=len(jobs),
        )
        kept = model.config.head_dim
        if self.mended:
            model.config.head_dim = model.config.qk_head_dim
        try:
            with model.continuous_batching_context_manager(
                generation_config=sampling,
                continuous_batching_config=settings,
                workload_hints=hints,
                timeout=60,
            ) as manager:
                return self._answered(manager, jobs, seconds)
        finally:
            model.config.head_dim = kept

    def _answered(self, manager: Any, jobs: Sequence[Job], seconds: float) -> float:
        began, found = time.perf_counter(), {}
        for at, (prompt, length) in enumerate(jobs):
            manager.add_request(list(prompt), request_id=str(at), max_new_tokens=length)
        while len(found) < len(jobs):
            if time.perf_counter() - began > seconds:
                manager.stop(block=True, hard_stop=True)
                return math.inf
            one = manager.get_result(timeout=1)
            if one is None and not manager.is_running():
                raise RuntimeError("the thread that generates has ended")
            if one is not None and one.error:
                raise RuntimeError(one.error)
            if one is not None and one.is_finished():
                found[int(one.request_id)] = len(one.generated_tokens)
        self.counts = [found[at] for at in range(len(jobs))]
        return time.perf_counter() - began


def fastest_way(model: Any, jobs: Sequence[Job], run: Callable[[Sequence[Job]], float]) -> str:
    """Sets, and names, the fastest way to multiply by experts for these, after one unmeasured call.

    `batched_mm` copies an expert for each assignment, and is left out where they would not fit.
    """
    c, taken = model.config, {}
    copied = len(jobs) * len(jobs[0].prompt) * c.num_experts_per_tok
    copied *= 4 * 3 * c.hidden_size * c.moe_intermediate_size
    for way in WAYS:
        if way == "batched_mm" and copied > MOST_COPIED_BYTES:
            continue
        model.set_experts_implementation(way)
        run(jobs[:1])
        taken[way] = run(jobs)
    best = min(taken, key=lambda way: taken[way])
    model.set_experts_implementation(best)
    return best
