"""Every test runs on eight virtual CPU devices, with JAX at its strictest."""

import gc
import os
import pathlib
from collections.abc import Iterator

import hypothesis
import jax
import pytest

from tests import smoke

# A test's examples are the same in every run, and the first call of a jitted function may be slow.
hypothesis.settings.register_profile("house", derandomize=True, deadline=None)
hypothesis.settings.load_profile("house")

MANY_MAPS = 16_000


def pytest_configure(config: pytest.Config) -> None:
    # In the environment too, so that the processes a test starts inherit them.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Compiled programs outlive the run, in .pytest_cache: `pytest --cache-clear` removes them.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(config.cache.mkdir("jax")))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

    # Most programs run a few times: LLVM's optimisations take longer than they save.
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_backend_optimization_level" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=0".strip()

    jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update(
        "jax_persistent_cache_min_compile_time_secs",
        float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"]),
    )
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List what the parity tests recorded: differences from the reference, and near-ties."""
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.getreports(kind)]
    found = [text for r in reports for name, text in r.user_properties if name == "parity"]
    if found:
        terminalreporter.section("parity with the reference library")
        terminalreporter.write_line("\n".join(sorted(set(found))))


@pytest.fixture(scope="module", autouse=True)
def bounded_memory_maps() -> Iterator[None]:
    """Drop the compiled programs of the modules before, once they are many.

    Each holds several memory maps. Linux gives a process 65,530 (`vm.max_map_count`), a whole run
    comes near that, and at the limit XLA does not raise: it segfaults while it loads a program.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MANY_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def smoke_workdir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """What configs/smoke.py leaves; read-only."""
    return smoke.finished(tmp_path_factory)
