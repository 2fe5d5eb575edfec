"""mathv2-records: records in and out, and where they come from.

Import files (.json, .jsonl, .csv, .parquet, .array_record) into a folder of records:

mathv2-records --from=FILE [--from=FILE ...] --records=DIR [--field=OURS=THEIRS ...] [--kind=auto]
               [--source=NAME] [--scale=NAME] [--score_map=marks:7] [--evaluation | --withdraw]
               [--max_bad_share=0.05]

What a row may hold: problem; proof; score (0, 0.5 or 1) or human_score and human_max; analysis;
id, source, scale, rater; answer, reference_solution, grading_guidelines, false_variant. Records
written by this program are taken as they are. Rejects stand in DIR/rejects.jsonl. What --evaluation
or --withdraw names counts for texts that are there already, too.

mathv2-records --records=DIR [--statistics=FILE.json] [--figure=FILE.png]     # what is there
mathv2-records --records=DIR --lineage=ID     # what a record is made of; also of runs/X/records
mathv2-records --records=DIR --to=FILE.jsonl [--kind=proof] [--evaluation]     # without copies

Send what has no label to people, and take their ratings back (DIR may be runs/X/records):

mathv2-records --records=DIR --annotate=PROJECT [--analyses=4] [--kind=proof]
mathv2-records --records=DIR --annotations=EXPORT.json [--adjudicate=majority] [--to=FILE.jsonl]

PROJECT holds labeling_config.xml, tasks.json and tasks.csv: proofs without a label, and analyses
without one, those of other proofs too (--kind=proof: not these). The export is Label Studio's JSON,
or tasks.csv filled in. Labels go into DIR, or, of a run, to the stages of kind `experts` that wait
for them, and to FILE.jsonl; analyses of a run have no other place. Later exports, with more raters
or another --adjudicate, replace the labels that the same raters' ratings made before.

Exit codes: 0 finished, 2 bad usage or input (nothing was written), 1 failure.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags
from etils import epath

from mathv2_jax import records, storage
from mathv2_jax.cli import shell
from mathv2_jax.data import (
    adjudication,
    annotation,
    graded,
    importing,
    lineage,
    ratings,
    sources,
    statistics,
)
from mathv2_jax.data import store as store_lib
from mathv2_jax.stages import experts

_ASKED = flags.FlagValues()
_DEFAULT = importing.ImportConfig()


def _define(make: Callable[..., Any], name: str, default: Any, doc: str) -> None:
    make(name, default, doc, flag_values=_ASKED)


_define(flags.DEFINE_multi_string, "from", [], "A file to import; may be given often.")
_define(flags.DEFINE_string, "records", None, "The folder of records.")
_define(flags.DEFINE_multi_string, "field", [], "OURS=THEIRS: a column of another name.")
_define(flags.DEFINE_string, "kind", _DEFAULT.kind, f"One of {', '.join(importing.KINDS)}.")
_define(flags.DEFINE_string, "source", "", "Of rows that name none; default: the file's name.")
_define(flags.DEFINE_string, "scale", "", "How the scores were made, such as full-marks.")
_define(flags.DEFINE_string, "score_map", None, "marks, marks:7, or pairs: 7:1,6:0.5,else:0")
_define(flags.DEFINE_bool, "evaluation", False, "Never learn from these problems.")
_define(flags.DEFINE_bool, "withdraw", False, "Give up evaluation problems that these are about.")
_define(
    flags.DEFINE_float, "max_bad_share", _DEFAULT.max_bad_share, "Of rows; more: none is taken."
)
_define(flags.DEFINE_integer, "max_text_bytes", _DEFAULT.max_text_bytes, "Of one text.")
_define(flags.DEFINE_float, "near", _DEFAULT.near, "Share of a statement that makes a cluster.")
_define(flags.DEFINE_string, "lineage", None, "The id of a record, or how it begins.")
_define(flags.DEFINE_string, "statistics", None, "A JSON file for the figures of the table.")
_define(flags.DEFINE_string, "figure", None, "A .png of lengths and scores; needs matplotlib.")
_define(flags.DEFINE_string, "tokenizer", None, "A folder or .model: lengths in its tokens.")
_define(flags.DEFINE_string, "to", None, "A .jsonl file to be written.")
_define(flags.DEFINE_string, "annotate", None, "A new folder for a project of Label Studio.")
_define(flags.DEFINE_integer, "analyses", annotation.ANALYSES, "Of a proof, at most, in a project.")
_define(flags.DEFINE_string, "annotations", None, "What people made of it: .json or .csv.")
_define(flags.DEFINE_string, "adjudicate", adjudication.MAJORITY, "Or a rater with the last word.")
_OF_IMPORTS = (
    "field",
    "source",
    "scale",
    "score_map",
    "evaluation",
    "withdraw",
    "max_bad_share",
    "max_text_bytes",
    "near",
)


def main(argv: Sequence[str]) -> int:
    """Usage and input errors are one line and exit code 2; what is a bug keeps its traceback."""
    try:
        _ASKED.unparse_flags()  # one process may call it often
        if not shell.read_flags(_ASKED, argv, __doc__, ["records"]):
            return shell.FINISHED
        folder = shell.absolute(_ASKED.records)
        empty = [name for name in _JOBS if name != "from" and _ASKED[name].value == ""]
        if empty:
            raise ValueError(f"--{empty[0]}= is empty: give what it is to name, or leave it out")
        jobs = [name for name in _JOBS if _ASKED[name].value]
        if jobs[-2:] == ["annotations", "to"]:
            jobs.pop()
        if len(jobs) > 1:
            raise ValueError(f"{' and '.join(f'--{name}' for name in jobs)} exclude each other")
        if "from" not in jobs:
            unused = set(_OF_IMPORTS) - ({"evaluation"} if jobs == ["to"] else set())
            shell.require_unused(_ASKED, sorted(unused), "are about --from=FILE")
        if "annotate" not in jobs:
            shell.require_unused(_ASKED, ["analyses"], "are about --annotate=DIR")
        if "annotations" not in jobs:
            shell.require_unused(_ASKED, ["adjudicate"], "is about --annotations=FILE")
        if jobs:
            shell.require_unused(
                _ASKED, ("statistics", "figure", "tokenizer"), "are about what is there"
            )
        _JOBS.get("".join(jobs), _show)(folder)
        return shell.FINISHED
    except (ValueError, FileNotFoundError, flags.Error) as error:
        if not shell.is_of_input(error):
            raise
        print(f"mathv2-records: {error}", file=sys.stderr)
        return shell.BAD_INPUT
    except OSError as error:  # a full disk, a folder that may not be read: no bug of ours
        print(f"mathv2-records: {error}", file=sys.stderr)
        return shell.FAILED


def _fields(given: Sequence[str]) -> Mapping[str, str]:
    found = {}
    for pair in given:
        ours, equals, theirs = pair.partition("=")
        if not equals or not ours or not theirs:
            raise ValueError(f"--field={pair}: give OURS=THEIRS, such as problem=question")
        if ours not in importing.FIELDS:
            raise ValueError(f"--field={pair}: ours are {', '.join(importing.FIELDS)}")
        found[ours] = theirs
    return found


def _import(folder: epath.Path) -> None:
    asked = _ASKED
    config = importing.ImportConfig(
        fields=_fields(asked.field),
        kind=asked.kind,
        source=asked.source,
        scale=asked.scale,
        score_map=graded.ScoreMap.parse(asked.score_map) if asked.score_map else None,
        evaluation=asked.evaluation,
        withdraw=asked.withdraw,
        max_bad_share=asked.max_bad_share,
        max_text_bytes=asked.max_text_bytes,
        near=asked.near,
    )
    files = [shell.absolute(file) for file in asked["from"].value or ()]
    report = importing.import_files(store_lib.Store(folder), files, config)
    kept = "  ".join(f"{kind} {number}" for kind, number in sorted(report.kept.items()))
    print(f"{report.rows} rows: {kept or 'nothing new'}")
    if report.rejects:
        print(f"left out, see {folder / store_lib.REJECTS}:\n{importing.describe(report.rejects)}")
    for note in report.notes:
        print(f"note: {note}")


def _lineage(folder: epath.Path) -> None:
    if not folder.exists():
        raise FileNotFoundError(f"--records={folder}: there is no such folder")
    print("\n".join(lineage.tree(_ASKED.lineage, lineage.known(lineage.read(folder)))))


def _show(folder: epath.Path) -> None:
    found = statistics.of(store_lib.require(folder), statistics.counter(_ASKED.tokenizer))
    print(statistics.table(found))
    if _ASKED.statistics:
        storage.write_whole(shell.absolute(_ASKED.statistics), statistics.to_json(found))
    if _ASKED.figure:
        statistics.draw(found, shell.absolute(_ASKED.figure))


def _export(folder: epath.Path) -> None:
    kinds = {
        "problem": records.Problem,
        "proof": records.Proof,
        "analysis": records.Analysis,
    }
    if _ASKED.kind not in (*kinds, "auto"):
        raise ValueError(f"--kind={_ASKED.kind}: one of auto, {', '.join(kinds)}")
    wanted = tuple(kinds.values()) if _ASKED.kind == "auto" else (kinds[_ASKED.kind],)
    store = store_lib.require(folder)
    held = store.marked("evaluation") - store.marked("withdraws")
    every = [r for r in store.latest() if isinstance(r, wanted)]
    found = [r for r in every if ((type(r), r.id) in held) is _ASKED.evaluation]
    target = _new_file(_ASKED.to)
    storage.write_whole(target, records.to_lines(found))
    print(f"{len(found)} records in {os.fspath(target)}")
    if len(found) < len(every):
        other = "for training" if _ASKED.evaluation else "for evaluation, which --evaluation writes"
        print(f"note: {len(every) - len(found)} records are {other}")


def _annotate(folder: epath.Path) -> None:
    if _ASKED.analyses < 0:
        raise ValueError(f"--analyses={_ASKED.analyses}: give 0 or more")
    target = shell.absolute(_ASKED.annotate)
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"--annotate={target} is there already and not empty; name another folder")
    kind = _ASKED.kind
    if kind not in ("auto", "proof"):
        raise ValueError(f"--kind={kind}: auto, or proof for the proofs without a label alone")
    waiting = annotation.tasks(_items(folder), _ASKED.analyses)
    if kind == "proof":
        waiting = [task for task in waiting if task.proof.label is None]
    if not waiting:
        what = "no proof without a label" + (", and no analysis" if kind == "auto" else "")
        raise ValueError(f"{folder} holds {what}: there is nothing to annotate")
    for name, data in annotation.project(waiting).items():
        storage.write_whole(target / name, data)
    shown = sum(len(task.analyses) for task in waiting)
    print(f"{len(waiting)} proofs with {shown} analyses in {os.fspath(target)}")


def _annotations(folder: epath.Path) -> None:
    """What is refused is refused before anything is written; --to is written last."""
    path = shell.absolute(_ASKED.annotations)
    out = _new_file(_ASKED.to) if _ASKED.to else None
    found = adjudication.labels(ratings.read(path), _items(folder), _ASKED.adjudicate)
    labelled = [*found.proofs.labelled, *found.analyses.labelled]
    if _is_store(folder):
        new = [(made.place, made.record) for made in labelled if made.is_new]
        if new:
            importing.import_labels(store_lib.Store(folder), path, _ASKED.adjudicate, new)
    else:
        answers = _answers(folder, [made.record for made in found.proofs.labelled])
        if out is None:
            _require_a_place([made.record for made in labelled if made.is_new], answers)
        for stage, proofs in answers.items():
            _write_answers(folder, stage, proofs)
    if out is not None:
        storage.write_whole(out, records.to_lines([made.record for made in labelled]))
    _report("proofs", found.proofs)
    _report("analyses", found.analyses)


def _report(name: str, found: adjudication.Decisions) -> None:
    print(f"{name}: {len(found.labelled)} labelled, {len(found.undecided)} not decided")
    as_before = sum(not made.is_new for made in found.labelled)
    if as_before:
        print(f"  {as_before} had their label already")
    for made in found.labelled:
        if made.before is not None and made.is_new:
            was, now = map(adjudication.describe, (made.before, made.record.label))
            print(f"  {made.record.id} was {was}, is {now}")
    agreed = found.agreement
    if agreed.items:
        kappa = "undefined" if agreed.kappa is None else f"{agreed.kappa:.3f}"
        print(
            f"  {agreed.items} by several raters, equal {agreed.equal:.1%}, {agreed.name} "
            f"kappa {kappa}"
        )
    for record in found.undecided:
        held = record.label and f", it stays {adjudication.describe(record.label)}"
        print(f"  not decided: {record.id}{held or ''}")


def _answers_path(folder: epath.Path, stage: str) -> epath.Path:
    return folder / "input" / experts.ANSWERS / f"{stage}.jsonl"


def _answered(path: epath.Path) -> list[records.Proof]:
    """The proofs in a file of answers; none where there is no file."""
    lines = storage.read_bytes(path).split(b"\n") if storage.exists(path) else []
    return sources.parse_lines([line for line in lines if line], records.Proof, os.fspath(path))


def _answers(
    folder: epath.Path, labelled: Sequence[records.Proof]
) -> Mapping[str, list[records.Proof]]:
    """What the file of each stage that waits for some of these is to hold: all that it holds, and
    these. ValueError where labels conflict.
    """
    by_id = {proof.id: proof for proof in labelled}
    found = {}
    for name in sorted(p.name for p in folder.iterdir() if p.name.endswith(experts.WANTED)):
        stage = name.removesuffix(experts.WANTED)
        wanted = {p.id: by_id[p.id] for p in lineage.read(folder / name) if p.id in by_id}
        if wanted:
            path = _answers_path(folder, stage)
            there = [_merged(proof, wanted.pop(proof.id, proof), path) for proof in _answered(path)]
            found[stage] = [*there, *wanted.values()]
    return found


def _merged(there: records.Proof, labelled: records.Proof, path: epath.Path) -> records.Proof:
    if labelled.label is None:
        return there
    label = adjudication.standing(there.label, labelled.label, by_ratings=True)
    if there.label is not None and label is None:
        was, now = map(adjudication.describe, (there.label, labelled.label))
        raise ValueError(
            f"labels conflict: proof {there.id} is {was} in {path}, the ratings make it {now}"
        )
    return dataclasses.replace(there, label=label)


def _write_answers(folder: epath.Path, stage: str, proofs: Sequence[records.Proof]) -> None:
    path = _answers_path(folder, stage)
    if proofs == _answered(path):
        return
    storage.write_whole(path, records.to_lines(proofs))
    print(f"stage {stage}: {len(proofs)} labels in {path}")
    if storage.list_names(folder / stage, "manifest-*.json"):
        print(f"  it has read its labels before: --restart_stage={stage} takes these")


def _require_a_place(labelled: Sequence[Any], answers: Mapping[str, Sequence[Any]]) -> None:
    """ValueError where some of a run's labels would be written nowhere."""
    placed = {proof.id for proofs in answers.values() for proof in proofs}
    lost = [record for record in labelled if record.id not in placed]
    if lost:
        kinds = " and ".join(
            f"{number} {name}"
            for kind, name in ((records.Proof, "proofs"), (records.Analysis, "analyses"))
            if (number := sum(isinstance(record, kind) for record in lost))
        )
        raise ValueError(
            f"no stage of this run takes the labels of {kinds}, such as {lost[0].id}: give "
            "--to=FILE.jsonl too, and import that with mathv2-records --from=FILE.jsonl"
        )


def _is_store(folder: epath.Path) -> bool:
    return bool(storage.list_names(folder, "manifest-*.json"))


def _items(folder: epath.Path) -> annotation.Items:
    """Proofs and analyses of a store, or of a run, whose experts' answers are people's ratings."""
    if not folder.exists():
        raise FileNotFoundError(f"--records={folder}: there is no such folder")
    if _is_store(folder):
        return annotation.items(store_lib.Store(folder).latest())
    answers = folder / "input" / experts.ANSWERS
    files = [answers / name for name in storage.list_names(answers, "*.jsonl")]
    answered = [proof.id for file in files for proof in _answered(file) if proof.label]
    return annotation.items(lineage.read(folder), answered)


def _new_file(name: str) -> epath.Path:
    target = shell.absolute(name)
    if target.exists():
        raise ValueError(f"--to={target} is there already; name a file that is not")
    if target.suffix != ".jsonl":
        raise ValueError(f"--to={target}: its name must end in .jsonl")
    return target


_JOBS: Mapping[str, Callable[[epath.Path], None]] = {
    "from": _import,
    "lineage": _lineage,
    "annotate": _annotate,
    "annotations": _annotations,
    "to": _export,
}


def run() -> None:
    """The console script."""
    shell.run(main)


if __name__ == "__main__":
    run()
