"""What n verifications of one 2,000-token proof cost an engine, beside n of n different proofs.

    python experiments/cost_of_n/measure.py [--out=FILE.json] [--repeats=3] \
        [--prompt=2000] [--answer=64] [--samples=1,4,16,64]
    python experiments/cost_of_n/measure.py --draw=FILE.json

A random model of 1.6 M parameters samples n answers of 64 tokens each, forced, to one prompt; then
one answer to each of n prompts that differ in their first token, so that no page can be shared.
Each engine has n rows and just the pages that all of them need; compilation is not counted. Times
are of the calls of the two programs. With matplotlib a figure is drawn beside FILE.json.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # for tools

import jax  # noqa: E402 - after the platform is set
import numpy as np  # noqa: E402

from mathv2_jax import records, sharding  # noqa: E402
from mathv2_jax.model import transformer  # noqa: E402
from mathv2_jax.model.config import ModelConfig  # noqa: E402
from mathv2_jax.rollout import engine, schedule  # noqa: E402
from tools import rollout_calls  # noqa: E402

MODEL = ModelConfig(
    vocab_size=1024,
    width=128,
    num_layers=4,
    num_heads=4,
    q_latent_width=64,
    kv_latent_width=64,
    head_key_width=32,
    head_rope_width=16,
    head_value_width=32,
    dense_width=352,
    expert_width=64,
    num_experts=12,
    experts_per_token=3,
    max_position=4096,
)
PAGE, CHUNK, CHUNKS, STEPS = 16, 128, 8, 16
WAYS = {"shared": "one prompt, n answers", "apart": "n prompts, one answer each"}
FIGURES = ("computed_tokens", "pages", "megabytes", "prefill_seconds", "decode_seconds")


class Case:
    """An engine for n answers, to one prompt or to n; its programs are compiled."""

    def __init__(self, way: str, n: int, prompt: int, answer: int, variables: Any):
        draw = np.random.default_rng(0)
        tokens = tuple(draw.integers(n + 1, MODEL.vocab_size, prompt).tolist())
        fields: dict[str, Any] = dict(seed=0, max_tokens=answer)
        if way == "shared":
            self.requests = [records.Request(id="p", prompt=tokens, num_samples=n, **fields)]
        else:
            self.requests = [
                records.Request(id=f"p{at}", prompt=(at, *tokens[1:]), num_samples=1, **fields)
                for at in range(n)
            ]
        prompts = 1 if way == "shared" else n
        pages = prompts * -(-(prompt - 1) // PAGE) + n * -(-answer // PAGE)
        limits = schedule.EngineConfig(
            rows=n,
            context=prompt + answer,
            page=PAGE,
            pages=max(pages, -(-(prompt + answer) // PAGE) + 1),
            chunk=CHUNK,
            chunks=CHUNKS,
            steps=STEPS,
        )
        self.programs = rollout_calls.Timed(MODEL, self._look)
        self.variables, self._held = variables, 0
        mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
        tokenizer: Any = rollout_calls.Unread(MODEL.vocab_size)
        self.engine = engine.Engine(self.programs, tokenizer, limits, mesh)
        self.run()

    def _look(self) -> None:
        self._held = max(self._held, sum(p.number - p.available for p in self.engine.pools))

    def run(self) -> dict[str, float]:
        """What all the answers cost, from an engine that holds no page."""
        self.engine.load(self.variables, "random")
        self.engine.stats = engine.Stats()
        self.programs.clear()
        self._held = 0
        began = time.perf_counter()
        found = self.engine.generate(self.requests)
        seconds = time.perf_counter() - began
        answers = [response for responses in found for response in responses]
        assert self.engine.stats.restarted == 0, "the pages suffice for all answers at once"
        return {
            "answers": len(answers),
            "tokens": sum(len(response.token_ids) for response in answers),
            "computed_tokens": self.engine.stats.computed_tokens,
            "pages": self._held,
            "megabytes": self._held * bytes_a_page() / 1e6,
            "prefill_seconds": sum(self.programs.prefills),
            "decode_seconds": sum(call.seconds for call in self.programs.calls),
            "seconds": seconds,
        }


def bytes_a_page() -> int:
    """Of all layers."""
    pages = jax.eval_shape(lambda: transformer.empty_cache(MODEL, 1, PAGE))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pages))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs by way and n; the repeats are outermost, so that a slow minute is not of one n."""
    made = jax.jit(lambda key: transformer.init(MODEL, key))
    variables = made(jax.random.key(0))
    cases = {
        (way, n): Case(way, n, args.prompt, args.answer, variables)
        for way in WAYS
        for n in args.samples
    }
    runs: dict[str, dict[str, list[dict[str, float]]]] = {
        way: {str(n): [] for n in args.samples} for way in WAYS
    }
    for _ in range(args.repeats):
        for (way, n), case in cases.items():
            runs[way][str(n)].append(case.run())
    return {
        "prompt_tokens": args.prompt,
        "answer_tokens": args.answer,
        "parameters": transformer.num_parameters(variables),
        "bytes_a_page": bytes_a_page(),
        "cores": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
        "runs": runs,
    }


def spread(runs: list[dict[str, float]], name: str) -> tuple[float, float, float]:
    """(median, least, largest)."""
    values = [run[name] for run in runs]
    return statistics.median(values), min(values), max(values)


def show(found: dict[str, Any]) -> None:
    for way, by_n in found["runs"].items():
        print(WAYS[way])
        print(f"{'n':>5}{'computed':>10}{'pages':>7}{'MB':>8}{'prefill, s':>24}{'decode, s':>24}")
        for n, runs in by_n.items():
            computed, pages, megabytes, *seconds = (spread(runs, name) for name in FIGURES)
            times = "".join(f"{f'{m:.2f} ({a:.2f} to {b:.2f})':>24}" for m, a, b in seconds)
            print(f"{n:>5}{computed[0]:>10,}{pages[0]:>7,}{megabytes[0]:>8.2f}{times}")


def draw(found: dict[str, Any], path: str) -> bool:
    """Prompt tokens, memory and seconds over n; False where matplotlib is not installed."""
    try:
        from matplotlib import figure  # pyright: ignore[reportMissingImports] - an extra
    except ImportError:
        print('no figure: matplotlib is missing, pip install -e ".[experiments]" brings it')
        return False
    page = figure.Figure(figsize=(11, 3.6), layout="constrained")
    tokens, memory, times = page.subplots(1, 3)
    for axes, name, title in (
        (tokens, "computed_tokens", "prompt tokens computed"),
        (memory, "megabytes", "pages held, MB"),
    ):
        for way, label in WAYS.items():
            _plot(axes, found["runs"][way], name, label, "C0" if way == "shared" else "C1", "-")
        axes.set_title(title)
    for way, colour in (("shared", "C0"), ("apart", "C1")):
        for name, style in (("prefill_seconds", "-"), ("decode_seconds", "--")):
            label = f"{name.partition('_')[0]}, {'one prompt' if way == 'shared' else 'n prompts'}"
            _plot(times, found["runs"][way], name, label, colour, style)
    times.set_title("seconds")
    for axes in (tokens, memory, times):
        numbers = [int(n) for n in found["runs"]["shared"]]
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.set_xticks(numbers, [str(n) for n in numbers])
        axes.set_xlabel("n")
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left", fontsize=8)
    page.savefig(path, dpi=80)
    return True


def _plot(axes: Any, by_n: dict[str, Any], name: str, label: str, colour: str, style: str) -> None:
    numbers = [int(n) for n in by_n]
    middle, least, most = zip(*(spread(runs, name) for runs in by_n.values()), strict=True)
    axes.plot(numbers, middle, style, marker="o", markersize=4, color=colour, label=label)
    axes.fill_between(numbers, least, most, alpha=0.2, color=colour, linewidth=0)


def main() -> None:
    integers: Callable[[str], tuple[int, ...]] = lambda text: tuple(map(int, text.split(",")))  # noqa: E731
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--draw", type=pathlib.Path, help="draw what such a file holds, no more")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=2000, help="tokens")
    parser.add_argument("--answer", type=int, default=64, help="tokens")
    parser.add_argument("--samples", type=integers, default=(1, 4, 16, 64))
    args = parser.parse_args()
    found = json.loads(args.draw.read_text()) if args.draw else measure(args)
    show(found)
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    at = args.draw or args.out
    if at:
        draw(found, str(at.with_suffix(".png")))


if __name__ == "__main__":
    main()
