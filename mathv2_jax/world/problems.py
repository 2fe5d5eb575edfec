"""Problems of the proof world: Horn clauses over letters, a fact or two, and a goal, in English.

`Given: A. Rules: (1) A implies F (2) F and B imply C. Show: C.` Finding a proof is a search among
distractors, checking one is a look-up, so there is a gap between writing and checking.
"""

import dataclasses
import hashlib
import random
import re
import string
from collections.abc import Mapping
from typing import Any

_STATEMENT = re.compile(
    r"Given: (?P<facts>[A-Z](?: and [A-Z])*)\. Rules: (?P<rules>[^:]*)\. Show: (?P<goal>[A-Z])\."
)
_NUMBERED = re.compile(r"\(\d+\) ([A-Z][A-Za-z ]*[A-Z])")
_RULE = re.compile(r"(?P<premises>[A-Z](?: and [A-Z])*) impl(?:y|ies) (?P<conclusion>[A-Z])")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dials:
    """How hard the world is. Ranges are inclusive; shares are of the distractors.

    A distractor drawn twice stands once. `two_premises` is the share of chain steps that need a
    second premise, an extra fact.
    """

    num_letters: int = 12
    depth: tuple[int, int] = (2, 4)
    distractors: tuple[int, int] = (2, 4)
    dead_ends: float = 0.45
    from_underivable: float = 0.25
    two_premises: float = 0.0

    def __post_init__(self):
        if not 4 <= self.num_letters <= 26:
            raise ValueError(
                f"world.dials.num_letters = {self.num_letters}: must lie between 4 and 26"
            )
        for name, least in (("depth", 1), ("distractors", 0)):
            low, high = getattr(self, name)
            if not least <= low <= high:
                raise ValueError(
                    f"world.dials.{name} = {(low, high)}: must be an ascending range from {least}"
                )
        if self.depth[1] + 2 > self.num_letters:
            raise ValueError(
                f"world.dials.depth = {self.depth} does not fit {self.num_letters} letters: the "
                "longest chain needs depth + 2"
            )
        for name in ("dead_ends", "from_underivable", "two_premises"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"world.dials.{name} = {getattr(self, name)}: must lie in 0..1")
        if self.dead_ends + self.from_underivable > 1.0:
            raise ValueError(
                f"world.dials.dead_ends + from_underivable = "
                f"{self.dead_ends + self.from_underivable}: must not exceed 1"
            )


@dataclasses.dataclass(frozen=True)
class Rule:
    """Premises together imply the conclusion."""

    premises: tuple[str, ...]
    conclusion: str

    def __str__(self) -> str:
        verb = "implies" if len(self.premises) == 1 else "imply"
        return f"{' and '.join(self.premises)} {verb} {self.conclusion}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorldProblem:
    """Facts, rules and the goal; `chain` (the shortest proof) is the world's secret."""

    facts: tuple[str, ...]
    rules: tuple[Rule, ...]
    goal: str
    chain: tuple[Rule, ...] = ()

    def __str__(self) -> str:
        rules = " ".join(f"({n}) {rule}" for n, rule in enumerate(self.rules, start=1))
        return f"Given: {' and '.join(self.facts)}. Rules: {rules}. Show: {self.goal}."


def parse_rule(text: str) -> Rule | None:
    """The rule that `text` states, None where it states none."""
    match = _RULE.fullmatch(text)
    if match is None:
        return None
    return Rule(tuple(match["premises"].split(" and ")), match["conclusion"])


def parse_statement(statement: str) -> WorldProblem:
    """The inverse of `str(problem)`; ValueError where the text is no statement of this world."""
    match = _STATEMENT.fullmatch(statement)
    rules = [parse_rule(r) for r in _NUMBERED.findall(match["rules"])] if match else [None]
    found = tuple(r for r in rules if r is not None)
    if match is not None and None not in rules:
        facts = tuple(match["facts"].split(" and "))
        problem = WorldProblem(facts=facts, rules=found, goal=match["goal"])
        if str(problem) == statement:
            return problem
    raise ValueError(f"not a statement of the proof world: {statement!r:.120}")


def make_problem(rng: random.Random, dials: Dials) -> WorldProblem:
    """A solvable problem: a chain from a fact to the goal, hidden among distractors."""
    letters = rng.sample(string.ascii_uppercase[: dials.num_letters], dials.num_letters)
    depth = rng.randint(*dials.depth)
    nodes, spare = letters[: depth + 1], letters[depth + 1 :]
    facts = [nodes[0]]
    chain: list[Rule] = []
    for before, after in zip(nodes[:-1], nodes[1:], strict=True):
        premises = (before,)
        if rng.random() < dials.two_premises and len(spare) > 2:
            facts.append(spare.pop())
            premises = (before, facts[-1])
        chain.append(Rule(premises, after))
    rules = list(chain)
    reachable = list(nodes[:-1])
    for _ in range(rng.randint(*dials.distractors)):
        rule = _distractor(rng, dials, nodes, reachable, spare)
        if rule not in rules:
            rules.append(rule)
    rng.shuffle(rules)
    return WorldProblem(
        facts=tuple(facts),
        rules=tuple(rules),
        goal=nodes[-1],
        chain=tuple(chain),
    )


def _distractor(
    rng: random.Random,
    dials: Dials,
    nodes: list[str],
    reachable: list[str],
    spare: list[str],
) -> Rule:
    """One rule that no shortest proof needs; takes letters out of `spare`."""
    kind = rng.random()
    if kind < dials.dead_ends and spare:
        leaf = spare.pop()
        rule = Rule((rng.choice(reachable),), leaf)
        reachable.append(leaf)
        return rule
    if kind < dials.dead_ends + dials.from_underivable and spare:
        return Rule((spare.pop(),), rng.choice(nodes[1:]))
    later = rng.randrange(1, len(nodes))
    return Rule((nodes[later],), nodes[rng.randrange(later)])


def canonical_form(problem: WorldProblem) -> str:
    """A name that renaming letters and reordering rules or facts does not change.

    Colour refinement of the rule graph, then the graph written in colours: different problems may
    share a name (they are then kept together, which is safe for splits), equal ones always do.
    """
    letters = {a for r in problem.rules for a in (*r.premises, r.conclusion)}
    letters |= {problem.goal, *problem.facts}
    colour = _ranked({a: (a in problem.facts, a == problem.goal) for a in letters})
    while True:
        uses: dict[str, list[Any]] = {a: [] for a in letters}
        for rule in problem.rules:
            premises = sorted(colour[p] for p in rule.premises)
            for atom in {*rule.premises, rule.conclusion}:
                place = (atom in rule.premises, atom == rule.conclusion)
                uses[atom].append((place, premises, colour[rule.conclusion]))
        finer = _ranked({a: (colour[a], sorted(uses[a])) for a in letters})
        if len(set(finer.values())) == len(set(colour.values())):
            break
        colour = finer
    rules = sorted(
        (sorted(colour[p] for p in r.premises), colour[r.conclusion]) for r in problem.rules
    )
    facts = sorted(colour[f] for f in problem.facts)
    text = f"{rules}{facts}{colour[problem.goal]}{sorted(colour.values())}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _ranked(signatures: Mapping[str, Any]) -> dict[str, int]:
    """Each letter's rank among the distinct signatures."""
    order = {repr(s): s for s in signatures.values()}
    ranks = {text: rank for rank, (text, _) in enumerate(sorted(order.items(), key=lambda x: x[1]))}
    return {letter: ranks[repr(s)] for letter, s in signatures.items()}
