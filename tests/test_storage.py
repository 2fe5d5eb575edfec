import contextlib
import itertools
import json
import logging as std_logging
import os

import fsspec.implementations.memory
import pytest
from etils.epath import backend

from mathv2_jax import leases, storage


class Killed(BaseException):
    """Stands for the process ending here: no handler of errors sees it."""


def kill_at(monkeypatch, count):
    """Ends the process just before its change number `count` on disk, from 0, of any kind."""
    calls = itertools.count()

    def ending(function):
        def call(*args, **kwargs):
            if next(calls) == count:
                raise Killed
            return function(*args, **kwargs)

        return call

    for name in ("replace", "mkdir", "remove"):
        monkeypatch.setattr(os, name, ending(getattr(os, name)))
    monkeypatch.setattr(os, "fsync", ending(lambda descriptor: None))  # nothing cuts the power


def kill_in_turn(monkeypatch, folder, program, check):
    """Runs `program` killed at its 1st, 2nd, ... change and `check`s what it left, each time in
    another folder; returns how many changes it makes when it is not killed."""
    for count in range(1000):
        place = folder / f"killed-{count}"
        ended = False
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            kill_at(patch, count)
            program(place)
            ended = True
        check(place)
        if ended:
            return count
    raise AssertionError("the program writes without end")


def snapshot(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# Files.


def test_a_file_killed_at_any_write_is_the_old_one_or_the_new(tmp_path, monkeypatch):
    seen = []

    def program(folder):
        storage.write_whole(folder / "file", b"old")
        storage.write_whole(folder / "file", b"new" * 1000)

    def check(folder):
        assert storage.list_names(folder) in ([], ["file"])
        seen.append((folder / "file").read_bytes() if (folder / "file").exists() else b"")

    assert kill_in_turn(monkeypatch, tmp_path, program, check) >= 6
    assert [data for data, _ in itertools.groupby(seen)] == [b"", b"old", b"new" * 1000]


def test_a_write_that_fails_leaves_no_draft_and_the_old_file(tmp_path, monkeypatch):
    storage.write_whole(tmp_path / "file", b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        storage.write_whole(tmp_path / "file", b"new")
    assert os.listdir(tmp_path) == ["file"]
    assert storage.read_bytes(tmp_path / "file") == b"old"


def test_names_are_sorted_and_hidden_ones_left_out(tmp_path):
    for name in ("b.json", "a.json", "c.txt", ".a.json.1.draft"):
        (tmp_path / name).write_bytes(b"")
    assert storage.list_names(tmp_path, "*.json") == ["a.json", "b.json"]
    assert storage.list_names(tmp_path / "nowhere") == []


@pytest.fixture
def bucket(monkeypatch):
    """gs:// as etils reaches it, over a memory in place of the network."""
    memory = fsspec.implementations.memory.MemoryFileSystem()
    monkeypatch.setattr(memory, "store", {})
    monkeypatch.setattr(memory, "pseudo_dirs", [""])
    monkeypatch.setattr(
        backend._FileSystemSpecBackend, "_get_filesystem", lambda self, name: memory
    )
    return "gs://bucket/run"


def test_an_object_store_holds_parts_and_leases(bucket):
    parts = storage.Parts(f"{bucket}/records")
    parts.write_part(storage.part_name(1), b"one\n")
    parts.write_part(storage.part_name(2), b"two\n")
    parts.commit(2)
    assert list(storage.Parts(f"{bucket}/records").read()) == ["one", "two"]
    parts.discard_after(1)
    assert list(storage.Parts(f"{bucket}/records").read()) == ["one"]
    assert storage.list_names(f"{bucket}/records", "part*") == ["part-000001.jsonl"]
    with (
        leases.Lease(f"{bucket}/lease.json", "a", 60, settle_seconds=0),
        pytest.raises(leases.LeaseHeldError, match="held by a "),
    ):
        leases.Lease(f"{bucket}/lease.json", "b", 60, settle_seconds=0).acquire()
    assert not storage.exists(f"{bucket}/lease.json")


# Parts.


def lines_of(step):
    return f"{step} first\n{step} second\n".encode()


def read(folder):
    """The steps whose lines can be read; every one of them is there whole."""
    lines = list(storage.Parts(folder).read())
    steps = [int(line.split()[0]) for line in lines[::2]]
    assert lines == [x for s in steps for x in lines_of(s).decode().splitlines()]
    return steps


def run(folder, *, first=1, last=6, every=2):
    """What a stage does: parts of every step, a commit with every checkpoint."""
    parts = storage.Parts(folder)
    parts.discard_after(first - 1)
    for step in range(first, last + 1):
        parts.write_part(storage.part_name(step), lines_of(step))
        if step % every == 0:
            parts.commit(step)


def test_a_part_counts_once_it_is_committed(tmp_path):
    parts = storage.Parts(tmp_path)
    for step in (1, 2, 3):
        parts.write_part(storage.part_name(step), lines_of(step))
    assert read(tmp_path) == []
    parts.commit(2)
    assert read(tmp_path) == [1, 2] and parts.names() == ["part-000001.jsonl", "part-000002.jsonl"]
    parts.commit(3)
    assert read(tmp_path) == [1, 2, 3]


def test_parts_are_read_by_step_beyond_a_million(tmp_path):
    run(tmp_path, first=999_998, last=1_000_001, every=1)
    assert read(tmp_path) == [999_998, 999_999, 1_000_000, 1_000_001]


def test_text_of_any_kind_comes_back_as_the_same_lines(tmp_path):
    parts = storage.Parts(tmp_path)
    lines = ["", "a\u2028b\x0cc", "\u221a", ""]
    parts.write_part(storage.part_name(0), "".join(line + "\n" for line in lines).encode())
    parts.commit(0)
    assert list(parts.read()) == lines


def test_two_manifests_are_kept(tmp_path):
    run(tmp_path, last=12, every=1)
    assert len(storage.list_names(tmp_path, "manifest-*")) == 2


def test_a_step_done_again_changes_no_byte(tmp_path):
    run(tmp_path)
    before = snapshot(tmp_path)
    parts = storage.Parts(tmp_path)
    for step in range(1, 7):
        parts.write_part(storage.part_name(step), lines_of(step))
    parts.commit(6)
    assert snapshot(tmp_path) == before


def test_what_several_processes_write_counts_together_by_step_and_process(tmp_path):
    first, second = storage.Parts(tmp_path), storage.Parts(tmp_path, keeper=False)
    for step in (1, 2, 3):
        second.write_part(storage.part_name(step, 1), f"second {step}\n".encode())
        if step != 2:
            first.write_part(storage.part_name(step), f"first {step}\n".encode())
    told = first.pending, second.pending
    for parts in (first, second):
        for written in told:
            parts.adopt(written)
        parts.commit(2)
    assert storage.list_names(tmp_path, "manifest-*") == ["manifest-000000.json"]
    expected = ["first 1", "second 1", "second 2"]
    assert [list(p.read()) for p in (first, second, storage.Parts(tmp_path))] == [expected] * 3
    assert [storage.is_shared(name) for name in first.names()] == [False, True, True]
    alone = storage.Parts(tmp_path)
    alone.discard_after(1)  # by a run of one process: what others left beyond it is gone too
    assert storage.list_names(tmp_path, "part-*") == ["part-000001.0001.jsonl", "part-000001.jsonl"]


def test_only_the_keeper_writes_a_table_of_one_part(tmp_path):
    first, second = storage.Parts(tmp_path), storage.Parts(tmp_path, keeper=False)
    second.write_only(b"all\n")
    assert not storage.list_names(tmp_path)
    first.write_only(b"all\n")
    assert first.names() == second.names() == ["part-000001.jsonl"]


def test_a_committed_part_does_not_change(tmp_path):
    run(tmp_path)
    parts = storage.Parts(tmp_path)
    with pytest.raises(ValueError, match="part-000006.jsonl is committed with other bytes"):
        parts.write_part(storage.part_name(6), b"other\n")
    with pytest.raises(ValueError, match="part-000006.jsonl counts already; call discard_after"):
        parts.commit(5)
    parts.discard_after(5)
    parts.write_part(storage.part_name(6), b"other\n")
    parts.commit(6)
    assert list(parts.read())[-1] == "other"


def test_a_part_is_named_by_its_step_and_ends_its_lines(tmp_path):
    parts = storage.Parts(tmp_path)
    with pytest.raises(ValueError, match=r"'records.jsonl' is not the name of a part"):
        parts.write_part("records.jsonl", b"")
    with pytest.raises(ValueError, match="last line does not end"):
        parts.write_part(storage.part_name(1), b"no end")
    assert storage.part_step(storage.part_name(12)) == 12


def test_a_table_of_one_part_follows_what_it_is_made_of(tmp_path):
    parts = storage.Parts(tmp_path)
    parts.write_only(b"old\n")
    before = snapshot(tmp_path)
    storage.Parts(tmp_path).write_only(b"old\n")
    assert snapshot(tmp_path) == before
    storage.Parts(tmp_path).write_only(b"new\n")
    assert list(storage.Parts(tmp_path).read()) == ["new"]


def test_discarded_parts_are_gone_even_those_never_committed(tmp_path):
    run(tmp_path, last=7)
    assert len(storage.list_names(tmp_path, "part-*")) == 7 and read(tmp_path) == [1, 2, 3, 4, 5, 6]
    storage.Parts(tmp_path).discard_after(3)
    assert len(storage.list_names(tmp_path, "part-*")) == 3 and read(tmp_path) == [1, 2, 3]


def test_a_table_killed_between_any_two_writes_is_readable_and_goes_on(tmp_path, monkeypatch):
    run(tmp_path / "whole")
    whole = {n: d for n, d in snapshot(tmp_path / "whole").items() if n.startswith("part")}

    def check(folder):
        steps = read(folder)
        assert steps in ([], [1, 2], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6])
        for resumed in range(len(steps), -1, -2):  # the checkpoint may be older than the commit
            run(folder, first=resumed + 1)
            assert read(folder) == [1, 2, 3, 4, 5, 6]
            assert {n: d for n, d in snapshot(folder).items() if n.startswith("part")} == whole

    assert kill_in_turn(monkeypatch, tmp_path, run, check) > 30


def test_a_discard_killed_between_any_two_writes_is_done_or_not_begun(tmp_path, monkeypatch):
    for count in range(20):
        run(tmp_path / f"killed-{count}")

    def check(folder):
        assert read(folder) in ([1, 2], [1, 2, 3, 4, 5, 6])
        storage.Parts(folder).discard_after(2)
        assert read(folder) == [1, 2] and len(storage.list_names(folder, "part-*")) == 2

    def program(folder):
        storage.Parts(folder).discard_after(2)

    assert kill_in_turn(monkeypatch, tmp_path, program, check) > 5


def damage(path, how):
    data = path.read_bytes()
    if how == "delete":
        path.unlink()
    else:
        path.write_bytes(
            {
                "truncate": data[: len(data) // 2],
                "empty": b"",
                "zero": bytes(len(data)),
                "flip": data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
            }[how]
        )


@pytest.mark.parametrize("how", ["truncate", "empty", "zero", "flip"])
def test_a_damaged_manifest_gives_way_to_the_one_before_and_says_so(tmp_path, caplog, how):
    run(tmp_path)
    newest = storage.list_names(tmp_path, "manifest-*")[-1]
    damage(tmp_path / newest, how)
    with caplog.at_level(std_logging.WARNING):
        assert read(tmp_path) == [1, 2, 3, 4]
    assert newest in caplog.text and "falling back to manifest-" in caplog.text
    run(tmp_path, first=5)
    caplog.clear()
    assert read(tmp_path) == [1, 2, 3, 4, 5, 6] and not caplog.text


def test_manifests_that_are_all_damaged_are_an_error(tmp_path):
    run(tmp_path)
    for name in storage.list_names(tmp_path, "manifest-*"):
        damage(tmp_path / name, "truncate")
    with pytest.raises(ValueError, match="no readable manifest in .*manifest-000002.json"):
        storage.Parts(tmp_path)


def test_a_manifest_of_another_schema_is_an_error(tmp_path):
    run(tmp_path)
    body = storage.unseal((tmp_path / "manifest-000003.json").read_bytes())
    (tmp_path / "manifest-000003.json").write_bytes(storage.seal({**body, "schema": 2}))
    with pytest.raises(ValueError, match="schema 2; this program reads 1"):
        storage.Parts(tmp_path)


@pytest.mark.parametrize("how", ["truncate", "empty", "zero", "flip", "delete"])
def test_a_damaged_part_is_an_error_that_names_it(tmp_path, how):
    run(tmp_path)
    damage(tmp_path / "part-000003.jsonl", how)
    with pytest.raises(ValueError, match="part-000003.jsonl is (damaged|missing)"):
        list(storage.Parts(tmp_path).read())


# Seals.


def test_a_seal_shows_any_changed_byte():
    data = storage.seal({"a": [1, 0.1, "x"], "b": None})
    assert storage.unseal(data) == {"a": [1, 0.1, "x"], "b": None}
    for place in range(len(data)):
        changed = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        try:
            assert storage.unseal(changed) == json.loads(data)["body"]
        except ValueError:
            continue
        raise AssertionError(f"byte {place} may change unseen: {changed!r}")
