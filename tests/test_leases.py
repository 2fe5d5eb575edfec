"""The right to write into a folder."""

import dataclasses
import logging as std_logging
import os
import subprocess
import sys
import time

import pytest

from mathv2_jax import leases, storage


class Clock:
    """A wall clock that is set by hand."""

    def __init__(self):
        self.seconds = 1_000_000.0

    def __call__(self):
        return self.seconds


@pytest.fixture
def clock():
    return Clock()


def lease(tmp_path, owner, clock, seconds=60):
    path = tmp_path / "run" / "lease.json"
    return leases.Lease(path, owner, seconds, now=clock, settle_seconds=0)


def test_a_held_lease_names_its_owner_and_its_end(tmp_path, clock):
    first, second = lease(tmp_path, "first", clock), lease(tmp_path, "second", clock)
    first.acquire()
    with pytest.raises(
        leases.LeaseHeldError,
        match=rf"held by first \(process {os.getpid()} .*1970-01-12 13:47:40",
    ):
        second.acquire()
    first.acquire()
    first.release()
    second.acquire()


def test_a_name_alone_gives_no_right_to_a_lease(tmp_path, clock):
    lease(tmp_path, "same", clock).acquire()
    with pytest.raises(leases.LeaseHeldError):
        lease(tmp_path, "same", clock).acquire()


def test_a_lease_that_is_past_is_taken_and_its_holder_told(tmp_path, clock, caplog):
    first, second = lease(tmp_path, "first", clock), lease(tmp_path, "second", clock)
    first.acquire()
    clock.seconds += 61
    with caplog.at_level(std_logging.WARNING):
        second.acquire()
    assert "taking over from first" in caplog.text
    with pytest.raises(leases.LeaseHeldError, match="held by second"):
        first.renew()
    first.release()
    second.renew()


def test_renewing_moves_the_end_and_writes_seldom(tmp_path, clock):
    first, second = lease(tmp_path, "first", clock), lease(tmp_path, "second", clock)
    first.acquire()
    written = (tmp_path / "run" / "lease.json").read_bytes()
    clock.seconds += 15
    first.renew()
    assert (tmp_path / "run" / "lease.json").read_bytes() == written
    for _ in range(5):
        clock.seconds += 30
        first.renew()
        with pytest.raises(leases.LeaseHeldError):
            second.acquire()


def test_a_late_holder_renews_a_lease_that_nobody_took(tmp_path, clock):
    first = lease(tmp_path, "first", clock)
    first.acquire()
    clock.seconds += 1000
    first.renew()
    with pytest.raises(leases.LeaseHeldError):
        lease(tmp_path, "second", clock).acquire()


def test_of_two_that_take_a_past_lease_at_once_the_last_has_it(tmp_path, clock, monkeypatch):
    first, second = lease(tmp_path, "first", clock), lease(tmp_path, "second", clock)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    late = leases.Lease._write

    def overtaken(self, mine):
        late(self, mine)
        if mine.owner == "first":
            monkeypatch.setattr(leases.Lease, "_write", late)
            late(second, dataclasses.replace(mine, owner="second", token="other"))

    monkeypatch.setattr(leases.Lease, "_write", overtaken)
    with pytest.raises(leases.LeaseHeldError, match="held by second"):
        first.acquire()


def test_the_lease_of_a_process_that_ended_is_taken_at_once(tmp_path, clock, caplog):
    program = (
        "import os, sys; from mathv2_jax import leases\n"
        "leases.Lease(sys.argv[1], 'gone', 1e9, settle_seconds=0).acquire(); os._exit(9)"
    )
    path = tmp_path / "run" / "lease.json"
    subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    with caplog.at_level(std_logging.WARNING):
        lease(tmp_path, "next", clock).acquire()
    assert "taking over from gone" in caplog.text and "has ended" in caplog.text


@pytest.mark.parametrize(
    ("change", "taken"),
    [({"started": "1"}, True), ({"host": "elsewhere"}, False), ({"pid": 1, "started": ""}, False)],
)
def test_a_lease_is_taken_early_only_from_a_process_known_to_be_gone(
    tmp_path, clock, change, taken
):
    lease(tmp_path, "first", clock).acquire()
    path = tmp_path / "run" / "lease.json"
    path.write_bytes(storage.seal({**storage.unseal(path.read_bytes()), **change}))
    second = lease(tmp_path, "second", clock)
    if taken:
        second.acquire()
    else:
        with pytest.raises(leases.LeaseHeldError, match="held by first"):
            second.acquire()


def test_a_lease_ends_with_its_block_and_cannot_be_renewed(tmp_path, clock):
    with lease(tmp_path, "first", clock) as held:
        assert storage.exists(tmp_path / "run" / "lease.json")
    assert not storage.exists(tmp_path / "run" / "lease.json")
    with pytest.raises(ValueError, match="is not held; acquire it first"):
        held.renew()


def test_a_garbled_lease_is_an_error_with_a_way_out(tmp_path, clock):
    storage.write_whole(tmp_path / "run" / "lease.json", b"{")
    with pytest.raises(ValueError, match="delete it once no other process"):
        lease(tmp_path, "first", clock).acquire()
