"""Proofs and analyses out to people, as a Label Studio project or a CSV file.

A task is a proof and some analyses of it: people score the proof, rate each analysis, and may
comment. What has a label is not asked for again. `ratings.py` reads what they say,
`adjudication.py` makes labels of it.
"""

import collections
import csv
import dataclasses
import html
import io
import itertools
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from mathv2_jax import records
from mathv2_jax.data import formulas
from mathv2_jax.data import store as store_lib

ANALYSES = 4  # of a proof that people are shown, at most
_VERIFIER = "verifier"  # the role that wrote a sample, as roles.py names it
CONFIG, TASKS, TABLE = "labeling_config.xml", "tasks.json", "tasks.csv"
_CHOICES = ("0", "0.5", "1")
_ALL = "Please score the proof and rate each analysis."
_ANALYSES_ONLY = "The proof has its score: please rate the analyses only."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Items:
    """What people may speak of, by id: all proofs and analyses, with the best label of each.

    `by_ratings` are the ids whose label came from people's ratings before, which newer ratings by
    the same people may replace.
    """

    proofs: Mapping[str, records.Proof]
    analyses: Mapping[str, records.Analysis]
    by_ratings: Collection[str] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A proof that people are to score, unless it has a label, and the analyses of it that they are
    to rate."""

    proof: records.Proof
    analyses: tuple[records.Analysis, ...] = ()


def items(found: Iterable[Any], answered: Collection[str] = ()) -> Items:
    """Of records: people's labels come before machines', any before none, later before earlier.

    A scored sample of a verifier is an analysis too, where its proof is among the records. The
    proof of an analysis that is not among them is taken from the analysis. `answered` are ids whose
    labels came from ratings, beside those that an import of ratings labelled.
    """
    proofs: dict[str, records.Proof] = {}
    analyses: dict[str, records.Analysis] = {}
    samples, imports = list[records.Sample](), set[str]()
    for record in found:
        match record:
            case records.Proof():
                _keep_better(proofs, record)
            case records.Analysis():
                _keep_better(analyses, record)
            case records.Sample(role=role) if role == _VERIFIER and record.score is not None:
                samples.append(record)
            case store_lib.Import() if record.of_ratings:
                imports.add(record.id)
    for sample in samples:
        if sample.target in proofs:
            made = _analysis(sample)
            analyses.setdefault(made.id, made)
    for analysis in analyses.values():
        if analysis.proof_id not in proofs:
            proofs[analysis.proof_id] = _proof(analysis)
    rated = {
        record.id
        for record in (*proofs.values(), *analyses.values())
        if any(parent.rpartition(":")[0] in imports for parent in record.parents)
    }
    return Items(proofs=proofs, analyses=analyses, by_ratings=rated | set(answered))


def _keep_better(held: dict[str, Any], record: Any) -> None:
    before = held.setdefault(record.id, record)
    if record.label is not None and store_lib.trust(record) >= store_lib.trust(before):
        held[record.id] = record


def _analysis(sample: records.Sample) -> records.Analysis:
    assert sample.score is not None, sample.id
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


def _proof(analysis: records.Analysis) -> records.Proof:
    return records.Proof(
        id=analysis.proof_id,
        problem_id=analysis.problem_id,
        statement=analysis.statement,
        text=analysis.proof,
        source=analysis.source,
        # A row's own id is the analysis's: a row with a proof may have the same.
        parents=tuple(p for p in analysis.parents if not p.startswith(store_lib.ROW)),
    )


def tasks(known: Items, most: int = ANALYSES) -> list[Task]:
    """What waits for people: proofs without a label, then others with analyses that have none.

    With up to `most` analyses each, of those without a label: first those whose scores are rarest,
    then the earlier ones.
    """
    waiting: dict[str, list[records.Analysis]] = collections.defaultdict(list)
    for analysis in known.analyses.values():
        if analysis.label is None:
            waiting[analysis.proof_id].append(analysis)
    found = [
        Task(proof=proof, analyses=_chosen(waiting[proof.id], most))
        for proof in known.proofs.values()
    ]
    undecided = [task for task in found if task.proof.label is None]
    return undecided + [task for task in found if task.proof.label is not None and task.analyses]


def _chosen(written: Sequence[records.Analysis], most: int) -> tuple[records.Analysis, ...]:
    """Turn by turn one of each score, the rarest score first."""
    by_score: dict[float, list[records.Analysis]] = collections.defaultdict(list)
    for analysis in written:
        by_score[analysis.score].append(analysis)
    queues = sorted(by_score.values(), key=len)
    turns = itertools.zip_longest(*queues)
    return tuple(itertools.islice((a for turn in turns for a in turn if a is not None), most))


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
        '<HyperText name="asked" value="$asked" inline="true"/>'
        '<View className="columns"><View className="left">'
        '<Header value="Problem"/><HyperText name="problem" value="$problem" inline="true"/>'
        '<Header value="Proof"/><HyperText name="proof" value="$proof" inline="true"/>'
        '<Header value="Score of the proof: 1 complete and rigorous, 0.5 right with minor flaws, '
        '0 wrong or with a gap" size="5"/>'
        f'<Choices name="score" toName="proof" choice="single-radio" showInline="true">'
        f"{choices}</Choices>"
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
            asked=f"<b>{html.escape(_asked(task))}</b>",
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


def _asked(task: Task) -> str:
    return _ALL if task.proof.label is None else _ANALYSES_ONLY


def _table(waiting: Sequence[Task], most: int) -> str:
    """The columns score, comment and quality_N are for people to fill, and rater for their name."""
    slots = range(1, most + 1)
    names = ["proof_id", "asked", "problem", "proof", "score", "comment", "rater"]
    names += [name for n in slots for name in (f"analysis_{n}_id", f"analysis_{n}", f"quality_{n}")]
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, names, restval="")
    writer.writeheader()
    for task in waiting:
        proof = task.proof
        row = dict(proof_id=proof.id, asked=_asked(task), problem=proof.statement, proof=proof.text)
        for number, analysis in enumerate(task.analyses, start=1):
            row |= {f"analysis_{number}_id": analysis.id, f"analysis_{number}": analysis.text}
        writer.writerow(row)
    return file.getvalue()
