"""Rollout tokens/s beside transformers: `generate`, and its continuous batching; and the limit.

    python tools/bench_rollout.py [--repeats=3] [--rows=64,128,256] [--batches=16,64,256,1024] \
        [--continuous=16,64,256] [--prompts=64] [--seed=0] [--out=FILE] [--small]

A random mixture of experts of DeepSeek-V3's form, 9.9 M parameters, float32, is exported by
hf/exporter.py; our engine and transformers read the same folder. 64 prompts of 64 to 128 tokens get
16 answers each, sampled at temperature 1. Each answer has its own length, the same on every side:
log-normal with median 60 (a sigma of 1), cut at 512. Nothing can end it earlier, and neither side
turns tokens into text. Useful tokens are these, over the seconds of all of them, prompts included;
compilation and a warming call are not.

Every side runs at the size that is best for it on this machine, on all of its cores. The engine's
rows and continuous batching's requests are chosen by one pass over everything, the batches of
`generate` (in the order of the requests, padded on their left) by one over as many requests as the
largest batch up to it needs, at least 256. A size is given up once it has taken longer than the
best before it would. Of transformers' three ways to multiply by experts each size takes the fastest
in a short call. Then all three run in turn, `repeats` times.

Continuous batching, as it is, keeps keys as wide as the rotated part of a DeepSeek-V3's and fails.
Its cache is told the whole width (`config.head_dim`), which is right where keys and values are of
one width, as here.

The limit is that of matrix products: the model's FLOPs for these tokens, at the rate that products
of its shapes reach when each is timed alone, by whichever of XLA and torch does it faster. What
fills the gap is read off the calls of the engine's two programs. The last line is JSON.
With --small everything is tiny, for a test. Needs the extra `[hf]`; set
GLIBC_TUNABLES=glibc.malloc.hugetlb=1, as experiments do.
"""

import argparse
import dataclasses
import json
import logging
import math
import os
import pathlib
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

CORES = len(os.sched_getaffinity(0))
os.environ["OMP_NUM_THREADS"] = str(CORES)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402 - after the platform is set
import numpy as np  # noqa: E402
import rollout_limit  # noqa: E402 - beside this file
import torch  # noqa: E402
import transformers  # noqa: E402
from etils import epath  # noqa: E402
from transformers.generation import configuration_utils, stopping_criteria  # noqa: E402
from transformers.generation.continuous_batching.utils import WorkloadHints  # noqa: E402

from mathv2_jax import checkpoint, hf, records, sharding  # noqa: E402
from mathv2_jax.hf import exporter, folder  # noqa: E402
from mathv2_jax.model import transformer  # noqa: E402
from mathv2_jax.model.config import ModelConfig  # noqa: E402
from mathv2_jax.rollout import engine, schedule  # noqa: E402

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


FULL = Scale(
    model=dict(
        vocab_size=4096,
        width=256,
        num_layers=6,
        num_heads=4,
        q_latent_width=96,
        kv_latent_width=64,
        head_key_width=48,
        head_rope_width=16,
        head_value_width=64,
        dense_width=704,
        expert_width=96,
        num_experts=16,
        experts_per_token=4,
        max_position=1024,
    ),
    prompts=64,
    samples=16,
    prompt_tokens=(64, 128),
    median=60,
    most=512,
    part=256,
    page=16,
    chunk=64,
    steps=16,
)
SMALL = Scale(
    model=FULL.model
    | dict(vocab_size=256, width=32, num_layers=2, num_heads=2, dense_width=48, expert_width=16)
    | dict(q_latent_width=16, kv_latent_width=16, num_experts=4, experts_per_token=2)
    | dict(head_key_width=8, head_rope_width=8, head_value_width=16, max_position=64),
    prompts=4,
    samples=3,
    prompt_tokens=(5, 9),
    median=6,
    most=20,
    part=8,
    page=4,
    chunk=8,
    steps=4,
)


class Job(NamedTuple):
    """One answer: its prompt, and how many tokens it gets."""

    prompt: tuple[int, ...]
    length: int


class Unread:
    """A tokenizer for tokens that nobody reads: no token ends anything, and all text is empty."""

    fingerprint, control_ids, stop_ids = "unread", frozenset(), ()
    pad_id, eos_id, end_think_id = 0, -1, -1

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def decode(self, ids: Sequence[int]) -> str:
        return ""

    def split_thinking(self, ids: Sequence[int], *, think: bool) -> tuple[list[int], list[int]]:
        return [], list(ids)


def lengths(number: int, median: int, most: int, draw: np.random.Generator) -> list[int]:
    """Quantiles of the log-normal, so that no draw of luck moves its tail, in a random order."""
    normal = statistics.NormalDist()
    logs = [math.log(median) + normal.inv_cdf((at + 0.5) / number) for at in range(number)]
    cut = [min(most, max(1, round(math.exp(x)))) for x in logs]
    return [cut[at] for at in draw.permutation(number)]


def make_jobs(scale: Scale, seed: int) -> list[Job]:
    """All answers, those of one prompt side by side."""
    draw = np.random.default_rng(seed)
    least, most = scale.prompt_tokens
    prompts = [
        tuple(draw.integers(1, scale.model["vocab_size"], draw.integers(least, most + 1)).tolist())
        for _ in range(scale.prompts)
    ]
    wanted = lengths(scale.prompts * scale.samples, scale.median, scale.most, draw)
    return [Job(prompts[at // scale.samples], length) for at, length in enumerate(wanted)]


def export(config: ModelConfig, at: epath.Path, seed: int) -> str:
    """A Hugging Face folder with a random model; its path."""
    variables = jax.jit(lambda key: transformer.init(config, key))(jax.random.key(seed))
    named = {
        jax.tree_util.keystr(path, simple=True, separator="."): x
        for path, x in jax.tree.leaves_with_path(variables)
    }
    with checkpoint.Checkpoints(at / "ours" / folder.CHECKPOINTS) as saved:
        saved.save(0, named, {})
    folder.write_config(at / "ours", config, {})
    exporter.convert(
        folder.locate(at / "ours"),
        at / "hf",
        dtype="float32",
        max_shard_bytes=10**9,
        progress=lambda done, total: None,
        with_tokenizer=False,
    )
    return os.fspath(at / "hf")


class Side(Protocol):
    """One way to answer. `counts` are the tokens that each job got in the last run."""

    sizes: tuple[int, ...]
    counts: list[int]

    def prepare(self, size: int) -> None:
        """Compile, warm up, and choose whatever else there is to choose at this size."""

    def run(self, jobs: Sequence[Job], seconds: float = math.inf) -> float:
        """Seconds for all jobs; infinite, and the rest left, where it is longer than they may be.

        Ours is not given up.
        """
        ...


class Ours:
    """The engine; its size is its number of rows."""

    def __init__(self, path: str, scale: Scale, rows: tuple[int, ...]):
        self.sizes, self.scale, self.counts = rows, scale, []
        self.config, self.variables = hf.load(path)
        self.mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
        self.programs = rollout_limit.Timed(self.config)

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
        tokenizer: Any = Unread(self.config.vocab_size)
        self.engine = engine.Engine(self.programs, tokenizer, self.limits, self.mesh)
        self.engine.load(self.variables, "warm")
        self.engine.generate([_request(0, Job(tuple(range(1, 1 + s.prompt_tokens[1])), 2))])

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
        self.sizes, self.scale, self.counts = batches, scale, []
        self.way = ""
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32
        ).eval()

    def prepare(self, size: int) -> None:
        self.size = size
        jobs = [Job(tuple(range(1, 1 + self.scale.prompt_tokens[1])), 8)] * size
        self.way = fastest_way(self.model, jobs, self.run)

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


def choose(side: Side, jobs: Sequence[Job], least: int) -> tuple[int, dict[int, float]]:
    """The size with most useful tokens/s, prepared, and what each gave (0: given up).

    Each is tried on the first `least` jobs, or as many as its size.
    """
    rates: dict[int, float] = {}
    if len(side.sizes) == 1:
        side.prepare(side.sizes[0])
        return side.sizes[0], rates
    for size in side.sizes:
        side.prepare(size)
        some = jobs[: max(size, least)]
        useful = sum(job.length for job in some)
        best = max(rates.values(), default=0.0)
        rates[size] = useful / side.run(some, useful / best if best else math.inf)
        print(f"  size {size}: {_shown(rates[size])}", flush=True)
    best_size = max(rates, key=lambda size: rates[size])
    side.prepare(best_size)
    return best_size, rates


def _shown(rate: float) -> str:
    return f"{rate:,.1f} useful tokens/s" if rate else "given up, slower than the best"


def same_weights(ours: Ours, theirs: Theirs, job: Job) -> dict[str, Any]:
    """How far one prompt's logits are apart, over the largest; whether greedy answers agree."""
    tokens_BT = np.asarray([job.prompt], np.int32)
    forward = jax.jit(lambda variables, tokens: transformer.forward(ours.config, variables, tokens))
    mine = np.asarray(forward(ours.variables, tokens_BT))
    with torch.no_grad():
        other = theirs.model(torch.from_numpy(tokens_BT).long()).logits.numpy()
    return {
        "logits_apart": float(np.abs(mine - other).max() / np.abs(other).max()),
        "greedy_equal": ours.greedy(job.prompt) == theirs.greedy(job.prompt),
    }


def fails_as_it_is(theirs: Theirs, job: Job) -> str | None:
    """What continuous batching says without the mended width; None where it runs."""
    plain = Continuous(theirs, (1,), mended=False)
    plain.size = 1
    try:
        plain.run([job._replace(length=2)])
    except RuntimeError as error:
        return str(error)
    return None


def measure(args: argparse.Namespace, scale: Scale, at: epath.Path) -> dict[str, Any]:
    """Everything, as what becomes the last line."""
    config = ModelConfig(**scale.model)
    path = export(config, at, args.seed)
    jobs = make_jobs(scale, args.seed)
    ours, theirs = Ours(path, scale, args.rows), Theirs(path, scale, args.batches)
    continuous = Continuous(theirs, args.continuous)
    sides: dict[str, tuple[Side, int]] = {
        "ours": (ours, len(jobs)),
        "generate": (theirs, scale.part),
        "continuous": (continuous, len(jobs)),
    }
    as_it_is, error = fails_as_it_is(theirs, jobs[0]), None
    sizes: dict[str, int] = {}
    tried: dict[str, dict[int, float]] = {}
    ways: dict[str, str] = {}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    tokens: dict[str, list[int]] = {}
    for name, (side, least) in sides.items():
        print(f"{name}, by size", flush=True)
        try:
            sizes[name], tried[name] = choose(side, jobs, least)
        except RuntimeError as failed:
            if name != "continuous":
                raise
            error = f"{failed}"
        if name != "ours":
            ways[name] = getattr(side, "way", "")
    found = same_weights(ours, theirs, jobs[0])
    if error:
        del sides["continuous"]
    parts: list[dict[str, float]] = []
    for repeat in range(args.repeats):
        for name, (side, _) in sides.items():
            if name != "ours":
                theirs.model.set_experts_implementation(ways[name])
            seconds = side.run(jobs)
            tokens[name] = side.counts
            rates[name].append(sum(side.counts) / seconds)
            print(f"run {repeat + 1}: {name} {_shown(rates[name][-1])}", flush=True)
            if name == "ours":
                parts.append(ours.programs.parts(seconds, sizes["ours"]))
    prompts = [len(prompt) for prompt in dict.fromkeys(job.prompt for job in jobs)]
    answers = [(len(job.prompt), job.length) for job in jobs]
    limit = rollout_limit.limit(config, prompts, answers, sizes["ours"])
    middle = sorted(range(args.repeats), key=lambda at: rates["ours"][at])[args.repeats // 2]
    medians = {name: statistics.median(each) if each else None for name, each in rates.items()}
    return {
        **{f"ratio_{n}": _ratio(medians["ours"], medians[n]) for n in ("generate", "continuous")},
        "continuous_error": error,
        "continuous_as_it_is": as_it_is,
        **found,
        "parameters": transformer.num_parameters(ours.variables),
        "requests": len(jobs),
        "tokens_forced": sum(job.length for job in jobs),
        "tokens": {name: sum(counts) for name, counts in tokens.items()},
        "lengths_kept": {
            name: counts == [job.length for job in jobs] for name, counts in tokens.items()
        },
        "tokens_per_second": rates,
        "median": medians,
        "sizes": sizes,
        "tried": tried,
        "experts": ways,
        "engine": dataclasses.asdict(ours.limits),
        "stats": dataclasses.asdict(ours.engine.stats) | {"row_use": ours.engine.stats.row_use},
        "limit": limit,
        "share_of_limit": (medians["ours"] or 0.0) / limit["tokens_per_second"],
        "gap": rollout_limit.gap(parts[middle], limit, sum(ours.counts)),
        "step": rollout_limit.step_parts(ours.programs, ours.variables, ours.limits, limit),
        "cores": CORES,
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
        "versions": {
            "jax": jax.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def _ratio(mine: float | None, other: float | None) -> float | None:
    return mine / other if mine and other else None


def show(found: dict[str, Any]) -> None:
    """The same as a few tables."""
    print(
        f"{found['parameters'] / 1e6:.2f} M parameters, {found['requests']} answers, "
        f"{found['tokens_forced']:,} tokens; logits {found['logits_apart']:.1e} apart; engine: "
        + ", ".join(f"{name} {value}" for name, value in found["engine"].items() if value)
    )
    for name, each in found["tokens_per_second"].items():
        if not each:
            print(f"{name:12}does not run: {found['continuous_error']}")
            continue
        size, ratio = found["sizes"][name], found.get(f"ratio_{name}")
        print(
            f"{name:12}{statistics.median(each):>10,.1f} useful tokens/s, {min(each):,.1f} to "
            f"{max(each):,.1f} over {len(each)}; size {size} {found['experts'].get(name, '')}"
            + (f"; ours is {ratio:.2f} times that" if ratio else "")
        )
    limit = found["limit"]
    print(
        f"limit       {limit['tokens_per_second']:>10,.1f} tokens/s: "
        f"{limit['flops_per_token'] / 1e6:.2f} MFLOP a token at "
        f"{limit['flops_per_second'] / 1e9:.1f} GFLOP/s; ours reaches "
        f"{100 * found['share_of_limit']:.1f} %"
    )
    whole = sum(found["gap"].values())
    print("a pass of ours, by what fills it")
    for name, seconds in found["gap"].items():
        print(f"  {name:56}{seconds:>9.2f} s{100 * seconds / whole:>7.1f} %")
    print("a step of decoding, by parts timed alone")
    for name, seconds in found["step"].items():
        print(f"  {name:56}{1e3 * seconds:>9.2f} ms")


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=_sizes, help="of the engine, to choose from")
    parser.add_argument("--batches", type=_sizes, help="of generate, to choose from")
    parser.add_argument("--continuous", type=_sizes, help="requests a pass, to choose from")
    parser.add_argument("--prompts", type=int, default=FULL.prompts)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file for all figures")
    parser.add_argument("--small", action="store_true", help="tiny sizes, for a test")
    args = parser.parse_args()
    scale = SMALL if args.small else dataclasses.replace(FULL, prompts=args.prompts)
    args.rows = args.rows or ((4,) if args.small else (64, 128, 256))
    args.batches = args.batches or ((3, 12) if args.small else (16, 64, 256, 1024))
    args.continuous = args.continuous or ((4,) if args.small else (16, 64, 256))
    torch.set_num_threads(CORES)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    # What goes wrong there is reported as `continuous_error` or `continuous_as_it_is`.
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as at:
        found = measure(args, scale, epath.Path(at))
    show(found)
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
