"""Finished responses of a step on disk: what a restart asks again, and what it must not take."""

import dataclasses
import logging
import time

import pytest

from mathv2_jax import records
from mathv2_jax.rollout import durable
from mathv2_jax.rollout import engine as engine_lib
from tests.rollout.test_engine import LONG, request

ASKED = [request("a"), request("b", LONG, seed=2, max_tokens=10), request("c", seed=5)]
VERSION = "rl@3"


class Killed(Exception):
    pass


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "responses"


class Counted(engine_lib.Engine):
    """Counts the answers that it draws, and dies before the one after `most`."""

    most, drawn = 10**6, 0

    def generate(self, requests, on_answer=None, **asked):
        def one(place, response):
            if self.drawn == self.most:
                raise Killed
            self.drawn += 1
            if on_answer is not None:
                on_answer(place, response)

        return super().generate(requests, one, **asked)


@pytest.fixture
def engine(make_engine):
    made = make_engine(version=VERSION)
    made.__class__ = Counted
    return made


def opened(folder, step=7, every=0.0):
    made = durable.Responses(folder, every)
    return made, made.begin(step)


def answered(folder, engine, asked=ASKED, version=VERSION, step=7, **recorded):
    """The responses, and how many of them were drawn now."""
    responses, _ = opened(folder, step)
    before = engine.drawn
    found = responses.of(engine, version, writes=True).generate(asked, **recorded)
    responses.flush()
    return found, engine.drawn - before


def killed_after(folder, engine, most):
    responses, _ = opened(folder)
    engine.most = engine.drawn + most
    with pytest.raises(Killed):
        responses.of(engine, VERSION, writes=True).generate(ASKED)
    engine.most = Counted.most


def test_a_restart_asks_for_what_is_missing_alone_and_has_the_same_responses(folder, engine):
    expected = engine.generate(ASKED)
    killed_after(folder, engine, most=4)
    assert opened(folder)[1] == 4
    assert answered(folder, engine) == (expected, 9 - 4)
    assert answered(folder, engine) == (expected, 0)


def test_responses_are_on_disk_at_most_so_many_seconds_after_they_are_finished(folder, engine):
    """By the clock: nothing else need be finished, or asked."""
    responses, _ = opened(folder, every=3600.0)
    responses.of(engine, VERSION, writes=True).generate(ASKED)
    assert not folder.exists()
    responses.flush()
    assert opened(folder)[1] == 9
    responses, _ = opened(folder, step=8, every=0.2)
    responses.of(engine, VERSION, writes=True).generate(ASKED)
    for _ in range(100):
        if opened(folder, step=8)[1] == 9:
            break
        time.sleep(0.1)
    assert opened(folder, step=8)[1] == 9


def test_a_write_that_fails_in_the_background_is_told_and_tried_again(
    folder, engine, monkeypatch, caplog
):
    def full(path, data):
        raise OSError("no space left")

    responses, _ = opened(folder, every=0.05)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(durable.storage, "write_whole", full)
        responses.of(engine, VERSION, writes=True).generate(ASKED)
        time.sleep(0.5)
    assert "could not be written, and will be tried again: no space left" in caplog.text
    responses.flush()
    assert opened(folder)[1] == 9


@pytest.mark.parametrize(
    ("change", "drawn"),
    [
        (dict(version="rl@4"), 9),
        (dict(step=8), 9),
        (dict(kept=True), 9),
        (dict(asked=[dataclasses.replace(ASKED[0], temperature=0.5), *ASKED[1:]]), 3),
        (dict(asked=[dataclasses.replace(ASKED[0], seed=9), *ASKED[1:]]), 3),
        (dict(asked=[*ASKED[1:], dataclasses.replace(ASKED[0], num_samples=5)]), 2),
    ],
    ids=["version", "step", "recorded", "temperature", "seed", "more samples, another order"],
)
def test_a_response_to_anything_else_is_not_taken(folder, engine, change, drawn):
    answered(folder, engine)
    engine.load(engine._worker._variables, change.get("version", VERSION))
    found, new = answered(folder, engine, **change)
    assert new == drawn
    recorded = {"kept": True} if "kept" in change else {}
    assert found == engine.generate(change.get("asked", ASKED), **recorded)


def test_a_disk_that_is_full_does_not_hide_why_a_call_failed(folder, engine, monkeypatch, caplog):
    def full(path, data):
        raise OSError("no space left")

    responses, _ = opened(folder, every=3600.0)
    monkeypatch.setattr(durable.storage, "write_whole", full)
    engine.most = engine.drawn + 4
    with pytest.raises(Killed), caplog.at_level(logging.WARNING):
        responses.of(engine, VERSION, writes=True).generate(ASKED)
    assert "could not be written" in caplog.text


def test_what_was_recorded_of_a_response_comes_back_with_it(folder, engine):
    asked = [request("a", top_p=0.9), request("b", LONG)]
    first, _ = answered(folder, engine, asked, experts=True, kept=True)
    again, drawn = answered(folder, engine, asked, experts=True, kept=True)
    assert again == first and drawn == 0
    assert again[0][0].kept and again[0][0].experts is not None


def test_what_was_lost_or_cancelled_is_asked_again(folder, engine):
    asked = [request("fits"), request("never", LONG, max_tokens=500), request("cancelled", seed=8)]
    engine.cancel("cancelled")
    first, _ = answered(folder, engine, asked)
    ends = [responses[0].finish for responses in first]
    assert ends[1:] == [records.Finish.LOST, records.Finish.CANCELLED]
    again, drawn = answered(folder, engine, asked)
    assert drawn == 6
    assert again[2] == engine.generate(asked)[2]


def flipped(at):
    return lambda data: data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-9], lambda data: b"", lambda data: b"[1]", *map(flipped, (0, 30, 60, -3))],
)
def test_a_damaged_file_is_told_and_its_responses_are_asked_again(folder, engine, damage, caplog):
    expected, _ = answered(folder, engine)
    part = sorted((folder / "000007").iterdir())[1]
    part.write_bytes(damage(part.read_bytes()))
    with caplog.at_level(logging.WARNING):
        found, drawn = answered(folder, engine)
    assert found == expected and drawn == 1
    assert f"{part} is damaged" in caplog.text and "asked again" in caplog.text


def test_a_second_session_overwrites_nothing_of_the_first(folder, engine):
    killed_after(folder, engine, most=4)
    before = {path.name: path.read_bytes() for path in (folder / "000007").iterdir()}
    answered(folder, engine)
    after = {path.name: path.read_bytes() for path in (folder / "000007").iterdir()}
    assert before.items() <= after.items() and len(after) > len(before)


def test_one_that_does_not_speak_for_its_replica_writes_nothing(folder, engine):
    responses, _ = opened(folder)
    responses.of(engine, VERSION, writes=False).generate(ASKED)
    responses.flush()
    assert not folder.exists()


@pytest.mark.parametrize("body", ['{"version"', '{"version": "a"}', "[]"])
def test_a_step_is_complete_for_the_variables_that_are_trained_on_it(folder, engine, caplog, body):
    responses, _ = opened(folder)
    responses.of(engine, VERSION, writes=True).generate(ASKED)
    assert responses.completed("then") is None
    responses.complete(VERSION, "then")
    again, _ = opened(folder)
    assert again.completed("then") == VERSION and again.completed("others") is None
    (folder / "000007" / "complete.json").write_text(body)
    assert again.completed("then") is None and "the step is sampled again" in caplog.text


@pytest.mark.parametrize("lose", [lambda path: path.write_bytes(b""), lambda path: path.unlink()])
def test_a_step_without_one_of_its_files_is_not_complete(folder, engine, lose):
    responses, _ = opened(folder)
    responses.of(engine, VERSION, writes=True).generate(ASKED)
    responses.complete(VERSION, "then")
    lose(next((folder / "000007").glob("part-*")))
    assert opened(folder)[0].completed("then") is None


def test_what_another_process_could_not_read_is_not_taken_here_either(folder, engine, monkeypatch):
    """Else their engines would go apart, and wait for each other for ever."""
    answered(folder, engine)
    missing = sorted(path.name for path in (folder / "000007").iterdir())[2]

    def others(word):
        if isinstance(word, list):
            return [word, [name for name in word if name != missing]]
        return [word, None]

    monkeypatch.setattr(durable.processes, "exchange", others)
    responses, there = opened(folder)
    assert there == 8
    responses.complete(VERSION, "then")
    assert responses.completed("then") is None


def test_a_response_without_finite_log_probabilities_is_not_kept(folder, engine, monkeypatch):
    generate = engine.generate

    def broken(requests, on_answer, **asked):
        def one(place, response):
            on_answer(place, dataclasses.replace(response, logprobs=(float("nan"),)))

        return generate(requests, one, **asked)

    monkeypatch.setattr(engine, "generate", broken)
    answered(folder, engine)
    assert opened(folder)[1] == 0


def test_steps_that_are_saved_and_stages_that_have_ended_leave_nothing(folder, engine):
    for step in (3, 4, 5):
        responses, _ = opened(folder, step)
        responses.of(engine, VERSION, writes=True).generate(ASKED[:1])
    responses.drop_before(5)
    assert [path.name for path in folder.iterdir()] == ["000005"]
    responses.close()
    assert not folder.exists()
