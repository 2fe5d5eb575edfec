"""One label of what several people say: how far they agree, and who decides where they do not."""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from mathv2_jax import records
from mathv2_jax.data import annotation, ratings

T = TypeVar("T")
R = TypeVar("R", records.Proof, records.Analysis)
MAJORITY = "majority"
_SHOWN = 5  # conflicts in an error


def cohen_kappa(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Agreement of two raters beyond chance; None without items, or where chance is certain."""
    if not pairs:
        return None
    total = len(pairs)
    first, second = (collections.Counter(side) for side in zip(*pairs, strict=True))
    observed = sum(a == b for a, b in pairs) / total
    chance = sum(first[s] * second[s] for s in first) / total**2
    return None if chance == 1.0 else (observed - chance) / (1.0 - chance)


def fleiss_kappa(items: Sequence[Sequence[float]]) -> float | None:
    """The same of m >= 2 raters an item, who need not be the same ones (Fleiss 1971).

    None as above; ValueError where items have different numbers of ratings, or one.
    """
    if not items:
        return None
    raters = {len(item) for item in items}
    if len(raters) > 1 or min(raters) < 2:
        raise ValueError(f"items have {sorted(raters)} ratings: Fleiss' kappa needs one number > 1")
    m = raters.pop()
    counts = [collections.Counter(item) for item in items]
    observed = sum(sum(n * (n - 1) for n in c.values()) / (m * (m - 1)) for c in counts)
    observed /= len(items)
    totals = sum(counts, collections.Counter())
    chance = sum((n / (m * len(items))) ** 2 for n in totals.values())
    return None if chance == 1.0 else (observed - chance) / (1.0 - chance)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far raters agree about `items` things that at least two of them scored."""

    items: int
    equal: float  # share on which all agree
    kappa: float | None
    name: str  # of the kappa


def agreement(scores: Iterable[Mapping[str, float]]) -> Agreement:
    """Of scores by rater, item by item: Cohen's kappa of two raters, else Fleiss'.

    Fleiss' is of the items with the commonest number of ratings.
    """
    shared = [s for s in scores if len(s) > 1]
    equal = sum(len(set(s.values())) == 1 for s in shared) / len(shared) if shared else 0.0
    raters = sorted({rater for s in shared for rater in s})
    if len(raters) == 2:
        pairs = [(s[raters[0]], s[raters[1]]) for s in shared]
        return Agreement(items=len(shared), equal=equal, kappa=cohen_kappa(pairs), name="Cohen's")
    number = max((len(s) for s in shared), key=[len(s) for s in shared].count, default=0)
    kept = [list(s.values()) for s in shared if len(s) == number]
    return Agreement(items=len(shared), equal=equal, kappa=fleiss_kappa(kept), name="Fleiss'")


def decide(scores: Mapping[str, float], rule: str) -> float | None:
    """One score of several raters': where they differ by the rule; None where that decides nothing.

    `majority` is a strict one of all ratings; any other rule names the rater who has the last word.
    """
    if len(set(scores.values())) == 1:
        return next(iter(scores.values()))
    if rule != MAJORITY:
        return scores.get(rule)
    best, number = collections.Counter(scores.values()).most_common(1)[0]
    return best if 2 * number > len(scores) else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Labelled(Generic[R]):
    """A record with the label that stands now, and the one `before`; `place` is that of the task in
    the file, from 1."""

    record: R
    before: records.Label | None
    place: int

    @property
    def is_new(self) -> bool:
        """Whether the ratings changed anything."""
        return self.record.label != self.before


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decisions(Generic[R]):
    """What the ratings of proofs, or of analyses, come to; `undecided` as they were before."""

    labelled: Sequence[Labelled[R]]
    undecided: Sequence[R]
    agreement: Agreement


@dataclasses.dataclass(frozen=True)
class Decided:
    """Of the proofs and of the analyses that ratings are about."""

    proofs: Decisions[records.Proof]
    analyses: Decisions[records.Analysis]


def labels(
    given: Sequence[ratings.Rating], known: annotation.Items, rule: str = MAJORITY
) -> Decided:
    """Ratings as human labels on full marks.

    A rater's later rating of an item takes the place of an earlier one: by their times, in the
    order of the file where one has none. Of items that have a label `standing` decides; one that
    the ratings leave undecided keeps it. ValueError names items that are not known, and those whose
    labels conflict.
    """
    for rating in given:
        unknown = {rating.proof_id} - set(known.proofs)
        unknown |= set(rating.qualities) - set(known.analyses)
        if unknown:
            raise ValueError(
                f"task {rating.place}: rater {rating.rater} speaks of {min(unknown)}, which is not "
                "among these records"
            )
    if rule != MAJORITY and rule not in {rating.rater for rating in given}:
        raise ValueError(
            f"--adjudicate={rule}: no rater of that name; there are "
            f"{', '.join(sorted({r.rater for r in given}))}, and {MAJORITY}"
        )
    scores = _latest(given, lambda r: {} if r.score is None else {r.proof_id: r.score})
    comments = _latest(given, lambda r: {r.proof_id: r.comment} if r.comment else {})
    qualities = _latest(given, lambda r: r.qualities)
    places: dict[str, int] = {}
    for rating in given:
        for item in (rating.proof_id, *rating.qualities):
            places.setdefault(item, rating.place)
    made_proofs = _made(scores, rule, "I_v", comments)
    made_analyses = _made(qualities, rule, "I_mv", {})
    _require_no_conflict(known, {**made_proofs, **made_analyses})
    return Decided(
        _decisions(known.proofs, known, scores, made_proofs, places),
        _decisions(known.analyses, known, qualities, made_analyses, places),
    )


def _latest(
    given: Iterable[ratings.Rating], said: Callable[[ratings.Rating], Mapping[str, T]]
) -> dict[str, dict[str, T]]:
    """What each rater said last of each item, by item and rater."""
    found: dict[str, dict[str, T]] = collections.defaultdict(dict)
    times: dict[tuple[str, str], Any] = {}
    for rating in given:
        for item, value in said(rating).items():
            key = item, rating.rater
            before = times.get(key)
            if before is not None and rating.at is not None and rating.at < before:
                continue
            found[item][rating.rater], times[key] = value, rating.at
    return found


def _made(
    scores: Mapping[str, Mapping[str, float]],
    rule: str,
    rubric: str,
    comments: Mapping[str, Mapping[str, str]],
) -> dict[str, records.Label]:
    """The labels of the items that are decided."""
    made = {}
    for item, by_rater in scores.items():
        score = decide(by_rater, rule)
        if score is not None:
            said = comments.get(item, {})
            made[item] = records.Label(
                score=score,
                source="human",
                rater=", ".join(by_rater),
                votes=tuple(by_rater.values()) if len(by_rater) > 1 else (),
                rubric=rubric,
                comment="\n".join(f"{rater}: {text}" for rater, text in said.items()),
            )
    return made


def standing(
    before: records.Label | None, made: records.Label, *, by_ratings: bool
) -> records.Label | None:
    """The label that stands of an earlier one and that made of ratings; None where they conflict.

    The new one, where there was none or no person's, or one that came from ratings too, all of
    whose raters are heard again. Otherwise the earlier one, with which the new one must agree.
    """
    if before is None or before.source != "human":
        return made
    if by_ratings and _raters(before) <= _raters(made):
        return made
    return before if before.score == made.score else None


def _raters(label: records.Label) -> set[str]:
    return set(label.rater.split(", "))


def describe(label: records.Label) -> str:
    """Its score, its scale and who gave it."""
    by = f" by {label.rater}" if label.rater else ""
    return f"{label.score:g} ({label.source}, {label.scale}{by})"


def _standing(known: annotation.Items, record: Any, made: records.Label) -> records.Label | None:
    return standing(record.label, made, by_ratings=record.id in known.by_ratings)


def _require_no_conflict(known: annotation.Items, made: Mapping[str, records.Label]) -> None:
    held: dict[str, Any] = {**known.proofs, **known.analyses}
    faults = [
        f"{type(held[item]).__name__} {item} is {describe(held[item].label)} already, "
        f"the ratings make it {describe(label)}"
        for item, label in made.items()
        if _standing(known, held[item], label) is None
    ]
    if faults:
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise ValueError(f"labels conflict: {'; '.join(faults[:_SHOWN])}{more}")


def _decisions(
    held: Mapping[str, R],
    known: annotation.Items,
    scores: Mapping[str, Mapping[str, float]],
    made: Mapping[str, records.Label],
    places: Mapping[str, int],
) -> Decisions[R]:
    labelled = [
        Labelled(
            record=dataclasses.replace(held[item], label=_standing(known, held[item], label)),
            before=held[item].label,
            place=places[item],
        )
        for item, label in made.items()
    ]
    return Decisions(
        labelled=labelled,
        undecided=[held[item] for item in scores if item not in made],
        agreement=agreement(scores.values()),
    )
