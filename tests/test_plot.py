"""The curves of runs: which of a run's metrics are drawn, and what is refused. `python -m pytest tests/test_plot.py -n 0`"""

import json
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest
from helpers import ROOT, launcher_environment
from PIL import Image

from runtime import curves, toy
from tools import plot


def row(step, queries, split="train", **more):
    return {"step": step, "split": split, "queries": queries, "pairs_seen": 8 * step, "rewards/accuracies": 0.5 + step / 100,
            "rewards/margins": step / 10, "pseudo_label_accuracy": None, **more}


ROWS = [row(0, 0, "eval"), row(1, 8), row(2, 12, pseudo_label_accuracy=0.75), row(2, 12, "eval")]


def write(folder, rows, end="\n"):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + end)
    return folder


def drawn(figure):
    """{(title, x label): [the points of each curve]}."""
    axes = figure.axes
    return {(axes[n % 4].get_title(), axis.get_xlabel()): [list(map(tuple, line.get_xydata())) for line in axis.get_lines()]
            for n, axis in enumerate(axes)}


def fails(capsys, words, *args):
    assert plot.main([str(arg) for arg in args]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("tools/plot.py: ") and said.err.count("\n") == 1 and words in said.err


def test_each_panel_holds_the_numbers_of_the_metrics(tmp_path):
    panels = drawn(curves.draw({"run": curves.read_metrics(write(tmp_path / "run", ROWS))}))
    expected = {"held-out accuracy": [(0, 0.5), (2, 0.52)], "held-out reward margin": [(0, 0.0), (2, 0.2)],
                "labels bought per pair seen": [(1, 1.0), (2, 0.75), (2, 0.75)], "pseudo-labels right": [(2, 0.75)]}
    bought = {0: 0, 1: 8, 2: 12}
    for title, points in expected.items():
        assert panels[title, "optimiser step"] == [points]
        assert panels[title, "labels bought"] == [[(bought[step], value) for step, value in points]]


def test_several_runs_have_looks_that_need_no_colour(tmp_path):
    runs = {f"run {n}": curves.read_metrics(write(tmp_path / "run", ROWS)) for n in range(4 * len(curves.STYLES))}
    figure = curves.draw(runs)
    lines = figure.axes[0].get_lines()
    assert len({(line.get_linestyle(), str(line._dash_pattern), line.get_marker()) for line in lines}) == len(runs)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(runs)
    assert [key.get_color() for key in figure.legends[0].legend_handles] == [line.get_color() for line in lines]


def test_an_audit_is_a_band_of_its_interval(tmp_path):
    audited = [row(n, 8 * n, audited=n, audit_accuracy=0.8 if n else None, audit_low=0.5, audit_high=0.9) for n in range(3)]
    figure = curves.draw({"run": curves.read_metrics(write(tmp_path / "run", audited)),
                          "plain": curves.read_metrics(write(tmp_path / "plain", ROWS[:2]))})
    [band] = figure.axes[7].collections
    assert {tuple(corner) for corner in band.get_paths()[0].vertices} == {(1, 0.5), (1, 0.9), (2, 0.5), (2, 0.9)}
    assert "audit" in figure.axes[3].get_title() and not figure.axes[7].texts  # nothing says that there is none
    assert not figure.axes[0].collections


def test_the_axes_of_shares_end_at_1(tmp_path):
    """Also where a curve reaches 1, and without stretching those of low accuracy."""
    for last, top in ((1.0, 1.0), (0.52, None)):
        rows = [row(0, 0, "eval"), row(1, 8, pseudo_label_accuracy=last), row(2, 12, "eval", **{"rewards/accuracies": last})]
        figure = curves.draw({"run": curves.read_metrics(write(tmp_path / "run", rows))})
        tops = [figure.axes[n].get_ylim()[1] for n in (0, 3, 4, 7)]
        assert all(found == top if top else 0.52 < found < 0.6 for found in tops)
        assert figure.axes[2].get_ylim() == figure.axes[6].get_ylim() == (0, 1)


def test_names_are_drawn_as_they_are(tmp_path):
    rows = curves.read_metrics(write(tmp_path / "run", ROWS))
    figure = curves.draw({"_hidden": rows, r"$\nonsense$": rows, "two\nlines": rows})
    curves.save(figure, tmp_path / "odd.png")  # a broken formula would raise here
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [" _hidden", r"\$\nonsense\$", "two?lines"]


def test_the_pictures(tmp_path, capsys, monkeypatch):
    """Those of one run go into its folder, those of several here or where --output says. The same rows give the same
    bytes."""
    one, other = (write(tmp_path / name, ROWS) for name in ("one", "other"))
    assert plot.main([str(one)]) == 0 and capsys.readouterr().out == f"{one}/curves.png, {one}/curves.svg\n"
    with Image.open(one / "curves.png") as picture:
        assert picture.size == (1600, 704)
    assert ET.parse(one / "curves.svg").getroot().tag.endswith("svg")
    assert sorted(path.name for path in one.iterdir()) == ["curves.png", "curves.svg", "metrics.jsonl"]
    monkeypatch.chdir(tmp_path)
    for flags in ([], ["--output=b.png"]):  # .png is what it becomes anyway
        assert plot.main([str(one), str(other), "--labels", "A,B", *flags]) == 0
    for ending in ("png", "svg"):
        assert (tmp_path / f"curves.{ending}").read_bytes() == (tmp_path / f"b.{ending}").read_bytes()


def test_a_row_that_is_being_written_is_left_out(tmp_path):
    whole = curves.read_metrics(write(tmp_path / "run", ROWS))
    for cut in (1, 20, len(json.dumps(ROWS[0])) - 1):
        assert curves.read_metrics(write(tmp_path / "run", ROWS, "\n" + json.dumps(ROWS[0])[:cut])) == whole
    assert curves.read_metrics(write(tmp_path / "run", ROWS, "")) == whole  # complete except for its line end


@pytest.mark.parametrize("content, words", [
    (b"", "no metrics yet"),
    (b'{"step": 1, "spl', "no metrics yet"),
    (b'{"step": 1\n', "line 1: cut off or damaged"),
    (b'{"step": 1}\n', "line 1: cut off or damaged (not an object with a split"),
    (b'[]\n', "line 1: cut off or damaged (not an object with a split"),
    (b'{"split": "eval", "step": 1, "queries": null}\n', "(field queries: not a number)"),
    (b'{"split": "eval", "step": 1, "queries": 2, "rewards/margins": "2"}\n', "(field rewards/margins: not a number)"),
    (b'{"split": "eval", "step": 1, "queries": true}\n', "(field queries: not a number)"),
    (b'{"split": "eval", "step": 1, "queries": 2, "audit_low": 1e999}\n', "(field audit_low: not a number)"),
    (b"\xff\xfe\n", "cannot be read"),
])
def test_metrics_that_cannot_be_drawn_are_named(content, words, tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    fails(capsys, words, tmp_path)
    assert not (tmp_path / "curves.png").exists()


def test_other_refusals(tmp_path, capsys, monkeypatch):
    one, other = write(tmp_path / "one", ROWS), write(tmp_path / "other", ROWS)
    (tmp_path / "empty").mkdir()
    fails(capsys, "no such folder", tmp_path / "nowhere")
    fails(capsys, "no such folder", tmp_path / "nowhere", "--follow")
    fails(capsys, "no metrics yet", tmp_path / "empty")
    fails(capsys, "1 names for 2 runs", one, other, "--labels=A", f"--output={tmp_path}/x")
    fails(capsys, "two runs are called A", one, other, "--labels=A,A", f"--output={tmp_path}/x")
    fails(capsys, "two runs are called", one, one, f"--output={tmp_path}/x")
    fails(capsys, "--interval nan", one, "--follow", "--interval=nan")
    fails(capsys, "cannot be written", one, f"--output={tmp_path}/nowhere/x")
    with monkeypatch.context() as patch:
        patch.setattr(plot.importlib.util, "find_spec", lambda name: None)
        fails(capsys, "matplotlib is not installed", one)
    (tmp_path / "sub").mkdir()
    twin = write(tmp_path / "sub" / "one", ROWS)
    assert plot.names_of([one, twin], None) == [f"{tmp_path.name}/one", "sub/one"]


def test_following_a_run_ends_with_it(tmp_path):
    """Its process starts before the run's first row is written, beside a run that has ended. The last picture shows the
    whole run."""
    run, other = tmp_path / "run", write(tmp_path / "other", ROWS)
    run.mkdir()
    (other / "summary.json").write_text("{}")
    follower = subprocess.Popen([sys.executable, "tools/plot.py", str(run), str(other), "--follow", "--interval=0.05",
                                 f"--output={run}/curves"], cwd=ROOT, env=launcher_environment(), text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert "waiting: " in follower.stdout.readline()
        write(run, ROWS[:2])
        while "curves.png" not in (line := follower.stdout.readline()):
            assert line
        first = (run / "curves.png").read_bytes()
        write(run, ROWS)
        (run / "summary.json").write_text("{}")
        out, err = follower.communicate(timeout=600)
    finally:
        follower.kill()
    assert follower.returncode == 0 and err == "" and out.endswith("all runs have ended\n")
    runs = {folder.name: curves.read_metrics(folder) for folder in (run, other)}
    curves.save(curves.draw(runs), tmp_path / "whole.png")
    assert (run / "curves.png").read_bytes() == (tmp_path / "whole.png").read_bytes() != first


def test_a_real_runs_metrics_are_drawn(train):
    run = train("plotted", max_steps=8, gamma=0.05, audit_fraction=0.5, eval_strategy="steps", eval_steps=4)
    panels = drawn(curves.draw({"run": curves.read_metrics(run.output)}))
    summary = run.summary()
    accuracy = [(row["step"], row["rewards/accuracies"]) for row in run.rows("eval")]
    assert panels["held-out accuracy", "optimiser step"] == [accuracy]
    right = panels["pseudo-labels right; band: audit", "labels bought"]
    assert right[0][-1] == (summary["queries"], summary["audit_accuracy"])
    assert right[1][-1] == (summary["queries"], summary["pseudo_label_accuracy"])
    low, high = summary["pseudo_label_interval"]
    assert 0 < low < summary["pseudo_label_accuracy"] < high <= 1
    assert panels["labels bought per pair seen", "optimiser step"][0][-1] == (8, summary["query_fraction"])


def test_a_run_of_supervised_fine_tuning_has_no_such_curves(train, tmp_path, capsys):
    toy.write_jsonl(tmp_path / "train.jsonl", [{"prompt": f"review of the {place} :", "completion": " the food was good"}
                                               for place in toy.PLACES[:8]])
    run = train("sft", objective="sft", gamma=1.3, max_steps=2, do_eval=False, dataset_mixer=f"{{{tmp_path}: 1.0}}")
    for flags in ((), ("--follow",)):
        fails(capsys, f"{run.output}/metrics.jsonl: of supervised fine-tuning, which buys no labels and has none of these "
                      "curves", run.output, *flags)
