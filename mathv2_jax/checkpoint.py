"""Train state and data position on disk: written in the background, verified when read.

Orbax writes the arrays, sharded, whatever the number of processes. Beside them lies a seal: the
format version, the position, and for every array its shape, dtype and fingerprint. A fingerprint
is computed on the device from the bits of the array and their places, whatever its sharding, so
that a checkpoint counts as sound only if what was restored is bit for bit what was saved.
"""

import json
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from mathv2_jax import fingerprint, storage

FORMAT_VERSION = 1
CHUNK_BYTES = 2**25  # of one chunk on disk, which holds at most one layer, and one expert of it


class Checkpoints:
    """The checkpoints of one run in `directory`, local or gs://; every process makes one.

    The newest `keep` are kept and, where `every` is given, those of its multiples of steps too.
    One object writes a directory at a time (see leases.py); any number may read.
    """

    def __init__(self, directory: epath.PathLike, *, keep: int = 2, every: int | None = None):
        if keep < 1:
            raise ValueError(f"keep={keep} checkpoints: at least 1 is needed to resume")
        if every is not None and every < 1:
            raise ValueError(f"every={every} steps: give a positive number, or None")
        self._directory = epath.Path(directory)
        newest = checkpoint_managers.LatestN(keep)
        milestones = [] if every is None else [checkpoint_managers.EveryNSteps(every)]
        self._policy = checkpoint_managers.AnyPreservationPolicy([newest, *milestones])
        self._damaged: set[int] = set()
        self._saving: int | None = None
        self._writing = False
        self._manager = self._open()

    def save(self, step: int, state: Any, position: Mapping[str, Any]) -> None:
        """Starts saving; returns once `state` (a tree of jax arrays) may be donated.

        `position` is a small JSON object that says where the run stands. Checkpoints of `step`
        and beyond, and damaged ones that `restore` passed over, are deleted: the run goes on from
        here. Raises what the save before raised, if that failed; ValueError for a leaf that is
        no array, or a position that JSON does not give back unchanged.
        """
        if step < 0:
            raise ValueError(f"step {step} of a checkpoint is negative; steps count from 0")
        position = _require_json(position)
        arrays = _named_leaves(state)
        for name, array in arrays.items():
            if not isinstance(array, jax.Array) or jnp.issubdtype(array.dtype, jax.dtypes.extended):
                raise ValueError(
                    f"state leaf {name} is {type(array).__name__}, not a numeric jax array; put "
                    "counters in an array, random keys as jax.random.key_data, the rest in position"
                )
        self.wait()
        if not self._writing:  # only a writer may sweep up what an interrupted writer left
            self._manager.close()
            self._writing = True
            self._manager = self._open()
        for other in self._steps():
            if other >= step or other in self._damaged:
                logging.warning("%s: deleting step %d to save %d", self._directory, other, step)
                self._manager.delete(other)
        self._damaged.clear()
        prints = fingerprint.of_arrays(arrays)
        leaves = {name: [*_kind(array), prints[name]] for name, array in arrays.items()}
        body = {"format": FORMAT_VERSION, "step": step, "position": position, "leaves": leaves}
        self._saving = step
        full = {n: x for n, x in arrays.items() if x.size}  # Orbax takes no empty ones
        chunks = {
            n: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=tuple(range(num_stacked(n, x))))
            for n, x in full.items()
        }
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(full, chunks),
            seal=ocp.args.JsonSave(json.loads(storage.seal(body))),
        )
        try:
            started = self._manager.save(step, args=args, force=True)
        except BaseException as error:
            self._give_up(error)
            raise
        assert started, f"Orbax declined to save step {step}"

    def wait(self) -> None:
        """Returns once the last save is on disk; raises what it raised if it failed.

        After a failure the step does not exist, the ones before it do, and saving may go on.
        """
        try:
            self._manager.wait_until_finished()
        except BaseException as error:
            self._give_up(error)
            raise
        self._saving = None

    def close(self) -> None:
        """Waits as `wait` does and ends the background threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """The steps on disk, the newest first, damaged ones too; waits for a save in progress."""
        return sorted(self._steps(), reverse=True)

    def latest_step(self) -> int | None:
        """The newest step on disk, None where there is none; waits for a save in progress.

        Its files are not read; a step that `restore` found damaged is left out.
        """
        return max(set(self._steps()) - self._damaged, default=None)

    def restore(
        self, abstract_state: Any, step: int | None = None
    ) -> tuple[Any, dict[str, Any], int] | None:
        """(state, position, step) of the newest sound checkpoint; None where there is none.

        `abstract_state` is the state's tree of `jax.ShapeDtypeStruct` with shardings (arrays do
        too), which need not be those it was saved with. A damaged checkpoint is reported in the
        log and the one before is taken; given a `step`, that one or none. ValueError where every
        checkpoint is damaged, or a sound one is of another format or another state.
        """
        wanted = _named_leaves(abstract_state)
        for name, leaf in wanted.items():
            if getattr(leaf, "sharding", None) is None:
                raise ValueError(f"state leaf {name} has no sharding to be restored with")
        steps = sorted(self._steps(), reverse=True)
        if step is not None and step not in steps:
            raise ValueError(
                f"no checkpoint of step {step} in {self._directory}; there are {steps}"
            )
        complaints = []
        for candidate in steps if step is None else [step]:
            complaint, body, arrays = self._read(candidate, wanted)
            if complaint:
                complaints.append(f"step {candidate}: {complaint}")
                self._damaged.add(candidate)
                continue
            for one in complaints:
                logging.warning(
                    "%s: damaged checkpoint, %s; falling back to step %d",
                    self._directory,
                    one,
                    candidate,
                )
            state = jax.tree.unflatten(
                jax.tree.structure(abstract_state), [arrays[name] for name in wanted]
            )
            return state, body["position"], candidate
        if complaints:
            raise ValueError(
                f"no sound checkpoint in {self._directory}: {'; '.join(complaints)}. Restore its "
                "files, or start in another folder"
            )
        return None

    def _read(self, step: int, wanted: Mapping[str, Any]) -> tuple[str, dict[str, Any], Any]:
        """(complaint, seal, arrays); an empty complaint says that they are what was saved."""
        folder = self._directory / str(step)
        body: dict[str, Any] = {}
        arrays: dict[str, jax.Array] = {}
        complaint = ""
        try:
            body = read_seal(folder)
        except (OSError, ValueError) as error:
            complaint = f"its seal cannot be read: {_first_line(error)}"
        complaint = _agree(complaint)
        if complaint:
            return complaint, body, arrays
        self._require_fit(step, body, wanted)
        try:
            arrays = _read_arrays(folder / "state", wanted)
        except (OSError, ValueError) as error:
            complaint = f"its arrays cannot be read: {_first_line(error)}"
        complaint = _agree(complaint)
        if complaint:
            return complaint, body, arrays
        prints = fingerprint.of_arrays(arrays)
        wrong = [name for name in prints if prints[name] != body["leaves"][name][2]]
        if wrong:
            complaint = f"{len(wrong)} arrays differ from what was saved, {wrong[0]} among them"
        return complaint, body, arrays

    def _require_fit(self, step: int, body: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        where = f"checkpoint of step {step} in {self._directory}"
        require_format(body, where)
        saved = {name: leaf[:2] for name, leaf in body["leaves"].items()}
        asked = {name: _kind(leaf) for name, leaf in wanted.items()}
        if saved == asked:
            return
        differing = sorted(n for n in saved | asked if saved.get(n) != asked.get(n))
        name = differing[0]
        raise ValueError(
            f"{where} is of another state: {len(differing)} leaves differ, first {name}: saved "
            f"{saved.get(name, 'nothing')}, asked for {asked.get(name, 'nothing')}; resume with "
            "the config it was made with"
        )

    def _steps(self) -> list[int]:
        self.wait()
        self._manager.reload()
        return list(self._manager.all_steps())

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._policy,
            create=self._writing,
            cleanup_tmp_directories=self._writing,
            save_root_metadata=False,
            lightweight_initialize=True,
            # A folder that cannot be made in the background costs Orbax a wait of five minutes.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        return ocp.CheckpointManager(
            self._directory,
            options=options,
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "seal": ocp.JsonCheckpointHandler(),
            },
        )

    def _give_up(self, error: BaseException) -> None:
        """Forgets a failed save: Orbax would go on to list it, and to raise its error."""
        error.add_note(f"while saving step {self._saving} in {self._directory}")
        self._saving = None
        self._manager = self._open()


def read_seal(folder: epath.Path) -> dict[str, Any]:
    """What the checkpoint in `folder` is: its format, step, position and leaves.

    A leaf's name stands before its shape, dtype and fingerprint. OSError or ValueError where the
    seal cannot be read.
    """
    return storage.unseal(storage.read_bytes(folder / "seal" / "metadata"))


class DamagedError(ValueError):
    """A checkpoint is not what was saved."""


def read_part(folder: epath.Path, abstract: Any, prefix: str = "") -> tuple[Any, dict[str, int]]:
    """A part of the state in a step's folder: the leaves whose names begin with `prefix`.

    `abstract` is the part's tree of `jax.ShapeDtypeStruct` with shardings. With it come the leaves'
    fingerprints by name. DamagedError where they cannot be read or are not what was saved;
    ValueError for another format or another part.
    """
    leaves = _named_leaves(abstract)
    wanted = {f"{prefix}{name}": leaf for name, leaf in leaves.items()}
    try:
        body = read_seal(folder)
    except (OSError, ValueError) as error:
        raise DamagedError(f"its seal cannot be read: {_first_line(error)}") from error
    require_format(body, f"checkpoint {folder}")
    saved = {name: leaf[:2] for name, leaf in body["leaves"].items() if name.startswith(prefix)}
    for name in sorted({*saved, *wanted}):
        asked = _kind(wanted[name]) if name in wanted else "nothing"
        if saved.get(name, "nothing") != asked:
            raise ValueError(
                f"checkpoint {folder} holds another model: {name} is {saved.get(name, 'nothing')} "
                f"there, asked for {asked}"
            )
    try:
        arrays = _read_arrays(folder / "state", wanted)
    except (OSError, ValueError) as error:
        raise DamagedError(f"its arrays cannot be read: {_first_line(error)}") from error
    prints = fingerprint.of_arrays(arrays)
    wrong = [name for name in prints if prints[name] != body["leaves"][name][2]]
    if wrong:
        raise DamagedError(f"{len(wrong)} arrays differ from what was saved, {wrong[0]} among them")
    tree = jax.tree.unflatten(
        jax.tree.structure(abstract), [arrays[f"{prefix}{name}"] for name in leaves]
    )
    return tree, {name.removeprefix(prefix): found for name, found in prints.items()}


def require_format(body: Mapping[str, Any], where: str) -> None:
    """ValueError where a seal is of a format that this program does not read."""
    if body["format"] != FORMAT_VERSION:
        raise ValueError(
            f"{where} has format {body['format']}; this program reads {FORMAT_VERSION}: use "
            "the program that wrote it"
        )


def num_stacked(name: str, leaf: Any) -> int:
    """How many leading axes of a leaf count layers, and experts: a chunk spans no two of them."""
    *parents, last = name.split(".")
    if not leaf.ndim or not {"dense", "sparse", "mtp"} & set(parents):
        return 0
    return min(leaf.ndim, 2 if last.startswith("experts_") else 1)


def array_spec(folder: epath.Path, name: str) -> dict[str, Any]:
    """How TensorStore finds the leaf `name` in a checkpoint's folder of arrays."""
    url = os.fspath(folder) if "://" in os.fspath(folder) else f"file://{os.path.abspath(folder)}"
    return {
        "driver": "zarr",
        "kvstore": {"driver": "ocdbt", "base": f"{url}/", "path": f"{name}/"},
    }


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by their path, `params.layers.kernel`, in the order of the tree."""
    named = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if not name or name in named:
            raise ValueError(f"state leaf {name!r}: leaves need different names, and one each")
        named[name] = leaf
    if not named:
        raise ValueError("the state has no leaves")
    return named


def _kind(leaf: Any) -> list[Any]:
    return [list(leaf.shape), str(leaf.dtype)]


def _read_arrays(folder: epath.Path, wanted: Mapping[str, Any]) -> dict[str, jax.Array]:
    """What Orbax wrote there, in the shardings of `wanted`; each process reads its own pieces.

    Orbax's own restore runs all reads as one, and leaves the others behind when one fails;
    TensorStore alone says what is wrong with an array, and lets go.
    """
    opened = {
        name: tensorstore.open(
            array_spec(folder, name) | {"fill_missing_data_reads": False}, open=True
        )
        for name, leaf in wanted.items()
        if math.prod(leaf.shape)
    }
    stores = _results(opened)
    return {name: _read_array(stores.get(name), leaf) for name, leaf in wanted.items()}


def _read_array(store: Any, leaf: Any) -> jax.Array:
    places = leaf.sharding.addressable_devices_indices_map(leaf.shape)
    if store is None:  # empty, so not in the store
        pieces = {str(index): np.zeros(leaf.shape, leaf.dtype)[index] for index in places.values()}
    else:
        pieces = _results({str(index): store[index].read() for index in places.values()})
    local = [
        jax.device_put(pieces[str(index)], device, may_alias=False)
        for device, index in places.items()
    ]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, local)


def _results(futures: Mapping[str, Any]) -> dict[str, Any]:
    """All results; the first error is raised once every future has ended."""
    errors = [error for error in (future.exception() for future in futures.values()) if error]
    if errors:
        raise errors[0]
    return {name: future.result() for name, future in futures.items()}


def _require_json(position: Mapping[str, Any]) -> dict[str, Any]:
    try:
        back = json.loads(json.dumps(position, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"position {position!r:.200} is no JSON object: {error}") from error
    if back != position:
        raise ValueError(
            f"position {position!r:.200} is read back as {back!r:.200}; use lists, not tuples, "
            "and text as keys"
        )
    return back


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def _agree(complaint: str) -> str:
    """`complaint`, or another process's where this one has none: all fall back, or none."""
    if jax.process_count() == 1:
        return complaint
    others = multihost_utils.process_allgather(np.array(bool(complaint)))
    if others.any() and not complaint:
        return f"damaged for process {int(others.argmax())}"
    return complaint
