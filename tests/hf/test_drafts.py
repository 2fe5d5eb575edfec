"""New folders come into being whole."""

import fcntl
import os
import pathlib

import pytest
from etils import epath

from mathv2_jax.hf import drafts
from tests.hf import checkpoints


def make(target: pathlib.Path) -> None:
    with drafts.drafted(epath.Path(target)) as draft:
        (draft / "a").write_text("whole")


def test_what_a_killed_process_has_left_is_swept(tmp_path):
    left = tmp_path / ".out.draft"
    (left / "part").mkdir(parents=True)
    (left / "half").write_text("x")
    make(tmp_path / "out")
    assert checkpoints.files(tmp_path) == {"out"} and checkpoints.files(tmp_path / "out") == {"a"}


def test_what_another_process_is_writing_is_left_alone(tmp_path):
    draft = tmp_path / ".out.draft"
    draft.mkdir()
    (draft / "theirs").write_text("x")
    held = os.open(draft, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="being written by another process"):
        make(tmp_path / "out")
    assert checkpoints.files(tmp_path) == {".out.draft"}
    assert checkpoints.files(draft) == {"theirs"}
    os.close(held)
    make(tmp_path / "out")
    assert checkpoints.files(tmp_path) == {"out"}


@pytest.mark.parametrize("there", [True, False])
def test_a_link_leads_to_the_new_folder(tmp_path, there):
    (tmp_path / "big").mkdir()
    if there:
        (tmp_path / "big" / "out").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "big" / "out")
    make(tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert checkpoints.files(tmp_path / "big" / "out") == {"a"}
    assert checkpoints.files(tmp_path / "big") == {"out"}
    with pytest.raises(ValueError, match="not empty"):
        make(tmp_path / "out")


def test_a_mount_point_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: os.fspath(path) == str(tmp_path / "out"))
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="mount point.* a folder to be made in it"):
        make(tmp_path / "out")
    assert checkpoints.files(tmp_path) == {"out"}
    make(tmp_path / "out" / "new")


def test_folders_above_go_again_after_a_failure_unless_they_were_there(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(KeyboardInterrupt), drafts.drafted(epath.Path(tmp_path) / "there/new/x"):
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.rglob("*")] == ["there"]
    with drafts.drafted(epath.Path(tmp_path) / "there/new/x") as draft:
        (draft / "file").write_text("")
    assert (tmp_path / "there/new/x/file").exists()


def test_a_place_that_cannot_be_written_to_is_named():
    with pytest.raises(ValueError, match="/proc/new cannot be made: .*; name a folder"):
        make(pathlib.Path("/proc/new"))
