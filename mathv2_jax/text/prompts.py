r"""Prompt templates: files of plain text with fields, filled by literal substitution.

A template set is a folder of four files. `load` takes a packaged set's name or any folder.

| file              | must hold              | may also hold                          |
|-------------------|------------------------|----------------------------------------|
| generator.txt     | {statement}            |                                        |
| verifier.txt      | {statement} {proof}    |                                        |
| meta_verifier.txt | {statement} {proof} {analysis} |                                |
| refine.txt        | {statement} {proof}    | {analysis} {instruction} {previous}    |

`statement` is the problem, `proof` the proof at hand, `analysis` an analysis of it. Two fields of
refine.txt are spelt out when the set is loaded: `instruction` becomes the generator's template,
`previous` the proof with its analysis. So whoever fills a template only ever gives the first
three. The released model's names are understood: {question} is `statement`, {rating} `analysis`,
{proofs_to_refine} `previous`.

A field is a name in braces that does not follow a letter, `\`, `^`, `_`, `*` or `]` directly:
`\begin{proof}`, `\boxed{s}` and `x_{proof}` are LaTeX and stay as they are, as do all other braces.
"""

import dataclasses
import difflib
import importlib.resources
import importlib.resources.abc
import os
import re
from collections.abc import Callable, Iterable, Mapping

from mathv2_jax import records, storage

FIELDS = ("statement", "proof", "analysis")
ALIASES: Mapping[str, str] = {
    "question": "statement",
    "rating": "analysis",
    "proofs_to_refine": "previous",
}

_REQUIRED = {
    "generator": ("statement",),
    "verifier": ("statement", "proof"),
    "meta_verifier": FIELDS,
    "refine": ("statement", "proof"),
}
_ALLOWED = {**_REQUIRED, "refine": FIELDS}
_FIELD = re.compile(r"(?<![A-Za-z\\^_*\]])\{([a-z][a-z_]*)\}")
_PREVIOUS = "Solution:\n{proof}\n\nEvaluation of this solution:\n{analysis}"


@dataclasses.dataclass(frozen=True)
class Template:
    """A template ready to be filled: `fields` are those of FIELDS that `text` holds.

    `fingerprint` names the text, aliases resolved.
    """

    name: str
    text: str
    fields: tuple[str, ...]
    fingerprint: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptSet:
    """One template for each thing a model is asked to do."""

    generator: Template
    verifier: Template
    meta_verifier: Template
    refine: Template


def packaged_sets() -> list[str]:
    """The names of the sets that come with the package."""
    return sorted(entry.name for entry in _packaged().iterdir() if entry.is_dir())


def load(directory_or_name: str | os.PathLike[str]) -> PromptSet:
    """The packaged set of that name, or the set in that folder (local or remote).

    ValueError where there is no such set, or a file is missing, is no UTF-8, lacks a field it
    must hold or holds one that nobody fills.
    """
    where = os.fspath(directory_or_name)
    if where in packaged_sets():
        folder = _packaged() / where
        return make_set(where, _texts(where, lambda file: (folder / file).read_bytes()))
    if not storage.exists(where):
        raise ValueError(
            f"no template set {where!r}: it is neither a folder nor one of the packaged sets "
            f"{', '.join(packaged_sets())}{_nearest(where, packaged_sets())}"
        )
    name = os.path.basename(os.path.abspath(where))
    return make_set(name, _texts(where, lambda file: storage.read_bytes(os.path.join(where, file))))


def make_set(name: str, texts: Mapping[str, str]) -> PromptSet:
    """A set from its four texts, by role; ValueErrors as in `load`."""
    generator = _template(name, "generator", texts["generator"], {})
    blocks = {"instruction": generator.text, "previous": _PREVIOUS}
    return PromptSet(
        generator=generator,
        verifier=_template(name, "verifier", texts["verifier"], {}),
        meta_verifier=_template(name, "meta_verifier", texts["meta_verifier"], {}),
        refine=_template(name, "refine", texts["refine"], blocks),
    )


def fill(template: Template, **values: str) -> str:
    """The prompt: each field replaced, in one pass, by its value, which is not looked into.

    Values that the template has no field for are left out. ValueError where a field has no value,
    or a value's name is no field at all.
    """
    for name in values:
        if name not in FIELDS:
            raise ValueError(_unknown(name, f"the values for {template.name}", FIELDS))
    missing = [field for field in template.fields if field not in values]
    if missing:
        raise ValueError(f"{template.name} needs a value for {', '.join(missing)}")
    return _FIELD.sub(lambda m: values[m[1]] if m[1] in template.fields else m[0], template.text)


def _packaged() -> importlib.resources.abc.Traversable:
    return importlib.resources.files("mathv2_jax.text") / "templates"


def _texts(where: str, read: Callable[[str], bytes]) -> dict[str, str]:
    texts = {}
    for role in _REQUIRED:
        try:
            text = read(f"{role}.txt").decode("utf-8-sig")
        except OSError as error:
            raise ValueError(f"{where}: {role}.txt cannot be read: {error}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: {role}.txt is not UTF-8: {error}") from error
        texts[role] = text.replace("\r\n", "\n").rstrip("\n")
    return texts


def _template(set_name: str, role: str, text: str, blocks: Mapping[str, str]) -> Template:
    where = f"{set_name}/{role}.txt"
    required, allowed = _REQUIRED[role], _ALLOWED[role]

    def resolve(match: re.Match[str]) -> str:
        field = ALIASES.get(match[1], match[1])
        if field in blocks:
            return blocks[field]
        if field in allowed:
            return "{" + field + "}"
        if len(match[1]) < 3 or text[: match.start()].endswith("}"):
            return match[0]  # a variable in braces, or the second argument of a LaTeX command
        raise ValueError(_unknown(match[1], where, (*allowed, *blocks)))

    resolved = _FIELD.sub(resolve, text)
    found = {match[1] for match in _FIELD.finditer(resolved)}
    missing = [field for field in required if field not in found]
    if missing:
        raise ValueError(
            f"{where} lacks the field {{{missing[0]}}}: write it where that text is to stand"
        )
    fields = tuple(field for field in allowed if field in found)
    fingerprint = records.content_id("template", resolved)
    return Template(f"{set_name}/{role}", resolved, fields, fingerprint)


def _unknown(name: str, where: str, valid: Iterable[str]) -> str:
    valid = list(valid)
    return (
        f"{where}: {name!r} is not a field; valid here: {', '.join(valid)}"
        f"{_nearest(name, [*valid, *ALIASES])} (plain text in braces takes a space: {{ {name} }})"
    )


def _nearest(name: str, valid: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(valid), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
