r"""Training-step tokens/s beside transformers + torch: same model, same weights, same two cores.

    python tools/bench_step.py [--repeats=7] [--seconds=4] [--sizes=tiny,small,medium] [--unroll] \
        [--out=FILE]

One step is forward, backward, clipping by global norm and AdamW, all in float32. Ours is the step
of the supervised stages (rl/learner.py), router bias and guard against non-finite values included;
theirs is the plain loop over DeepseekV3ForCausalLM with torch's fused AdamW and, of transformers'
three ways to multiply by experts, the one that is fastest at that size. Both start from the same
weights, and the run stops where their first losses differ. Blocks of steps alternate in one
process; a ratio compares the two blocks of one repeat. Then every part is timed alone, forward and
backward, which says where the slower one loses. Needs the extra `[hf]`.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

CORES = sorted(os.sched_getaffinity(0))[:2]
os.sched_setaffinity(0, CORES)  # before either library counts the cores
os.environ["OMP_NUM_THREADS"] = str(len(CORES))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402 - after the cores are set
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from mathv2_jax import hf, sharding  # noqa: E402
from mathv2_jax.data import packing  # noqa: E402
from mathv2_jax.model import cache, heads, layers, mla, moe, transformer  # noqa: E402
from mathv2_jax.rl import learner as learner_lib  # noqa: E402
from mathv2_jax.rl import optimizer as optimizer_lib  # noqa: E402

RATE = 1e-4
ADAM = optimizer_lib.OptimizerConfig(learning_rate=RATE, weight_decay=0.1)
WAYS = ("grouped_mm", "batched_mm", "eager")
MOST_COPIED_BYTES = 4 << 30


class Size(NamedTuple):
    """A model as transformers describes it, and the batch of one step."""

    fields: dict[str, Any]
    rows: int
    length: int


def _fields(**changes: Any) -> dict[str, Any]:
    return dict(
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        n_shared_experts=1,
        num_nextn_predict_layers=0,
        rope_parameters=dict(rope_type="default", rope_theta=10_000.0),
        bos_token_id=None,
        eos_token_id=None,
        **changes,
    )


SIZES = {
    # configs/quick.py without its embedding taps: 0.32 M parameters.
    "tiny": Size(
        _fields(
            vocab_size=448,
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=2,
            q_lora_rank=None,
            kv_lora_rank=64,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            v_head_dim=32,
            intermediate_size=128,
            moe_intermediate_size=32,
            n_routed_experts=8,
            num_experts_per_tok=2,
        ),
        rows=8,
        length=256,
    ),
    "small": Size(
        _fields(
            vocab_size=4096,
            hidden_size=192,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=4,
            q_lora_rank=96,
            kv_lora_rank=64,
            qk_nope_head_dim=48,
            qk_rope_head_dim=16,
            v_head_dim=48,
            intermediate_size=512,
            moe_intermediate_size=96,
            n_routed_experts=16,
            num_experts_per_tok=4,
        ),
        rows=4,
        length=512,
    ),
    "medium": Size(
        _fields(
            vocab_size=8192,
            hidden_size=384,
            num_hidden_layers=8,
            num_attention_heads=6,
            num_key_value_heads=6,
            q_lora_rank=192,
            kv_lora_rank=128,
            qk_nope_head_dim=64,
            qk_rope_head_dim=32,
            v_head_dim=64,
            intermediate_size=1024,
            moe_intermediate_size=192,
            n_routed_experts=16,
            num_experts_per_tok=4,
        ),
        rows=2,
        length=1024,
    ),
}


class Theirs:
    """The reference library's model with its usual training loop."""

    def __init__(self, size: Size, tokens_BT: np.ndarray):
        torch.manual_seed(0)
        config = transformers.DeepseekV3Config(**size.fields)
        self.model: Any = transformers.DeepseekV3ForCausalLM(config).train()
        self.tokens = torch.from_numpy(tokens_BT).long()
        groups: dict[bool, list[Any]] = {True: [], False: []}
        for name, parameter in self.model.named_parameters():
            groups["norm" not in name].append(parameter)
        decayed = [
            dict(params=groups[True], weight_decay=ADAM.weight_decay),
            dict(params=groups[False], weight_decay=0.0),
        ]
        betas = (ADAM.beta1, ADAM.beta2)
        self.adam = torch.optim.AdamW(decayed, lr=RATE, betas=betas, eps=ADAM.epsilon, fused=True)

    def choose_way(self) -> str:
        """The fastest of the ways to multiply by experts, by one step each after one unmeasured.

        `batched_mm` copies an expert for each assignment, and is left out where they would not fit.
        """
        taken, c = {}, self.model.config
        matrices = 3 * c.hidden_size * c.moe_intermediate_size
        copied = self.tokens.numel() * c.num_experts_per_tok * matrices * c.num_hidden_layers
        for way in WAYS:
            if way == "batched_mm" and 4 * copied > MOST_COPIED_BYTES:
                continue
            self.model.set_experts_implementation(way)
            self.gradients()
            taken[way] = seconds_of(self.gradients, 0.0)
        best = min(taken, key=lambda way: taken[way])
        self.model.set_experts_implementation(best)
        return best

    def loss(self) -> torch.Tensor:
        return self.model(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss

    def forward(self) -> float:
        with torch.no_grad():
            return float(self.loss())

    def gradients(self) -> None:
        self.adam.zero_grad(set_to_none=True)
        self.loss().backward()

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), ADAM.clip_norm)
        self.adam.step()

    def step(self) -> None:
        self.gradients()
        self.update()

    def parts(self) -> dict[str, float]:
        """Seconds of each part of a step, forward and backward, over all its layers."""
        c, (rows, length) = self.model.config, self.tokens.shape
        x = torch.randn(rows, length, c.hidden_size, requires_grad=True)
        positions = torch.arange(length)[None]
        rotation = self.model.model.rotary_emb(x, position_ids=positions)
        first, last = self.model.model.layers[0], self.model.model.layers[-1]

        def both_ways(call: Callable[[], torch.Tensor]) -> Callable[[], None]:
            def run() -> None:
                self.adam.zero_grad(set_to_none=True)
                x.grad = None
                out = call()
                out.backward(torch.ones_like(out))

            return run

        def head() -> torch.Tensor:
            out = self.model.lm_head(x).flatten(0, 1)
            return torch.nn.functional.cross_entropy(out, self.tokens.flatten())

        attend = both_ways(lambda: last.self_attn(x, rotation, None)[0])
        num_dense = c.first_k_dense_replace
        found = {
            "attention": c.num_hidden_layers * seconds_of(attend),
            "experts": (c.num_hidden_layers - num_dense)
            * seconds_of(both_ways(lambda: last.mlp(x))),
            "dense feed-forward": num_dense * seconds_of(both_ways(lambda: first.mlp(x))),
            "logits and loss": seconds_of(both_ways(head)),
        }
        self.gradients()
        return found | {"update": seconds_of(self.update)}


class Ours:
    """The learner of the supervised stages, on weights read from the reference's folder."""

    def __init__(self, folder: str, tokens_BT: np.ndarray, unroll: bool):
        released, variables = hf.load(folder)
        self.config = dataclasses.replace(released, scan_unroll=unroll)
        self.trunk = learner_lib.Trunk(config=self.config, kernels=transformer.Kernels())
        self.optimizer = optimizer_lib.make_optimizer(ADAM)
        self.mesh = sharding.make_mesh(sharding.MeshConfig())
        mean_loss = functools.partial(learner_lib.supervised, self.trunk, mean=True)
        self.learner = learner_lib.Learner(
            self.trunk, mean_loss, self.optimizer, self.mesh, router_bias_rate=1e-3
        )
        rows, length = tokens_BT.shape
        packer = packing.Packer(rows, length)
        for tokens_T in tokens_BT:
            answer = packing.Answer(tokens=tokens_T.tolist(), weights=[1.0] * length)
            assert packer.add(packing.Item(prompt=(), answers=(answer,)))
        self.batch = self.learner.put(packer.batch)
        self.state = self.learner.start(variables)
        self.tokens_BT = jnp.asarray(tokens_BT)
        loss = jax.jit(
            lambda variables: mean_loss(variables["params"], variables, self.batch, None)[0]
        )
        slope = jax.jit(jax.grad(lambda p, variables: mean_loss(p, variables, self.batch, None)[0]))
        self.forward = lambda: float(loss(self.state.variables))
        self.gradients = lambda: jax.block_until_ready(
            slope(self.state.variables["params"], self.state.variables)
        )

    def step(self) -> None:
        self.state, metrics = self.learner.step(self.state, [self.batch], [None], RATE)
        jax.block_until_ready(metrics["loss"])

    def parts(self) -> dict[str, float]:
        """As the reference's; what stands between the parts (norms, residuals) is in neither."""
        c, params = self.config, self.state.variables["params"]
        rows, length = self.tokens_BT.shape
        x_BTD = jax.random.normal(jax.random.key(0), (rows, length, c.width))
        layout = cache.plain_layout(jnp.full((rows,), length), length)
        last = jax.tree.map(lambda leaf: leaf[-1], params["sparse"])
        router = {"bias": self.state.variables["router"]["sparse"]["mlp"]["bias"][-1]}
        first = jax.tree.map(lambda leaf: leaf[0], params["dense"])
        attention = mla.LatentAttention(c, self.trunk.kernels.attend)
        sparse = moe.SparseMlp(c, self.trunk.kernels.experts)
        dense = layers.GatedMlp(c.dense_width)

        def attend(p: Any, x_BTD: jax.Array) -> jax.Array:
            out = attention.apply({"params": p}, x_BTD, layout, method="expanded")
            return out[0]

        def experts(p: Any, x_BTD: jax.Array) -> jax.Array:
            variables = {"params": p, "router": router}
            out = sparse.apply(variables, x_BTD, jnp.ones(x_BTD.shape[:2], bool), None)
            return out[0]

        def head(p: Any, x_BTD: jax.Array) -> jax.Array:
            return heads.token_logprobs(
                x_BTD, p["unembed"], self.tokens_BT, chunk=c.logprob_chunk
            ).logprob_BT

        def both_ways(call: Callable[..., Any], p: Any) -> Callable[[], Any]:
            slope = jax.jit(jax.grad(lambda p, x: jnp.sum(call(p, x)), argnums=(0, 1)))
            return lambda: jax.block_until_ready(slope(p, x_BTD))

        attending = seconds_of(both_ways(attend, last["attention"]))
        routed = seconds_of(both_ways(experts, last["mlp"]))
        feeding = seconds_of(both_ways(lambda p, x: dense.apply({"params": p}, x), first["mlp"]))
        return {
            "attention": c.num_layers * attending,
            "experts": c.num_sparse_layers * routed,
            "dense feed-forward": c.num_dense_layers * feeding,
            "logits and loss": seconds_of(both_ways(head, {"unembed": params["unembed"]})),
            "update": self._update_seconds(),
        }

    def _update_seconds(self) -> float:
        grads = jax.tree.map(jnp.ones_like, self.state.variables["params"])

        def update(params: Any, state: Any) -> Any:
            directions, state = self.optimizer.update(grads, state, params)
            return optax.apply_updates(params, jax.tree.map(lambda d: -RATE * d, directions)), state

        compiled = jax.jit(update, donate_argnums=(0, 1))
        held = jax.tree.map(jnp.copy, (self.state.variables["params"], self.state.optimizer))

        def run() -> None:
            nonlocal held
            held = jax.block_until_ready(compiled(*held))

        return seconds_of(run)


def seconds_of(call: Callable[[], Any], at_least: float = 0.5) -> float:
    """Seconds per call, over one or more calls that fill `at_least`, after one unmeasured."""
    call()
    calls, began = 0, time.perf_counter()
    while True:
        call()
        calls += 1
        taken = time.perf_counter() - began
        if taken >= at_least:
            return taken / calls


def measure(name: str, repeats: int, block_seconds: float, unroll: bool) -> dict[str, Any]:
    """One size: losses compared, blocks of steps in turn, then the parts."""
    size = SIZES[name]
    shape = (size.rows, size.length)
    tokens_BT = np.random.default_rng(0).integers(0, size.fields["vocab_size"], shape)
    theirs = Theirs(size, tokens_BT.astype(np.int32))
    way = theirs.choose_way()
    with tempfile.TemporaryDirectory() as folder:
        theirs.model.save_pretrained(folder)
        ours = Ours(folder, tokens_BT.astype(np.int32), unroll)
    losses = ours.forward(), theirs.forward()
    if abs(losses[0] - losses[1]) > 1e-4 * losses[1]:
        raise ValueError(f"{name}: ours starts at a loss of {losses[0]}, theirs at {losses[1]}")
    blocks: dict[str, list[float]] = {"ours": [], "theirs": []}
    for repeat in range(repeats):
        pair = [("ours", ours.step), ("theirs", theirs.step)]
        for who, step in pair if repeat % 2 == 0 else pair[::-1]:
            blocks[who].append(size.rows * size.length / seconds_of(step, block_seconds))
    ratios = [a / b for a, b in zip(blocks["ours"], blocks["theirs"], strict=True)]
    parameters = sum(p.numel() for p in theirs.model.parameters())
    whole = {
        who: {"forward": seconds_of(one.forward), "forward and backward": seconds_of(one.gradients)}
        for who, one in (("ours", ours), ("theirs", theirs))
    }
    return dict(
        parameters=parameters,
        rows=size.rows,
        length=size.length,
        experts_of_theirs=way,
        losses=losses,
        tokens_per_second=blocks,
        ratios=ratios,
        seconds={
            who: whole[who] | one.parts() for who, one in (("ours", ours), ("theirs", theirs))
        },
    )


def show(name: str, found: dict[str, Any]) -> None:
    median = statistics.median
    speeds = {who: median(each) for who, each in found["tokens_per_second"].items()}
    ratios = found["ratios"]
    print(
        f"{name}: {found['parameters'] / 1e6:.2f} M parameters, {found['rows']} x "
        f"{found['length']} tokens a step; tokens/s ours {speeds['ours']:,.0f}, theirs "
        f"{speeds['theirs']:,.0f} ({found['experts_of_theirs']}); ratio {median(ratios):.2f}, "
        f"from {min(ratios):.2f} to {max(ratios):.2f} over {len(ratios)}"
    )
    for part in found["seconds"]["ours"]:
        ours, theirs = (found["seconds"][who][part] * 1e3 for who in ("ours", "theirs"))
        print(f"  {part:22}{ours:>10.1f} ms ours{theirs:>10.1f} ms theirs{ours / theirs:>8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=4.0, help="of one block of steps")
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--unroll", action="store_true", help="our layers unrolled, not scanned")
    parser.add_argument("--out", help="a JSON file for all figures")
    args = parser.parse_args()
    torch.set_num_threads(len(CORES))
    transformers.utils.logging.disable_progress_bar()
    found = {}
    for name in args.sizes.split(","):
        found[name] = measure(name, args.repeats, args.seconds, args.unroll)
        show(name, found[name])
    versions = dict(jax=jax.__version__, torch=torch.__version__)
    versions |= dict(transformers=transformers.__version__, python=platform.python_version())
    if args.out:
        body = dict(threads=len(CORES), unrolled=args.unroll, versions=versions, sizes=found)
        pathlib.Path(args.out).write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
