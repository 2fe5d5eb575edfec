"""Config files and `--config.field=value`."""

import ml_collections
import pytest

from mathv2_jax.cli import overrides

GOOD = """
import ml_collections

def get_config():
    return ml_collections.ConfigDict(dict(seed=3))
"""


def test_overrides_are_told_from_other_arguments():
    argv = [
        "train",
        "--config=a.py",
        "--config.a.b=1",
        "--workdir=w",
        "--config.c=x=y",
        "--config.d=",
    ]
    rest, found = overrides.split(argv)
    assert rest == ["train", "--config=a.py", "--workdir=w"]
    assert found == [("config.a.b", "1"), ("config.c", "x=y"), ("config.d", "")]


@pytest.mark.parametrize("argument", ["--config.seed", "--config.stage.sft.sft.steps"])
def test_an_override_without_a_value_is_named(argument):
    with pytest.raises(ValueError, match=f"{argument} has no value: write {argument}=VALUE"):
        overrides.split(["train", argument, "3"])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-3", 1e-3),
        ("-2", -2),
        ("True", True),
        ("None", None),
        ("(64, 128)", (64, 128)),
        ("{'depth': (1, 2)}", {"depth": (1, 2)}),
        ("'3'", "3"),
        ("sft,before", "sft,before"),
        ("true", "true"),
        ("gs://bucket/a", "gs://bucket/a"),
        ("", ""),
    ],
)
def test_a_value_is_a_python_literal_or_else_text(text, value):
    found = overrides.read_value(text)
    assert found == value and type(found) is type(value)


def test_a_field_of_any_depth_is_set_whether_it_was_there_or_not():
    body = dict(seed=0, stage={"verifier-0": {"rl": {"steps": 30, "groups": 16}}})
    found = overrides.apply(
        body,
        [
            ("config.seed", "7"),
            ("config.stage.verifier-0.rl.steps", "2"),
            ("config.stage.verifier-0.rl.grpo.kl_coefficient", "0.5"),
            ("config.runtime.save_every", "1"),
        ],
    )
    rl = {"steps": 2, "groups": 16, "grpo": {"kl_coefficient": 0.5}}
    assert found == dict(seed=7, stage={"verifier-0": {"rl": rl}}, runtime={"save_every": 1})


def test_the_given_fields_stay_as_they_were():
    body = dict(model=dict(width=32))
    found = overrides.apply(body, [("config.model.width", "16")])
    assert found == dict(model=dict(width=16)) and body == dict(model=dict(width=32))


@pytest.mark.parametrize("name", ["--config", "--config.model.width", "--workdir"])
def test_what_is_given_twice_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} is given 2 times: leave one"):
        overrides.split(["train", f"{name}=1", "--config.seed=1", f"{name}=2"])


def test_a_path_through_a_plain_value_is_refused():
    with pytest.raises(ValueError, match="--config.seed.low: config.seed is 0 and has no fields"):
        overrides.apply(dict(seed=0), [("config.seed.low", "1")])


def test_a_config_file_may_build_on_its_neighbour_from_any_folder(tmp_path, monkeypatch):
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "base_recipe.py").write_text(GOOD)
    text = (
        "from recipes import base_recipe\n\ndef get_config():\n    c = base_recipe.get_config()\n"
    )
    (folder / "mine.py").write_text(text + "    c.seed = 4\n    return c\n")
    monkeypatch.chdir(folder)
    found = overrides.load("mine.py")
    assert isinstance(found, ml_collections.ConfigDict) and found.seed == 4


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="--config=.*absent.py: there is no such file"):
        overrides.load(str(tmp_path / "absent.py"))


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("config.yaml", "seed: 3", r"is a Python file \(.py\)"),
        ("none.py", "seed = 3", r"has no get_config\(\)"),
        ("plain.py", "def get_config():\n    return dict(seed=3)\n", "returns a ConfigDict"),
    ],
)
def test_a_file_that_makes_no_config_is_named(tmp_path, name, text, named):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{name}: .*{named}"):
        overrides.load(str(path))


def test_a_field_of_something_else_than_the_config_is_named_with_what_may_be_meant():
    with pytest.raises(
        ValueError, match=r"--confg\.seed is no flag; did you mean --config\.seed\?"
    ):
        overrides.split(["train", "--workdir=../a.b", "--confg.seed=1"])
    assert overrides.split(["train", "--workdir=../a.b"]) == (["train", "--workdir=../a.b"], [])
