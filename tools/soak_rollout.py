"""An engine under mixed requests for half an hour: nothing is lost, and memory does not grow.

    python tools/soak_rollout.py [--minutes=30] [--seed=0] [--bound=0.02]

A tiny model answers call after call of random requests: 1 to 64 samples, prompts that begin alike,
temperatures with 0, truncation, stop ids and stop strings; empty, over-long and otherwise hopeless
ones; with experts and kept sets recorded or not. Another thread cancels requests all the while, ids
that nobody has among them. In between variables are loaded, opinions asked, answers left out as
answered already, and callers fail in the middle of a call. There are too few pages for all rows.

Checked after each call: every answer came exactly once, and as its request has it end; pages were
never in two hands, and all that were taken were given back; after each load a fixed request is
answered as ever. Memory is flat where a line through the resident sizes of the last two thirds of
the time rises by less than `bound` of their mean. A line a minute; the last line is JSON. Exit code
1 where anything fails.
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402 - after the platform is set
import numpy as np  # noqa: E402

from mathv2_jax import records, sharding  # noqa: E402
from mathv2_jax.model import transformer  # noqa: E402
from mathv2_jax.model.config import ModelConfig  # noqa: E402
from mathv2_jax.rollout import decode, engine, schedule  # noqa: E402
from mathv2_jax.text import tokenizer as tokenizer_lib  # noqa: E402

TEXTS = ["Prove that the sum of two even numbers is even.", "Let n = 2 k, so n is even.", "A gap."]
LIMITS = schedule.EngineConfig(
    rows=16, context=48, page=4, pages=40, chunk=8, chunks=4, steps=4, most_kept=16
)
VERSIONS = ("soak@0", "soak@1")
MOST_NAMED = 20  # failures that are written out
LOST, CANCELLED = records.Finish.LOST, records.Finish.CANCELLED


class CountedPool(schedule.Pool):
    """A pool that knows who has what, and says where a page would be in two hands."""

    def __init__(self, number: int, size: int):
        super().__init__(number, size)
        self.taken, self.given, self.leased, self.released = 0, 0, 0, 0
        self.own: set[int] = set()
        self.shared: collections.Counter[int] = collections.Counter()
        self.faults: list[str] = []

    def take_all(self, number: int) -> list[int] | None:
        pages = super().take_all(number)
        if pages is not None:
            self.taken += len(pages)
            if len(set(pages)) < number or self.own & set(pages) or self.shared.keys() & set(pages):
                self.faults.append(f"pages {pages} were taken while they were held")
            self.own |= set(pages)
        return pages

    def give_all(self, pages: Sequence[int]) -> None:
        self.given += len(pages)
        if not set(pages) <= self.own:
            self.faults.append(f"pages {pages} came back that nobody had")
        self.own -= set(pages)
        super().give_all(pages)

    def lease(self, prompt: Sequence[int]) -> schedule.Lease | None:
        lease = super().lease(prompt)
        if lease is not None:
            self.leased += 1
            if self.own & set(lease.pages):
                self.faults.append(f"pages {lease.pages} of a prompt are an answer's own")
            self.shared.update(lease.pages)
        return lease

    def release(self, lease: schedule.Lease) -> None:
        self._returned(lease)
        super().release(lease)

    def undo(self, lease: schedule.Lease) -> None:
        self._returned(lease)
        super().undo(lease)

    def _returned(self, lease: schedule.Lease) -> None:
        self.released += 1
        self.shared -= collections.Counter(lease.pages)

    def complaints(self) -> list[str]:
        """What is wrong while nobody should hold anything."""
        found, self.faults = self.faults, []
        if self.taken != self.given or self.own:
            found.append(f"{self.taken} pages taken, {self.given} given back")
        if self.leased != self.released or self.shared:
            found.append(f"{self.leased} prompts leased, {self.released} released")
        if self.available != self.number:
            found.append(f"{self.available} of {self.number} pages can be had")
        return found


class Canceller(threading.Thread):
    """Cancels requests of the call that goes on, and some that there are none of, now and then."""

    def __init__(self, engine: engine.Engine, seed: int):
        super().__init__(daemon=True)
        self._engine, self._draw = engine, np.random.default_rng(seed)
        self._over = threading.Event()
        self.ids: tuple[str, ...] = ()
        self.cancelled: set[str] = set()

    def run(self) -> None:
        while not self._over.wait(float(self._draw.exponential(0.1))):
            ids = self.ids
            name = str(self._draw.choice(ids)) if ids else ""
            if not name or self._draw.random() < 0.1:
                name = "nobody"
            self.cancelled.add(name)  # before the engine can know of it
            self._engine.cancel(name)

    def end(self) -> None:
        self._over.set()
        self.join()


class CallerFailedError(Exception):
    """What a caller raises that fails in the middle of a call."""


class Soak:
    """The engine, what is drawn for it, and what came of that."""

    def __init__(self, seed: int):
        self.draw = np.random.default_rng(seed)
        model = tokenizer_lib.train(TEXTS, vocab_size=300)
        self.tokenizer = tokenizer_lib.SentencePieceTokenizer.from_bytes(model)
        config = ModelConfig(
            vocab_size=self.tokenizer.vocab_size,
            width=16,
            num_layers=3,
            num_heads=2,
            kv_latent_width=8,
            head_key_width=4,
            head_rope_width=4,
            head_value_width=4,
            dense_width=16,
            expert_width=8,
            num_experts=4,
            experts_per_token=2,
            embedding_taps=2,
        )
        made = jax.jit(lambda key: transformer.init(config, key))
        self.variables = [made(jax.random.key(at)) for at in range(len(VERSIONS))]
        mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
        programs = decode.Programs(config, transformer.Kernels())
        self.engine = engine.Engine(programs, self.tokenizer, LIMITS, mesh)
        self.engine.pools = tuple(CountedPool(p.number, p.size) for p in self.engine.pools)
        self.canceller = Canceller(self.engine, seed + 1)
        self.finishes: collections.Counter[str] = collections.Counter()
        self.done: collections.Counter[str] = collections.Counter()
        self.failures: list[str] = []
        self._probes: dict[str, tuple[tuple[int, ...], ...]] = {}
        self._number = 0
        self._stems = [self._ids(int(self.draw.integers(2, 24))) for _ in range(12)]
        self.load(0)

    def _ids(self, number: int) -> tuple[int, ...]:
        return tuple(self.draw.integers(9, self.tokenizer.vocab_size, number).tolist())

    def warm(self) -> None:
        """Every program is compiled before memory is looked at."""
        for experts, kept in _RECORDED:
            for top_p in (1.0, 0.5):
                asked = records.Request(
                    id="warm", prompt=(9, 10), num_samples=1, seed=0, max_tokens=2, top_p=top_p
                )
                self.engine.generate([asked], experts=experts, kept=kept)
        self.engine.first_opinions([(9, 10)])

    def load(self, at: int) -> None:
        """Other variables, with which a fixed request is answered as it was the first time."""
        self.engine.load(self.variables[at], VERSIONS[at])
        asked = records.Request(id="probe", prompt=(9, 10, 11), num_samples=2, seed=7, max_tokens=8)
        said = tuple(response.token_ids for response in self.engine.generate([asked])[0])
        if self._probes.setdefault(VERSIONS[at], said) != said:
            self.failures.append(f"{VERSIONS[at]} answers the fixed request in another way")
        self.done["loads"] += 1

    def request(self) -> records.Request:
        """A random one; one in eight is hopeless."""
        draw, self._number = self.draw, self._number + 1
        stem = self._stems[draw.integers(len(self._stems))]
        prompt = stem[: draw.integers(1, len(stem) + 1)] + self._ids(int(draw.integers(0, 6)))
        fields: dict[str, Any] = dict(max_tokens=int(draw.integers(1, 18)))
        if draw.random() < 0.3:
            fields["temperature"] = float(draw.choice([0.0, 0.7, 1.5]))
        if draw.random() < 0.4:
            fields |= dict(top_p=float(draw.uniform(0.2, 1.0)), top_k=int(draw.integers(0, 20)))
            fields["min_p"] = float(draw.choice([0.0, 0.05]))
        if draw.random() < 0.3:
            fields["stop_ids"] = self._ids(int(draw.integers(1, 5)))
        if draw.random() < 0.3:
            fields["stop"] = ("e", "even")[: draw.integers(1, 3)]
        hopeless = draw.integers(0, 32)
        if hopeless == 0:
            prompt = ()
        elif hopeless == 1:
            prompt = self._ids(LIMITS.context)
        elif hopeless == 2:
            fields["max_tokens"] = 0
        elif hopeless == 3:
            fields["stop"] = ("",)
        many = draw.random() < 0.2
        return records.Request(
            id=f"r{self._number}",
            prompt=prompt,
            num_samples=int(draw.integers(1, 65 if many else 5)),
            seed=int(draw.integers(2**31)),
            **fields,
        )

    def call(self) -> None:
        """One call of the engine, whatever it is this time, and all checks after it."""
        kind = self.draw.random()
        if kind < 0.05:
            self.engine.unload()
            self.load(int(self.draw.integers(len(VERSIONS))))
        elif kind < 0.1:
            prompts = [self._ids(int(self.draw.integers(1, LIMITS.context))) for _ in range(5)]
            opinions_N3 = self.engine.first_opinions(prompts)
            if not np.allclose(opinions_N3.sum(axis=1), 1.0, atol=1e-5):
                self.failures.append("opinions do not sum to 1")
            self.done["opinions"] += len(prompts)
        else:
            self._generate(fails=kind < 0.15)
        for pool in self.engine.pools:
            assert isinstance(pool, CountedPool)
            self.failures += pool.complaints()

    def _generate(self, *, fails: bool) -> None:
        requests = [self.request() for _ in range(self.draw.integers(1, 7))]
        wanted = [(p, i) for p, r in enumerate(requests) for i in range(r.num_samples)]
        answered = {pair for pair in wanted if self.draw.random() < 0.02}
        experts, kept = _RECORDED[self.draw.integers(len(_RECORDED))]
        told: dict[tuple[int, int], records.Response] = {}
        last = int(self.draw.integers(1, len(wanted) + 1)) if fails else 0

        def on_answer(place: int, response: records.Response) -> None:
            if (place, response.index) in told:
                self.failures.append(f"{response.request_id}/{response.index} came twice")
            told[place, response.index] = response
            if len(told) == last:
                raise CallerFailedError

        self.canceller.cancelled = set()
        self.canceller.ids = tuple(r.id for r in requests)
        try:
            found = self.engine.generate(
                requests, on_answer, experts=experts, kept=kept, answered=answered
            )
        except CallerFailedError:
            self.done["failed calls"] += 1
            return
        finally:
            self.canceller.ids = ()
        self.done["calls"] += 1
        self.done["requests"] += len(requests)
        if told.keys() != set(wanted) - answered:
            self.failures.append(f"told of {len(told)} answers of {len(set(wanted) - answered)}")
        for place, request in enumerate(requests):
            ours = [told[place, i] for i in range(request.num_samples) if (place, i) in told]
            if found[place] != ours:
                self.failures.append(f"{request.id}: what it was told of is not what came")
            for response in ours:
                self.finishes[response.finish] += 1
                complaint = self._complaint(request, response, experts, kept)
                if complaint:
                    self.failures.append(f"{request.id}/{response.index}: {complaint}")

    def _complaint(
        self, request: records.Request, response: records.Response, experts: bool, kept: bool
    ) -> str:
        """What an answer has that it should not, or lacks; empty where it is right."""
        finish, ids = response.finish, response.token_ids
        fits = 0 < len(request.prompt) <= LIMITS.context - request.max_tokens
        hopeless = not fits or request.max_tokens < 1 or "" in request.stop
        if (finish is LOST) != hopeless:
            return f"{finish}, and {'hopeless' if hopeless else 'it fits'}"
        if finish in (LOST, CANCELLED):
            if finish is CANCELLED and request.id not in self.canceller.cancelled:
                return "nobody cancelled it"
            return "" if ids == () else "has tokens"
        ends = {*self.tokenizer.stop_ids, *request.stop_ids}
        stopped = ids[-1] in ends or any(stop in response.text for stop in request.stop)
        if finish is records.Finish.STOP and not stopped:
            return "stopped at nothing"
        if finish is records.Finish.LENGTH and len(ids) != request.max_tokens:
            return f"cut at {len(ids)} of {request.max_tokens} tokens"
        lengths = {len(ids), len(response.logprobs), len(response.policy_logprobs)}
        if experts and response.experts and response.prompt_experts:
            lengths.add(response.experts.shape[0])
            if response.prompt_experts.shape[0] != len(request.prompt) - 1:
                return "the prompt's experts are not of its tokens"
        elif experts:
            return "has no experts"
        truncated = request.top_p < 1.0 or request.top_k > 0 or request.min_p > 0.0
        if kept and truncated:
            lengths.add(len(response.kept or ()))
        return "" if len(lengths) == 1 else f"parts of lengths {sorted(lengths)}"


_RECORDED = ((False, False), (True, False), (True, True))  # (experts, kept)


def resident() -> int:
    """Bytes of this process that are in memory."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def growth(seconds: Sequence[float], sizes: Sequence[int]) -> float:
    """Rise of a line through the last two thirds of the time, over their mean; 0 of too few."""
    late = [at for at, second in enumerate(seconds) if second >= seconds[-1] / 3]
    if len(late) < 3:
        return 0.0
    x, y = np.asarray(seconds)[late], np.asarray(sizes, float)[late]
    slope = np.polyfit(x - x.mean(), y, 1)[0]
    return float(slope * (x[-1] - x[0]) / y.mean())


def soak(minutes: float, seed: int, bound: float) -> dict[str, Any]:
    """Everything, as what becomes the last line."""
    one = Soak(seed)
    one.warm()
    one.canceller.start()
    began = time.monotonic()
    seconds, sizes = [0.0], [resident()]
    told = 0
    while seconds[-1] < 60 * minutes:
        try:
            one.call()
        except Exception as error:  # whatever it raises is what is looked for
            one.failures.append(f"a call ended with {error!r}")
            break
        now = time.monotonic() - began
        if now - seconds[-1] >= min(1.0, minutes):  # a sample a second; at least 60 of a short run
            seconds.append(now)
            sizes.append(resident())
        if now >= 60 * (told + 1):
            told += 1
            _tell(told, one, sizes[-1])
    one.canceller.end()
    grown = growth(seconds, sizes)
    if grown >= bound:
        one.failures.append(f"memory grew by {grown:.4f} of itself, the bound is {bound}")
    pools = [p for p in one.engine.pools if isinstance(p, CountedPool)]
    pages = {name: sum(getattr(p, name) for p in pools) for name in ("taken", "given")}
    return {
        "minutes": seconds[-1] / 60,
        "done": dict(one.done),
        "answers": dict(one.finishes),
        "restarted": one.engine.stats.restarted,
        "pages": pages,
        "slots": {name: number * LIMITS.page for name, number in pages.items()},
        "prompts": {n: sum(getattr(p, n) for p in pools) for n in ("leased", "released")},
        "resident_mb": [round(s / 1e6, 1) for s in (sizes[0], max(sizes), sizes[-1])],
        "growth": grown,
        "bound": bound,
        "num_failures": len(one.failures),
        "failures": one.failures[:MOST_NAMED],
        "engine": dataclasses.asdict(LIMITS),
    }


def _tell(minute: int, one: Soak, size: int) -> None:
    answers = ", ".join(f"{number} {finish}" for finish, number in sorted(one.finishes.items()))
    pages = [(p.taken, p.given) for p in one.engine.pools if isinstance(p, CountedPool)]
    print(
        f"minute {minute}: {one.done['requests']} requests, answers: {answers}; "
        f"{one.engine.stats.restarted} begun again, {one.done['loads']} loads; pages taken "
        f"{sum(t for t, _ in pages)}, given {sum(g for _, g in pages)}; {size / 1e6:.1f} MB; "
        f"{len(one.failures)} failures",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bound", type=float, default=0.02, help="share that memory may grow by")
    args = parser.parse_args()
    found = soak(args.minutes, args.seed, args.bound)
    print(json.dumps(found))
    return 1 if found["num_failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
