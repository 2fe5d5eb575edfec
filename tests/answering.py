"""A program of one or more processes, with four devices in all: replicas answer requests.

    python -m tests.answering --folder=DIR [--coordinator=...]

The requests are of uneven lengths, one is cancelled, in one process only. Every process writes down
what all of them got, with one replica and with two.
"""

import json
import pathlib
import sys

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from mathv2_jax import processes, records, sharding
from mathv2_jax.cli import launch
from mathv2_jax.model import transformer
from mathv2_jax.model.config import ModelConfig
from mathv2_jax.rollout import decode, engine, replicas, schedule
from mathv2_jax.text import tokenizer as tokenizer_lib

_FOLDER = flags.DEFINE_string("folder", None, "Where the answers go.")


def main() -> None:
    model = tokenizer_lib.train(["Prove that 1 + 1 = 2.", "A gap at step 3."], vocab_size=300)
    tokenizer = tokenizer_lib.SentencePieceTokenizer.from_bytes(model)
    config = ModelConfig(
        vocab_size=300,
        width=16,
        num_layers=2,
        num_heads=2,
        kv_latent_width=8,
        head_key_width=4,
        head_rope_width=4,
        head_value_width=4,
        dense_width=16,
        expert_width=8,
        num_experts=4,
        experts_per_token=2,
    )
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2))
    programs = decode.Programs(config, transformer.Kernels())
    boxed = transformer.boxed_abstract(config, programs.kernels)
    draw = np.random.default_rng(1)
    shapes = transformer.unboxed(boxed)
    drawn = jax.tree.map(lambda x: draw.normal(size=x.shape).astype(np.float32) * 0.3, shapes)
    variables = sharding.put(drawn, sharding.shardings_for(boxed, mesh))
    requests = [
        records.Request(
            id=f"{at}", prompt=(3, *range(40, 41 + 3 * at)), num_samples=3, seed=at, max_tokens=most
        )
        for at, most in enumerate((4, 23, 1, 12, 30, 7))
    ]
    limits = schedule.EngineConfig(rows=4, context=56, page=4, chunk=8, chunks=4, steps=5)

    def make_engine(own: Mesh) -> engine.Engine:
        return engine.Engine(programs, tokenizer, limits, own)

    found = {}
    for number, axes in ((1, dict(data=2, expert=2)), (2, dict(data=2))):
        layout = sharding.SamplingConfig(**{"data": 1, **axes}, replicas=number)
        sampling = replicas.Replicas(sharding.make_sampling_mesh(layout, mesh), make_engine)
        sampling.load(variables, "drawn")
        heard = {}
        for replica, own in sampling.engines.items():
            places = sampling.share(replica, len(requests))
            # Of a replica's processes the last alone is told.
            if 3 in places and processes.index() == processes.count() - 1 or number == 2:
                own.cancel("3")
            answers = own.generate([requests[place] for place in places])
            if replica in sampling.led:
                heard |= dict(zip(places, answers, strict=True))
        for said in processes.exchange(heard):
            heard |= said
        found[number] = [
            [(r.finish, r.token_ids, r.logprobs) for r in heard[at]] for at in sorted(heard)
        ]
        head_P3 = next(iter(sampling.engines.values())).first_opinions([r.prompt for r in requests])
        found[f"head{number}"] = head_P3.tolist()
    path = pathlib.Path(_FOLDER.value) / f"{processes.count()}-{processes.index()}.json"
    path.write_text(json.dumps(found))


if __name__ == "__main__":
    flags.FLAGS(sys.argv)
    with launch.together("answering"):
        main()
