import contextlib
import logging as std_logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from etils import epath
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mathv2_jax import checkpoint, storage


class State(NamedTuple):
    """A train state in small: every dtype that one holds, empty and scalar leaves too."""

    params: dict[str, jax.Array]
    moments: tuple[dict[str, jax.Array], None]
    step: jax.Array


def make_state(seed, shardings=None):
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(16, 24)).astype(np.float32)
    kernel[0, :4] = [np.nan, np.inf, -0.0, 1e-42]  # bits that a comparison of values misses
    params = {
        "kernel": jnp.asarray(kernel),
        "bias": jnp.asarray(rng.normal(size=(24,)), jnp.bfloat16),
        "kept": jnp.asarray(rng.integers(0, 2, (16, 5)), bool),
        "experts": jnp.asarray(rng.normal(size=(8, 16, 6)), jnp.float32),
        "none": jnp.zeros((0, 3), jnp.float32),
    }
    moments = ({"kernel": jnp.asarray(rng.normal(size=(16, 24)), jnp.float32)}, None)
    state = State(params, moments, jnp.asarray(seed, jnp.int32))
    return state if shardings is None else jax.device_put(state, shardings)


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def bits(state):
    return jax.tree.map(lambda x: (str(x.dtype), x.shape, np.asarray(x).tobytes()), state)


def save(folder, *steps, **kwargs):
    with checkpoint.Checkpoints(folder, **kwargs) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), {"row": step})


def restore(folder, step=None):
    with checkpoint.Checkpoints(folder) as checkpoints:
        return checkpoints.restore(abstract(make_state(0)), step)


def assert_restores(folder, step, state=None):
    found = restore(folder)
    assert found is not None and found[1:] == ({"row": step}, step)
    assert bits(found[0]) == bits(make_state(step) if state is None else state)


def test_what_is_restored_is_bit_for_bit_what_was_saved(tmp_path):
    save(tmp_path / "new" / "folder", 1, 2)
    assert_restores(tmp_path / "new" / "folder", 2)
    assert isinstance(restore(tmp_path / "new" / "folder")[0], State)


def test_a_folder_without_checkpoints_gives_none(tmp_path):
    assert restore(tmp_path / "nowhere") is None
    assert not (tmp_path / "nowhere").exists()
    with checkpoint.Checkpoints(tmp_path / "nowhere") as checkpoints:
        assert checkpoints.latest_step() is None


def split(mesh_shape, state):
    """Shardings over eight devices: the last axis that divides over "y", the first over "x"."""
    mesh = jax.make_mesh(mesh_shape, ("x", "y"), axis_types=(AxisType.Auto,) * 2)

    def of(leaf):
        names = [None] * leaf.ndim
        if leaf.ndim and leaf.shape[-1] % mesh_shape[1] == 0:
            names[-1] = "y"
        if leaf.ndim > 1 and leaf.shape[0] % mesh_shape[0] == 0:
            names[0] = "x"
        return NamedSharding(mesh, PartitionSpec(*names))

    return jax.tree.map(of, state)


@pytest.mark.parametrize("shape", [(1, 8), (8, 1), (4, 2)])
def test_another_sharding_restores_the_same_bits(tmp_path, shape):
    state = make_state(3)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, make_state(3, split((2, 4), state)), {"row": 3})
        shardings = split(shape, state)
        want = jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            state,
            shardings,
        )
        found, _, _ = checkpoints.restore(want)
        assert bits(found) == bits(state)
        chex.assert_trees_all_equal(jax.tree.map(lambda x: x.sharding, found), shardings)
        assert bits(checkpoints.restore(abstract(state))[0]) == bits(state)


def test_the_state_may_be_donated_once_save_returns(tmp_path):
    spoil = jax.jit(
        lambda s: jax.tree.map(lambda x: ~x if x.dtype == bool else x * 0, s), donate_argnums=0
    )
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        for step in range(5):
            state = make_state(step)
            checkpoints.save(step, state, {"row": step})
            jax.block_until_ready(spoil(state))
            checkpoints.wait()
            assert bits(checkpoints.restore(abstract(make_state(0)))[0]) == bits(make_state(step))


def test_the_newest_are_kept_and_the_milestones(tmp_path):
    save(tmp_path / "a", *range(1, 9))
    assert sorted(os.listdir(tmp_path / "a")) == ["7", "8"]
    save(tmp_path / "b", *range(1, 9), keep=1, every=3)
    assert sorted(os.listdir(tmp_path / "b")) == ["3", "6", "8"]


def test_a_given_step_is_restored_or_none(tmp_path):
    save(tmp_path, 1, 2, keep=3)
    assert restore(tmp_path, 1)[1:] == ({"row": 1}, 1)
    with pytest.raises(ValueError, match=r"no checkpoint of step 7 in .*; there are \[2, 1\]"):
        restore(tmp_path, 7)
    damage(tmp_path / "2" / "seal" / "metadata", "truncate")
    with pytest.raises(ValueError, match="no sound checkpoint in .*step 2: its seal"):
        restore(tmp_path, 2)


def test_going_back_drops_the_steps_beyond(tmp_path):
    save(tmp_path, 10, 20, 30, keep=5)
    with checkpoint.Checkpoints(tmp_path, keep=5) as checkpoints:
        checkpoints.restore(abstract(make_state(0)), 10)
        checkpoints.save(20, make_state(99), {"row": 20})
    assert sorted(os.listdir(tmp_path)) == ["10", "20"]
    assert_restores(tmp_path, 20, make_state(99))


def test_a_reader_leaves_a_save_in_progress_alone(tmp_path):
    save(tmp_path, 1)
    draft = tmp_path / "2.orbax-checkpoint-tmp"
    draft.mkdir()
    assert_restores(tmp_path, 1)
    assert draft.exists()
    save(tmp_path, 3)
    assert not draft.exists()


# Refusals.


def test_a_checkpoint_of_another_state_is_refused_by_the_name_of_a_leaf(tmp_path):
    save(tmp_path, 1)
    other = make_state(0)._replace(step=jnp.zeros((2,), jnp.int32))
    with (
        checkpoint.Checkpoints(tmp_path) as checkpoints,
        pytest.raises(
            ValueError, match=r"of another state: 1 leaves differ, first step: saved \[\[\]"
        ),
    ):
        checkpoints.restore(abstract(other))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_a_checkpoint_of_another_dtype_is_refused(tmp_path, dtype):
    save(tmp_path, 1)
    state = make_state(0)
    state.params["bias"] = state.params["bias"].astype(dtype)
    with (
        checkpoint.Checkpoints(tmp_path) as checkpoints,
        pytest.raises(ValueError, match=r"first params.bias: saved \[\[24\], 'bfloat16'\]"),
    ):
        checkpoints.restore(abstract(state))


def test_a_checkpoint_of_another_format_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT_VERSION", 2)
        save(tmp_path, 1)
    with pytest.raises(ValueError, match="has format 2; this program reads 1"):
        restore(tmp_path)


@pytest.mark.parametrize(
    ("position", "rule"),
    [
        ({"a": (1, 2)}, "not tuples"),
        ({"a": {1: 2}}, "text as keys"),
        ({"a": float("nan")}, "no JSON"),
    ],
)
def test_a_position_that_json_would_change_is_refused(tmp_path, position, rule):
    with (
        checkpoint.Checkpoints(tmp_path) as checkpoints,
        pytest.raises(ValueError, match=rule),
    ):
        checkpoints.save(1, make_state(1), position)


@pytest.mark.parametrize("leaf", [3, np.zeros(3), jax.random.key(0)])
def test_a_leaf_that_is_no_numeric_jax_array_is_refused(tmp_path, leaf):
    with (
        checkpoint.Checkpoints(tmp_path) as checkpoints,
        pytest.raises(ValueError, match="state leaf a is .*, not a numeric jax array"),
    ):
        checkpoints.save(1, {"a": leaf}, {})


def test_a_leaf_without_a_sharding_is_refused(tmp_path):
    with (
        checkpoint.Checkpoints(tmp_path) as checkpoints,
        pytest.raises(ValueError, match="state leaf a has no sharding"),
    ):
        checkpoints.restore({"a": jax.ShapeDtypeStruct((3,), jnp.float32)})


# Damage.


def damage(path, how):
    data = path.read_bytes()
    if how == "delete":
        path.unlink()
    else:
        path.write_bytes({"truncate": data[: len(data) // 2], "zero": bytes(len(data))}[how])


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Checkpoints of steps 1 and 2, and one of each kind of file in them."""
    folder = tmp_path_factory.mktemp("two")
    save(folder, 1, 2)
    return folder


# The files that hold what is restored; Orbax writes others, that nothing here reads.
NEEDED = {
    "state/manifest.ocdbt": ("truncate", "zero", "delete"),
    "state/d/*": ("truncate", "zero", "delete"),
    "state/ocdbt.process_0/d/*": ("truncate", "zero", "delete"),
    "seal/metadata": ("truncate", "zero", "delete"),
}


@pytest.mark.parametrize(("kind", "how"), [(k, how) for k, hows in NEEDED.items() for how in hows])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(two, tmp_path, caplog, kind, how):
    shutil.copytree(two, tmp_path / "run")
    files = sorted((tmp_path / "run" / "2").glob(kind))
    assert files
    for path in files:
        damage(path, how)
    with caplog.at_level(std_logging.WARNING):
        assert_restores(tmp_path / "run", 1)
    messages = [r.getMessage() for r in caplog.records if "run: " in r.getMessage()]
    assert len(messages) == 1 and "step 2" in messages[0]


def test_no_damage_to_any_one_file_goes_unseen(two, tmp_path):
    """Either the newest checkpoint comes back bit for bit, or the one before it."""
    fallen = []
    for path in sorted(p for p in (two / "2").rglob("*") if p.is_file()):
        for how in ("truncate", "zero", "delete"):
            folder = tmp_path / str(len(fallen))
            shutil.copytree(two, folder)
            damage(folder / path.relative_to(two), how)
            found, position, step = restore(folder)
            assert bits(found) == bits(make_state(step)) and position == {"row": step}
            fallen.append(step)
    assert fallen.count(1) >= 12 and set(fallen) == {1, 2}


def test_zeros_that_tensorstore_reads_without_complaint_are_damage(two, tmp_path, caplog):
    """A checkpoint whose every file is sound, and one array is not what was saved."""
    shutil.copytree(two, tmp_path / "run")
    base = {"driver": "ocdbt", "base": f"file://{tmp_path}/run/2/state/", "path": "params.kernel/"}
    array = tensorstore.open({"driver": "zarr", "kvstore": base}).result()
    array[3, 5].write(np.float32(0)).result()
    with caplog.at_level(std_logging.WARNING):
        assert_restores(tmp_path / "run", 1)
    assert "step 2: 1 arrays differ from what was saved, params.kernel among them" in caplog.text
    assert "falling back to step 1" in caplog.text


def test_checkpoints_that_are_all_damaged_are_an_error(two, tmp_path):
    shutil.copytree(two, tmp_path / "run")
    damage(tmp_path / "run" / "2" / "seal" / "metadata", "zero")
    damage(tmp_path / "run" / "1" / "state" / "manifest.ocdbt", "truncate")
    with pytest.raises(
        ValueError, match="no sound checkpoint in .*step 2: its seal.*step 1: its arrays"
    ):
        restore(tmp_path / "run")


@pytest.mark.parametrize("next_step", [2, 3])
def test_a_run_goes_on_past_a_damaged_checkpoint(two, tmp_path, next_step):
    folder = tmp_path / "run"
    shutil.copytree(two, folder)
    damage(folder / "2" / "state" / "manifest.ocdbt", "truncate")
    with checkpoint.Checkpoints(folder) as checkpoints:
        assert checkpoints.restore(abstract(make_state(0)))[2] == 1
        assert checkpoints.latest_step() == 1
        checkpoints.save(next_step, make_state(next_step), {"row": next_step})
    assert sorted(os.listdir(folder)) == ["1", str(next_step)]
    assert_restores(folder, next_step)


# Saves that fail, and processes that end.


class DiskFullError(OSError):
    pass


@pytest.mark.parametrize("then", ["save", "wait", "latest_step", "close"])
def test_a_save_that_fails_in_the_background_is_raised_by_the_next_call(
    tmp_path, monkeypatch, then
):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(1, make_state(1), {"row": 1})
    checkpoints.wait()
    with monkeypatch.context() as patch:
        break_finalizing(patch)
        checkpoints.save(2, make_state(2), {"row": 2})
        calls = {
            "save": lambda: checkpoints.save(3, make_state(3), {"row": 3}),
            "wait": checkpoints.wait,
            "latest_step": checkpoints.latest_step,
            "close": checkpoints.close,
        }
        with pytest.raises(DiskFullError, match="disk full") as caught:
            calls[then]()
    assert caught.value.__notes__ == [f"while saving step 2 in {tmp_path}"]
    assert_restores(tmp_path, 1)
    if then != "close":
        assert checkpoints.latest_step() == 1
        for step in (2, 3):  # nothing is skipped afterwards
            checkpoints.save(step, make_state(step), {"row": step})
        checkpoints.close()
    else:
        save(tmp_path, 2, 3)
    assert sorted(os.listdir(tmp_path)) == ["2", "3"]
    assert_restores(tmp_path, 3)


def break_finalizing(patch):
    """Lets the background part of Orbax's saves fail where it makes the checkpoint final."""

    def full(source, target, *args, **kwargs):
        raise DiskFullError("disk full")

    patch.setattr(os, "rename", full)


def test_a_save_that_fails_at_once_leaves_the_ones_before(tmp_path, monkeypatch):
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1), {"row": 1})
        checkpoints.wait()
        with monkeypatch.context() as patch:

            def full(path, *args, **kwargs):
                raise DiskFullError("disk full")

            patch.setattr(os, "mkdir", full)
            with pytest.raises(DiskFullError, match="disk full"):
                checkpoints.save(2, make_state(2), {"row": 2})
                checkpoints.wait()
        assert checkpoints.latest_step() == 1
        checkpoints.save(2, make_state(2), {"row": 2})
    assert_restores(tmp_path, 2)


def test_a_process_killed_between_any_two_writes_leaves_a_readable_store(tmp_path, monkeypatch):
    """The folder is copied before each change that Python makes to it, background threads' too."""
    folder, copies = tmp_path / "run", []
    one_at_a_time = threading.RLock()  # copytree itself calls os.mkdir

    def copy_file(source, target):
        # tensorstore's threads come and go with files of their own while this one copies.
        with contextlib.suppress(FileNotFoundError):
            shutil.copy2(source, target)

    def watched(function):
        def call(path, *args, **kwargs):
            with one_at_a_time:
                if str(path).startswith(str(folder)):
                    copies.append(tmp_path / f"copy-{len(copies)}")
                    shutil.copytree(folder, copies[-1], copy_function=copy_file)
                return function(path, *args, **kwargs)

        return call

    save(folder, 1, 2)
    with monkeypatch.context() as patch:
        for name in ("mkdir", "rename", "unlink", "rmdir", "remove"):
            patch.setattr(os, name, watched(getattr(os, name)))
        save(folder, 3)
    assert len(copies) > 8
    steps = []
    for copy in copies:
        found, position, step = restore(copy)
        assert bits(found) == bits(make_state(step)) and position == {"row": step}
        steps.append(step)
    assert steps == sorted(steps) and set(steps) == {2, 3}
    for copy in copies[::3]:
        save(copy, 3)
        assert_restores(copy, 3)


def test_a_process_killed_while_it_saves_leaves_a_readable_store(tmp_path):
    program = (
        "import sys; sys.path.insert(0, sys.argv[2]); import test_checkpoint as t\n"
        "t.save(sys.argv[1], *range(1, 100000))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "run"), os.path.dirname(__file__)]
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "run" / "5").exists() and child.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    found, position, step = restore(tmp_path / "run")
    assert step >= 5 and position == {"row": step} and bits(found) == bits(make_state(step))
    save(tmp_path / "run", step + 1)
    assert_restores(tmp_path / "run", step + 1)


def test_a_relative_folder_is_found_by_tensorstore(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = checkpoint.array_spec(epath.Path("runs/a"), "params.x")["kvstore"]["base"]
    assert base == f"file://{tmp_path}/runs/a/"
    on_bucket = checkpoint.array_spec(epath.Path("gs://bucket/a"), "params.x")["kvstore"]["base"]
    assert on_bucket == "gs://bucket/a/"


def test_saving_and_restoring_need_no_implicit_transfers(tmp_path):
    state = make_state(1)
    with checkpoint.Checkpoints(tmp_path) as checkpoints, jax.transfer_guard("disallow"):
        checkpoints.save(1, state, {"row": 1})
        found = checkpoints.restore(abstract(state))
    assert bits(found[0]) == bits(state)
    assert storage.list_names(tmp_path) == ["1"]
