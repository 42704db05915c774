"""Draw the curves of runs, finished or still running: what the policy learned, against what it cost (runtime/curves.py).

    python tools/plot.py RUN                               RUN/curves.png and RUN/curves.svg
    python tools/plot.py RUN RUN … [--labels A,B,…]        several runs in one figure, ./curves.png and ./curves.svg
    python tools/plot.py RUN … --output NAME               NAME.png and NAME.svg
    python tools/plot.py RUN … --follow [--interval 30]    drawn again and again until every run has ended

RUN is a run's output_dir. Only its metrics.jsonl is read; a summary.json beside it means that the run has ended. A row that
a run is just writing is left out. Exit code 2: there are no metrics, they are damaged, or they are of supervised
fine-tuning, which has none of these curves; one line says where. Needs matplotlib (tools/requirements.txt). The official
code draws nothing.
"""

import argparse
import importlib.util
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's root, for the import below

from runtime.curves import NoRow, PlotError, draw, read_metrics, save  # noqa: E402


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
    """Draw again and again until every run has ended. Waits for a run that has no metrics yet."""
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
    """The runs' names in the legend: from --labels, or as much of their paths as tells them apart."""
    if labels:
        names = labels.split(",")
        if len(names) != len(folders):
            raise PlotError(f"--labels {labels}: {len(names)} names for {len(folders)} runs; give one per run, with "
                            "commas between them")
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
    output = (args.output or "").removesuffix(".png").removesuffix(".svg")  # both endings are ours
    output = output or (args.runs[0] / "curves" if len(args.runs) == 1 else "curves")
    try:
        if importlib.util.find_spec("matplotlib") is None:
            raise PlotError("matplotlib is not installed: pip install -r tools/requirements.txt")
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
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show some letters shows ? instead
    sys.exit(main())
