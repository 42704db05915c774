"""The curves of runs: what the policy learned, against what it cost.

Four quantities, each against the labels bought so far, as in the paper's figures, and against optimiser steps: accuracy and
margin on the held-out pairs, by their true labels; labels bought per pair seen; the share of the pseudo-labels so far that
are right, where the truth is known, and what the audit says about it, a thin line in the band of its 95 % interval. Each run
has its own colour, line and marker, so runs can be told apart in greyscale too.

tools/plot.py is its command line; each run draws itself at its end. Needs matplotlib (tools/requirements.txt).
"""

import io
import json
import math
import os
from pathlib import Path

from runtime.errors import UsageError
from runtime.files import replacing

STYLES = [  # colour, line, marker; the colours are safe for the colour-blind (Okabe and Ito)
    ("#000000", "-", "o"), ("#d55e00", (0, (5, 1.5)), "s"), ("#0072b2", (0, (1.2, 1.2)), "^"),
    ("#009e73", (0, (5, 1.5, 1.2, 1.5)), "D"), ("#e69f00", "-", "v"), ("#56b4e9", (0, (5, 1.5)), "P"),
    ("#cc79a7", (0, (1.2, 1.2)), "X")]
LOOK = {"font.size": 8, "axes.titlesize": 8.5, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7,
        "legend.fontsize": 8, "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6,
        "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "curves", "font.family": "DejaVu Sans"}
ROUND = [1, 2, 2.5, 5, 10]  # ticks come in steps of these
AXES = [("queries", "labels bought"), ("step", "optimiser step")]
PANELS = [  # title, split (None: either), metric, text where no run has it
    ("held-out accuracy", "eval", "rewards/accuracies", "no evaluation"),
    ("held-out reward margin", "eval", "rewards/margins", "no evaluation"),
    ("labels bought per pair seen", None, "share", "not in these metrics"),
    ("pseudo-labels right", None, "pseudo_label_accuracy", "none of known truth")]
NUMBERS = ("step", "queries", "pairs_seen", "rewards/accuracies", "rewards/margins", "pseudo_label_accuracy",
           "audit_accuracy", "audit_low", "audit_high")


class PlotError(UsageError):
    """Metrics that cannot be drawn; the message names the file, the line and the field."""


class NoRow(PlotError):
    """There are no metrics yet; --follow waits for them."""


def read_metrics(folder):
    """The rows of a run's metrics.jsonl, by step. A half-written last line is left out. Raises PlotError."""
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
            row = json.loads(line)
            if isinstance(row, dict) and "loss" in row and "queries" not in row:  # as runtime/sft.py logs it
                raise PlotError(f"{path}: of supervised fine-tuning, which buys no labels and has none of these curves; "
                                "its losses are in that file")
            rows.append(checked(row))
        except ValueError as error:
            if line.endswith("\n"):
                raise PlotError(f"{path}, line {n}: cut off or damaged ({error}); delete that line, or resume the run, "
                                "which drops it")
    if not rows:
        raise NoRow(f"{path}: no metrics yet; a run writes the first row with its first evaluation or logged step")
    return sorted(rows, key=lambda row: row["step"])


def checked(row):
    """A row of metrics with the share of its pairs that was asked. Raises ValueError if a field to draw is not a number."""
    if not isinstance(row, dict) or row.get("split") not in ("train", "eval"):
        raise ValueError("not an object with a split, train or eval")
    for name in NUMBERS:
        value = row.get(name)
        missing = value is None and name not in ("step", "queries")
        if not missing and (type(value) not in (int, float) or not math.isfinite(value)):
            raise ValueError(f"field {name}: not a number")
    return row | {"share": row["queries"] / row["pairs_seen"] if row.get("pairs_seen") else None}


def points(rows, split, x, *metrics):
    """[(x, metric, …)] of the rows of a split (None: any split) that have all of these fields."""
    found = [tuple(row.get(name) for name in (x, *metrics)) for row in rows if split in (None, row["split"])]
    return [point for point in found if None not in point]


def draw(runs):
    """The figure.  runs: {label: rows of read_metrics}."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook names a backend of its own here, which need not be installed
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
        axes[0, 2].set_ylim(0, 1)
        for axis in axes[0, [0, 3]]:  # the rows share their scales
            axis.set_ylim(top=min(1, axis.get_ylim()[1]))  # no accuracy is above 1, where matplotlib's margin would go
        keys = [Line2D([], [], **look(n)) for n in range(len(runs))]
        figure.legend(keys, [literal(label) for label in runs], loc="outside upper center", ncols=min(4, len(runs)),
                      frameon=False, handlelength=3.2)
    return figure


def look(n):
    """Colour, line and marker of the n-th run."""
    again, n = divmod(n, len(STYLES))  # more runs than colours take another line each time
    colour, _, marker = STYLES[n]
    line = STYLES[(n + again) % 4][1]
    return {"color": colour, "linestyle": line, "marker": marker, "linewidth": 1.3, "markersize": 4,
            "markerfacecolor": "white", "markeredgewidth": 1}


def literal(text):
    """A text that matplotlib draws unchanged: $ starts no formula, and an underscore does not hide it from the legend."""
    text = "".join(c if c.isprintable() else "?" for c in text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def draw_run(axis, rows, split, x, metric, style):
    """Draw one run in one panel. Returns whether there was anything to draw."""
    curve = points(rows, split, x, metric)
    band = points(rows, split, x, "audit_low", "audit_high", "audit_accuracy") if metric == "pseudo_label_accuracy" else []
    if band:
        at, low, high, middle = zip(*band)
        axis.fill_between(at, low, high, color=style["color"], alpha=0.15, linewidth=0)
        axis.plot(at, middle, color=style["color"], linewidth=0.7, linestyle=style["linestyle"])
    if curve:
        axis.plot(*zip(*curve), **style, markevery=max(1, len(curve) // 9), clip_on=False)  # a curve at 1 stays whole
    return bool(curve or band)


def save(figure, path):
    """Write the figure in the format that the path's ending names, whole or not at all. Raises OSError."""
    import matplotlib
    content = io.BytesIO()
    with matplotlib.rc_context(LOOK):
        metadata = {"Date": None} if Path(path).suffix == ".svg" else {}  # the same rows give the same bytes
        figure.savefig(content, format=Path(path).suffix[1:], dpi=160, metadata=metadata)
    with replacing(path) as temporary:
        temporary.write_bytes(content.getvalue())
