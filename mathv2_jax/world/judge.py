"""The exact judge of the proof world. It measures and labels files; training never calls it.

A proof is lines `Step 1: A implies F`. An analysis gives one line a step, which repeats it, looks
up the rule and where its premise comes from, and then says what it found,
`Step 1: A implies F (4) and A from the facts: holds`, and one line for the goal,
`Goal C, shown C: reached`. With E = the facts and all earlier conclusions (also of bad steps, so
that an error counts once), a step is at fault when its rule is not given, when a premise is not in
E but follows from E by one given rule (a skipped step), or when it has no support at all.
"""

import dataclasses
import enum
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mathv2_jax.text import parse
from mathv2_jax.world import problems

MAX_STEPS = 12
_STEP = re.compile(r"Step ([1-9][0-9]?): ([A-Za-z ]+)")


class Fault(enum.StrEnum):
    """What can be wrong, in the words an analysis uses."""

    NOT_GIVEN = "not a given rule"
    SKIPPED = "skips a step"
    UNSUPPORTED = "has no support"
    NO_GOAL = "missing"


HOLDS, REACHED = "holds", "reached"
NO_STEPS = 0  # the place of the goal's fault, which belongs to no step


@dataclasses.dataclass(frozen=True, order=True)
class Issue:
    """A fault at a step (from 1); `step` 0 for the missing goal."""

    step: int
    fault: Fault

    def __str__(self) -> str:
        return f"{self.place}: {self.fault.value}"

    @property
    def place(self) -> str:
        """`Step n`, or `Goal`."""
        return "Goal" if self.fault is Fault.NO_GOAL else f"Step {self.step}"


@dataclasses.dataclass(frozen=True)
class ProofVerdict:
    """`score` by I_v and every issue; a malformed proof has score 0 and `steps` None."""

    score: float
    issues: tuple[Issue, ...]
    steps: tuple[problems.Rule, ...] | None


@dataclasses.dataclass(frozen=True)
class AnalysisVerdict:
    """`quality` is ms by I_mv; `named` what the analysis claims, `missed` what it overlooked."""

    quality: float
    named: tuple[Issue, ...]
    false: tuple[Issue, ...]
    missed: tuple[Issue, ...]
    score_follows: bool

    @property
    def faithful(self) -> bool:
        """Every named issue is real and rightly described, and the score follows from them."""
        return self.quality == 1.0


def parse_proof(text: str) -> tuple[problems.Rule, ...] | None:
    """The steps, None where the text is not steps numbered from 1 (or more than 12)."""
    found = [_STEP.fullmatch(line.strip()) for line in text.strip().split("\n")]
    steps = []
    for number, match in enumerate(found, start=1):
        rule = None if match is None else problems.parse_rule(match[2])
        if match is None or rule is None or int(match[1]) != number:
            return None
        steps.append(rule)
    return tuple(steps) if len(steps) <= MAX_STEPS else None


def write_proof(steps: tuple[problems.Rule, ...] | list[problems.Rule]) -> str:
    """The inverse of `parse_proof`."""
    return "\n".join(f"Step {n}: {step}" for n, step in enumerate(steps, start=1))


def _fault(step: problems.Rule, known: set[str], rules: frozenset[problems.Rule]) -> Fault | None:
    if step not in rules:
        return Fault.NOT_GIVEN
    lacking = [p for p in step.premises if p not in known]
    one_step = {r.conclusion for r in rules if all(p in known for p in r.premises)}
    if any(p not in one_step for p in lacking):
        return Fault.UNSUPPORTED
    return Fault.SKIPPED if lacking else None


def score_from(issues: tuple[Issue, ...]) -> float:
    """I_v in the world: 1 without issues, 0.5 where steps are only skipped, else 0."""
    if not issues:
        return 1.0
    return 0.5 if all(i.fault is Fault.SKIPPED for i in issues) else 0.0


def judge_steps(
    problem: problems.WorldProblem, steps: tuple[problems.Rule, ...]
) -> tuple[Issue, ...]:
    """Every issue of a well-formed proof, in order, the goal's last."""
    known, rules = set(problem.facts), frozenset(problem.rules)
    issues: list[Issue] = []
    for number, step in enumerate(steps, start=1):
        fault = _fault(step, known, rules)
        if fault is not None:
            issues.append(Issue(number, fault))
        known.add(step.conclusion)
    if steps[-1].conclusion != problem.goal:
        issues.append(Issue(NO_STEPS, Fault.NO_GOAL))
    return tuple(issues)


def judge_proof(statement: str, proof: str) -> ProofVerdict:
    """The true score of a proof text for a statement of the world."""
    steps = parse_proof(proof)
    if steps is None:
        return ProofVerdict(0.0, (), None)
    issues = judge_steps(problems.parse_statement(statement), steps)
    return ProofVerdict(score_from(issues), issues, steps)


class Lookup(NamedTuple):
    """What a step's line cites: the rule's number, and where the weakest premise comes from."""

    rule: int | None
    premise: str
    source: str

    @property
    def parts(self) -> tuple[str, str]:
        """The words that cite the rule, and those that cite the source: none without a rule."""
        return (" (none)", "") if self.rule is None else (f" ({self.rule})", f" from {self.source}")

    def __str__(self) -> str:
        rule, source = self.parts
        return f"{rule} and {self.premise}{source}" if source else rule


FACTS, NOTHING = "the facts", "nothing"


def look_up(problem: problems.WorldProblem, steps: tuple[problems.Rule, ...]) -> list[Lookup]:
    """The true citations of every step."""
    origin = dict.fromkeys(problem.facts, FACTS)
    found = []
    for number, step in enumerate(steps, start=1):
        rule = problem.rules.index(step) + 1 if step in problem.rules else None
        sources = {p: origin.get(p) or _one_step(problem, origin, p) for p in step.premises}

        def weakness(premise: str, sources: Mapping[str, str] = sources) -> tuple[bool, ...]:
            source = sources[premise]
            return source == NOTHING, source.startswith("("), source != FACTS

        weakest = max(step.premises, key=weakness)
        found.append(Lookup(rule, weakest, sources[weakest]))
        origin.setdefault(step.conclusion, f"step {number}")
    return found


def _one_step(problem: problems.WorldProblem, known: Mapping[str, str], premise: str) -> str:
    for number, rule in enumerate(problem.rules, start=1):
        if rule.conclusion == premise and all(p in known for p in rule.premises):
            return f"({number})"
    return NOTHING


def write_analysis_body(
    problem: problems.WorldProblem,
    steps: tuple[problems.Rule, ...],
    lookups: Sequence[Lookup],
    issues: tuple[Issue, ...],
) -> str:
    """One line a step with its citations and finding, then the goal's."""
    findings = {i.step: i.fault.value for i in issues}
    numbers = range(1, len(steps) + 1)
    lines = [write_line(problem, steps, lookups, n, findings.get(n, HOLDS)) for n in numbers]
    goal = write_line(problem, steps, lookups, NO_STEPS, findings.get(NO_STEPS, REACHED))
    return "\n".join([*lines, goal])


def write_line(
    problem: problems.WorldProblem,
    steps: tuple[problems.Rule, ...],
    lookups: Sequence[Lookup],
    number: int,
    finding: str,
) -> str:
    """The line about one step (from 1), or about the goal where `number` is NO_STEPS."""
    if number == NO_STEPS:
        return f"Goal {problem.goal}, shown {steps[-1].conclusion}: {finding}"
    return f"Step {number}: {steps[number - 1]}{lookups[number - 1]}: {finding}"


_FINDINGS = "|".join([HOLDS, *(f.value for f in Fault if f is not Fault.NO_GOAL)])
_SOURCE = rf"(?:{FACTS}|{NOTHING}|step \d+|\(\d+\))"
_CITATION = rf"(?: [A-Za-z ]+ \((?:none|\d+)\)(?: and [A-Z] from {_SOURCE})?:)?"
_LINE = re.compile(rf"Step (?P<step>[1-9][0-9]?):{_CITATION} (?P<finding>{_FINDINGS})")
_GOAL_LINE = re.compile(
    rf"Goal(?: [A-Z], shown [A-Z])?: (?P<finding>{REACHED}|{Fault.NO_GOAL.value})"
)

_NUMBERS = range(1, MAX_STEPS + 1)
PHRASES: tuple[str, ...] = (
    "\n\n",
    *(f"Step {n}:" for n in _NUMBERS),
    *(f" ({n})" for n in _NUMBERS),
    *(f" from ({n})" for n in _NUMBERS),
    *(f" from step {n}" for n in _NUMBERS),
    " (none)",
    f" from {FACTS}",
    f" from {NOTHING}",
    *(f": {f.value}" for f in Fault),
    f": {HOLDS}",
    f": {REACHED}",
    "Goal",
    ", shown",
    " implies",
    " imply",
    " and",
)
"""Fixed wordings of this world, for a tokenizer to hold as single pieces."""


def read_issues(body: str) -> tuple[tuple[Issue, ...], bool]:
    """The issues that an analysis names, and whether every line was understood.

    What a line cites is not judged, only what it finds.
    """
    issues: set[Issue] = set()
    understood = True
    for line in body.strip().split("\n"):
        step, goal = _LINE.fullmatch(line.strip()), _GOAL_LINE.fullmatch(line.strip())
        if step is not None:
            if step["finding"] != HOLDS:
                issues.add(Issue(int(step["step"]), Fault(step["finding"])))
        elif goal is not None:
            if goal["finding"] != REACHED:
                issues.add(Issue(NO_STEPS, Fault.NO_GOAL))
        else:
            understood = False
    return tuple(sorted(issues)), understood


def judge_analysis(statement: str, proof: str, body: str, score: float) -> AnalysisVerdict:
    """ms of an analysis by I_mv: only the defects that it names are judged.

    All false: 0; some false: 0.5; none false: 1, lowered to 0.5 by a misstatement (the right step
    with the wrong fault, or a line of no meaning) or by a score that does not follow.
    """
    verdict = judge_proof(statement, proof)
    named, understood = read_issues(body)
    faulty_steps = {i.step for i in verdict.issues}
    false = tuple(i for i in named if i.step not in faulty_steps)
    misstated = [i for i in named if i.step in faulty_steps and i not in verdict.issues]
    follows = score == score_from(named)
    missed = tuple(i for i in verdict.issues if i.step not in {n.step for n in named})
    if named and len(false) == len(named):
        quality = 0.0
    elif false or misstated or not understood or not follows:
        quality = 0.5
    else:
        quality = 1.0
    return AnalysisVerdict(quality, named, false, missed, follows)


class ExactJudge:
    """The truth about texts of this world, for `held_out.measure`."""

    def proof_score(self, statement: str, proof: str) -> float:
        """The true score of a proof."""
        return judge_proof(statement, proof).score

    def analysis_quality(self, statement: str, proof: str, analysis: str) -> float:
        """The true ms of an analysis in the verifier's format; 0 where it is not in it."""
        found = parse.parse_analysis(analysis)
        if found is None:
            return 0.0
        return judge_analysis(statement, proof, found.body, found.score).quality

    def names_issue(self, analysis: str) -> bool:
        """Whether an analysis in the verifier's format names any issue."""
        found = parse.parse_analysis(analysis)
        return found is not None and bool(read_issues(found.body)[0])
