"""Requests over a server that fails: each is answered or told to be lost, once, and none twice."""

import collections
import dataclasses
import email.utils
import logging
import threading
import time

import pytest

from mathv2_jax import records, roles
from mathv2_jax.rollout import durable, remote
from tests import by_hand, faulty, scripted

KEY = "sk-very-secret-1234"
Finish = records.Finish


def request(name, num_samples=3, **fields):
    values = dict(messages=(("user", f"about {name}"),), seed=1, max_tokens=20)
    return records.Request(id=name, num_samples=num_samples, **{**values, **fields})


ASKED = [request("a"), request("b", 2, seed=2), request("c", 1)]
SAMPLES = 6


def engine_at(url, **fields):
    values = dict(key_env="", model="tiny", backoff_s=0.01, longest_wait_s=0.05, timeout_s=5.0)
    return remote.RemoteEngine(remote.RemoteConfig(base_url=url, **{**values, **fields}))


def texts(found):
    return [[response.text for response in responses] for responses in found]


def ends(found):
    return [response.finish for responses in found for response in responses]


@pytest.fixture(scope="module")
def expected():
    with faulty.serving(faulty.Server()) as url:
        return engine_at(url).generate(ASKED)


def test_each_sample_is_one_request_with_a_seed_of_its_own(expected):
    server = faulty.Server()
    with faulty.serving(server) as url:
        found = engine_at(url).generate(ASKED)
    assert found == [
        [dataclasses.replace(r, parameter_version=engine_at(url).version) for r in responses]
        for responses in expected
    ]
    assert [len(responses) for responses in found] == [3, 2, 1]
    assert len({asked.sample for asked in server.asked}) == SAMPLES == len(server.asked)
    assert all(0 <= asked.body["seed"] < 2**31 for asked in server.asked)


def test_a_request_is_told_to_the_server_whole():
    server = faulty.Server()
    with faulty.serving(server) as url:
        asked = request(
            "a", 1, temperature=0.3, top_p=0.9, top_k=7, min_p=0.1, stop=("END",), max_tokens=11
        )
        engine_at(url, extra={"chat_template_kwargs": {"thinking": True}}).generate([asked])
        engine_at(url, limit_field="max_completion_tokens", send_seed=False).generate(ASKED[2:])
    first, second = (asked.body for asked in server.asked)
    seed = first.pop("seed")
    assert first == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "about a"}],
        "temperature": 0.3,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "max_tokens": 11,
        "stop": ["END"],
        "chat_template_kwargs": {"thinking": True},
    }
    assert isinstance(seed, int)
    assert {"max_completion_tokens", "temperature"} <= set(second)
    assert not {"seed", "max_tokens", "top_k", "min_p", "stop"} & set(second)


@pytest.mark.parametrize(
    ("text", "sent"),
    [
        ("a<|user|>b", "a<\u2060|user|>b"),
        ("a<\uff5cAssistant\uff5c>b", "a<\u2060\uff5cAssistant\uff5c>b"),
        ("<think></think><s></s>", "<\u2060think><\u2060/think><\u2060s><\u2060/s>"),
        ("|a| < |b| and |c|> 1, x<think, <strong>", "|a| < |b| and |c|> 1, x<think, <strong>"),
    ],
)
def test_a_text_cannot_forge_a_servers_control_tokens(text, sent):
    server = faulty.Server()
    with faulty.serving(server) as url:
        engine_at(url).generate([dataclasses.replace(request("a", 1), messages=(("user", text),))])
    (asked,) = server.asked
    assert asked.body["messages"] == [{"role": "user", "content": sent}]


def test_a_response_has_text_alone_and_the_servers_count(expected):
    response = expected[0][0]
    assert response.token_ids == () and response.logprobs == ()
    assert response.num_tokens == response.counted_tokens == 3


def test_a_server_that_does_not_count_is_told_once(caplog):
    server = faulty.Server(answer=lambda asked: faulty.completion("x", tokens=None))
    with faulty.serving(server) as url, caplog.at_level(logging.WARNING):
        engine = engine_at(url)
        found = engine.generate(ASKED)
    assert {r.counted_tokens for each in found for r in each} == {None}
    assert engine.stats.uncounted == SAMPLES
    assert caplog.text.count("does not count tokens") == 1


@pytest.mark.parametrize(
    "fault", [500, 503, 408, 429, (429, "0.02"), "cut", "html", "empty", "hang"], ids=str
)
def test_what_may_pass_is_tried_again(fault, expected):
    server = faulty.Server(lambda asked, attempt: fault if attempt < 3 else None)
    with faulty.serving(server) as url:
        engine = engine_at(url, timeout_s=0.5 if fault == "hang" else 5.0)
        found = engine.generate(ASKED)
    assert texts(found) == texts(expected)
    assert set(server.answered.values()) == {1}
    assert engine.stats.attempts == len(server.asked) == 3 * SAMPLES
    assert (engine.stats.answered, engine.stats.lost) == (SAMPLES, 0)


def test_what_fails_at_every_attempt_is_lost_and_told(caplog):
    bad = lambda asked, attempt: 500 if "about b" in asked.sample[0] else None  # noqa: E731
    server = faulty.Server(bad)
    with faulty.serving(server) as url, caplog.at_level(logging.WARNING):
        engine = engine_at(url, attempts=3)
        found = engine.generate(ASKED)
    assert ends(found) == [Finish.STOP] * 3 + [Finish.LOST] * 2 + [Finish.STOP]
    assert (engine.stats.answered, engine.stats.lost) == (4, 2)
    assert sum("about b" in asked.sample[0] for asked in server.asked) == 2 * 3
    assert "request b, sample 0 is lost: status 500" in caplog.text
    assert "at the last of 3 attempts" in caplog.text
    assert [o.outcome for o in (roles.understand(scripted.ROLES.verifier, found[1][0]),)] == [
        records.Outcome.LOST
    ]


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_request_that_the_server_refuses_is_lost_at_once(status):
    server = faulty.Server(lambda asked, attempt: status if "about a" in asked.sample[0] else None)
    with faulty.serving(server) as url:
        found = engine_at(url).generate(ASKED)
    assert ends(found) == [Finish.LOST] * 3 + [Finish.STOP] * 3
    assert len(server.asked) == SAMPLES


def test_a_model_that_thinks_first_and_never_ends_has_no_final_response():
    """The tag that opens its thinking is a part of the prompt."""
    content = r"Say \boxed{1}? Hm."
    server = faulty.Server(answer=lambda asked: faulty.completion(content))
    with faulty.serving(server) as url:
        ((response,),) = engine_at(url, think=True).generate(ASKED[2:])
        assert (response.thinking_text, response.final_text) == (content, None)
        server.answer = lambda asked: faulty.completion("Yes.", reasoning="Hm.")
        ((response,),) = engine_at(url, think=True).generate(ASKED[2:])
        assert (response.thinking_text, response.final_text) == ("Hm.", "Yes.")


@pytest.mark.parametrize("status", [403, 404])
def test_what_one_request_is_refused_with_does_not_stop_those_after_answers(status):
    """A moderator, or one of several servers behind an address."""
    server = faulty.Server(lambda asked, attempt: status if "about b" in asked.sample[0] else None)
    with faulty.serving(server) as url:
        engine = engine_at(url, concurrency=1)
        found = engine.generate(ASKED)
    assert ends(found) == [Finish.STOP] * 3 + [Finish.LOST] * 2 + [Finish.STOP]
    assert len(server.asked) == SAMPLES


def test_an_account_that_runs_dry_stops_all_at_once():
    server = faulty.Server(lambda asked, attempt: 402 if "about b" in asked.sample[0] else None)
    with faulty.serving(server) as url, pytest.raises(remote.RemoteError, match="status 402"):
        engine_at(url, concurrency=1).generate(ASKED)
    assert len(server.asked) == 4


@pytest.mark.parametrize("status", [401, 402, 403, 404])
def test_what_is_wrong_with_every_request_stops_all(status, monkeypatch):
    monkeypatch.setenv("A_KEY", KEY)
    server = faulty.Server(lambda asked, attempt: status)
    said = rf"status {status}: .*remote.model = 'tiny'.*A_KEY"
    with faulty.serving(server) as url, pytest.raises(remote.RemoteError, match=said):
        engine_at(url, key_env="A_KEY", concurrency=1).generate(ASKED)
    assert len(server.asked) == 1


def test_a_server_that_is_not_there_is_an_error_and_not_a_loss_of_all():
    with faulty.serving(faulty.Server()) as url:
        pass
    with pytest.raises(remote.RemoteError, match="the connection failed .* last of 2 attempts"):
        engine_at(url, attempts=2).generate(ASKED)


@pytest.mark.parametrize("as_date", [False, True])
def test_the_server_says_how_long_to_wait(as_date):
    def fault(asked, attempt):
        after = email.utils.formatdate(time.time() + 2.0, usegmt=True) if as_date else "1.2"
        return (429, after) if attempt == 1 else None

    server = faulty.Server(fault)
    with faulty.serving(server) as url:
        engine_at(url, longest_wait_s=9.0).generate(ASKED[2:])
    first, second = (asked.moment for asked in server.asked)
    assert 0.9 < second - first < 4.0


def test_a_wait_is_never_longer_than_the_longest():
    server = faulty.Server(lambda asked, attempt: (429, "3600") if attempt == 1 else None)
    with faulty.serving(server) as url:
        found = engine_at(url, longest_wait_s=0.1).generate(ASKED[2:])
    assert ends(found) == [Finish.STOP]


def test_waits_grow_by_twos(monkeypatch):
    server = faulty.Server(lambda asked, attempt: 500 if attempt < 5 else None)
    with faulty.serving(server) as url:
        engine = engine_at(url, backoff_s=0.08, longest_wait_s=9.0)
        engine._jitter.uniform = lambda low, high: high
        engine.generate(ASKED[2:])
    moments = [asked.moment for asked in server.asked]
    gaps = [b - a for a, b in zip(moments, moments[1:], strict=False)]
    for gap, wanted in zip(gaps, [0.08, 0.16, 0.32, 0.64], strict=True):
        assert wanted <= gap < wanted + 0.3


def test_no_more_are_open_at_once_than_the_config_says():
    def slow(asked):
        time.sleep(0.05)
        return faulty.echo(asked)

    server = faulty.Server(answer=slow)
    with faulty.serving(server) as url:
        engine_at(url, concurrency=3).generate([request("a", 20)])
    assert server.most_open == 3


def test_an_answer_that_drips_is_timed_out_as_a_whole():
    """Bytes that keep coming do not keep a request alive."""

    class Dripping(faulty.Server):
        def send(self, handler, status, data, length=None, **extra):
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(data)))
            handler.end_headers()
            for byte in data:
                handler.wfile.write(bytes([byte]))
                handler.wfile.flush()
                time.sleep(0.02)

    said = r"no answer within 0.3 s, at the last of 1"
    with faulty.serving(Dripping()) as url, pytest.raises(remote.RemoteError, match=said):
        engine_at(url, timeout_s=0.3, attempts=1).generate(ASKED[2:])


@pytest.mark.parametrize(
    ("message", "thinking", "final"),
    [
        (dict(text="Yes.", reasoning_content="Hm."), "Hm.", "Yes."),
        (dict(text="Yes.", reasoning="Hm."), "Hm.", "Yes."),
        (dict(text="<think>\nHm.\n</think>\n\nYes."), "Hm.", "Yes."),
        (dict(text="Hm. </think> Hm!</think>Yes."), "Hm. </think> Hm!", "Yes."),
        (dict(text="<think>Hm."), "Hm.", None),
        (dict(text="<think>Hm.</think>"), "Hm.", ""),
        (dict(text="Yes."), "", "Yes."),
        (dict(text="A <think> in the text"), "", "A <think> in the text"),
    ],
)
def test_reasoning_is_read_apart_or_inline(message, thinking, final):
    server = faulty.Server(answer=lambda asked: faulty.completion(**message))
    with faulty.serving(server) as url:
        ((response,),) = engine_at(url).generate(ASKED[2:])
    assert (response.thinking_text, response.final_text) == (thinking, final)


@pytest.mark.parametrize(
    ("finish", "expected"),
    [("length", Finish.LENGTH), ("content_filter", Finish.LOST), (None, Finish.LOST)],
)
def test_how_an_answer_ended(finish, expected):
    server = faulty.Server(answer=lambda asked: faulty.completion("x", finish))
    with faulty.serving(server) as url:
        assert ends(engine_at(url).generate(ASKED[2:])) == [expected]
    assert len(server.asked) == 1


def test_a_cancelled_request_ends_while_it_hangs():
    server = faulty.Server(lambda asked, attempt: "hang" if "about a" in asked.sample[0] else None)
    with faulty.serving(server) as url:
        engine = engine_at(url, timeout_s=60.0)
        timer = threading.Timer(0.5, engine.cancel, ["a"])
        timer.start()
        began = time.monotonic()
        found = engine.generate(ASKED)
        assert time.monotonic() - began < 10.0
        assert engine.stats.cancelled == 3
        assert texts(engine.generate(ASKED[1:])) == texts(found[1:])
    assert ends(found) == [Finish.CANCELLED] * 3 + [Finish.STOP] * 3


def test_one_cancelled_during_another_call_is_cancelled_in_the_next():
    server = faulty.Server()
    with faulty.serving(server) as url:
        engine = engine_at(url)
        engine.generate(ASKED[1:], lambda place, response: engine.cancel("a"))
        assert ends(engine.generate(ASKED[:1])) == [Finish.CANCELLED] * 3
        assert ends(engine.generate(ASKED[:1])) == [Finish.STOP] * 3


def test_a_second_call_at_once_is_refused():
    server = faulty.Server()
    caught = []

    def again(place, response):
        with pytest.raises(remote.RemoteError, match="give each thread one of its own") as error:
            engine.generate(ASKED)
        caught.append(error)

    with faulty.serving(server) as url:
        engine = engine_at(url)
        found = engine.generate(ASKED[2:], again)
        assert ends(found) == [Finish.STOP] and len(caught) == 1
        assert ends(engine.generate(ASKED[2:])) == [Finish.STOP]


def test_one_cancelled_before_is_not_asked_and_is_forgotten_after():
    server = faulty.Server()
    with faulty.serving(server) as url:
        engine = engine_at(url)
        engine.cancel("a")
        assert ends(engine.generate(ASKED[:1])) == [Finish.CANCELLED] * 3
        assert server.asked == []
        assert ends(engine.generate(ASKED[:1])) == [Finish.STOP] * 3


def test_answers_are_told_as_they_come_in_the_callers_thread():
    come = []
    server = faulty.Server(lambda asked, attempt: "hang" if "about c" in asked.sample[0] else None)
    with faulty.serving(server) as url:
        engine = engine_at(url, timeout_s=0.5, attempts=1)
        engine.generate(ASKED, lambda place, r: come.append((place, r, threading.get_ident())))
    assert collections.Counter(place for place, _, _ in come) == {0: 3, 1: 2, 2: 1}
    assert come[-1][1].finish is Finish.LOST
    assert {ident for _, _, ident in come} == {threading.get_ident()}


class Stop(Exception):
    pass


def test_one_who_leaves_in_the_middle_leaves_no_request_open():
    server = faulty.Server(lambda asked, attempt: "hang" if "about b" in asked.sample[0] else None)

    def stop(place, response):
        raise Stop

    with faulty.serving(server) as url:
        with pytest.raises(Stop):
            engine_at(url, timeout_s=60.0).generate(ASKED, stop)
        names = [thread.name for thread in threading.enumerate()]
    assert "remote" not in names


def test_what_was_answered_is_not_asked_again_by_a_later_run(tmp_path, expected):
    server = faulty.Server()
    with faulty.serving(server) as url:

        def run(on_answer=None):
            kept = durable.Responses(tmp_path, 3600.0)
            kept.begin(0)
            engine = engine_at(url, concurrency=1)
            if on_answer is not None:
                generate = engine.generate
                engine.generate = lambda asked, done, **more: generate(
                    asked, lambda *said: (done(*said), on_answer()), **more
                )
            found = kept.of(engine, engine.version).generate(ASKED)
            kept.flush()
            return found

        left = iter(range(3))

        def die():
            if next(left) == 2:
                raise Stop

        with pytest.raises(Stop):
            run(die)
        assert texts(run()) == texts(expected)
        assert texts(run()) == texts(expected)
    # The run that died had three told; a fourth may have been on its way.
    assert SAMPLES <= len(server.asked) <= SAMPLES + 1
    assert len(server.answered) == SAMPLES


def test_the_key_is_sent_and_shown_nowhere(monkeypatch, caplog, capsys):
    monkeypatch.setenv("A_KEY", KEY)
    server = faulty.Server(lambda asked, attempt: 500 if attempt == 1 else 400)
    with caplog.at_level(logging.DEBUG), faulty.serving(server) as url:
        engine = engine_at(url, key_env="A_KEY")
        found = engine.generate(ASKED)
        assert ends(found) == [Finish.LOST] * SAMPLES
        with pytest.raises(remote.RemoteError) as caught:
            server.faults = lambda asked, attempt: 401
            engine.generate(ASKED)
    assert {asked.headers["authorization"] for asked in server.asked} == {f"Bearer {KEY}"}
    shown = [caplog.text, *capsys.readouterr(), str(caught.value)]
    shown += [repr(engine), repr(engine.config), repr(found)]
    assert "(the key)" in caplog.text  # the server repeated it
    assert not any(KEY in text for text in shown)


def test_a_key_is_hidden_where_a_text_is_cut(monkeypatch, caplog):
    monkeypatch.setenv("A_KEY", KEY)
    body = {"choices": [], "note": "x" * 160 + KEY}
    server = faulty.Server(answer=lambda asked: body)
    with faulty.serving(server) as url, caplog.at_level(logging.DEBUG):
        engine_at(url, key_env="A_KEY", attempts=1).generate(ASKED)
    ours = [record.getMessage() for record in caplog.records if record.name == "absl"]
    assert any("is no chat completion" in text for text in ours)
    assert not any(KEY[:6] in text for text in ours)


@pytest.mark.parametrize("value", ["sk-a\nsecond", "sk a", "sk-\u00e4", "sk-\x07"])
def test_what_cannot_be_a_key_is_refused_and_not_shown(monkeypatch, value):
    monkeypatch.setenv("A_KEY", value)
    with pytest.raises(ValueError, match="remote.key_env = 'A_KEY': .* cannot be a key") as caught:
        engine_at("https://example.org/v1", key_env="A_KEY")
    assert "sk" not in str(caught.value)


def test_all_that_an_answer_depends_on_is_in_its_version():
    url = "http://127.0.0.1:1/v1"
    settings = [{}, dict(extra={"reasoning_effort": "high"}), dict(send_seed=False)]
    settings += [dict(model="other"), dict(think=True), dict(limit_field="most")]
    versions = {engine_at(url, **each).version for each in settings}
    named = {engine_at(url, version="v", **each).version for each in settings}
    assert len(versions) == len(named) == len(settings)
    assert engine_at(url, concurrency=3, attempts=9).version in versions


@pytest.mark.parametrize("value", [None, " "])
def test_a_key_that_is_not_in_the_environment_is_named(monkeypatch, value):
    monkeypatch.delenv("A_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("A_KEY", value)
    with pytest.raises(ValueError, match="remote.key_env = 'A_KEY': .* export A_KEY="):
        engine_at("https://example.org/v1", key_env="A_KEY")


def test_a_key_over_plain_http_is_told(monkeypatch, caplog):
    monkeypatch.setenv("A_KEY", KEY)
    engine_at("http://127.0.0.1:1/v1", key_env="A_KEY")
    assert "unencrypted" not in caplog.text
    engine_at("http://example.org/v1", key_env="A_KEY")
    assert "unencrypted: use https" in caplog.text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(base_url="example.org/v1"), "base_url = 'example.org/v1': must be like"),
        (dict(base_url="https://me:secret@example.org/v1"), "a key belongs into the environment"),
        (dict(base_url="https://example.org/v1?key=secret"), "a key belongs into the environment"),
        (dict(model=""), "remote.model is empty"),
        (dict(concurrency=0), "concurrency = 0"),
        (dict(attempts=0), "attempts = 0"),
        (dict(timeout_s=0.0), "timeout_s = 0.0 must be positive"),
        (dict(backoff_s=9.0, longest_wait_s=1.0), "backoff_s = 9.0"),
        (dict(extra={"n": 4}), r"remote.extra sets \['n'\]"),
    ],
)
def test_a_config_that_cannot_be_is_refused_without_its_secrets(fields, message):
    values = dict(base_url="https://example.org/v1", model="tiny")
    with pytest.raises(ValueError, match=message) as caught:
        remote.RemoteConfig(**{**values, **fields})
    assert "secret" not in str(caught.value)


def test_token_ids_are_not_asked_of_a_server():
    engine = engine_at("http://127.0.0.1:1/v1")
    with pytest.raises(ValueError, match="request a holds token ids"):
        engine.generate([records.Request(id="a", prompt=(1,), num_samples=1, seed=0, max_tokens=2)])
    with pytest.raises(ValueError, match="request a has stop_ids"):
        engine.generate([request("a", stop_ids=(3,))])


def test_roles_ask_a_server_as_they_ask_an_engine():
    verdicts = iter([*by_hand.VERDICTS.values(), by_hand.NOISE])
    server = faulty.Server(answer=lambda asked: faulty.completion(next(verdicts)))
    verifier = scripted.ROLES.verifier
    fields = dict(statement=by_hand.STATEMENT, proof=by_hand.PROOF)
    with faulty.serving(server) as url:
        (opinions,) = roles.ask(engine_at(url), verifier, [fields], 4, ["seed"])
    assert sorted(roles.votes(opinions)) == [0.0, 0.5, 1.0]
    shown = {asked.body["messages"][0]["content"] for asked in server.asked}
    assert shown == {scripted.shown(verifier, **fields)}


def test_without_the_extra_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    with pytest.raises(ImportError, match=r"pip install 'mathv2_jax\[remote\]'"):
        engine_at("http://127.0.0.1:1/v1")
