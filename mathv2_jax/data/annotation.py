"""Proofs out to people, as a Label Studio project or a CSV file, and their ratings back as labels.

A task is a proof and some analyses of it: people score the proof, rate each analysis, and may
comment. Several may do the same tasks: they are compared, and what they disagree about is decided
by the majority or by one of them who has the last word.
"""

import collections
import csv
import dataclasses
import io
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from mathv2_jax import records, storage
from mathv2_jax.data import formulas, lineage

ANALYSES = 4  # of a proof that people are shown, at most
MAJORITY = "majority"
_VERIFIER = "verifier"  # the role that wrote a sample, as roles.py names it
CONFIG, TASKS, TABLE = "labeling_config.xml", "tasks.json", "tasks.csv"
_CHOICES = {"0": 0.0, "0.5": 0.5, "1": 1.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A proof that people are to score, and the analyses of it that they are to rate."""

    proof: records.Proof
    analyses: tuple[records.Analysis, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rating:
    """What one person says of one task; None where they say nothing. `qualities` by analysis."""

    rater: str
    proof_id: str
    score: float | None
    qualities: Mapping[str, float]
    comment: str = ""


def tasks(items: Iterable[Any], most: int = ANALYSES) -> list[Task]:
    """Of records, the proofs that wait for people: without a label by one, nor by a machine.

    With up to `most` analyses each, first those whose scores are rarest, then the earlier ones.
    """
    by_id, judging = lineage.known(items)
    analyses: dict[str, list[records.Analysis]] = collections.defaultdict(list)
    for record in by_id.values():
        if isinstance(record, records.Analysis):
            analyses[record.proof_id].append(record)
    found = []
    for proof in by_id.values():
        if not isinstance(proof, records.Proof) or proof.label is not None:
            continue
        written = [*analyses[proof.id], *map(_analysis, judging.get(proof.id, ()))]
        found.append(Task(proof=proof, analyses=_chosen([a for a in written if a], most)))
    return found


def _analysis(sample: records.Sample) -> records.Analysis | None:
    """A sampled analysis as a record; None of what is none, or has no score."""
    if sample.role != _VERIFIER or sample.score is None:
        return None
    return records.Analysis(
        id=records.content_id("analysis", sample.statement, sample.proof, sample.text),
        problem_id=sample.problem_id,
        proof_id=sample.target,
        statement=sample.statement,
        proof=sample.proof,
        text=sample.text,
        score=sample.score,
        source=sample.stage,
        parents=(sample.id,),
    )


def _chosen(written: Sequence[records.Analysis], most: int) -> tuple[records.Analysis, ...]:
    """Turn by turn one of each score, the rarest score first."""
    by_score: dict[float, list[records.Analysis]] = collections.defaultdict(list)
    for analysis in {a.id: a for a in written}.values():
        by_score[analysis.score].append(analysis)
    queues = sorted(by_score.values(), key=len)
    turns = itertools.zip_longest(*queues)
    return tuple(itertools.islice((a for turn in turns for a in turn if a is not None), most))


# Out.


def labelling_config(most: int) -> str:
    """The page of Label Studio: problem and proof to the left, the analyses to the right."""
    choices = "".join(f'<Choice value="{value}"/>' for value in _CHOICES)
    slots = "".join(
        f'<View className="analysis"><Header value="Analysis {n}" size="5"/>'
        f'<HyperText name="analysis_{n}" value="$analysis_{n}" inline="true"/>'
        f'<Header value="Is analysis {n} right about the proof?" size="6"/>'
        f'<Choices name="quality_{n}" toName="analysis_{n}" choice="single-radio" '
        f'showInline="true">{choices}</Choices></View>'
        for n in range(1, most + 1)
    )
    return (
        "<View>"
        "<Style>.columns{display:flex;gap:24px;align-items:flex-start}"
        ".left,.right{flex:1 1 0;min-width:0}"
        ".analysis{border-top:1px solid #ccc;padding-top:8px;margin-top:8px}</Style>"
        '<View className="columns"><View className="left">'
        '<Header value="Problem"/><HyperText name="problem" value="$problem" inline="true"/>'
        '<Header value="Proof"/><HyperText name="proof" value="$proof" inline="true"/>'
        '<Header value="Score of the proof: 1 complete and rigorous, 0.5 right with minor flaws, '
        '0 wrong or with a gap" size="5"/>'
        f'<Choices name="score" toName="proof" choice="single-radio" showInline="true" '
        f'required="true">{choices}</Choices>'
        '<Header value="Comment" size="5"/>'
        '<TextArea name="comment" toName="proof" rows="3" editable="true"/>'
        f'</View><View className="right">{slots}</View></View></View>\n'
    )


def project(waiting: Sequence[Task]) -> dict[str, bytes]:
    """The files of a project, by name: the page, the tasks, and the same tasks as a CSV file."""
    most = max((len(task.analyses) for task in waiting), default=0)
    made = []
    for task in waiting:
        data: dict[str, Any] = dict(
            proof_id=task.proof.id,
            problem=formulas.rendered(task.proof.statement),
            proof=formulas.rendered(task.proof.text),
        )
        for number in range(1, most + 1):
            analysis = task.analyses[number - 1] if number <= len(task.analyses) else None
            data[f"analysis_{number}_id"] = analysis.id if analysis else ""
            text = formulas.rendered(analysis.text) if analysis else "<i>There is none.</i>"
            data[f"analysis_{number}"] = text
        made.append({"data": data})
    body = json.dumps(made, ensure_ascii=False, indent=1) + "\n"
    return {
        CONFIG: labelling_config(most).encode(),
        TASKS: body.encode(),
        TABLE: _table(waiting, most).encode(),
    }


def _table(waiting: Sequence[Task], most: int) -> str:
    """The columns score, comment and quality_N are for people to fill, and rater for their name."""
    slots = range(1, most + 1)
    names = ["proof_id", "problem", "proof", "score", "comment", "rater"]
    names += [name for n in slots for name in (f"analysis_{n}_id", f"analysis_{n}", f"quality_{n}")]
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, names, restval="")
    writer.writeheader()
    for task in waiting:
        row = dict(proof_id=task.proof.id, problem=task.proof.statement, proof=task.proof.text)
        for number, analysis in enumerate(task.analyses, start=1):
            row |= {f"analysis_{number}_id": analysis.id, f"analysis_{number}": analysis.text}
        writer.writerow(row)
    return file.getvalue()


# Back.


def read(path: epath.Path) -> list[Rating]:
    """The ratings in a JSON export of Label Studio, or in a filled-in CSV file.

    ValueError names the file, the task and the fault.
    """
    data = storage.read_bytes(path)
    if path.suffix == ".csv":
        return _read_table(data, path)
    try:
        body = storage.parse_json(data)
    except ValueError as error:
        raise ValueError(f"{path} is no JSON export of Label Studio: {error}") from error
    if not isinstance(body, list):
        raise ValueError(f"{path} is no JSON export of Label Studio: it holds no list of tasks")
    found = []
    for number, task in enumerate(body, start=1):
        where = f"{path}, task {number}"
        data_of = task.get("data") if isinstance(task, dict) else None
        if not isinstance(data_of, dict) or not isinstance(task.get("annotations"), list):
            raise ValueError(f'{where}: no "data" and "annotations"; export as JSON, not JSON-MIN')
        if "proof_id" not in data_of:
            raise ValueError(f"{where} has no proof_id: it is of another project")
        for annotation in task["annotations"]:
            if not annotation.get("was_cancelled"):
                found.append(_of_annotation(annotation, data_of, where))
    return found


def _of_annotation(annotation: Mapping[str, Any], data: Mapping[str, Any], where: str) -> Rating:
    by = annotation.get("completed_by")
    rater = by.get("email", by.get("id")) if isinstance(by, dict) else by
    values: dict[str, Any] = {}
    for result in annotation.get("result", ()):
        value = result.get("value", {})
        if "choices" in value:
            values[result["from_name"]] = _score(value["choices"][0], where)
        elif "text" in value:
            texts = value["text"] if isinstance(value["text"], list) else [value["text"]]
            values[result["from_name"]] = "\n".join(texts)
    qualities = {
        data[f"{name.replace('quality', 'analysis')}_id"]: value
        for name, value in values.items()
        if name.startswith("quality_") and data.get(f"{name.replace('quality', 'analysis')}_id")
    }
    return Rating(
        rater=str(rater),
        proof_id=data["proof_id"],
        score=values.get("score"),
        qualities=qualities,
        comment=values.get("comment", ""),
    )


def _score(text: str, where: str) -> float:
    if text not in _CHOICES:
        raise ValueError(f"{where}: {text!r:.40} is none of {', '.join(_CHOICES)}")
    return _CHOICES[text]


def _read_table(data: bytes, path: epath.Path) -> list[Rating]:
    try:
        rows = list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no CSV file in UTF-8: {error}") from error
    found = []
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        if not row.get("proof_id"):
            raise ValueError(f"{where} has no proof_id: keep the columns of {TABLE}")
        qualities = {}
        for name, value in row.items():
            if name and name.startswith("quality_") and value and value.strip():
                analysis = row.get(f"{name.replace('quality', 'analysis')}_id")
                if not analysis:
                    raise ValueError(f"{where}: {name} is filled in, but there is no such analysis")
                qualities[analysis] = _score(value.strip(), where)
        score = (row.get("score") or "").strip()
        if not score and not qualities:
            continue  # nobody has been here
        if not (row.get("rater") or "").strip():
            raise ValueError(f"{where} has no rater: write a name or initials there")
        found.append(
            Rating(
                rater=row["rater"].strip(),
                proof_id=row["proof_id"],
                score=_score(score, where) if score else None,
                qualities=qualities,
                comment=(row.get("comment") or "").strip(),
            )
        )
    return found


# Between them.


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


@dataclasses.dataclass(frozen=True)
class Decided:
    """Labelled proofs and analyses, what is still open, and how far the raters agree."""

    proofs: list[records.Proof]
    analyses: list[records.Analysis]
    open_proofs: list[str]
    open_analyses: list[str]
    on_proofs: Agreement
    on_analyses: Agreement


def labels(ratings: Sequence[Rating], known: Sequence[Task], rule: str = MAJORITY) -> Decided:
    """Ratings as human labels on full marks. A rater's later rating of a task takes the place of
    an earlier one. ValueError names a proof or an analysis that is not among the tasks.
    """
    proofs = {task.proof.id: task.proof for task in known}
    analyses = {analysis.id: analysis for task in known for analysis in task.analyses}
    by_proof: dict[str, dict[str, float]] = collections.defaultdict(dict)
    by_analysis: dict[str, dict[str, float]] = collections.defaultdict(dict)
    comments: dict[str, dict[str, str]] = collections.defaultdict(dict)
    for rating in ratings:
        unknown = {rating.proof_id} - set(proofs) or set(rating.qualities) - set(analyses)
        if unknown:
            raise ValueError(
                f"rater {rating.rater} speaks of {unknown.pop()}, which does not wait for people "
                "in these records: they are others, or it has a label already"
            )
        if rating.score is not None:
            by_proof[rating.proof_id][rating.rater] = rating.score
        if rating.comment:
            comments[rating.proof_id][rating.rater] = rating.comment
        for analysis, quality in rating.qualities.items():
            by_analysis[analysis][rating.rater] = quality
    if rule != MAJORITY and rule not in {rating.rater for rating in ratings}:
        raise ValueError(
            f"--adjudicate={rule}: no rater of that name; there are "
            f"{', '.join(sorted({r.rater for r in ratings}))}, and {MAJORITY}"
        )
    made_proofs, open_proofs = _labelled(by_proof, proofs, rule, "I_v", comments)
    made_analyses, open_analyses = _labelled(by_analysis, analyses, rule, "I_mv", {})
    return Decided(
        made_proofs,
        made_analyses,
        open_proofs,
        open_analyses,
        agreement(by_proof.values()),
        agreement(by_analysis.values()),
    )


def _labelled(
    scores: Mapping[str, Mapping[str, float]],
    items: Mapping[str, Any],
    rule: str,
    rubric: str,
    comments: Mapping[str, Mapping[str, str]],
) -> tuple[list[Any], list[str]]:
    made, still_open = [], []
    for name, by_rater in scores.items():
        score = decide(by_rater, rule)
        if score is None:
            still_open.append(name)
            continue
        said = comments.get(name, {})
        label = records.Label(
            score=score,
            source="human",
            rater=", ".join(by_rater),
            votes=tuple(by_rater.values()) if len(by_rater) > 1 else (),
            rubric=rubric,
            comment="\n".join(f"{rater}: {text}" for rater, text in said.items()),
        )
        made.append(dataclasses.replace(items[name], label=label))
    return made, still_open
