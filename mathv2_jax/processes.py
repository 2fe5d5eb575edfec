"""The processes of a run: which one this is, and what they tell each other on the way.

Every process runs the same program. What is said here travels by JAX's own collectives, so every
process must come to the same calls in the same order.
"""

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")

_SHORT = 1024  # bytes of a word that is said together with the others'
_SIZE = 8  # bytes that say how long a word is


class FirstFailedError(RuntimeError):
    """The first process failed at what it does for all."""


def count() -> int:
    """How many processes the run has."""
    return jax.process_count()


def index() -> int:
    """Which of them this is, from 0."""
    return jax.process_index()


def is_first() -> bool:
    """Whether this is the process that writes what a run has once: config, metrics, reports."""
    return index() == 0


def exchange(word: Any) -> list[Any]:
    """What every process said, by process; any picklable object, each process its own.

    It is unpickled, so it is for processes of one run only. Long words are said one after the
    other, so a device holds one of them at a time.
    """
    if count() == 1:
        return [word]
    body = pickle.dumps(word)
    head = len(body).to_bytes(_SIZE, "big") + body[:_SHORT].ljust(_SHORT, b"\0")
    found = []
    for process, row in enumerate(multihost_utils.process_allgather(np.frombuffer(head, np.uint8))):
        size = int.from_bytes(row[:_SIZE].tobytes(), "big")
        said = row[_SIZE:]
        if size > _SHORT:
            room = 1 << (size - 1).bit_length()  # few sizes, few programs
            mine = body.ljust(room, b"\0") if process == index() else bytes(room)
            said = multihost_utils.broadcast_one_to_all(
                np.frombuffer(mine, np.uint8), is_source=process == index()
            ).astype(np.uint8)
        found.append(pickle.loads(said.tobytes()[:size]))
    return found


def any_of(flag: bool) -> bool:
    """Whether any process says so; all of them get the same answer."""
    if count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def meet() -> None:
    """Returns once every process has come here, so that what one wrote the others may read."""
    any_of(False)


def first(work: Callable[[], T]) -> T | None:
    """Done by the first process while the others wait; they get None.

    Where it raises, the first process raises that, and the others FirstFailedError.
    """
    found, failed = None, True
    try:
        if is_first():
            found = work()
        failed = False
    finally:
        failed = any_of(failed)
    if failed:
        raise FirstFailedError("process 0 has failed, and says why in its own log")
    return found
