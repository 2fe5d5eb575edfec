"""An exported model behind `transformers serve`, with faults between it and those that ask."""

import collections
import hashlib
import time

import pytest

from mathv2_jax import records
from mathv2_jax.rollout import durable, remote
from tests import faulty
from tools import check_serve

SECONDS = 240.0
FAULTS = (None, 500, "cut", (429, "0.1"), "hang", "html", 503, "empty")
Finish = records.Finish
ASKED = [
    records.Request(
        id=name,
        messages=(("user", f"Is {name} even?"),),
        num_samples=n,
        seed=place,
        max_tokens=8,
        top_p=0.9,
    )
    for place, (name, n) in enumerate([("four", 1), ("five", 4), ("six", 3), ("seven", 8)])
]


def fault_of(asked, attempt):
    """What befalls an attempt: a function of the sample; some never get an answer."""
    text, seed = asked.sample
    number = hashlib.sha256(f"{text}/{seed}".encode()).digest()
    if number[0] < 32:
        return 500
    return FAULTS[number[attempt] % len(FAULTS)] if attempt < 4 else None


@pytest.fixture(scope="module")
def upstream(tmp_path_factory):
    """The server's URL and its model's name, the model loaded."""
    model = check_serve.export(tmp_path_factory.mktemp("serve"), "v3")
    with check_serve.serving(time.monotonic() + SECONDS) as url:
        config = remote.RemoteConfig(
            base_url=f"{url}/v1", model=str(model), key_env="", timeout_s=SECONDS
        )
        ((first,),) = remote.RemoteEngine(config).generate(ASKED[:1])
        assert first.finish in (Finish.STOP, Finish.LENGTH)
        assert first.counted_tokens and first.counted_tokens <= 8
        yield f"{url}/v1", str(model)


def test_every_sample_is_answered_or_told_to_be_lost_once(upstream, tmp_path):
    url, model = upstream
    server = faulty.Server(fault_of, upstream=url)
    come = []
    with faulty.serving(server) as between:
        config = remote.RemoteConfig(
            base_url=between,
            model=model,
            key_env="",
            concurrency=4,
            attempts=5,
            timeout_s=4.0,
            backoff_s=0.05,
            longest_wait_s=1.0,
        )
        engine = remote.RemoteEngine(config)
        found = engine.generate(ASKED, lambda place, r: come.append((place, r.index)))
        never = {asked.sample for asked in server.asked if server.answered[asked.sample] == 0}
        kept = durable.Responses(tmp_path, 0.0)
        kept.begin(0)
        again = kept.of(engine, engine.version).generate(ASKED[:2])
        before = len(server.asked)
        kept.begin(0)
        assert kept.of(engine, engine.version).generate(ASKED[:1]) == again[:1]
        assert len(server.asked) == before
    places = [(place, n) for place, request in enumerate(ASKED) for n in range(request.num_samples)]
    assert sorted(come) == places
    assert [[r.index for r in each] for each in found] == [
        list(range(request.num_samples)) for request in ASKED
    ]
    ends = collections.Counter(r.finish for each in found for r in each)
    assert ends[Finish.LOST] == len(never) > 0
    assert ends[Finish.STOP] + ends[Finish.LENGTH] == len(places) - len(never) > 8
    assert engine.stats.attempts > 2 * len(places)
