"""The monitors that runtime/report.py feeds hold the numbers of metrics.jsonl; and what it says about money.

    python -m pytest tests/test_report.py -n 0
"""

import math
import shutil
from types import SimpleNamespace

import pytest

from runtime import report
from runtime.config import Config

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


def test_the_closing_line_says_all_that_is_known():
    assert report.closing_line({
        **SUMMARY, "queries_without_preference": 1, "pseudo_label_accuracy": 0.9, "audited": 10, "audit_accuracy": 0.8,
        "audit_interval": [0.5, 0.95], "budget_spent_at_step": 2, "cost": None, "eval_accuracy": 0.75,
        "gold_reward_before": 0.06, "gold_reward_after": -3.074}) == (
        "4 of 8 labels bought (50 %) · 1 of them without a preference · pseudo-labels right: 90.0 % · 10 audited: 80.0 % "
        "right (50.0–95.0 %) · the budget was spent at step 3 · held-out accuracy 0.750 · gold reward of generations +0.06 "
        "→ -3.07 · 1 s")


def test_a_row_counts_the_answers_of_its_steps_alone():
    """Where a run goes on from an earlier checkpoint, the ledger holds answers of later steps."""
    audit = {"accuracy": 0.5, "interval": (0.2, 0.8)}
    oracle = SimpleNamespace(
        config=Config(audit_fraction=0.1), state={"pseudo_labels": 4, "pseudo_right": 3, "pseudo_known": 4},
        queries=lambda last: last, without_preference=lambda last: last, judge_metrics=lambda last: {"judge_ties": last},
        audit=lambda last: {"audited": last, **audit})
    row = report.label_metrics(oracle, SimpleNamespace(pairs_seen=lambda steps: 8 * steps), 3)
    assert [row[name] for name in ("queries", "queries_without_preference", "judge_ties", "audited")] == [2] * 4
    assert (row["pairs_seen"], row["pseudo_label_accuracy"], row["audit_low"], row["audit_high"]) == (24, 0.75, 0.2, 0.8)


@pytest.mark.parametrize("known, unpriced, price, told", [
    (0, 3, None, (None, False)), (1.5, 3, None, (1.5, True)), (1.5, 0, None, (1.5, False)), (1.5, 3, 2.0, (7.5, False))])
def test_what_labels_cost_is_what_is_known_and_a_price_for_the_rest(known, unpriced, price, told):
    oracle = SimpleNamespace(ledger=SimpleNamespace(cost=lambda: (known, unpriced)), config=Config(price_per_label=price))
    assert report.cost(oracle) == told


@pytest.mark.parametrize("predicted, warned", [(0.94, 0), (0.95, 0), (0.96, 1)])
def test_a_policy_is_overconfident_where_its_prediction_is_above_the_interval(predicted, warned, capsys):
    audit = {"audited": 100, "accuracy": 0.9, "interval": (0.83, 0.95), "predicted": predicted}
    oracle = SimpleNamespace(config=Config(audit_fraction=0.1), state={"warned_of_audit": False}, audit=lambda step: audit)
    for step in (1, 2):
        report.warn_of_wrong_pseudo_labels(oracle, step)
    assert capsys.readouterr().out.count("WARNING: of 100 audited pseudo-labels 90.0% agree") == warned


@pytest.mark.parametrize("said, warned", [
    ({}, 0), (dict(agreement=0.5, first_position=0.3), 0), (dict(first_position=0.7), 0), (dict(coins=5, ties=5), 0),
    (dict(queries=19, agreement=0.0, first_position=1.0, ties=19), 0), (dict(agreement=0.49), 1),
    (dict(first_position=0.29), 1), (dict(first_position=0.71), 1), (dict(coins=4, ties=4, unanswerable=3), 1),
    (dict(agreement=None, first_position=None, unanswerable=20), 1)], ids=str)
def test_a_judge_is_warned_of_once_beyond_its_limits(said, warned, capsys):
    said = dict(queries=20, agreement=0.8, first_position=0.5, coins=0, ties=0, unanswerable=0) | said
    row, oracle = {name if name == "queries" else f"judge_{name}": said[name] for name in said}, SimpleNamespace(state={})
    for _ in range(2):
        report.warn_of_judge(oracle, row)
    assert capsys.readouterr().out.count("WARNING: the judge is hardly of use") == warned


def test_a_metric_that_is_not_finite_is_null(tmp_path):
    """JSON has no other word for it, and other readers refuse a file with NaN."""
    log = report.Log(tmp_path, SimpleNamespace(monitor=SimpleNamespace(enabled=False)), -1)
    log.write({"step": 1, "loss": 0.5, "grad_norm": math.nan, "rewards/margins": -math.inf})
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 1, "loss": 0.5, "grad_norm": null, "rewards/margins": null}\n')


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
