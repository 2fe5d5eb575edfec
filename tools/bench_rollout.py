r"""Rollout tokens/s beside transformers: `generate`, and its continuous batching; and the limit.

    python tools/bench_rollout.py [--repeats=3] [--rows=32,64,128,256] \
        [--batches=16,64,256,1024] [--continuous=16,64,256] [--prompts=64] [--generate_part=0] \
        [--seed=0] [--out=FILE] [--small]

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
in a short call. Then all three run in turn, `repeats` times. --generate_part bounds the hours that
`generate` takes: it is given so many of the requests alone, whose batches need not the others.

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
from collections.abc import Sequence
from typing import Any, NamedTuple

CORES = len(os.sched_getaffinity(0))
os.environ["OMP_NUM_THREADS"] = str(CORES)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402 - after the platform is set
import numpy as np  # noqa: E402
import rollout_limit  # noqa: E402 - beside this file
import rollout_sides as sides_lib  # noqa: E402 - beside this file
import torch  # noqa: E402
import transformers  # noqa: E402
from etils import epath  # noqa: E402

from mathv2_jax import checkpoint  # noqa: E402
from mathv2_jax.hf import exporter, folder  # noqa: E402
from mathv2_jax.model import transformer  # noqa: E402
from mathv2_jax.model.config import ModelConfig  # noqa: E402

FULL = sides_lib.Scale(
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
SMALL = sides_lib.Scale(
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


def lengths(number: int, median: int, most: int, draw: np.random.Generator) -> list[int]:
    """Quantiles of the log-normal, so that no draw of luck moves its tail, in a random order."""
    normal = statistics.NormalDist()
    logs = [math.log(median) + normal.inv_cdf((at + 0.5) / number) for at in range(number)]
    cut = [min(most, max(1, round(math.exp(x)))) for x in logs]
    return [cut[at] for at in draw.permutation(number)]


def make_jobs(scale: sides_lib.Scale, seed: int) -> list[sides_lib.Job]:
    """All answers, those of one prompt side by side."""
    draw = np.random.default_rng(seed)
    least, most = scale.prompt_tokens
    prompts = [
        tuple(draw.integers(1, scale.model["vocab_size"], draw.integers(least, most + 1)).tolist())
        for _ in range(scale.prompts)
    ]
    wanted = lengths(scale.prompts * scale.samples, scale.median, scale.most, draw)
    return [sides_lib.Job(prompts[at // scale.samples], length) for at, length in enumerate(wanted)]


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


class Chosen(NamedTuple):
    """A side's size, its way to multiply by experts, and the rate of each size that was tried.

    A size that was given up has a rate of 0.
    """

    size: int
    way: str
    tried: dict[int, float]


def choose(side: sides_lib.Side, jobs: Sequence[sides_lib.Job], least: int) -> Chosen:
    """The size with most useful tokens/s, prepared.

    Each is tried on the first `least` jobs, or as many as its size; one alone is not tried.
    """
    rates: dict[int, float] = {}
    for size in side.sizes if len(side.sizes) > 1 else ():
        side.prepare(size)
        some = jobs[: max(size, least)]
        useful = sum(job.length for job in some)
        best = max(rates.values(), default=0.0)
        rates[size] = useful / side.run(some, useful / best if best else math.inf)
        print(f"  size {size}: {_shown(rates[size])}", flush=True)
    best_size = max(rates, key=lambda size: rates[size], default=next(iter(side.sizes)))
    side.prepare(best_size)
    return Chosen(best_size, side.way, rates)


def _shown(rate: float) -> str:
    return f"{rate:,.1f} useful tokens/s" if rate else "given up, slower than the best"


def same_weights(
    ours: sides_lib.Ours, theirs: sides_lib.Theirs, prompt: tuple[int, ...]
) -> dict[str, Any]:
    """How far one prompt's logits are apart, over the largest; whether greedy answers agree."""
    tokens_BT = np.asarray([prompt], np.int32)
    forward = jax.jit(lambda variables, tokens: transformer.forward(ours.config, variables, tokens))
    mine = np.asarray(forward(ours.variables, tokens_BT))
    with torch.no_grad():
        other = theirs.model(torch.from_numpy(tokens_BT).long()).logits.numpy()
    return {
        "logits_apart": float(np.abs(mine - other).max() / np.abs(other).max()),
        "greedy_equal": ours.greedy(prompt) == theirs.greedy(prompt),
    }


def fails_as_it_is(theirs: sides_lib.Theirs, job: sides_lib.Job) -> str | None:
    """What continuous batching says without the mended width; None where it runs."""
    plain = sides_lib.Continuous(theirs, (1,), mended=False)
    plain.size = 1
    try:
        plain.run([job._replace(length=2)])
    except RuntimeError as error:
        return str(error)
    return None


def choose_all(
    sides: dict[str, sides_lib.Side], jobs: Sequence[sides_lib.Job], part: int
) -> tuple[dict[str, Chosen], str | None]:
    """What each side is run with; `sides` loses continuous batching where that fails, and why."""
    chosen: dict[str, Chosen] = {}
    for name, side in list(sides.items()):
        print(f"{name}, by size", flush=True)
        try:
            chosen[name] = choose(side, jobs, part if name == "generate" else len(jobs))
        except RuntimeError as error:
            if name != "continuous":
                raise
            del sides[name]
            return chosen, str(error)
    return chosen, None


class Runs(NamedTuple):
    """Useful tokens/s of each run of each side, and ours by parts of its seconds (Timed.parts)."""

    rates: dict[str, list[float]]
    parts: list[dict[str, float]]


def run_all(
    sides: dict[str, sides_lib.Side],
    chosen: dict[str, Chosen],
    given: dict[str, Sequence[sides_lib.Job]],
    repeats: int,
) -> Runs:
    """All sides in turn, as often as asked for."""
    found = Runs({name: [] for name in sides}, [])
    for repeat in range(repeats):
        for name, side in sides.items():
            side.use(chosen[name].way)
            seconds = side.run(given[name])
            rate = sum(side.counts) / seconds
            found.rates[name].append(rate)
            print(f"run {repeat + 1}: {name} {_shown(rate)}", flush=True)
            if isinstance(side, sides_lib.Ours):
                found.parts.append(side.programs.parts(seconds, chosen[name].size))
    return found


def measure(args: argparse.Namespace, scale: sides_lib.Scale, at: epath.Path) -> dict[str, Any]:
    """Everything, as what becomes the last line."""
    config = ModelConfig(**scale.model)
    path = export(config, at, args.seed)
    jobs = make_jobs(scale, args.seed)
    ours = sides_lib.Ours(path, scale, args.rows)
    theirs = sides_lib.Theirs(path, scale, args.batches)
    continuous = sides_lib.Continuous(theirs, args.continuous)
    sides: dict[str, sides_lib.Side] = dict(ours=ours, generate=theirs, continuous=continuous)
    as_it_is = fails_as_it_is(theirs, jobs[0])
    chosen, error = choose_all(sides, jobs, scale.part)
    checks = same_weights(ours, theirs, jobs[0].prompt)
    given: dict[str, Sequence[sides_lib.Job]] = {name: jobs for name in sides}
    if args.generate_part:
        given["generate"] = jobs[: max(args.generate_part, chosen["generate"].size)]
    runs = run_all(sides, chosen, given, args.repeats)
    medians = {name: statistics.median(each) for name, each in runs.rates.items()}
    prompts = [len(prompt) for prompt in dict.fromkeys(job.prompt for job in jobs)]
    answers = [(len(job.prompt), job.length) for job in jobs]
    limit = rollout_limit.limit(config, prompts, answers, chosen["ours"].size)
    middle = sorted(range(args.repeats), key=lambda at: runs.rates["ours"][at])[args.repeats // 2]
    forced = [job.length for job in jobs]
    return {
        "ratio_generate": medians["ours"] / medians["generate"],
        "ratio_continuous": None if error else medians["ours"] / medians["continuous"],
        "continuous_error": error,
        "continuous_as_it_is": as_it_is,
        **checks,
        "parameters": transformer.num_parameters(ours.variables),
        "requests": len(jobs),
        "tokens_forced": sum(forced),
        "requests_given": {name: len(some) for name, some in given.items()},
        "tokens": {name: sum(side.counts) for name, side in sides.items()},
        "lengths_kept": {
            name: side.counts == forced[: len(given[name])] for name, side in sides.items()
        },
        "tokens_per_second": runs.rates,
        "median": medians,
        "chosen": {name: one._asdict() for name, one in chosen.items()},
        "engine": dataclasses.asdict(ours.limits),
        "stats": dataclasses.asdict(ours.engine.stats) | {"row_use": ours.engine.stats.row_use},
        "limit": limit,
        "share_of_limit": medians["ours"] / limit["tokens_per_second"],
        "gap": rollout_limit.gap(runs.parts[middle], limit, sum(forced)),
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


def show(found: dict[str, Any]) -> None:
    """The same as a few tables."""
    print(
        f"{found['parameters'] / 1e6:.2f} M parameters, {found['requests']} answers, "
        f"{found['tokens_forced']:,} tokens; logits {found['logits_apart']:.1e} apart; engine: "
        + ", ".join(f"{name} {value}" for name, value in found["engine"].items() if value)
    )
    for name, each in found["tokens_per_second"].items():
        chosen, ratio = found["chosen"][name], found.get(f"ratio_{name}")
        print(
            f"{name:12}{statistics.median(each):>10,.1f} useful tokens/s, {min(each):,.1f} to "
            f"{max(each):,.1f} over {len(each)}; size {chosen['size']}"
            + (chosen["way"] and f", {chosen['way']}")
            + (f"; ours is {ratio:.2f} times that" if ratio else "")
        )
    if found["continuous_error"]:
        print(f"continuous  does not run: {found['continuous_error']}")
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
    parser.add_argument("--generate_part", type=int, default=0, help="requests; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file for all figures")
    parser.add_argument("--small", action="store_true", help="tiny sizes, for a test")
    args = parser.parse_args()
    scale = SMALL if args.small else dataclasses.replace(FULL, prompts=args.prompts)
    args.rows = args.rows or ((4,) if args.small else (32, 64, 128, 256))
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
