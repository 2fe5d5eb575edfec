"""Which commit this package is of."""

import pathlib
import subprocess

_ROOT = pathlib.Path(__file__).resolve().parents[2]


def commit(root: pathlib.Path = _ROOT) -> str | None:
    """Its hash, with " and changes" where package or configs differ from it; None where unknown.

    It is known where `root` is the top of a checkout, and git is there.
    """
    if not (root / ".git").exists():
        return None
    try:
        found = _git(root, "rev-parse", "HEAD")
        changes = _git(root, "status", "--porcelain", "--", "mathv2_jax", "configs")
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return f"{found} and changes" if changes else found


def _git(root: pathlib.Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()
