"""The house rules that a reader cannot see in any one module: who may import whom, names, sizes.

Each rule is a function of a source tree that returns its violations; it is run on the package, and
on a small tree with a violation planted in it, which it must find.
"""

import ast
import dataclasses
import pathlib
from collections.abc import Callable, Iterable

import pytest

PACKAGE = "mathv2_jax"
REPOSITORY = pathlib.Path(__file__).resolve().parents[1]

# From the ground up: a room imports from the floors above it in this table, and from itself.
FLOORS = (
    ("records", "sharding", "processes", "metrics", "storage", "leases", "fingerprint"),
    ("text", "model"),
    ("data", "rollout", "rl.grpo", "reward"),
    ("roles", "rl.optimizer", "rl.auxiliary", "rl.learner", "rl.placement", "checkpoint", "hf"),
    ("search",),
    ("evaluation", "world"),
    ("stages",),
    ("report", "pods"),
    ("cli",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Rooms of one floor that may see each other nevertheless: metrics and leases are files, the
# learner holds the optimizer and auxiliary losses, and hf reads and writes checkpoints.
NEIGHBOURS = {
    ("metrics", "storage"),
    ("leases", "storage"),
    ("rl.learner", "rl.optimizer"),
    ("rl.learner", "rl.auxiliary"),
    ("hf", "checkpoint"),
}

NEEDS_JAX = {"jax", "jaxlib", "flax", "optax", "orbax", "chex"}
NEVER_TAUGHT_BY_THE_JUDGE = ("stages", "rl", "reward", "roles", "search", "rollout")
NO_SUBJECTS = {"utils", "util", "common", "helpers", "misc"}
MAX_LINES = 450


@dataclasses.dataclass(frozen=True)
class Import:
    """One imported name, absolute: `from a import b` is `a.b`."""

    target: str
    line: int


@dataclasses.dataclass(frozen=True)
class Module:
    name: str  # below the package: "rl.grpo"; "" is the package itself
    path: pathlib.Path
    num_lines: int
    imports: tuple[Import, ...]

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"

    def at(self, line: int) -> str:
        return f"{self.name or PACKAGE}:{line}"


Tree = dict[str, Module]


def read_tree(root: pathlib.Path) -> Tree:
    """The modules of the package whose folder is `root`, by name below the package."""
    tree = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        source = path.read_text(encoding="utf-8")
        imports = tuple(imports_of(ast.parse(source, filename=str(path))))
        tree[name] = Module(name, path, len(source.splitlines()), imports)
    return tree


def imports_of(source: ast.AST) -> Iterable[Import]:
    """All imports, those inside functions and by `importlib.import_module("...")` included.

    A relative import keeps its dots, for `relative_imports` to find.
    """
    for node in ast.walk(source):
        match node:
            case ast.Import():
                yield from (Import(alias.name, node.lineno) for alias in node.names)
            case ast.ImportFrom():
                base = "." * node.level + (node.module or "")
                yield from (Import(f"{base}.{alias.name}", node.lineno) for alias in node.names)
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module"),
                args=[ast.Constant(value=str(target)), *_],
            ):
                yield Import(target, node.lineno)


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


def room_of(name: str) -> str | None:
    return next((room for room in FLOOR_OF if within(name, room)), None)


def own_imports(tree: Tree, module: Module) -> Iterable[tuple[str, int]]:
    """(module below the package, line) for each import of the package's own modules."""
    for item in module.imports:
        if within(item.target, PACKAGE):
            name = item.target.removeprefix(PACKAGE).removeprefix(".")
            # `from a import b` may name something inside the module a.
            yield name if name in tree else name.rpartition(".")[0], item.line


def reached_from(tree: Tree, name: str) -> set[str]:
    """Every module of the package that importing `name` loads, itself included."""
    reached, waiting = set(), [name]
    while waiting:
        name = waiting.pop()
        if name in reached or name not in tree:
            continue
        reached.add(name)
        waiting.append(name.rpartition(".")[0])
        waiting.extend(target for target, _ in own_imports(tree, tree[name]))
    return reached


def modules_in(tree: Tree, *rooms: str) -> Iterable[Module]:
    return (module for module in tree.values() if any(within(module.name, r) for r in rooms))


# The rules.


def unlisted_modules(tree: Tree) -> list[str]:
    return [
        f"{module.name} has no room in FLOORS: give it one, with its floor"
        for module in tree.values()
        if not module.is_package and room_of(module.name) is None
    ]


def relative_imports(tree: Tree) -> list[str]:
    return [
        f"{module.at(item.line)} imports {item.target} relatively"
        for module in tree.values()
        for item in module.imports
        if item.target.startswith(".")
    ]


def imports_in_package_files(tree: Tree) -> list[str]:
    """`__init__` files import nothing of ours, so that a room never loads its neighbours.

    That of a room which is a whole package (hf) may name what the room offers.
    """
    return [
        f"{module.at(line)} is an __init__ that imports {target}"
        for module in tree.values()
        if module.is_package
        for target, line in own_imports(tree, module)
        if not (module.name in FLOOR_OF and within(target, module.name))
    ]


def imports_upward(tree: Tree) -> list[str]:
    violations = []
    for module in tree.values():
        room = room_of(module.name)
        for target, line in own_imports(tree, module):
            other = room_of(target)
            if None in (room, other) or room == other or (room, other) in NEIGHBOURS:
                continue  # modules without a room are named by `unlisted_modules`
            if FLOOR_OF[other] >= FLOOR_OF[room]:
                violations.append(f"{module.at(line)} ({room}) imports {target} ({other})")
    return violations


def imports_of_the_command_line(tree: Tree) -> list[str]:
    return [
        f"{module.at(line)} imports {target}"
        for module in tree.values()
        if not within(module.name, "cli")
        for target, line in own_imports(tree, module)
        if within(target, "cli")
    ]


def imports_by_the_model(tree: Tree) -> list[str]:
    return [
        f"{module.at(line)} imports {target}; the model knows only sharding"
        for module in modules_in(tree, "model")
        for target, line in own_imports(tree, module)
        if not within(target, "model") and target != "sharding"
    ]


def jax_in_reward_or_text(tree: Tree) -> list[str]:
    """Also by way of the modules that they import."""
    return [
        f"{module.name} needs {item.target} through {tree[name].at(item.line)}"
        for module in modules_in(tree, "reward", "text")
        for name in sorted(reached_from(tree, module.name))
        for item in tree[name].imports
        if item.target.partition(".")[0] in NEEDS_JAX
    ]


def model_or_rollout_in_grpo(tree: Tree) -> list[str]:
    return [
        f"{module.name} reaches {name}"
        for module in modules_in(tree, "rl.grpo")
        for name in sorted(reached_from(tree, module.name))
        if within(name, "model") or within(name, "rollout")
    ]


def judge_that_teaches(tree: Tree) -> list[str]:
    """Training and search never reach the world, by whatever way."""
    return [
        f"{module.name} reaches {name}; the judge measures, it never teaches"
        for module in modules_in(tree, *NEVER_TAUGHT_BY_THE_JUDGE)
        for name in sorted(reached_from(tree, module.name))
        if within(name, "world")
    ]


def settings_beyond_the_command_line(tree: Tree) -> list[str]:
    """ConfigDict and absl's flags stop at the command line; absl's logging may be anywhere."""
    return [
        f"{module.at(item.line)} imports {item.target}"
        for module in tree.values()
        if not within(module.name, "cli")
        for item in module.imports
        if within(item.target, "ml_collections")
        or (within(item.target, "absl") and not within(item.target, "absl.logging"))
    ]


def names_without_a_subject(tree: Tree) -> list[str]:
    return [
        f"{name}: `{part}` is not a subject"
        for name in tree
        for part in name.split(".")
        if part in NO_SUBJECTS
    ]


def modules_too_long(tree: Tree) -> list[str]:
    return [
        f"{module.name} has {module.num_lines} lines, more than {MAX_LINES}"
        for module in tree.values()
        if module.num_lines > MAX_LINES
    ]


# Each rule with trees, as {file: source}, that break it once.
PLANTED: list[tuple[Callable[[Tree], list[str]], dict[str, str]]] = [
    (unlisted_modules, {"attic.py": ""}),
    (unlisted_modules, {"rl/attic.py": ""}),
    (relative_imports, {"text/parse.py": "from . import tokenizer", "text/tokenizer.py": ""}),
    (imports_in_package_files, {"rl/__init__.py": "from mathv2_jax.rl import grpo"}),
    (imports_in_package_files, {"hf/__init__.py": "from mathv2_jax import model"}),
    (imports_upward, {"storage.py": "from mathv2_jax import roles", "roles.py": ""}),
    (imports_upward, {"data/sources.py": "import mathv2_jax.reward", "reward.py": ""}),
    (imports_upward, {"storage.py": "from mathv2_jax.metrics import X", "metrics.py": "X = 1"}),
    (imports_upward, {"rl/grpo.py": "import mathv2_jax.rl.learner", "rl/learner.py": ""}),
    (imports_of_the_command_line, {"report/page.py": "from mathv2_jax.cli import train"}),
    (imports_by_the_model, {"model/moe.py": "from mathv2_jax import records", "records.py": ""}),
    (jax_in_reward_or_text, {"text/parse.py": "import jax.numpy as jnp"}),
    (
        jax_in_reward_or_text,
        {"reward.py": "from mathv2_jax import storage", "storage.py": "def f():\n    import jax"},
    ),
    (
        model_or_rollout_in_grpo,
        {"rl/grpo.py": "from mathv2_jax.model import heads", "model/heads.py": ""},
    ),
    (
        judge_that_teaches,
        {
            "stages/rl.py": "from mathv2_jax import evaluation",
            "evaluation.py": "import importlib\nimportlib.import_module('mathv2_jax.world.judge')",
            "world/judge.py": "",
        },
    ),
    (settings_beyond_the_command_line, {"roles.py": "from ml_collections import ConfigDict"}),
    (settings_beyond_the_command_line, {"storage.py": "from absl import flags, logging"}),
    (names_without_a_subject, {"text/utils.py": ""}),
    (modules_too_long, {"records.py": "x = 1\n" * (MAX_LINES + 1)}),
]
RULES = list(dict.fromkeys(rule for rule, _ in PLANTED))


def plant(root: pathlib.Path, files: dict[str, str]) -> Tree:
    for name, source in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
        for folder in path.relative_to(root).parents:
            (root / folder / "__init__.py").touch()
    return read_tree(root)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_package_keeps_the_rule(rule: Callable[[Tree], list[str]]) -> None:
    tree = read_tree(REPOSITORY / PACKAGE)
    assert "records" in tree
    violations = rule(tree)
    assert not violations, "\n" + "\n".join(violations)


@pytest.mark.parametrize(("rule", "files"), PLANTED, ids=[rule.__name__ for rule, _ in PLANTED])
def test_rule_finds_the_planted_violation(
    rule: Callable[[Tree], list[str]], files: dict[str, str], tmp_path: pathlib.Path
) -> None:
    assert rule(plant(tmp_path, files))


def test_an_orderly_tree_breaks_no_rule(tmp_path: pathlib.Path) -> None:
    tree = plant(
        tmp_path,
        {
            "records.py": "import json",
            "sharding.py": "import jax",
            "storage.py": "from absl import logging",
            "metrics.py": "from mathv2_jax import storage",
            "text/parse.py": "from mathv2_jax.records import Proof",
            "model/moe.py": "from mathv2_jax import sharding\nfrom mathv2_jax.model import layers",
            "model/layers.py": "import jax",
            "rl/grpo.py": "import jax.numpy as jnp",
            "rl/optimizer.py": "import optax",
            "rl/learner.py": "from mathv2_jax.rl import grpo, optimizer",
            "world/judge.py": "from mathv2_jax.text import parse",
            "cli/train.py": "from absl import app\nfrom mathv2_jax.world import judge",
        },
    )
    assert [violation for rule in RULES for violation in rule(tree)] == []
