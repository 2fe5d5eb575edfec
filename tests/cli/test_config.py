"""From config files to dataclasses, and what may change when a run goes on."""

import copy
import dataclasses
import pathlib
import shutil

import jax
import pytest

from mathv2_jax.cli import config as config_lib
from mathv2_jax.cli import machine, overrides
from mathv2_jax.model import grouped, transformer

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
CONFIGS = sorted((REPOSITORY / "configs").glob("*.py"))
SWEEPS = sorted((REPOSITORY / "configs" / "sweeps").glob("*.py"))


def smoke(*changes: tuple[str, str]) -> config_lib.RunConfig:
    file = overrides.load(str(REPOSITORY / "configs" / "smoke.py"))
    return config_lib.build(file, [(f"config.{path}", value) for path, value in changes])


# Every config of the repository.


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_builds_and_its_model_evaluates(path):
    loaded = overrides.load(str(path))
    real = [("config.data", "DIR")] if loaded.world is None else []
    config = config_lib.build(loaded, real)
    boxed = transformer.boxed_abstract(config.model, transformer.Kernels())
    params = transformer.unboxed(boxed)["params"]
    assert params["embed"].shape == (config.model.vocab_size, config.model.width)
    assert all(leaf.size for leaf in jax.tree.leaves(params))
    named = {s.name for s in config.stages}
    assert {config.before, config.after} <= named


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_override_of_a_sweep_builds(path):
    module: dict = {}
    exec(compile(path.read_text(), path.name, "exec"), module)
    file = overrides.load(str(REPOSITORY / module["CONFIG"]))
    for entry in module["get_sweep"]().values():
        rest, found = overrides.split([f"--{override}" for override in entry])
        assert not rest
        config_lib.build(file, found)


# Values.


def test_an_override_reaches_a_nested_field_and_one_that_the_file_leaves_unset():
    config = smoke(
        ("world.dials.two_premises", "0.5"),
        ("stage.verifier-0.rl.grpo.kl_coefficient", "0.25"),
        ("world.dials.depth", "(1, 4)"),
        ("router_bias_rate", "0"),
    )
    (stage,) = [s for s in config.stages if s.name == "verifier-0"]
    assert config.world.dials.two_premises == 0.5
    assert stage.rl.grpo.kl_coefficient == 0.25
    assert config.world.dials.depth == (1, 4)
    assert config.router_bias_rate == 0.0 and isinstance(config.router_bias_rate, float)


def test_auxiliary_losses_are_fields_of_a_stage_that_the_model_must_have_the_parts_for():
    path = "stage.sft.sft.auxiliary"
    config = smoke((f"{path}.balance", "1e-4"), ("stage.verifier-0.rl.auxiliary.balance", "1e-3"))
    stages = {s.name: s for s in config.stages}
    assert stages["sft"].sft.auxiliary.balance == 1e-4
    assert stages["verifier-0"].rl.auxiliary.balance == 1e-3
    with pytest.raises(ValueError, match=rf"^config\.{path}\.mtp = 0\.1: .*num_mtp_layers is 0"):
        smoke((f"{path}.mtp", "0.1"))
    with pytest.raises(ValueError, match="attention is sparse, and the trainer's must be too"):
        where = "stage.verifier-0.rl.auxiliary"
        smoke((f"{where}.indexer", "1.0"), (f"{where}.indexer_stage", "dense"))


@pytest.mark.parametrize(
    ("longest", "said"),
    [(199, r"engine.context = 200"), (255, r"sft\.row_length = 256")],
)
def test_no_sequence_is_longer_than_the_models_context(longest, said):
    with pytest.raises(ValueError, match=rf"{said}.*max_position = {longest}"):
        smoke(("model.max_position", str(longest)))
    assert smoke(("model.max_position", "256")).model.max_position == 256


def test_every_role_leaves_room_for_a_prompt():
    message = r"roles\.generator\.max_tokens = 200 leaves no room .*engine\.context = 200"
    with pytest.raises(ValueError, match=message):
        smoke(("roles.generator.max_tokens", "200"))


def test_a_part_of_the_recipe_is_an_override():
    part, none = (
        ("stages", "rule-drills, source-drills,sft,before"),
        [("before", ""), ("after", "")],
    )
    config = smoke(part, *none)
    assert [s.name for s in config.stages] == ["rule-drills", "source-drills", "sft", "before"]
    with pytest.raises(ValueError, match=r"after = 'after' .*has \['before'\].*--config.after= "):
        smoke(part)


def test_the_models_vocabulary_is_the_tokenizers():
    assert smoke(("tokenizer.vocab_size", "500")).model.vocab_size == 500


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("sed", "1", r"config has no field 'sed'; did you mean config\.seed\?"),
        (
            "model.widht",
            "8",
            r"config\.model has no field 'widht'; did you mean config\.model\.width",
        ),
        (
            "stage.sft.sft.stesp",
            "8",
            r"stage\.sft\.sft has no field .stesp.; did you mean config\.stage\.sft\.sft\.steps",
        ),
        ("model.qqqqq", "8", r"config\.model has no field 'qqqqq'; it has \["),
        ("stages", "", r"config\.stages is empty"),
        ("before", "sft", r"config\.before = 'sft' is no answer stage .*--config\.before= --c"),
        ("after", "", r"config\.after = '' is no answer stage"),
        ("after", "aftr", r"config\.after = 'aftr' .*did you mean 'after'\?"),
        ("stage.after.num_autolabel", "7", r"'before' and 'after' .* num_autolabel is 8 and 7"),
        ("stage.verifer-1.rl.steps", "3", r"config\.stage\.verifer-1 .*mean 'verifier-1'\?"),
        ("tokenizer.vocab_size", "0", r"config\.tokenizer: vocab_size = 0 and .*: give one"),
        ("model.vocab_size", "9", r"config\.model\.vocab_size = 9, .*of 448: set config\.tok"),
        ("runtime.attention", "block", r"attention = 'block' .*did you mean 'blocks'\?"),
        ("runtime.model_kernels", "raged", r"model_kernels = 'raged' .*did you mean 'ragged'\?"),
        ("runtime.metrics.shown", "loss,entropi", r"no .* 'entropi'; did you mean 'entropy'\?"),
        ("stages", "sft,befor", r"config\.stages lists 'befor'.*did you mean 'before'\?"),
        ("stage.sft.kind", "sftt", r"config\.stage\.sft\.kind = 'sftt'.*did you mean 'sft'\?"),
        (
            "stage.sft.name",
            "other",
            r"config\.stage\.sft\.name = 'other': a stage's name is its key",
        ),
        ("stage", "3", r"config\.stage must hold the stages by name"),
        ("stage.new.init", "sft", r"config\.stage\.new must have a field 'kind'"),
        ("seed", "x", r"config\.seed must be of type int, it is 'x'"),
        ("seed", "True", r"config\.seed must be of type int, it is True"),
        ("seed", "1.0", r"config\.seed must be of type int, it is 1.0"),
        ("router_bias_rate", "True", r"config\.router_bias_rate must be of type float"),
        ("world.dials.depth", "3", r"config\.world\.dials\.depth must be a sequence"),
        ("world.dials.depth", "(1, 2, 3)", r"config\.world\.dials\.depth must have 2 entries"),
        (
            "world.dials.depth",
            "(1, 'a')",
            r"config\.world\.dials\.depth must be of type int",
        ),
        ("stage.meta.mixture", "3", r"config\.stage\.meta\.mixture must be a mapping"),
        ("model", "3", r"config\.model must hold the fields of ModelConfig"),
        ("data", "DIR", r"one of the two; config\.data is 'DIR'"),
        ("world", "None", r"one of the two; config\.data is ''"),
        ("stages", "before,sft", r"'before'|stage\.before\.verifier = 'sft'"),
    ],
)
def test_a_bad_setting_is_named_by_its_full_path(path, value, complaint):
    with pytest.raises(ValueError, match=complaint):
        smoke((path, value))


def test_a_required_field_that_is_not_given_is_named():
    file = overrides.load(str(REPOSITORY / "configs" / "smoke.py"))
    del file.stage.sft.sft.rows
    with pytest.raises(ValueError, match=r"config\.stage\.sft\.sft\.rows must be given"):
        config_lib.build(file)


def test_a_typo_in_a_stage_that_is_not_listed_is_found_too():
    with pytest.raises(ValueError, match=r"config\.stage\.after has no field 'verifer'"):
        smoke(("stages", "rule-drills,source-drills,sft"), ("stage.after.verifer", "sft"))


# What may change when a run goes on.


def require_same(*changes, done=(), begun=(), saved=()):
    config_lib.require_same(
        config_lib.identity(smoke(*saved)), config_lib.identity(smoke(*changes)), done, begun
    )


def test_the_same_config_and_other_runtime_fields_may_go_on():
    require_same(("runtime.save_every", "7"), ("runtime.lost_alarm", "0.5"), done=("sft",))
    assert config_lib.runtime(smoke(("runtime.save_every", "7")))["save_every"] == 7
    assert "runtime" not in config_lib.identity(smoke())


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("seed", "1", "seed was 0, now 1"),
        ("model.width", "64", "model.width was 32, now 64"),
        ("world.dials.two_premises", "0.5", "world.dials.two_premises was 0.0, now 0.5"),
        ("roles.verifier.max_tokens", "9", r"roles.verifier.max_tokens was \d+, now 9"),
        ("router_bias_rate", "0", "router_bias_rate was 0.001, now 0.0"),
    ],
)
def test_what_is_computed_may_not_change(path, value, complaint):
    with pytest.raises(ValueError, match=f"begun with another config: {complaint}"):
        require_same((path, value))


def test_prompts_that_were_edited_under_the_same_name_are_noticed(tmp_path):
    source = REPOSITORY / "mathv2_jax" / "text" / "templates" / "world"
    folder = tmp_path / "mine"
    shutil.copytree(source, folder)
    mine = smoke(("roles.templates", str(folder)))
    before = config_lib.identity(mine)
    with (folder / "verifier.txt").open("a") as file:
        file.write(" Be brief.")
    with pytest.raises(ValueError, match=r"another config: templates\.verifier was"):
        config_lib.require_same(before, config_lib.identity(mine), (), ())


SHORT, LONG = "rule-drills,source-drills,sft,before", "rule-drills,source-drills,sft,before,meta"
DONE, NO_TABLE = ("rule-drills", "source-drills", "sft"), [("before", ""), ("after", "")]


def test_a_stage_takes_other_steps_until_it_has_finished():
    change = ("stage.sft.sft.steps", "500")
    require_same(change, done=DONE[:1])
    require_same(change, done=DONE[:2], begun=("sft",))
    with pytest.raises(ValueError, match=r"stages\[2\].sft.steps was 90, now 500; .*finished"):
        require_same(change, done=DONE)


def test_the_gate_of_a_stage_that_has_begun_may_change():
    """It is the way out where it stopped the stage, and nothing that is computed depends on it."""
    gate = ("stage.verifier-0.rl.gate", "0.5"), ("stage.verifier-0.rl.gate_share", "0.1")
    require_same(*gate, done=(*DONE, "before"), begun=("verifier-0",))
    with pytest.raises(ValueError, match=r"only its steps and its gate may change"):
        routing = ("stage.verifier-0.rl.keep_routing", "True")
        require_same(*gate, routing, done=(*DONE, "before"), begun=("verifier-0",))


def test_every_setting_of_a_stage_that_has_not_begun_may_change():
    rate = ("stage.verifier-0.rl.optimizer.learning_rate", "0.5")
    judge = ("stage.verifier-1.judge", "None")
    require_same(rate, judge, done=(*DONE, "before"))
    with pytest.raises(ValueError, match=r"learning_rate was .*--restart_stage=verifier-0"):
        require_same(rate, judge, done=(*DONE, "before"), begun=("verifier-0",))


def test_stages_change_behind_the_last_that_has_begun_and_nowhere_else():
    def changed(old, new, *begun):
        changes, saved = [("stages", new), *NO_TABLE], [("stages", old), *NO_TABLE]
        require_same(*changes, saved=saved, done=DONE, begun=begun)

    changed(SHORT, LONG, "before")
    changed(LONG, SHORT, "before")
    between = "rule-drills,source-drills,sft,meta,before"
    changed(SHORT, between)
    with pytest.raises(ValueError, match=r"begun with other stages: stages\[3\]"):
        changed(SHORT, between, "before")
    with pytest.raises(ValueError, match=r"begun with other stages: stages\[4\] was .*now None"):
        changed(LONG, SHORT, "meta")


def test_on_cpus_experts_are_sorted_into_blocks_and_elsewhere_the_platforms_own_product_is_used():
    small = smoke().model
    wide = dataclasses.replace(small, width=256, expert_width=128)
    assert machine.choose_experts("auto", "cpu", wide) is grouped.sorted_blocks
    assert machine.choose_experts("auto", "gpu", wide) is grouped.ragged
    assert machine.choose_experts("auto", "tpu", wide) is grouped.megablox
    assert machine.choose_experts("auto", "tpu", small) is grouped.ragged  # no whole tiles
    with pytest.raises(ValueError, match="'megablox' is of kernels for TPUs.*is 'cpu'"):
        machine.choose_experts("megablox", "cpu", wide)
    assert machine.choose_experts("every_expert", "cpu", wide) is grouped.every_expert


def test_an_identity_is_plain_data_that_says_each_stages_kind():
    found = config_lib.identity(smoke())
    again = copy.deepcopy(found)
    config_lib.require_same(found, again, (), ())
    kinds = {s["name"]: s["kind"] for s in found["stages"]}
    assert (kinds["sft"], kinds["meta"], kinds["probe-1"]) == ("sft", "rl", "probe")
