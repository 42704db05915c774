"""The monitors that runtime/report.py feeds hold the numbers of metrics.jsonl; and what it says about money.

    python -m pytest tests/test_report.py -n 0
"""

import shutil

import pytest

from runtime import report

ROW = {"loss": 0.6, "rewards/accuracies": 0.5, "queries": 4, "pairs_seen": 8, "queries_without_preference": 0}
SUMMARY = {"queries": 4, "pairs": 8, "query_fraction": 0.5, "pseudo_label_accuracy": None, "audited": 0,
           "budget_spent_at_step": None, "eval_accuracy": None, "wall_seconds": 1.0}


@pytest.mark.parametrize("cost, said", [((1234.5, False), ", 1,234.50 spent"), ((0.5, True), ", at least 0.50 spent"),
                                        ((0.0036, False), ", 0.0036 spent"), ((0.0, False), ", 0.00 spent"),
                                        ((None, False), "")])
def test_money_of_which_a_part_is_unknown_is_at_least_that(cost, said):
    assert report.bar_text(ROW, None, cost).endswith("(50% of pairs)" + said)
    line = report.closing_line({**SUMMARY, "cost": cost[0], "cost_incomplete": cost[1]})
    assert line == f"4 of 8 labels bought (50 %){said.replace(', ', ' · ')}{' on labels' if said else ''} · 1 s"


def test_the_summary_of_an_older_run_is_read():
    assert "0.50 spent on labels" in report.closing_line({**SUMMARY, "cost": 0.5})


def points_of_csv(output):
    """{split_metric: [(step, value)]}"""
    tables = {path.stem: path.read_text().splitlines() for path in (output / "csv").glob("*.csv")}
    return {name: [tuple(map(float, line.split(","))) for line in lines[1:]] for name, lines in tables.items()}


def points_of_tensorboard(output):
    """The same, as TensorBoard itself reads them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(output / "tensorboard"), {"scalars": 0}).Reload()
    return {tag.replace("/", "_"): [(event.step, event.value) for event in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("lost", [["checkpoint-4", "checkpoint-6"], ["checkpoint-2", "checkpoint-4", "checkpoint-6"]])
@pytest.mark.parametrize("service, points", [("csv_monitor", points_of_csv), ("tensorboard", points_of_tensorboard)])
def test_the_monitor_holds_each_number_of_the_metrics_once(service, points, lost, train):
    """Both splits, at their steps, and nothing else; also after a resume, and after starting again from step 0."""
    if service == "tensorboard":
        pytest.importorskip("tensorboard", reason="needs tests/requirements.txt")
    keys = dict(report_to=service, max_steps=6, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=3,
                eval_on_start=True)

    def check(run):
        expected = {}
        for row in run.rows() + run.rows("eval"):
            for name, value in row.items():
                if name not in ("step", "split") and value is not None:
                    expected.setdefault(f"{row['split']}/{name}".replace("/", "_"), []).append((row["step"], value))
        found = points(run.output)
        assert found.keys() == expected.keys()
        for name in found:
            assert found[name] == [pytest.approx(point, rel=1e-6) for point in expected[name]], name
        assert [step for step, _ in found["train_loss"]] == [1, 2, 3, 4, 5, 6]
        assert [step for step, _ in found["eval_loss"]] == [0, 3, 6]

    run = train("monitor", **keys)
    check(run)
    for name in lost:
        shutil.rmtree(run.output / name)
    (run.output / "summary.json").unlink()
    again = train("monitor-again", output_dir=run.output, **keys)
    assert ("resumed from" in again.stdout) == (len(lost) == 2)
    check(again)
