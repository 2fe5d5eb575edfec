"""mathv2-records: records in and out, and where they come from.

Import files (.jsonl, .csv, .parquet, .array_record) into a folder of records:

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

Send proofs without a label to people, and take their ratings back (DIR may be runs/X/records):

mathv2-records --records=DIR --annotate=PROJECT [--analyses=4]    # labeling_config.xml, tasks.json
mathv2-records --records=DIR --annotations=EXPORT.json [--adjudicate=majority] [--to=FILE.jsonl]

The export is Label Studio's JSON, or PROJECT/tasks.csv filled in. Labels go into DIR, or, of a run,
to the stages of kind `experts` that wait for them, and to FILE.jsonl.

Exit codes: 0 finished, 2 bad usage or input (nothing was written), 1 failure.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags
from etils import epath

from mathv2_jax import records, storage
from mathv2_jax.cli import shell
from mathv2_jax.data import annotation, graded, importing, lineage, statistics
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
_define(flags.DEFINE_string, "adjudicate", annotation.MAJORITY, "Or a rater with the last word.")
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
        jobs = [name for name in _JOBS if _ASKED[name].value]
        if jobs[-2:] == ["annotations", "to"]:
            jobs.pop()
        if len(jobs) > 1:
            raise ValueError(f"{' and '.join(f'--{name}' for name in jobs)} exclude each other")
        if "from" not in jobs:
            unused = set(_OF_IMPORTS) - ({"evaluation"} if jobs == ["to"] else set())
            _require_unused(sorted(unused), "are about --from=FILE")
        if jobs:
            _require_unused(("statistics", "figure", "tokenizer"), "are about what is there")
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


def _require_unused(names: Sequence[str], why: str) -> None:
    given = [name for name in names if _ASKED[name].value != _ASKED[name].default]
    if given:
        raise ValueError(f"--{', --'.join(given)} {why}, which is not asked for")


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
    waiting = annotation.tasks(_records(folder), _ASKED.analyses)
    if not waiting:
        raise ValueError(f"{folder} holds no proof without a label: there is nothing to annotate")
    for name, data in annotation.project(waiting).items():
        storage.write_whole(target / name, data)
    shown = sum(len(task.analyses) for task in waiting)
    print(f"{len(waiting)} proofs with {shown} analyses in {os.fspath(target)}")


def _annotations(folder: epath.Path) -> None:
    path, out = shell.absolute(_ASKED.annotations), None
    if _ASKED.to:
        out = _new_file(_ASKED.to)
    ratings = annotation.read(path)
    waiting = annotation.tasks(_records(folder), sys.maxsize)
    found = annotation.labels(ratings, waiting, _ASKED.adjudicate)
    made = [*found.proofs, *found.analyses]
    for name, labelled, still_open, agreed in (
        ("proofs", found.proofs, found.open_proofs, found.on_proofs),
        ("analyses", found.analyses, found.open_analyses, found.on_analyses),
    ):
        print(f"{name}: {len(labelled)} labelled, {len(still_open)} not decided")
        if agreed.items:
            kappa = "undefined" if agreed.kappa is None else f"{agreed.kappa:.3f}"
            print(
                f"  {agreed.items} by several raters, equal {agreed.equal:.1%}, {agreed.name} "
                f"kappa {kappa}"
            )
        for item in still_open:
            print(f"  not decided: {item}")
    if out is not None:
        storage.write_whole(out, records.to_lines(made))
    if storage.list_names(folder, "manifest-*.json"):
        importing.import_labels(store_lib.Store(folder), path, made)
    else:
        _answer_experts(folder, found.proofs)


def _answer_experts(folder: epath.Path, labelled: Sequence[records.Proof]) -> None:
    """Puts labels where the stages of a run look for them; a file that is there is left alone."""
    by_id = {proof.id: proof for proof in labelled}
    for name in sorted(p.name for p in folder.iterdir() if p.name.endswith(experts.WANTED)):
        wanted = [p for p in lineage.read(folder / name) if p.id in by_id]
        stage = name.removesuffix(experts.WANTED)
        target = folder / "input" / experts.ANSWERS / f"{stage}.jsonl"
        if wanted and target.exists():
            print(f"stage {stage}: {target} is there already, and left as it is")
        elif wanted:
            storage.write_whole(target, records.to_lines([by_id[p.id] for p in wanted]))
            print(f"stage {stage}: {len(wanted)} labels in {target}")


def _records(folder: epath.Path) -> list[Any]:
    if not folder.exists():
        raise FileNotFoundError(f"--records={folder}: there is no such folder")
    if storage.list_names(folder, "manifest-*.json"):
        return store_lib.Store(folder).latest()
    return list(lineage.read(folder))


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
