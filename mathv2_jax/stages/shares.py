"""Stages that are made part by part, each part by one of the run's replicas."""

from collections.abc import Callable

from mathv2_jax import metrics, storage
from mathv2_jax.stages import run as run_lib


def write_parts(
    run: run_lib.Run, stage: str, total: int, make: Callable[[int, int], bytes]
) -> None:
    """Parts 1 .. `total` of a stage's records; those that count already are not made again.

    `make(replica, number)` gives a part's lines. As many parts as there are replicas are made at
    once, and count together. Stops between them where the run is asked to.
    """
    parts = run.parts(stage)
    written = {storage.part_step(name) for name in parts.names()}
    waiting = [number for number in range(1, total + 1) if number not in written]
    progress = metrics.PartProgress(stage, total)
    for at in range(0, len(waiting), run.policy.count):
        run.check_stop(lambda: None)
        numbers = waiting[at : at + run.policy.count]

        def share(replica: int, places: range, numbers: list[int] = numbers) -> list[bytes]:
            return [make(replica, numbers[place]) for place in places]

        for place, lines in run.each(len(numbers), share).items():
            parts.write_part(storage.part_name(numbers[place]), lines)
        run.commit(parts, numbers[-1])
        progress.done(numbers[-1])
