"""Programs compiled for TPUs that are not there, by the libtpu that tools/test.sh puts aside.

Two layers of DeepSeek-V3.2 on 1,024 chips, all of them by experiments/pods/run.sh; and two of
quick.py, with every program of its step, on four.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIBTPU = pathlib.Path(sys.prefix) / "libtpu"

pytestmark = pytest.mark.skipif(
    not (LIBTPU / "complete").exists(), reason="there is no libtpu: run tools/test.sh"
)


def on_libtpu(*arguments):
    environment = {
        k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
    }
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(LIBTPU)])
    # A TPU's programs are as good as never in the tests' cache, and large.
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_two_layers_of_v32_compile_for_a_thousand_chips_and_fit(tmp_path):
    to = tmp_path / "result.json"
    done = on_libtpu(
        "-m",
        "mathv2_jax.cli.compile",
        "--config=configs/deepseek_v32.py",
        "--topology=v5p:8x8x16",
        "--max_layers=2",
        "--programs=logprobs,update,decode",
        f"--json={to}",
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout
    found = json.loads(to.read_text())
    assert found["layers"] == 2 and found["mesh"]["expert"] == 64
    flops = found["experts"]["flops"]
    # 128 tiles of 256 rows, and one more for each expert but the first.
    kernels = found["experts"]["of_kernels"]
    assert kernels["8"] / kernels["2"] == (128 + 7) / (128 + 1)
    assert not found["experts"]["scales"] and flops["8"] < 1.06 * flops["2"]
    passed = found["programs"]["logprobs"]
    assert passed["fits"] and passed["loops_of_unknown_length"] == []
    sent = passed["collective_bytes_per_chip"]
    assert sent["ragged-all-to-all"] > 0 and sent["all-gather"] > 0
    # 32 rows of 4,096 tokens in two layers: a copy of the latents alone takes more.
    assert found["programs"]["decode"]["temp_bytes_per_chip"] < 2 * 32 * 4096 * 576 * 2


@pytest.mark.parametrize(
    ("config", "topology", "most"),
    [("deepseek_v32", "v5p:8x8x16", 1.45), ("moonlight_16b", "v6e:4x4", 1.42)],
)
def test_the_gradients_execute_little_beyond_the_models_flops(tmp_path, config, topology, most):
    """All layers, with the tiles of TPUs' kernels; full recomputation alone is 1.33."""
    to = tmp_path / "result.json"
    done = on_libtpu(
        "-m",
        "mathv2_jax.cli.compile",
        f"--config=configs/{config}.py",
        f"--topology={topology}",
        "--programs=gradients",
        "--lower_only",
        f"--json={to}",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    train = json.loads(to.read_text())["programs"]["gradients"]
    assert 1.33 < train["executed_over_model"] <= most
    edges = train["executed_flops_per_chip"]["edges_of_tiles"]
    assert 0.01 < edges / train["model_flops_per_chip_total"] < 0.05
    named = sum(sum(passes.values()) for passes in train["excess_flops_per_chip"].values())
    beyond = train["executed_flops_per_chip_total"] - train["model_flops_per_chip_total"]
    assert named == pytest.approx(beyond, rel=1e-9)


def test_the_whole_step_of_quick_compiles_for_a_few_chips(tmp_path):
    """Of two layers. Its widths are below the TPU kernels' tiles: by libtpu 0.0.42 its experts'
    products grow, which the exit code says; by 0.0.48 they do not.
    """
    to = tmp_path / "result.json"
    done = on_libtpu(
        "-m",
        "mathv2_jax.cli.compile",
        "--config=configs/quick.py",
        "--topology=v5e:2x2",
        "--max_layers=2",
        "--config.runtime.mesh.data=2",
        "--config.runtime.mesh.fsdp=2",
        f"--json={to}",
    )
    found = json.loads(to.read_text())
    assert set(found["programs"]) == {"gradients", "update", "logprobs", "prefill", "decode"}
    for name, program in found["programs"].items():
        assert program["fits"] is True, (name, done.stderr[-3000:])
        assert program["loops_of_unknown_length"] == []
        sent = program["collective_bytes_per_chip"]
        assert sent != "unknown" and sum(sent.values()) > 0, name
        assert program["executed_over_model"] is None or program["executed_over_model"] > 1.0
    assert {phase["fits"] for phase in found["phases"].values()} == {True}
    assert done.returncode == int(found["experts"]["scales"]), done.stderr[-3000:]
    flops = found["experts"]["flops"]
    assert found["experts"]["scales"] == (flops["8"] > 1.5 * flops["2"])


PROGRAM = """
import jax
from mathv2_jax import sharding
from mathv2_jax.cli import compile as compile_lib
jax.config.update("jax_platforms", "cpu")
compile_lib._devices("v5p:2x2x2")  # sets what libtpu must not look for
from jax.experimental import topologies
found = topologies.get_topology_desc(
    platform="tpu", topology_name="v5p:2x2x2", num_slices=2
).devices
mesh = sharding.make_mesh(sharding.MeshConfig(data=4, fsdp=4), found)
for at in range(4):
    print(at, {device.slice_index for device in mesh.devices[at].flat})
try:
    sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=16), found)
except ValueError as error:
    print(error)
"""


def test_slices_lie_along_data_alone():
    done = on_libtpu("-c", PROGRAM)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [
        "0 {0}",
        "1 {0}",
        "2 {1}",
        "3 {1}",
        "mesh data=1: 2 slices lie along data, so its size must be a multiple of their number",
    ]
