r"""The three written formats, read and written: a verifier's analysis, a meta-verifier's, a proof.

Malformed model text is data: the readers return None for it (format indicator 0) and never raise.
The writers are their inverses, for demonstrations.

An analysis holds its opening phrase, a body, its verdict phrase and a box, in this order. The
first opening and the last verdict count; so does the last box after the verdict, which must hold
0, 0.5 or 1 in plain digits (`.5` and `1.0` are the same numbers) inside any number of braces.

A generation holds the two headings, each alone on its line, at the line's start, outside code
fences, exactly once and in order; below the second stands a complete analysis.
"""

import re
from typing import NamedTuple

from mathv2_jax import records

SOLUTION_HEADING = "## Solution"
SELF_EVALUATION_HEADING = "## Self Evaluation"
ANALYSIS_OPENING = "Here is my evaluation of the solution:"
ANALYSIS_VERDICT = "Based on my evaluation, the final overall score should be:"
META_OPENING = 'Here is my analysis of the "solution evaluation":'
META_VERDICT = 'Based on my analysis, I will rate the "solution evaluation" as:'
BOXES = {0.0: r"\boxed{0}", 0.5: r"\boxed{0.5}", 1.0: r"\boxed{1}"}
KEY_PHRASES: tuple[str, ...] = (
    SOLUTION_HEADING,
    SELF_EVALUATION_HEADING,
    ANALYSIS_OPENING,
    ANALYSIS_VERDICT,
    META_OPENING,
    META_VERDICT,
    *BOXES.values(),
)

# The released model's prompts spell it so; what follows them is the same verdict.
_MISSPELT_VERDICT = ANALYSIS_VERDICT.replace("overall", "overal")

_BOX = re.compile(r"\\boxed(?![A-Za-z])")
_BOXED_NUMBER = re.compile(r"\s*((?:\{\s*)+)([0-9.]+)((?:\s*\})+)")
_NUMBERS = (
    (re.compile(r"0+(?:\.0*)?|\.0+"), 0.0),
    (re.compile(r"0*\.50*"), 0.5),
    (re.compile(r"0*1(?:\.0*)?"), 1.0),
)
_FENCE = re.compile(r" {0,3}(`{3,}(?=[^`]*$)|~{3,})(.*)", re.DOTALL)


class ParsedAnalysis(NamedTuple):
    """What stands between opening and verdict, stripped, and the score in the box."""

    body: str
    score: float


class ParsedGeneration(NamedTuple):
    """The proof and the self-evaluation section (a whole analysis), stripped, and its score."""

    proof: str
    self_analysis: str
    self_score: float


def parse_analysis(text: str) -> ParsedAnalysis | None:
    """A verifier's final response; None where it breaks the format."""
    return _parse(text, ANALYSIS_OPENING, (ANALYSIS_VERDICT, _MISSPELT_VERDICT))


def parse_meta_analysis(text: str) -> ParsedAnalysis | None:
    """A meta-verifier's final response; None where it breaks the format."""
    return _parse(text, META_OPENING, (META_VERDICT,))


def parse_generation(text: str) -> ParsedGeneration | None:
    """A generator's final response; None where it breaks the format."""
    headings = _headings(text)
    if [heading for heading, _, _ in headings] != [
        SOLUTION_HEADING,
        SELF_EVALUATION_HEADING,
    ]:
        return None
    (_, _, proof_start), (_, proof_end, analysis_start) = headings
    self_analysis = text[analysis_start:].strip()
    parsed = parse_analysis(self_analysis)
    if parsed is None:
        return None
    return ParsedGeneration(text[proof_start:proof_end].strip(), self_analysis, parsed.score)


def write_analysis(body: str, score: float) -> str:
    """The text that `parse_analysis` reads as (body.strip(), score); any body will do."""
    return _write(ANALYSIS_OPENING, body, ANALYSIS_VERDICT, score)


def write_meta_analysis(body: str, score: float) -> str:
    """The text that `parse_meta_analysis` reads as (body.strip(), score); any body will do."""
    return _write(META_OPENING, body, META_VERDICT, score)


def write_generation(proof: str, self_analysis: str) -> str:
    """The text that `parse_generation` reads as `proof` and `self_analysis`, both stripped.

    ValueError where no text would: a heading or an open code fence inside the proof, a heading
    inside the self-analysis, or a self-analysis that is not in the verifier's format.
    """
    proof, self_analysis = proof.strip(), self_analysis.strip()
    text = f"{SOLUTION_HEADING}\n{proof}\n\n{SELF_EVALUATION_HEADING}\n{self_analysis}"
    parsed = parse_generation(text)
    if parsed is None or (parsed.proof, parsed.self_analysis) != (proof, self_analysis):
        raise ValueError(
            f"the proof {proof!r:.80} and the self-analysis {self_analysis!r:.80} cannot be read "
            f"back: neither may hold the line {SOLUTION_HEADING!r} or {SELF_EVALUATION_HEADING!r}, "
            "the proof must close its code fences, and the self-analysis must be what "
            "write_analysis writes"
        )
    return text


def _write(opening: str, body: str, verdict: str, score: float) -> str:
    box = BOXES[records.require_score(score, "analysis")]
    return f"{opening}\n{body.strip()}\n\n{verdict}\n{box}"


def _parse(text: str, opening: str, verdicts: tuple[str, ...]) -> ParsedAnalysis | None:
    start = text.find(opening)
    if start < 0:
        return None
    start += len(opening)
    end, verdict = max((text.rfind(verdict, start), verdict) for verdict in verdicts)
    if end < 0:
        return None
    score = _boxed_score(text[end + len(verdict) :])
    return None if score is None else ParsedAnalysis(text[start:end].strip(), score)


def _boxed_score(text: str) -> float | None:
    """The number in the last box, where that is one of the three scores."""
    boxes = list(_BOX.finditer(text))
    found = _BOXED_NUMBER.match(text, boxes[-1].end()) if boxes else None
    if found is None or found[1].count("{") > found[3].count("}"):
        return None
    return next((score for form, score in _NUMBERS if form.fullmatch(found[2])), None)


def _headings(text: str) -> list[tuple[str, int, int]]:
    """(heading, offset of its line, offset of the next line) outside code fences, in order."""
    found, fence, offset = [], "", 0
    for line in text.split("\n"):
        end = offset + len(line) + 1
        mark = _FENCE.match(line.rstrip())
        if fence:  # closed by at least as many of the same mark, alone on the line
            if mark and mark[1].startswith(fence) and not mark[2]:
                fence = ""
        elif mark:
            fence = mark[1]
        elif line.rstrip() in (SOLUTION_HEADING, SELF_EVALUATION_HEADING):
            found.append((line.rstrip(), offset, end))
        offset = end
    return found
