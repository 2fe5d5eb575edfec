"""Columns of public benchmarks under the names that are read here.

IMO-ProofBench and IMO-GradingBench as their CSV files have them (github.com/google-deepmind/
superhuman, imobench: `Problem ID`, `Problem`, `Response`, `Points`, ...), PutnamBench's informal
statements (github.com/trishullab/PutnamBench: `informal_statement`), and files of questions.
"""

from collections.abc import Mapping
from typing import Any

_THEIRS: Mapping[str, tuple[str, ...]] = {
    "id": ("grading_id", "problem_id", "problem_idx", "problem_name"),
    "problem": ("statement", "question", "informal_statement"),
    "proof": ("response",),
    "human_score": ("points",),
    "answer": ("short_answer",),
    "reference_solution": ("solution", "informal_solution"),
    "grading_guidelines": (),
}


def by_our_names(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields, and beside them what stands under others' names; a name of ours comes first.

    Others' names are compared in small letters, with `_` for a space.
    """
    found = dict(fields)
    known = {name.strip().casefold().replace(" ", "_"): value for name, value in fields.items()}
    for ours, theirs in _THEIRS.items():
        values = (known.get(name) for name in (ours, *theirs))
        value = next((v for v in values if v is not None), None)
        if found.get(ours) is None and value is not None:
            found[ours] = value
    return found
