"""Which commit a checkout is of."""

import subprocess

import pytest

from mathv2_jax.cli import source


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "mathv2_jax").mkdir()
    (tmp_path / "mathv2_jax" / "a.py").write_text("one")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "one")
    return tmp_path


def git(folder, *arguments):
    done = subprocess.run(["git", "-C", folder, *arguments], check=True, capture_output=True)
    return done.stdout.decode().strip()


def test_a_commit_is_named_and_what_differs_from_it_is_said(checkout):
    head = git(checkout, "rev-parse", "HEAD")
    (checkout / "result.json").write_text("neither package nor config")
    assert source.commit(checkout) == head
    (checkout / "mathv2_jax" / "a.py").write_text("two")
    assert source.commit(checkout) == f"{head} and changes"


def test_a_folder_within_another_checkout_is_of_no_commit(checkout):
    assert source.commit(checkout / "mathv2_jax") is None
