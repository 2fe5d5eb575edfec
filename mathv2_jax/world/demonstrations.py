"""Imperfect writers of the proof world: proofs, analyses and meta-analyses to imitate.

Their faults are stated rates, so a model that imitates them perfectly is a mediocre one, and what
reinforcement learning adds can be seen.
"""

import dataclasses
import itertools
import random

from mathv2_jax.records import SCORES
from mathv2_jax.world import judge, problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriterRates:
    """How often the writers err. The four proof faults are shares; what is left is right.

    Where a problem has no room for a fault, another of them takes its place (a chain of one step
    may have room for none). `detours` is the share of proofs with a valid step that was not needed,
    where a rule allows one. Beside these faults the writers give up early: after each new step but
    the last they stop with probability `stops`, so a long proof takes several attempts, each of
    which goes on where the one before stopped.

    An analyst invents an issue in `invent_flawed` of flawed and `invent_sound` of sound proofs, of
    those with a faultless step; overlooks a real issue with probability `overlook`; of the proofs
    that stop short of the goal, lets the share `condone` of those it sees pass, writing down what
    was shown and that the goal is reached all the same; and draws another score with probability
    `redraw`. A meta-analyst misjudges an issue, or whether the score follows, with probability
    `misjudge`.
    """

    skipped: float = 0.2
    false_rule: float = 0.15
    unsupported: float = 0.15
    wrong_end: float = 0.15
    detours: float = 0.3
    stops: float = 0.0
    invent_flawed: float = 0.2
    invent_sound: float = 0.06
    overlook: float = 0.08
    condone: float = 0.0
    redraw: float = 0.15
    misjudge: float = 0.1

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"world.writers.{field.name} = {value}: must lie in 0..1")
        if self.skipped + self.false_rule + self.unsupported + self.wrong_end > 1.0:
            raise ValueError("world.writers: the four proof faults exceed 1 in sum")


Steps = list[problems.Rule]


def write_proof(rng: random.Random, problem: problems.WorldProblem, rates: WriterRates) -> str:
    """A proof with at most one planted fault (a fault can cause another), or the start of it."""
    return judge.write_proof(_up_to_a_stop(rng, _first_proof(rng, problem, rates), rates, 0))


def _first_proof(rng: random.Random, problem: problems.WorldProblem, rates: WriterRates) -> Steps:
    steps = list(problem.chain)
    if rng.random() < rates.detours:
        steps = _with_detour(rng, problem, steps)
    draw = rng.random()
    for share, plant in (
        (rates.skipped, _skip),
        (rates.false_rule, _false_rule),
        (rates.unsupported, _unsupported),
        (rates.wrong_end, _wrong_end),
    ):
        if draw < share:
            return plant(rng, problem, steps)
        draw -= share
    return steps


def _up_to_a_stop(rng: random.Random, steps: Steps, rates: WriterRates, num_kept: int) -> Steps:
    """The steps up to where their writer stops, after one new step or more."""
    if rates.stops:
        for place in range(num_kept + 1, len(steps)):
            if rng.random() < rates.stops:
                return steps[:place]
    return steps


def write_repair(
    rng: random.Random,
    problem: problems.WorldProblem,
    flawed: Steps,
    named: tuple[judge.Issue, ...],
    rates: WriterRates,
) -> str:
    """The steps before the first that an analysis names, then the shortest way on to the goal.

    Where the analysis is wrong, so may the repair be; half as often as a first proof it has a
    planted fault of its own, and its writer stops as often as any. Without a way on the proof is
    written from the beginning.
    """
    first = min((i.step for i in named if i.step != judge.NO_STEPS), default=len(flawed) + 1)
    kept = flawed[: first - 1]
    rest = _way_on(problem, {*problem.facts, *(s.conclusion for s in kept)})
    steps = list(problem.chain) if rest is None else [*kept, *rest]
    if not steps or len(steps) > judge.MAX_STEPS:
        steps = list(problem.chain)
    whole = rates.skipped + rates.false_rule + rates.unsupported + rates.wrong_end
    if rng.random() < whole / 2:
        steps = rng.choice((_skip, _false_rule, _wrong_end))(rng, problem, steps)
    pairs = zip(steps, kept, strict=False)
    num_kept = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return judge.write_proof(_up_to_a_stop(rng, steps, rates, num_kept))


def _way_on(problem: problems.WorldProblem, known: set[str]) -> Steps | None:
    """The fewest steps from what is known to the goal, None where none lead there."""
    made: dict[str, Steps] = {letter: [] for letter in known}
    while problem.goal not in made:
        reached: dict[str, Steps] = {}
        for rule in problem.rules:
            if rule.conclusion not in made and all(p in made for p in rule.premises):
                before = [step for p in rule.premises for step in made[p]]
                way = [*dict.fromkeys(before), rule]
                if len(way) < len(reached.get(rule.conclusion, [*way, rule])):
                    reached[rule.conclusion] = way
        if not reached:
            return None
        made |= reached
    return made[problem.goal]


def write_recital(
    rng: random.Random,
    problem: problems.WorldProblem,
    num_lines: int,
    *,
    sources: bool,
    misquoted: float = 0.0,
) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Rules as the lines of an analysis, up to their citations; the spans to be learned.

    The rules are given ones but for the share `misquoted`. Learned are their numbers and, with
    `sources`, where the premises come from. A model of a few layers learns to look things up only
    where that is all that is asked of it; it then does so in whatever it writes. (A pretrained
    model needs no drill.)
    """
    steps: Steps = []
    known = set(problem.facts)
    for _ in range(num_lines):
        supported = [r for r in problem.rules if known.issuperset(r.premises)]
        rule = rng.choice(supported if rng.random() < 0.5 else problem.rules)
        steps.append(_misquote(rng, problem, rule) if rng.random() < misquoted else rule)
        known.add(steps[-1].conclusion)
    text, spans = "", []
    lines = zip(steps, judge.look_up(problem, tuple(steps)), strict=True)
    for number, (step, cited) in enumerate(lines, start=1):
        rule_part, source_part = cited.parts
        text += f"Step {number}: {step}{rule_part}"
        spans.append((len(text) - len(rule_part), len(text)))
        if sources and source_part:
            text += f" and {cited.premise}{source_part}"
            spans.append((len(text) - len(source_part), len(text)))
        text += "\n"
    return text.rstrip("\n"), tuple(spans)


def _is_false(rule: problems.Rule, problem: problems.WorldProblem) -> bool:
    return rule not in problem.rules and rule.conclusion not in rule.premises


def _letters(problem: problems.WorldProblem) -> list[str]:
    return sorted({a for r in problem.rules for a in (*r.premises, r.conclusion)})


def _misquote(
    rng: random.Random, problem: problems.WorldProblem, rule: problems.Rule
) -> problems.Rule:
    """The rule with another premise or conclusion, not given; itself where there is none."""
    made = [
        changed
        for letter in _letters(problem)
        for changed in (
            problems.Rule(rule.premises, letter),
            problems.Rule((letter,), rule.conclusion),
        )
        if _is_false(changed, problem)
    ]
    return rng.choice(made) if made else rule


def _with_detour(rng: random.Random, problem: problems.WorldProblem, steps: Steps) -> Steps:
    """One more valid step somewhere before the end."""
    options: list[tuple[int, problems.Rule]] = []
    known = set(problem.facts)
    for place, step in enumerate(steps):
        options += [
            (place, r) for r in problem.rules if r not in steps and known.issuperset(r.premises)
        ]
        known.add(step.conclusion)
    if not options:
        return steps
    place, rule = rng.choice(options)
    return [*steps[:place], rule, *steps[place:]]


def _skip(rng: random.Random, problem: problems.WorldProblem, steps: Steps) -> Steps:
    """Without one needed step that is not the last."""
    needed = [n for n, step in enumerate(steps[:-1]) if step in problem.chain]
    if not needed:
        return _wrong_end(rng, problem, steps)
    gone = rng.choice(needed)
    return steps[:gone] + steps[gone + 1 :]


def _false_rule(rng: random.Random, problem: problems.WorldProblem, steps: Steps) -> Steps:
    """One or two steps in a row replaced by a rule that is not given."""
    place = rng.randrange(len(steps))
    if place + 1 < len(steps) and rng.random() < 0.5:
        leap = problems.Rule(steps[place].premises, steps[place + 1].conclusion)
        if _is_false(leap, problem):
            return [*steps[:place], leap, *steps[place + 2 :]]
    for at in (place, *range(len(steps))):
        made = [problems.Rule((letter,), steps[at].conclusion) for letter in _letters(problem)]
        options = [rule for rule in made if _is_false(rule, problem)]
        if options:
            return [*steps[:at], rng.choice(options), *steps[at + 1 :]]
    return _wrong_end(rng, problem, steps)


def _unsupported(rng: random.Random, problem: problems.WorldProblem, steps: Steps) -> Steps:
    """A given rule without support takes the place of what leads to its conclusion."""
    derived = {*problem.facts, *(s.conclusion for s in steps)}
    options = [
        (place, rule)
        for place in range(len(steps))
        for rule in problem.rules
        if rule.conclusion == steps[place].conclusion and not derived.issuperset(rule.premises)
    ]
    if options:
        place, rule = rng.choice(options)
        before = [] if rng.random() < 0.5 else steps[:place]
        return [*before, rule, *steps[place + 1 :]]
    return steps[-1:] if len(problem.chain) > 2 else _wrong_end(rng, problem, steps)


def _wrong_end(rng: random.Random, problem: problems.WorldProblem, steps: Steps) -> Steps:
    """Stops early or, where it can, in a dead end."""
    kept = steps[:-1]
    known = {*problem.facts, *(s.conclusion for s in kept)}
    ends = [
        r
        for r in problem.rules
        if r not in kept and known.issuperset(r.premises) and r.conclusion != problem.goal
    ]
    if ends and (not kept or rng.random() < 0.5):
        return [*kept, rng.choice(ends)]
    return kept or steps


def write_analysis(
    rng: random.Random, statement: str, proof: str, rates: WriterRates
) -> tuple[str, float]:
    """An analyst's body and score for a well-formed proof; citations fit what it claims."""
    verdict, problem = judge.judge_proof(statement, proof), problems.parse_statement(statement)
    steps = verdict.steps
    if steps is None:
        raise ValueError(f"the analyst reads well-formed proofs only: {proof!r:.120}")
    issues: list[judge.Issue] = []
    for issue in verdict.issues:
        draw = rng.random()
        if draw < rates.overlook:
            continue
        seen = (draw - rates.overlook) / (1.0 - rates.overlook)
        if issue.fault is not judge.Fault.NO_GOAL or seen >= rates.condone:
            issues.append(issue)
    if rng.random() < (rates.invent_flawed if verdict.issues else rates.invent_sound):
        issues += _invented(rng, len(steps), {i.step for i in verdict.issues})
    named = tuple(sorted(issues))
    claimed = {i.step: i.fault for i in named}
    lookups = [
        _fitting(rng, problem, number, lookup, claimed.get(number))
        for number, lookup in enumerate(judge.look_up(problem, steps), start=1)
    ]
    score = judge.score_from(named)
    if rng.random() < rates.redraw:
        score = rng.choice([s for s in SCORES if s != score])
    return judge.write_analysis_body(problem, steps, lookups, named), score


def _fitting(
    rng: random.Random,
    problem: problems.WorldProblem,
    number: int,
    true: judge.Lookup,
    fault: judge.Fault | None,
) -> judge.Lookup:
    """Citations that say what the line claims: the true ones wherever these do."""
    if fault is judge.Fault.NOT_GIVEN:
        return true._replace(rule=None)
    any_rule = rng.randint(1, len(problem.rules))
    rule = any_rule if true.rule is None else true.rule
    if fault is judge.Fault.UNSUPPORTED:
        return true._replace(rule=rule, source=judge.NOTHING)
    if fault is judge.Fault.SKIPPED:
        fits = true.source.startswith("(")
        return true._replace(rule=rule, source=true.source if fits else f"({any_rule})")
    if true.source == judge.NOTHING or true.source.startswith("("):
        place = rng.randrange(number)
        return true._replace(rule=rule, source=f"step {place}" if place else judge.FACTS)
    return true._replace(rule=rule)


def _invented(rng: random.Random, num_steps: int, taken: set[int]) -> list[judge.Issue]:
    free = [n for n in range(1, num_steps + 1) if n not in taken]
    if not free:
        return []
    faults = [f for f in judge.Fault if f is not judge.Fault.NO_GOAL]
    fault = rng.choice(faults)
    return [judge.Issue(rng.choice(free), fault)]


def write_meta_body(
    rng: random.Random,
    statement: str,
    proof: str,
    analysis: judge.AnalysisVerdict,
    rates: WriterRates,
) -> tuple[str, float]:
    """A meta-analyst's body and rating: each named issue looked up anew, then the score.

    What a line cites is true, or fits the misjudgement.
    """
    steps, problem = judge.judge_proof(statement, proof).steps, problems.parse_statement(statement)
    assert steps is not None, "analysts read well-formed proofs only"
    true = judge.look_up(problem, steps)
    lines: list[str] = []
    num_false, follows = 0, analysis.score_follows
    for issue in analysis.named:
        false, cited = issue in analysis.false, list(true)
        if rng.random() < rates.misjudge:
            false = not false
            if issue.step != judge.NO_STEPS:
                at, claimed = issue.step - 1, None if false else issue.fault
                cited[at] = _fitting(rng, problem, issue.step, true[at], claimed)
        num_false += false
        finding = NOT_REAL if false else REAL
        lines.append(judge.write_line(problem, steps, cited, issue.step, finding))
    if not analysis.named:
        lines.append("No issue is named")
    if rng.random() < rates.misjudge:
        follows = not follows
    lines.append(f"The score {'follows' if follows else 'does not follow'}")
    misstated = analysis.quality == 0.5 and not analysis.false and analysis.score_follows
    if analysis.named and num_false == len(analysis.named):
        quality = 0.0
    elif num_false or misstated or not follows:
        quality = 0.5
    else:
        quality = 1.0
    return "\n".join(lines), quality


REAL, NOT_REAL = "real", "not real"
META_PHRASES = (
    f": {REAL}",
    f": {NOT_REAL}",
    "No issue is named",
    "The score",
    " follows",
    " does not follow",
)
"""Fixed wordings of the meta-analyst, for a tokenizer to hold as single pieces."""


def noisy_score(rng: random.Random, score: float, error_rate: float) -> float:
    """A human-like label: with probability `error_rate` one of the other two scores."""
    if rng.random() >= error_rate:
        return score
    return rng.choice([s for s in SCORES if s != score])
