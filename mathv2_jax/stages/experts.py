"""Experts grade the newest proofs, as in the paper's iterations before auto-labelling took over."""

import dataclasses

import numpy as np
from absl import logging

from mathv2_jax import processes, records, storage
from mathv2_jax.stages import autolabel
from mathv2_jax.stages import run as run_lib

WANTED = "-wanted"  # the folder of records beside the stage's own
ANSWERS = "experts"  # the folder of input files, one a stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsStage:
    """Up to `num_proofs` proofs with experts' labels, for a verifier's D_v.

    They are the newest distinct proofs of the generator stage `proofs_from`, or those that the
    auto-labelling stage `undecided_from` left undecided. The proofs go without labels to
    `records/NAME-wanted`; the labels come in the file `records/input/experts/NAME.jsonl`, in which
    the embedded world's imperfect experts answer by themselves, and people in a run on real data.
    """

    name: str
    num_proofs: int
    proofs_from: str | None = None
    undecided_from: str | None = None

    def __post_init__(self):
        if self.num_proofs < 1:
            raise ValueError(
                f"stage {self.name}: num_proofs = {self.num_proofs}: must be at least 1"
            )
        if (self.proofs_from is None) == (self.undecided_from is None):
            raise ValueError(
                f"stage {self.name}: give one of proofs_from (a generator's stage) and "
                f"undecided_from (an auto-labelling stage); they are {self.proofs_from!r} and "
                f"{self.undecided_from!r}"
            )


def run_stage(run: run_lib.Run, stage: ExpertsStage) -> dict[str, float]:
    """Writes what is wanted, reads the experts' file, and keeps the proofs that they labelled.

    ValueError where the experts' file is still missing (it says what belongs there), or holds
    something else than labels of the wanted proofs. Where no proof is wanted no file is either.
    """
    run.check_stop(lambda: None)
    wanted = _wanted(run, stage)
    if not wanted:
        logging.warning("%s: there is no proof for experts to grade", stage.name)
        return {"wanted": 0.0, "labelled": 0.0}
    run.parts(f"{stage.name}{WANTED}").write_only(records.to_lines(wanted))
    ask = run.ask_experts
    if ask is not None:
        processes.first(lambda: ask(stage.name))
    graded = _graded(run, stage, wanted)
    run.parts(stage.name).write_only(records.to_lines(graded))
    labels = [proof.label.score for proof in graded if proof.label is not None]
    return {
        "wanted": float(len(wanted)),
        "labelled": float(len(graded)),
        "mean_label": float(np.mean(labels)),
    }


def _wanted(run: run_lib.Run, stage: ExpertsStage) -> list[records.Proof]:
    if stage.proofs_from is not None:
        return autolabel.newest_proofs(run, stage.proofs_from, stage.num_proofs)
    folder = f"{stage.undecided_from}{autolabel.UNDECIDED}"
    return run.stage_records(folder, records.Proof)[: stage.num_proofs]


def _graded(
    run: run_lib.Run, stage: ExpertsStage, wanted: list[records.Proof]
) -> list[records.Proof]:
    """Those of the wanted proofs that the experts' file labels, in the order of `wanted`."""
    name = f"{ANSWERS}/{stage.name}"
    path, folder = run.input_path(name), run.workdir / "records" / f"{stage.name}{WANTED}"
    if not storage.exists(path):
        raise ValueError(
            f"stage {stage.name}: {len(wanted)} proofs wait for experts in "
            f"{folder / storage.part_name(1)}; copy its lines, each with its "
            '"label" (such as {"score": 0.5, "source": "human", "rater": "initials"}), into '
            f"{path}, and give the same command again"
        )
    ids, found = {proof.id for proof in wanted}, dict[str, records.Label]()
    for number, proof in enumerate(run.input(name, records.Proof), start=1):
        where = f"{path}, line {number}: proof {proof.id}"
        if proof.id not in ids:
            raise ValueError(
                f"{where} is none of the wanted ones in {folder}; if the file belongs to an "
                "earlier run of the stage before, move it away and give the same command again"
            )
        if proof.label is None:
            raise ValueError(f"{where} has no label; add it, or take the line out")
        if proof.label.source == "auto":
            raise ValueError(f"{where} has a label of source 'auto'; an expert's is 'human'")
        if proof.label.scale != records.FULL_MARKS:
            raise ValueError(
                f"{where} has a label of scale {proof.label.scale!r}; experts grade on the scale "
                f'{records.FULL_MARKS!r}: map the scores to 0, 0.5 and 1, and leave "scale" out'
            )
        if proof.id in found:
            raise ValueError(f"{where} stands in an earlier line too; keep one of them")
        found[proof.id] = proof.label
    if not found:
        raise ValueError(
            f"{path} holds no labelled proof; put the labelled lines of {folder} there"
        )
    return [dataclasses.replace(p, label=found[p.id]) for p in wanted if p.id in found]
