"""mathv2-compile, on this machine's own devices in the place of a topology's."""

import json
import pathlib

import jax
import pytest

from mathv2_jax.cli import compile as compile_lib
from mathv2_jax.cli import shell, source
from mathv2_jax.pods import chips

ROOT = pathlib.Path(__file__).resolve().parents[2]
MESH = [f"--config.runtime.mesh.{axis}=2" for axis in ("data", "expert", "tensor")]
SMOKE = [f"--config={ROOT / 'configs' / 'smoke.py'}", *MESH]
POD = f"--config={ROOT / 'configs' / 'deepseek_v32.py'}"


@pytest.fixture
def command(capsys, monkeypatch):
    """The command in this process: (exit code, what it printed, its errors)."""
    monkeypatch.setattr(compile_lib, "_devices", lambda topology: jax.devices())

    def run(*arguments):
        for name in compile_lib._OWN:
            compile_lib._OWN[name].unparse()
        code = compile_lib.main(["mathv2-compile", *arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_every_program_and_phase_is_reported(command, tmp_path):
    to = tmp_path / "result.json"
    code, out, err = command(*SMOKE, "--topology=v5p:2x2x2", f"--json={to}")
    assert code == shell.FINISHED, err
    found = json.loads(to.read_text())
    assert list(found["programs"]) == ["decode", "gradients", "logprobs", "prefill", "update"]
    for name, program in found["programs"].items():
        assert program["fits"] is True and f"{name}: " in out
        assert program["peak_bytes_per_chip"] > program["argument_bytes_per_chip"] * 0.99
        assert program["collective_bytes_per_chip"], name
        assert (program["model_flops_per_chip_total"] > 0) == (name != "update")
        assert program["roofline"]["without_overlap_seconds"] > 0
    train = found["programs"]["gradients"]
    assert train["executed_flops_per_chip"]["routed_experts"] > 0
    assert 1.0 < train["executed_over_model"] < 3.0
    assert {p["fits"] for p in found["phases"].values()} == {True}
    assert found["mesh"]["expert"] == 2 and found["versions"]["jax"] == jax.__version__
    assert found["command"] == ["mathv2-compile", *SMOKE, "--topology=v5p:2x2x2", f"--json={to}"]
    assert found["commit"] == source.commit() and "no upper bound" in found["rooflines_are"]
    assert "update: " in out and "no FLOPs of the model; collectives" in out and ", ;" not in out


def test_an_experts_product_that_grows_with_their_number_is_a_failure(command, tmp_path):
    some = [*SMOKE, "--topology=v5p:2x2x2", "--programs=update"]
    to = tmp_path / "result.json"
    code, out, _ = command(*some, "--config.runtime.model_kernels=every_expert", f"--json={to}")
    assert code == shell.FAILED and "for 8: grow with their number" in out
    flops = json.loads(to.read_text())["experts"]["flops"]
    assert flops["8"] == pytest.approx(4 * flops["2"], rel=0.05)
    code, out, err = command(*some, "--config.runtime.model_kernels=sorted_blocks")
    assert code == shell.FINISHED and "for 8: do not grow with it" in out, err


def test_lowering_alone_counts_flops_of_the_whole_model(command, tmp_path):
    to = tmp_path / "result.json"
    code, out, err = command(
        POD,
        "--topology=v5p:2x2x2",
        "--lower_only",
        "--programs=gradients",
        "--config.runtime.mesh.fsdp=2",
        "--config.runtime.mesh.expert=4",
        "--config.runtime.sampling=None",
        f"--json={to}",
    )
    assert code == shell.FINISHED, err
    found = json.loads(to.read_text())
    assert found["parameters"] == pytest.approx(671.88e9, rel=1e-5) and found["layers"] == 61
    train = found["programs"]["gradients"]
    assert train["executed_over_model"] < 1.45 and train["fits"] is None
    assert train["loops_of_unknown_length"] == []
    assert found["phases"]["training"]["fits"] is None and "not compiled" in out


def test_a_row_of_131072_tokens_costs_no_square_of_it(command, tmp_path):
    to = tmp_path / "result.json"
    code, out, err = command(
        f"--config={ROOT / 'configs' / 'deepseek_v32_128k.py'}",
        "--topology=v5p:2x2x2",
        "--lower_only",
        "--programs=gradients",
        "--config.runtime.mesh.expert=4",
        "--config.runtime.mesh.context=2",
        "--config.runtime.sampling=None",
        f"--json={to}",
    )
    assert code == shell.FINISHED, err
    train = json.loads(to.read_text())["programs"]["gradients"]
    assert train["executed_over_model"] < 1.7 and train["loops_of_unknown_length"] == []
    executed, model = train["executed_flops_per_chip"], train["model_flops_per_chip"]
    assert executed["indexer"] < 1.2 * model["indexer"]  # 9 / 8 of a triangle, picked once


def test_a_model_can_be_cut_short_and_a_stage_chosen(command):
    some = ["--topology=v5p:2x2x2", "--lower_only", "--programs=update"]
    small = [
        "--config.runtime.mesh.fsdp=2",
        "--config.runtime.mesh.expert=4",
        "--config.runtime.sampling=None",
    ]
    code, out, err = command(POD, *some, *small, "--max_layers=2", "--stage=verifier-0")
    assert code == shell.FINISHED, err
    assert "13.97 B parameters" in out and "phase judging" not in out


BAD = {
    "--topology=... must be given": SMOKE,
    "--config=... must be given": ["--topology=v5p:2x2x2"],
    "one of v5e, v5p": [*SMOKE, "--topology=v9:2x2"],
    "must be CHIP:SHAPE": ["--topology=v5p-garbage", "--xla_flags"],
    "its folder is not there": [*SMOKE, "--topology=v5p:2x2x2", "--json=nowhere/result.json"],
    "'update' is given 2 times": [*SMOKE, "--topology=v5p:2x2x2", "--programs=update,update"],
    "has no shape to compile for: write v5p:SHAPE": [*SMOKE, "--topology=v5p-8"],
    "none of gradients, update": [*SMOKE, "--topology=v5p:2x2x2", "--programs=gradient"],
    "none of the RL stages": [*SMOKE, "--topology=v5p:2x2x2", "--stage=sft"],
    "at least 2": [*SMOKE, "--topology=v5p:2x2x2", "--max_layers=1"],
    "Unknown command line flag": [*SMOKE, "--topologie=v5p:2x2x2"],
    "does not fit 8 devices": [POD, "--topology=v5p:2x2x2"],
    "cannot be split 8 ways": [SMOKE[0], "--topology=v5p:2x2x2", "--config.runtime.mesh.data=8"],
}


@pytest.mark.parametrize(("said", "arguments"), BAD.items(), ids=BAD)
def test_bad_usage_is_one_line_and_exit_code_2(command, said, arguments):
    code, _, err = command(*arguments)
    assert code == shell.BAD_INPUT and said in err and err.count("\n") == 1


def test_flags_of_xla_are_the_chips_in_every_form_of_its_name(command):
    said = {
        name: command(f"--topology={name}", "--xla_flags") for name in ("v6e", "v6e-16", "v6e:4x4")
    }
    assert set(said.values()) == {(0, " ".join(chips.CHIPS["v6e"].xla_flags) + "\n", "")}
    assert command("--topology=7x", "--xla_flags") == command("--topology=tpu7x-8", "--xla_flags")


def test_a_missing_folder_of_the_result_is_not_made(command, tmp_path):
    to = tmp_path / "missing" / "result.json"
    code, out, _ = command(*SMOKE, "--topology=v5p:2x2x2", f"--json={to}")
    assert code == shell.BAD_INPUT and not out and not to.parent.exists()


REFUSED = "INTERNAL: Mosaic failed to compile TPU kernel: unsupported shape\nat line 7 of it\n"


def test_a_compilers_fault_is_one_line_and_exit_code_1(command, monkeypatch, tmp_path):
    """The other programs are compiled all the same."""
    compiled = jax.stages.Lowered.compile

    def failing(lowered, *args, **settings):
        if "logprobs" in lowered.as_text().partition("\n")[0]:
            raise jax.errors.JaxRuntimeError(REFUSED)
        return compiled(lowered, *args, **settings)

    monkeypatch.setattr(jax.stages.Lowered, "compile", failing)
    to = tmp_path / "result.json"
    some = [*SMOKE, "--topology=v5p:2x2x2", "--programs=logprobs,update"]
    code, out, err = command(*some, f"--json={to}")
    (line,) = [line for line in out.splitlines() if line.startswith("logprobs: ")]
    assert code == shell.FAILED and not err
    assert (
        line.startswith("logprobs: the compiler failed: INTERNAL: Mosaic") and "line 7" not in out
    )
    found = json.loads(to.read_text())["programs"]
    assert found["logprobs"]["fits"] is None and found["logprobs"]["why"] in line
    assert found["update"]["fits"] is True


def test_a_compilers_fault_at_the_experts_product_is_one_line_too(command, monkeypatch):
    def failing(*args):
        raise jax.errors.JaxRuntimeError(REFUSED)

    monkeypatch.setattr(compile_lib.experts, "flops_by_experts", failing)
    code, _, err = command(*SMOKE, "--topology=v5p:2x2x2", "--programs=update")
    assert code == shell.FAILED and err.count("\n") == 1
    assert err.startswith("mathv2-compile: the compiler failed: INTERNAL: Mosaic")


def test_a_program_that_does_not_fit_is_exit_code_1(command, monkeypatch, tmp_path):
    chip = compile_lib.chips.CHIPS["v5e"]
    tiny = {"v5e": type(chip)(**{**vars(chip), "hbm_bytes": 1000.0})}
    monkeypatch.setattr(compile_lib.chips, "CHIPS", tiny)
    code, out, _ = command(*SMOKE, "--topology=v5e:2x4", "--programs=update")
    assert code == shell.FAILED and "does not fit" in out


def test_without_libtpu_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(compile_lib.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"mathv2_jax\[tpu\]"):
        compile_lib._devices("v5p:2x2x1")


def test_what_was_measured_before_a_failure_is_on_disk(command, tmp_path, monkeypatch):
    measured = compile_lib.measure.measured

    def failing(program, *args, **settings):
        if program.name == "update":
            raise RuntimeError("out of luck")
        return measured(program, *args, **settings)

    monkeypatch.setattr(compile_lib.measure, "measured", failing)
    to = tmp_path / "result.json"
    with pytest.raises(RuntimeError, match="out of luck"):
        command(*SMOKE, "--topology=v5p:2x2x2", f"--json={to}", "--lower_only")
    assert list(json.loads(to.read_text())["programs"]) == ["gradients"]
