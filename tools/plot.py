"""The curves of runs, finished or running: what the policy learned, against what it cost.

    python tools/plot.py RUN                               RUN/curves.png and RUN/curves.svg
    python tools/plot.py RUN RUN … [--labels A,B,…]        several runs in one figure, ./curves.png and ./curves.svg
    python tools/plot.py RUN … --output NAME               NAME.png and NAME.svg
    python tools/plot.py RUN … --follow [--interval 30]    drawn again and again until every run has ended

RUN is a run's output_dir; all that is read of it is metrics.jsonl (and whether summary.json is there: then it has ended).
Four quantities, each against the labels bought so far, as in the paper's figures, and against optimiser steps: accuracy and
margin on the held-out pairs, by their true labels; labels bought per pair seen; the share of the pseudo-labels so far that
are right, where the truth is known, and what the audit says of it, a thin line in the band of its 95 % interval. Each run
has a colour, a line and a marker of its own, which stay apart in greyscale too.

A row that a run is just writing is left out. Exit code 2: there are no metrics, or they are damaged; one line says where.
Needs matplotlib (requirements-extra.txt). The official code draws nothing.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import math
import os
import sys
import time
from pathlib import Path

STYLES = [  # colour, line, marker: the colours (Okabe and Ito) are told apart by the colour-blind and differ in lightness
    ("#000000", "-", "o"), ("#d55e00", (0, (5, 1.5)), "s"), ("#0072b2", (0, (1.2, 1.2)), "^"),
    ("#009e73", (0, (5, 1.5, 1.2, 1.5)), "D"), ("#e69f00", "-", "v"), ("#56b4e9", (0, (5, 1.5)), "P"),
    ("#cc79a7", (0, (1.2, 1.2)), "X")]
LOOK = {"font.size": 8, "axes.titlesize": 8.5, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7,
        "legend.fontsize": 8, "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6,
        "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "curves", "font.family": "DejaVu Sans"}
ROUND = [1, 2, 2.5, 5, 10]  # what ticks go in steps of
AXES = [("queries", "labels bought"), ("step", "optimiser step")]
PANELS = [  # title, split, metric (None: of either split), what stands there where no run has it
    ("held-out accuracy", "eval", "rewards/accuracies", "no evaluation"),
    ("held-out reward margin", "eval", "rewards/margins", "no evaluation"),
    ("labels bought per pair seen", None, "share", "not in these metrics"),
    ("pseudo-labels right", None, "pseudo_label_accuracy", "none of known truth")]
NUMBERS = ("step", "queries", "pairs_seen", "rewards/accuracies", "rewards/margins", "pseudo_label_accuracy",
           "audit_accuracy", "audit_low", "audit_high")


class PlotError(Exception):
    """Metrics that cannot be drawn; the message names the file, the line and the field. Exit code 2."""


class NoRow(PlotError):
    """There are no metrics yet: --follow waits for them."""


def read_metrics(folder):
    """The rows of a run's metrics.jsonl, by step. A last line that is half-written is left out. Raises PlotError."""
    path = Path(folder) / "metrics.jsonl"
    if not path.parent.is_dir():
        raise PlotError(f"{path.parent}: no such folder; name the output_dir of a run")
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise PlotError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})")
    rows = []
    for n, line in enumerate(text.splitlines(keepends=True), 1):
        try:
            rows.append(checked(json.loads(line)))
        except ValueError as error:
            if line.endswith("\n"):
                raise PlotError(f"{path}, line {n}: cut off or damaged ({error}); delete that line, or resume the run, "
                                "which drops it")
    if not rows:
        raise NoRow(f"{path}: no row of metrics; a run writes its first with its first evaluation or logged step")
    return sorted(rows, key=lambda row: row["step"])


def checked(row):
    """A row of metrics with its share of pairs asked. Raises ValueError where what is drawn of it is no number."""
    if not isinstance(row, dict) or row.get("split") not in ("train", "eval"):
        raise ValueError("no object with a split, train or eval")
    for name in NUMBERS:
        value = row.get(name)
        missing = value is None and name not in ("step", "queries")
        if not missing and (type(value) not in (int, float) or not math.isfinite(value)):
            raise ValueError(f"field {name}: no number")
    return row | {"share": row["queries"] / row["pairs_seen"] if row.get("pairs_seen") else None}


def points(rows, split, x, *metrics):
    """[(x, metric, …)] of the rows of a split (None: of any) that have all of them."""
    found = [tuple(row.get(name) for name in (x, *metrics)) for row in rows if split in (None, row["split"])]
    return [point for point in found if None not in point]


def draw(runs):
    """The figure.  runs: {label: rows of read_metrics}."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, MaxNLocator
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(10, 4.4), layout="constrained")
        axes = figure.subplots(len(AXES), len(PANELS), sharex="row", sharey="col")
        for (x, x_label), row in zip(AXES, axes):
            for (title, split, metric, nothing), axis in zip(PANELS, row):
                drawn = [draw_run(axis, rows, split, x, metric, look(n)) for n, rows in enumerate(runs.values())]
                if not any(drawn):
                    axis.text(0.5, 0.5, nothing, transform=axis.transAxes, ha="center", va="center", color="#777777")
                axis.set_xlabel(x_label)
                axis.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=ROUND))
                axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
                axis.yaxis.set_major_locator(MaxNLocator(5, steps=ROUND))
                axis.grid(color="#dddddd", linewidth=0.5)
                axis.set_axisbelow(True)
        for (title, *_), axis in zip(PANELS, axes[0]):
            axis.set_title(title)
        if any(points(rows, None, "step", "audit_accuracy") for rows in runs.values()):
            axes[0, 3].set_title("pseudo-labels right; band: audit")
        axes[0, 2].set_ylim(0, 1.05)
        keys = [Line2D([], [], **look(n)) for n in range(len(runs))]
        figure.legend(keys, [literal(label) for label in runs], loc="outside upper center", ncols=min(4, len(runs)),
                      frameon=False, handlelength=3.2)
    return figure


def look(n):
    """Colour, line and marker of the n-th run."""
    colour, line, marker = STYLES[n % len(STYLES)]
    return {"color": colour, "linestyle": line, "marker": marker, "linewidth": 1.3, "markersize": 4,
            "markerfacecolor": "white", "markeredgewidth": 1}


def literal(text):
    """A text as matplotlib draws it as it is: $ begins no formula, and an underscore does not hide it from the legend."""
    text = "".join(c if c.isprintable() else "?" for c in text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def draw_run(axis, rows, split, x, metric, style):
    """One run in one panel. Returns whether there was anything to draw."""
    curve = points(rows, split, x, metric)
    band = points(rows, split, x, "audit_low", "audit_high", "audit_accuracy") if metric == "pseudo_label_accuracy" else []
    if band:
        at, low, high, middle = zip(*band)
        axis.fill_between(at, low, high, color=style["color"], alpha=0.15, linewidth=0)
        axis.plot(at, middle, color=style["color"], linewidth=0.7, linestyle=style["linestyle"])
    if curve:
        axis.plot(*zip(*curve), **style, markevery=max(1, len(curve) // 9))
    return bool(curve or band)


def save(figure, path):
    """Write the figure in the format of the path's ending, complete or not at all. Raises OSError."""
    import matplotlib
    content, temporary = io.BytesIO(), Path(f"{path}.{os.getpid()}.tmp")
    with matplotlib.rc_context(LOOK):
        metadata = {"Date": None} if Path(path).suffix == ".svg" else {}  # the same rows give the same bytes
        figure.savefig(content, format=Path(path).suffix[1:], dpi=160, metadata=metadata)
    try:
        temporary.write_bytes(content.getvalue())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def redraw(folders, labels, output):
    """Read all runs, draw them and write both pictures. Returns whether every run had ended before it was read."""
    ended = all((folder / "summary.json").is_file() for folder in folders)
    figure = draw({label: read_metrics(folder) for label, folder in zip(labels, folders)})
    try:
        for ending in (".png", ".svg"):
            save(figure, f"{output}{ending}")
    except OSError as error:
        raise PlotError(f"{output}{ending}: cannot be written ({error.strerror}); choose another --output")
    return ended


def follow(folders, labels, output, interval):
    """Draw again and again until every run has ended. A run that has no row yet is waited for."""
    while True:
        try:
            ended = redraw(folders, labels, output)
            print(f"{time.strftime('%H:%M:%S')} {output}.png{', all runs have ended' if ended else ''}", flush=True)
        except NoRow as error:
            ended = False
            print(f"{time.strftime('%H:%M:%S')} waiting: {error}", flush=True)
        if ended:
            return
        time.sleep(interval)


def names_of(folders, labels):
    """The runs' names in the legend: what --labels says, or as much of their paths as tells them apart."""
    if labels:
        names = labels.split(",")
        if len(names) != len(folders):
            raise PlotError(f"--labels {labels}: {len(names)} names for {len(folders)} runs; give one a run, with commas")
    else:
        paths = [folder.resolve() for folder in folders]
        names = [path.name for path in paths]
        if len(set(names)) < len(names):
            names = [f"{path.parent.name}/{path.name}" for path in paths]
    if len(set(names)) < len(names):
        raise PlotError(f"two runs are called {max(names, key=names.count)}; name each run once, or say --labels A,B,…")
    return names


def main(argv=None):
    parser = argparse.ArgumentParser(prog="tools/plot.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output_dir of a run")
    parser.add_argument("--labels", metavar="A,B,…", help="names for the legend; default: the folders'")
    parser.add_argument("--output", metavar="NAME", help="NAME.png and NAME.svg; default: RUN/curves, of several ./curves")
    parser.add_argument("--follow", action="store_true", help="draw again and again until every run has ended")
    parser.add_argument("--interval", type=float, default=10, metavar="SECONDS", help="of --follow; default: 10")
    args = parser.parse_args(argv)
    output = args.output or (args.runs[0] / "curves" if len(args.runs) == 1 else "curves")
    try:
        if importlib.util.find_spec("matplotlib") is None:
            raise PlotError("matplotlib is not installed: pip install -r requirements-extra.txt")
        if not 0 < args.interval <= 86400:
            raise PlotError(f"--interval {args.interval}: give seconds, more than 0 and at most a day")
        labels = names_of(args.runs, args.labels)
        if args.follow:
            follow(args.runs, labels, output, args.interval)
        else:
            redraw(args.runs, labels, output)
            print(f"{output}.png, {output}.svg")
    except PlotError as error:
        print(f"tools/plot.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
