"""A real engine that speaks by a script: what it answers, and how often, is known exactly.

Each answer is one token of the tokenizer. The model is a Markov chain written into the weights of
a DeepSeek-shaped trunk: its layers add nothing, and the next token's distribution is a row of the
unembedding, chosen by the phrase that ends the prompt.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mathv2_jax import records, roles, sharding
from mathv2_jax.model import transformer
from mathv2_jax.model.config import ModelConfig
from mathv2_jax.rollout import decode, engine, replicas, schedule
from mathv2_jax.text import prompts
from mathv2_jax.text import tokenizer as tokenizer_lib
from mathv2_jax.world import judge

PROVE, VERIFY, META = "Prove it.", "Evaluate it.", "Rate the evaluation."  # ends of world prompts
ENDLESS = "and so on"  # is followed by itself
_CUES = (PROVE, VERIFY, META)
_SAID, _AGAIN, _WIDTH = len(_CUES), len(_CUES) + 1, 16
_NEVER = -60.0

LIMITS = schedule.EngineConfig(rows=16, context=324, page=32, chunk=64, chunks=8, steps=4)
Script = Mapping[str, Mapping[str, float]]

_SAMPLING = roles.Sampling(max_tokens=4)
ROLES = roles.make_roles(
    roles.RolesConfig(
        templates="world", generator=_SAMPLING, verifier=_SAMPLING, meta_verifier=_SAMPLING
    )
)


class Listening(engine.Engine):
    """An engine that remembers what it was asked, as text."""

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        self.asked: list[str] = []

    def generate(
        self,
        requests: Sequence[records.Request],
        on_answer: engine.OnAnswer | None = None,
        **asked: Any,
    ) -> list[list[records.Response]]:
        self.asked += [self.tokenizer.decode(request.prompt) for request in requests]
        return super().generate(requests, on_answer, **asked)


def shown(role: roles.Role, **fields: str) -> str:
    """What a role's prompt reads, its template filled."""
    return prompts.fill(role.template, **fields)


@dataclasses.dataclass(frozen=True)
class House:
    """Engines over one tokenizer and one set of compiled programs."""

    texts: tuple[str, ...]
    tokenizer: tokenizer_lib.SentencePieceTokenizer
    programs: decode.Programs

    def variables(self, script: Script) -> transformer.Variables:
        """A model that answers a prompt that ends in a key with one of its texts, at their odds."""
        config = self.programs.config
        embed = np.zeros((config.vocab_size, _WIDTH), np.float32)
        unembed = np.full((_WIDTH, config.vocab_size), _NEVER, np.float32)
        for place, cue in enumerate(_CUES):
            embed[self._id(cue), place] = 1.0
            for text, share in script.get(cue, {}).items():
                unembed[place, self._id(text)] = math.log(share)
        for text in self.texts:
            embed[self._id(text), _SAID] = 1.0
        unembed[_SAID, self.tokenizer.eos_id] = 0.0
        embed[self._id(ENDLESS)] = np.eye(_WIDTH)[_AGAIN]
        unembed[_AGAIN, self._id(ENDLESS)] = 0.0
        taps = np.zeros((1, _WIDTH), np.float32)
        taps[0, : len(_CUES)] = 1.0  # the opening of the answer sees the cue before it
        fresh = transformer.init(config, jax.random.key(0))
        params = dict(jax.tree.map(jnp.zeros_like, fresh["params"]))
        params |= dict(
            embed=jnp.asarray(embed),
            unembed=jnp.asarray(unembed / math.sqrt(_WIDTH)),  # the norm of one channel
            taps=jnp.asarray(taps),
            final_norm={"scale": jnp.ones(_WIDTH)},
        )
        return {**fresh, "params": params}

    def engine(self, script: Script) -> Listening:
        """An engine that plays such a model."""
        mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
        made = Listening(self.programs, self.tokenizer, LIMITS, mesh)
        made.load(self.variables(script), "script@0")
        return made

    def replicas(self, mesh: jax.sharding.Mesh | None = None) -> replicas.Replicas:
        """The engines of a run, on one device by default."""
        mesh = mesh or sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
        sampling = sharding.make_sampling_mesh(None, mesh)
        return replicas.Replicas(
            sampling, lambda own: Listening(self.programs, self.tokenizer, LIMITS, own)
        )

    def _id(self, text: str) -> int:
        (found,) = self.tokenizer.encode_text(text)
        return found


def build(texts: Sequence[str]) -> House:
    """A house whose engines can say each of `texts`, and ENDLESS."""
    said = (*dict.fromkeys(texts), ENDLESS)
    words = [*judge.PHRASES, *(f" ({n})" for n in range(1, 13)), " implies", "Rules:", *_CUES]
    model = tokenizer_lib.train(
        ["Given: A and B. Rules: A implies B (1). Show: B."],
        vocab_size=440,
        whole_phrases=(*said, *words),
    )
    tokenizer = tokenizer_lib.SentencePieceTokenizer.from_bytes(model)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        width=_WIDTH,
        num_layers=1,
        num_dense_layers=0,
        num_heads=1,
        kv_latent_width=4,
        head_key_width=4,
        head_rope_width=2,
        head_value_width=4,
        dense_width=4,
        expert_width=4,
        num_experts=2,  # the router, all zeros, always chooses the first
        experts_per_token=1,
        embedding_taps=1,
    )
    return House(said, tokenizer, decode.Programs(config, transformer.Kernels()))
