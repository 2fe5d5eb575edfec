"""A run whose engines speak by a script."""

import functools
import pathlib
from collections.abc import Callable
from typing import Protocol

import jax
import pytest
from etils import epath

from mathv2_jax import sharding
from mathv2_jax.rl import learner as learner_lib
from mathv2_jax.stages import run as run_lib
from tests import by_hand, scripted


@pytest.fixture(scope="session")
def house():
    return scripted.build([*by_hand.VERDICTS.values(), *by_hand.RATINGS.values(), by_hand.NOISE])


class MakeRun(Protocol):
    def __call__(self, **models: scripted.Script) -> run_lib.Run: ...


@pytest.fixture(scope="session")
def make_run_in(house) -> Callable[..., run_lib.Run]:
    """A run in a folder, in which each named stage has left a model that speaks by its script."""

    def make(folder: pathlib.Path, **models: scripted.Script) -> run_lib.Run:
        run = run_lib.Run(
            workdir=epath.Path(folder),
            seed=0,
            trunk=learner_lib.Trunk(config=house.programs.config, kernels=house.programs.kernels),
            tokenizer=house.tokenizer,
            roles=scripted.ROLES,
            mesh=sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1]),
            engine_config=scripted.LIMITS,
            runtime=run_lib.RuntimeConfig(save_every=1),
            router_bias_rate=0.0,
        )
        run.policy, run.judge = house.replicas(), house.replicas()  # compiled once for all
        for stage, script in models.items():
            run.keep_variables(stage, house.variables(script), 0)
        return run

    return make


@pytest.fixture
def make_run(make_run_in, tmp_path) -> MakeRun:
    """Such a run in the test's own folder."""
    return functools.partial(make_run_in, tmp_path)
