"""Does the sampler give what the trainer means? Answers, log-probabilities and importance ratios.

    python tools/check_sampler.py [--small] [--json=FILE]

For a random DeepSeek-V3 and a random DeepSeek-V3.2 (sparse attention) of some 100 thousand
parameters, it compares

  * answers drawn together with the same drawn one at a time, in the same compiled programs: each
    token must be equal;
  * answers drawn with other numbers of rows, pages, chunks and steps: equal up to the first
    near-tie. Each place where two part is listed with the distance of its uniform number from the
    edge between the two tokens in the cumulative distribution; above 1e-3 is a fault;
  * the sampler's log-probability of each token with the trainer's, on packed rows with padding,
    with routing replayed, and with top-p 0.9 and the kept set replayed: in float32 within 1e-4. An
    indexer that picks by scores makes the model jump where two of them are a near-tie, and sampler
    and trainer may then pick differently. A token beyond the bound counts as such, and is listed,
    where the trainer gives the sampler's value once its parameters are moved by 1e-6 of themselves.
    In bfloat16 each rounds by itself: both are held against float32 arithmetic on the same
    parameters and experts, and the sampler may be at most 1.5 times as far from it as the trainer;
  * a trainer whose router would choose other experts, its routing replayed and not;
  * the mean importance ratio with top-p 0.9 where the kept set is replayed: 1.000 +- 0.001, and in
    bfloat16, where it scatters, within 3 standard errors of 1. Without the replay it is the mean of
    the kept mass, which is shown beside it (in bfloat16 without a bound: it is the trainer's mass).

The last line is JSON. Exit code 1 where a bound is passed.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configs.models import tiny_v3, tiny_v32  # noqa: E402
from mathv2_jax import records, sharding  # noqa: E402
from mathv2_jax.data import packing  # noqa: E402
from mathv2_jax.model import cache, transformer  # noqa: E402
from mathv2_jax.model.config import ModelConfig  # noqa: E402
from mathv2_jax.rl import grpo  # noqa: E402
from mathv2_jax.rl import learner as learner_lib  # noqa: E402
from mathv2_jax.rl import optimizer as optimizer_lib  # noqa: E402
from mathv2_jax.rollout import answers, decode, engine, schedule  # noqa: E402
from mathv2_jax.stages import gate, groups, rl, updates  # noqa: E402
from mathv2_jax.text import tokenizer as tokenizer_lib  # noqa: E402

CONTEXT, ROW_LENGTH, MOST_KEPT = 96, 640, 256
SHAPES = dict(rows=32, page=8, chunk=16, chunks=8, steps=8)
OTHER_SHAPES = (
    dict(rows=8, page=8, chunk=16, chunks=8, steps=8),
    dict(rows=32, page=4, chunk=32, chunks=2, steps=3),
    dict(rows=5, page=32, chunk=8, chunks=16, steps=1),
)
EXACT, NEAR_TIE, RATIO = 1e-4, 1e-3, 1e-3
COARSER, ERRORS = 1.5, 3.0
MOVED, MOVES = 1e-6, 32  # parameters, relatively, and how often, in search of a near-tie
LISTED = 20  # partings that are printed; the JSON has all
ADAM = optimizer_lib.OptimizerConfig(learning_rate=1e-3)

Found = list[list[records.Response]]


@dataclasses.dataclass
class Model:
    """A random model with its trainer, and engines over it by their shapes."""

    config: ModelConfig
    variables: transformer.Variables
    tokenizer: tokenizer_lib.Tokenizer

    def __post_init__(self):
        self.mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
        self.programs = decode.Programs(self.config, transformer.Kernels())
        trunk = learner_lib.Trunk(config=self.config, kernels=self.programs.kernels)
        loss = functools.partial(learner_lib.policy_gradient, trunk, grpo.GrpoConfig(), 1.0)
        optimizer = optimizer_lib.make_optimizer(ADAM)
        self.learner = learner_lib.Learner(trunk, loss, optimizer, self.mesh, router_bias_rate=0.0)

    def exact(self) -> "Model":
        """The same parameters, and all arithmetic in float32."""
        config = dataclasses.replace(self.config, param_dtype="float32", compute_dtype="float32")
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), self.variables)
        return Model(config, wide, self.tokenizer)

    def engine(self, given: transformer.Variables, **settings: Any) -> engine.Engine:
        """An engine that answers with `given`."""
        limits = schedule.EngineConfig(
            context=CONTEXT, most_kept=MOST_KEPT, **{**SHAPES, **settings}
        )
        made = engine.Engine(self.programs, self.tokenizer, limits, self.mesh)
        made.load(given, "random@0")
        return made

    def placed(self, given: transformer.Variables) -> transformer.Variables:
        """Laid out as the trainer lays them out."""
        shardings = sharding.shardings_for(transformer.boxed_abstract(self.config), self.mesh)
        return jax.device_put(given, shardings)

    def score(
        self,
        asked: Sequence[records.Request],
        found: Found,
        given: transformer.Variables,
        *,
        routing: bool = False,
        allowed: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The trainer's log-probability of each sampled token, and the sampler's."""
        config = self.config
        replay = packing.Replay(
            routing=(config.num_sparse_layers, config.experts_per_token) if routing else None,
            allowed=MOST_KEPT if allowed else 0,
        )
        made = rl.RlConfig(
            steps=1, groups=len(asked), samples=2, rows=8, row_length=ROW_LENGTH, optimizer=ADAM
        )
        both = [groups.unscored(r.prompt, each) for r, each in zip(asked, found, strict=True)]
        trainer, sampler = [], []
        for batch in updates.pack(made, both, replay):
            scored_BT = np.asarray(self.learner.logprobs(given, self.learner.put(batch)))
            real_BT = batch.weights_BT > 0
            trainer.append(scored_BT[real_BT])
            sampler.append(batch.old_logprobs_BT[real_BT])
        return np.concatenate(trainer).astype(np.float64), np.concatenate(sampler)

    @functools.cached_property
    def _plain(self) -> Any:
        @jax.jit
        def run(variables: Any, tokens_BT: jax.Array) -> jax.Array:
            layout = cache.plain_layout(jnp.full((1,), CONTEXT), CONTEXT)
            previous_BTW = cache.previous_tokens(
                tokens_BT, cache.plain_sources(tokens_BT), self.config.embedding_taps
            )
            out = transformer.apply(
                self.config, variables, tokens_BT, layout, previous_BTW=previous_BTW
            )
            return out.hidden_BTD @ variables["params"]["unembed"]

        return run

    def probabilities(self, prefix: Sequence[int]) -> np.ndarray:
        """Of the token after `prefix`, by a plain pass over it."""
        padded = np.zeros((1, CONTEXT), np.int32)
        padded[0, : len(prefix)] = prefix
        logits_V = np.asarray(self._plain(self.variables, padded))[0, len(prefix) - 1]
        powers_V = np.exp(logits_V.astype(np.float64) - logits_V.max())
        return powers_V / powers_V.sum()


def make_model(module: Any, dtype: str, tokenizer: tokenizer_lib.Tokenizer) -> Model:
    """Every array is drawn; logits have a spread of about 2, so tokens have some 50 rivals."""
    fields = dict(vocab_size=tokenizer.vocab_size, param_dtype=dtype, compute_dtype=dtype)
    config = ModelConfig(**module.model() | fields)
    draw = np.random.default_rng(0)

    def one(path: Any, leaf: Any) -> jax.Array:
        name = path[-1].key
        centre, spread = (1.0, 0.3) if name == "scale" else (0.0, 0.3)
        if name == "unembed":
            spread = 2.0 / np.sqrt(config.width)
        return jnp.asarray(centre + spread * draw.normal(size=leaf.shape), leaf.dtype)

    shapes = transformer.unboxed(transformer.boxed_abstract(config))
    return Model(config, jax.tree_util.tree_map_with_path(one, shapes), tokenizer)


def make_requests(model: Model, prompts: int, samples: int, **fields: Any) -> list[records.Request]:
    """Prompts of 1 to 40 tokens, answers of up to 48."""
    draw = np.random.default_rng(1)
    size = model.tokenizer.vocab_size
    return [
        records.Request(
            id=str(n),
            prompt=tuple(draw.integers(10, size, draw.integers(1, 41)).tolist()),
            num_samples=samples,
            seed=n,
            **{"max_tokens": 48, **fields},
        )
        for n in range(prompts)
    ]


def pairs(one: Found, other: Found) -> Iterator[tuple[records.Response, records.Response]]:
    """The same sample by two."""
    for left, right in zip(one, other, strict=True):
        yield from zip(left, right, strict=True)


def count_tokens(found: Found) -> int:
    """Sampled tokens."""
    return sum(len(r.token_ids) for each in found for r in each)


def together_and_alone(model: Model, asked: Sequence[records.Request]) -> dict[str, Any]:
    """How many answers differ when each request has the engine to itself."""
    own = model.engine(model.variables)
    together, alone = own.generate(asked), []
    for request in asked:
        own.load(model.variables, "random@0")  # prompts are computed alone too
        alone += own.generate([request])
    differ = sum(a.token_ids != b.token_ids for a, b in pairs(together, alone))
    return {"answers": len(list(pairs(together, alone))), "differ": differ}


def across_shapes(model: Model, asked: Sequence[records.Request]) -> dict[str, Any]:
    """Where answers part between compiled shapes, and how near a tie each such place is."""
    first = model.engine(model.variables).generate(asked)
    partings, tokens = [], 0
    for shapes in OTHER_SHAPES:
        found = model.engine(model.variables, **shapes).generate(asked)
        prompts = [r for r in asked for _ in range(r.num_samples)]
        for request, (a, b) in zip(prompts, pairs(first, found), strict=True):
            at = _first_difference(a.token_ids, b.token_ids)
            tokens += len(a.token_ids) if at is None else at
            if at is not None:
                distance = _distance(model, request, a, b, at)
                partings.append({"shapes": shapes, "at": at, "distance": distance})
    return {"tokens": tokens, "partings": partings}


def _first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    for at, (a, b) in enumerate(itertools.zip_longest(one, other)):
        if a != b:
            return at
    return None


def _distance(
    model: Model, request: records.Request, a: records.Response, b: records.Response, at: int
) -> float:
    """How far the uniform number lies from the edge between two tokens of one place."""
    if at >= min(len(a.token_ids), len(b.token_ids)):
        return float("inf")  # one ended where the other did not: no tie
    key = jax.random.wrap_key_data(
        jnp.asarray(answers.row_key(request.seed, a.index), dtype=jnp.uint32)
    )
    uniform = float(jax.random.uniform(jax.random.fold_in(key, at)))
    low, high = sorted((a.token_ids[at], b.token_ids[at]))
    cdf_V = np.cumsum(model.probabilities((*request.prompt, *a.token_ids[:at])))
    return float(max(abs(uniform - cdf_V[low]), abs(uniform - cdf_V[high - 1])))


def gaps(one: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """|one - other| of log-probabilities; `beyond` is the share above the gate's bfloat16 bound."""
    gap = np.abs(one - other)
    return {
        "tokens": len(gap),
        "mean": float(gap.mean()),
        "largest": float(gap.max()),
        "beyond": float((gap > gate.BFLOAT16).mean()),
    }


def ratios(trainer: np.ndarray, sampler: np.ndarray) -> dict[str, float]:
    """The mean importance ratio with its standard error."""
    ratio = np.exp(trainer - sampler)
    error = float(ratio.std(ddof=1) / np.sqrt(len(ratio)))
    return {"tokens": len(ratio), "mean": float(ratio.mean()), "error": error}


def moved(variables: transformer.Variables, seed: int) -> transformer.Variables:
    """The same parameters but for a rounding's worth."""
    draw = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda x: x * jnp.asarray(1.0 + MOVED * draw.normal(size=x.shape), x.dtype),
        variables["params"],
    )
    return {**variables, "params": params}


def near_ties(
    model: Model,
    asked: Sequence[records.Request],
    found: Found,
    given: transformer.Variables,
    scored: tuple[np.ndarray, np.ndarray],
    **replayed: bool,
) -> np.ndarray:
    """Which tokens beyond the bound are near-ties of the indexer's choice, by their places."""
    trainer, sampler = scored
    left = np.abs(trainer - sampler) > EXACT
    ties = np.zeros_like(left)
    for seed in range(MOVES if model.config.index_topk else 0):
        if not left.any():
            break
        other, _ = model.score(asked, found, model.placed(moved(given, seed)), **replayed)
        met = left & (np.abs(other - sampler) <= EXACT)
        ties |= met
        left &= ~met
    return np.flatnonzero(ties)


def rerouted(variables: transformer.Variables) -> transformer.Variables:
    """The same model, but its router prefers other experts."""
    draw = np.random.default_rng(2)
    router = jax.tree.map(
        lambda bias: bias + jnp.asarray(3.0 * draw.normal(size=bias.shape), bias.dtype),
        variables["router"],
    )
    return {**variables, "router": router}


class Table:
    """What was measured of one model, printed line by line; `faults` are beyond their bounds."""

    def __init__(self, name: str, *, exact: bool):
        self.name, self.exact = name, exact
        self.found: dict[str, Any] = {}
        self.faults: list[str] = []

    def note(self, what: str, value: dict[str, Any], text: str, good: bool | None = None) -> None:
        """A line; `good` is None where there is no bound."""
        self.found[what] = value
        state = {None: "shown", True: "ok", False: "BEYOND ITS BOUND"}[good]
        print(f"{self.name:18} {what:37} {text:64} {state}", flush=True)
        if good is False:
            self.faults.append(f"{self.name}: {what}")

    def gap(
        self,
        what: str,
        scored: tuple[np.ndarray, np.ndarray],
        ties: Sequence[int] | np.ndarray = (),
        *,
        bound: bool = True,
    ) -> None:
        """Trainer and sampler; the bound is for float32 alone, and for all but the near-ties."""
        value: dict[str, Any] = gaps(*scored)
        text = f"|gap| mean {value['mean']:.1e}, largest {value['largest']:.1e}"
        if not self.exact:
            text += f", {value['beyond']:.2%} > {gate.BFLOAT16}"
        parted = [abs(float(scored[0][at] - scored[1][at])) for at in ties]
        if parted:
            rest = gaps(*(np.delete(each, ties) for each in scored))
            value |= {"near_ties": parted, "largest_else": rest["largest"]}
            text = f"|gap| mean {rest['mean']:.1e}, largest {rest['largest']:.1e}"
            text += f" but for {len(parted)} near-ties"
        good = value.get("largest_else", value["largest"]) <= EXACT
        text += f" (n={value['tokens']})"
        self.note(what, value, text, good if self.exact and bound else None)
        for gap in parted[:LISTED]:
            print(f"    a near-tie of the indexer's choice: {gap:.1e}")

    def ratio(self, what: str, scored: tuple[np.ndarray, np.ndarray], wanted: float) -> None:
        """The mean importance ratio and what it should be."""
        value = {**ratios(*scored), "wanted": wanted}
        text = f"{value['mean']:.5f} ± {value['error']:.5f}, wanted {wanted:.5f}"
        room = RATIO if self.exact else ERRORS * value["error"]
        good = abs(value["mean"] - wanted) <= room
        good = good if self.exact or wanted == 1.0 else None
        self.note(what, value, f"{text} (n={value['tokens']})", good)


def compare_answers(table: Table, model: Model, asked: Sequence[records.Request]) -> None:
    """Token for token."""
    value = together_and_alone(model, asked)
    text = f"{value['differ']} of {value['answers']} answers differ"
    table.note("together and one at a time", value, text, value["differ"] == 0)
    value = across_shapes(model, asked)
    far = [p for p in value["partings"] if p["distance"] > NEAR_TIE]
    text = f"{len(value['partings'])} partings in {value['tokens']} tokens"
    table.note("other shapes", value, text, not far if table.exact else None)
    for parting in value["partings"][:LISTED]:
        shapes = ", ".join(f"{k}={v}" for k, v in parting["shapes"].items())
        print(f"    token {parting['at']}, {parting['distance']:.1e} from the edge: {shapes}")


def compare_logprobs(table: Table, model: Model, asked: Sequence[records.Request]) -> None:
    """Sampler and trainer, and a trainer that would send tokens elsewhere."""
    placed, elsewhere = model.placed(model.variables), model.placed(rerouted(model.variables))
    drawn = model.engine(model.variables).generate(asked, experts=True)

    def compare(what: str, given: transformer.Variables, **replayed: bool) -> Any:
        scored = model.score(asked, drawn, given, **replayed)
        bound = table.exact and (given is placed or bool(replayed))
        ties = near_ties(model, asked, drawn, given, scored, **replayed) if bound else ()
        table.gap(what, scored, ties, bound=bound)
        return scored

    compare("log-probabilities, padded rows", placed)
    replayed = compare("routing replayed", placed, routing=True)
    if not table.exact:
        wide = model.exact()
        truth, _ = wide.score(asked, drawn, wide.placed(wide.variables), routing=True)
        trainer, sampler = (gaps(truth, each) for each in replayed)
        times = sampler["mean"] / trainer["mean"]
        text = f"trainer {trainer['mean']:.1e}, sampler {sampler['mean']:.1e}, {times:.2f} times"
        value = {"trainer": trainer, "sampler": sampler, "times": times}
        table.note("distance from float32 arithmetic", value, text, times <= COARSER)
    compare("another router, routing replayed", elsewhere, routing=True)
    compare("another router, routing chosen anew", elsewhere)


def compare_ratios(table: Table, model: Model, asked: Sequence[records.Request]) -> None:
    """Truncated sampling, with the kept set and without."""
    placed = model.placed(model.variables)
    drawn = model.engine(model.variables).generate(asked, experts=True, kept=True)
    both = dict(routing=True, allowed=True)
    replayed = model.score(asked, drawn, placed, **both)
    ties = near_ties(model, asked, drawn, placed, replayed, **both) if table.exact else ()
    table.gap("top-p 0.9, kept set replayed", replayed, ties)
    table.ratio("ratio, kept set replayed", replayed, 1.0)
    mass = np.concatenate(
        [np.exp(np.subtract(r.policy_logprobs, r.logprobs)) for each in drawn for r in each]
    )
    scored = model.score(asked, drawn, placed, routing=True)
    table.ratio("ratio without the kept set: its mass", scored, float(mass.mean()))


def measure(name: str, model: Model, prompts: int, samples: int) -> Table:
    """All figures of one model."""
    table = Table(name, exact=model.config.param_dtype == "float32")
    asked = make_requests(model, prompts, samples)
    compare_answers(table, model, asked)
    compare_logprobs(table, model, asked)
    compare_ratios(table, model, make_requests(model, prompts, samples, top_p=0.9))
    return table


def main() -> int:
    """Prints a table, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="fewer answers, for a test")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the last line too")
    arguments = parser.parse_args()
    prompts, samples = (4, 4) if arguments.small else (32, 16)
    lines = ["Prove that 1 + 1 = 2.", "The proof is complete and rigorous.", "A gap at step 3."]
    tokenizer = tokenizer_lib.SentencePieceTokenizer.from_bytes(
        tokenizer_lib.train(lines, vocab_size=300)
    )
    found, faults = {}, []
    for kind, dtype in itertools.product((tiny_v3, tiny_v32), ("float32", "bfloat16")):
        name = f"{kind.__name__.split('.')[-1]}, {dtype}"
        made = make_model(kind, dtype, tokenizer)
        table = measure(name, made, prompts, samples)
        found[name] = table.found
        faults += table.faults
    line = json.dumps({"faults": faults, "models": found})
    if arguments.json:
        arguments.json.write_text(line + "\n")
    print(line)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
