"""New folders that come into being whole or not at all."""

import contextlib
import fcntl
import os
from collections.abc import Iterator

from etils import epath

from mathv2_jax import storage


@contextlib.contextmanager
def drafted(target: epath.Path) -> Iterator[epath.Path]:
    """A folder to write into that becomes `target`, at once, if the block ends well.

    ValueError where `target` holds anything, cannot be replaced, or another process is writing it.
    Locally the draft is a hidden sibling, and what a killed process has left of it is swept;
    elsewhere, where nothing can be renamed, it is the target itself, emptied after a failure.
    """
    local = storage.is_local(target)
    if local:
        target = epath.Path(os.path.realpath(target))  # a link stays, and leads to what is made
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is not empty: give a folder that is new")
    if not local:
        target.mkdir(parents=True, exist_ok=True)
        with _deleted_on_failure(target):
            yield target
        return
    if os.path.ismount(target):
        raise ValueError(f"{target} is a mount point, which stays: name a folder to be made in it")
    draft = target.parent / f".{target.name}.draft"
    with _made(target, draft), _locked(draft), _deleted_on_failure(draft):
        for left in draft.iterdir():
            if left.is_dir():
                left.rmtree()
            else:
                left.unlink()
        yield draft
        os.replace(draft, target)  # an empty folder gives way to a full one
        storage.sync_folder(target.parent)


@contextlib.contextmanager
def _made(target: epath.Path, draft: epath.Path) -> Iterator[None]:
    """The draft's folder, with all above it, which go again after a failure if they are empty."""
    above = [p for p in target.parents if not p.exists()]
    try:
        draft.mkdir(parents=True, exist_ok=True)
    except (NotADirectoryError, FileExistsError) as error:
        raise ValueError(f"{target} lies below a file: name a folder to be made") from error
    except OSError as error:
        raise ValueError(
            f"{target} cannot be made: {error.strerror}; name a folder in a place that you may "
            "write to"
        ) from error
    try:
        yield
    except BaseException:
        for folder in above:
            with contextlib.suppress(OSError):  # another program may have put something there
                os.rmdir(folder)
        raise


@contextlib.contextmanager
def _deleted_on_failure(path: epath.Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        storage.remove_folder(path)
        raise


@contextlib.contextmanager
def _locked(path: epath.Path) -> Iterator[None]:
    """A local folder for this process alone, as long as it lives; ValueError if it is another's."""
    # Not a lease, which a killed process in another container would hold until its expiry.
    held = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{path} is being written by another process: wait for it, or give another folder"
            ) from error
        yield
    finally:
        os.close(held)
