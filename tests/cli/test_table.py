from etils import epath

from mathv2_jax import metrics
from mathv2_jax.cli import table, train
from mathv2_jax.evaluation import held_out
from mathv2_jax.rl import optimizer
from mathv2_jax.stages import answer, sft

SIDE = {"mean": 0.25, "se": 0.0123, "n": 1200}
ROW = {"before": SIDE, "after": SIDE, "difference": {"mean": -0.5, "se": None}}
EMPTY = {"mean": None, "se": None, "n": 0}


def summary(**changed):
    constants = {"meta_accuracy": {"before": 0.5, "after": 0.736}}
    return {"metrics": {name: ROW for name in held_out.METRICS} | changed, "constants": constants}


def without_metrics(before, after):
    return {"metrics": None, "compared": {"before": before, "after": after}}


def test_a_metric_is_a_row_of_before_after_change_and_n():
    lines = table.render(summary(), {"sft": 1.0}, 0.0).splitlines()
    assert lines[0].split()[-5:] == ["before", "after", "change", "n", "constant"]
    rows = lines[1 : 1 + len(held_out.METRICS)]
    for row in rows:
        figures = ["0.250", "±0.012", "0.250", "±0.012", "-0.500", "1200"]
        if row.startswith("meta-verifier: rating equals"):
            figures.append("0.736")  # the best constant answer's
        assert row.split()[-len(figures) :] == figures
        assert row.index("1200") == lines[0].index("     n") + 2
    assert len(set(rows)) == len(held_out.METRICS)  # each has its own title


def test_a_metric_without_items_has_no_figures():
    row = {"before": EMPTY, "after": EMPTY, "difference": EMPTY}
    text = table.render(summary(meta_accuracy=row), {"sft": 1.0}, 0.0)
    (line,) = (
        line for line in text.splitlines() if line.startswith("meta-verifier: rating equals")
    )
    assert line.split()[-5:] == ["-", "-", "-", "0", "0.736"]


def test_data_without_an_exact_judge_say_so():
    text = table.render(without_metrics("a", "b"), {"sft": 1.0}, 0.0)
    assert text.startswith("no exact judge for this data")


def test_a_run_that_compares_nothing_says_so():
    assert table.render(without_metrics("", ""), {}, 0.0).splitlines() == [
        "no stages to compare: the stages' own figures are in summary.json",
        "",
        "no times: timing.json is missing or empty",
    ]


def test_the_time_is_split_by_stage_in_their_order_and_compiling_is_told_apart(tmp_path):
    metrics.write_timing(tmp_path, "input", {"seconds": 14.0})
    metrics.write_timing(tmp_path, "stage/sft", {"seconds": 190.0, "compile_seconds": 40.0})
    metrics.write_timing(tmp_path, "sft", {"seconds": 150.0})  # the loop inside the stage
    metrics.write_timing(tmp_path, "stage/before", {"seconds": 60.0, "compile_seconds": 25.0})
    sft_config = sft.SftConfig(
        steps=1, rows=1, row_length=8, optimizer=optimizer.OptimizerConfig(learning_rate=1.0)
    )
    stages = (
        sft.SftStage(name="sft", sft=sft_config),
        answer.AnswerStage(name="before", verifier="sft", generator="sft"),
        answer.AnswerStage(name="after", verifier="sft", generator="sft"),  # not run yet
    )
    times = train.run_seconds(epath.Path(tmp_path), stages)
    assert table.render(without_metrics("a", "b"), *times).splitlines()[-1] == (
        "time 4m24s, of which 1m05s compiling:  input 14s  sft 3m10s  before 1m00s"
    )
