"""Config files and their overrides: `--config=FILE` and any number of `--config.field=value`.

Any field of the run's dataclasses can be set, whether the file sets it or not; names and types are
checked when the config is built. A value is read as a Python literal, else as text, so `3`, `1e-3`,
`True`, `(64, 128)` and `None` are what they look like and `sft,before` is text.
"""

import ast
import importlib.util
import os
import sys
from collections.abc import Collection, Sequence
from typing import Any

import ml_collections

PREFIX = "--config."


def split(
    argv: Sequence[str], often: Collection[str] = ()
) -> tuple[list[str], list[tuple[str, str]]]:
    """(the other arguments, overrides as (path, value)).

    ValueError where one has no value, where a field or another flag is given twice that is not
    among those which may be given `often`, and where a field is one of something else than the
    config.
    """
    rest, overrides = [], []
    given = [a.partition("=")[0] for a in argv if a.startswith("--") and "=" in a]
    for name in given:
        if given.count(name) > 1 and name.removeprefix("--") not in often:
            raise ValueError(f"{name} is given {given.count(name)} times: leave one")
    for argument in argv:
        if not argument.startswith(PREFIX):
            first, dot, field = argument.partition("=")[0].partition(".")
            if dot and first.startswith("--"):
                raise ValueError(f"{first}.{field} is no flag; did you mean {PREFIX}{field}?")
            rest.append(argument)
            continue
        path, equals, value = argument.removeprefix("--").partition("=")
        if not equals:
            raise ValueError(f"{argument} has no value: write {argument}=VALUE")
        overrides.append((path, value))
    return rest, overrides


def load(path: str) -> ml_collections.ConfigDict:
    """What the config file's `get_config()` returns.

    The folder above the file's own is importable while it runs, so that a config may build on its
    neighbours (`from configs import quick`). ValueError where the file makes no config.
    """
    found = os.path.abspath(os.path.expanduser(path))
    if not os.path.isfile(found):
        raise FileNotFoundError(f"--config={path}: there is no such file")
    spec = importlib.util.spec_from_file_location("config_file", found)
    if spec is None or spec.loader is None:
        raise ValueError(f"--config={path}: a config is a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    above = os.path.dirname(os.path.dirname(found))
    sys.path.insert(0, above)
    try:
        spec.loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        config = None if get_config is None else get_config()
    finally:
        sys.path.remove(above)
    if not isinstance(config, ml_collections.ConfigDict):
        raise ValueError(f"--config={path}: the file has no get_config() that returns a ConfigDict")
    return config


def apply(body: dict[str, Any], overrides: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """A copy of a config's fields with each `config.a.b` set, one after the other.

    ValueError where a path leads through a value that has no fields.
    """
    body = {name: _copied(value) for name, value in body.items()}
    for path, text in overrides:
        _, *parents, last = path.split(".")
        at, where = body, "config"
        for name in parents:
            at, where = at.setdefault(name, {}), f"{where}.{name}"
            if not isinstance(at, dict):
                raise ValueError(f"--{path}: {where} is {at!r:.80} and has no fields")
        at[last] = read_value(text)
    return body


def read_value(text: str) -> Any:
    """A Python literal where `text` is one, else `text` itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _copied(value: Any) -> Any:
    return {n: _copied(v) for n, v in value.items()} if isinstance(value, dict) else value
