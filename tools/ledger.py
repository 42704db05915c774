"""Look at a run's ledger, export it, or seed it with the labels of another run.

    python tools/ledger.py OUTPUT_DIR                        print it
    python tools/ledger.py OUTPUT_DIR --disagreements        the pairs about which people disagree, and who says what
    python tools/ledger.py OUTPUT_DIR --csv FILE [--force]   one row per answer: all columns, the texts that people were
                                                             shown, and every person's opinion as JSON. For spreadsheets:
                                                             UTF-8 with a byte order mark, and a ' before a text that would
                                                             be a formula (it begins with = + - @, tab or carriage return)
    python tools/ledger.py OUTPUT_DIR --reuse OLD_OUTPUT_DIR
                                                             copy the old run's answers, best before the new run starts

A reused answer keeps its label and annotator. Its source becomes "reused" and its step −1, so the new run uses it for
free and does not count it as a query. Its margin, time and cost stay in the old ledger. An answer that the new ledger
already has is not replaced.

Reading changes nothing in the run's folder and works during a run. Needs only requirements.txt; Krippendorff's alpha of
people's opinions needs tools/requirements.txt. Exit code 2: there is no ledger, or it cannot be read or written; one line
says why. The paper and the official code keep no labels.
"""

import argparse
import csv
import io
import itertools
import json
import sqlite3
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository root, for the imports below

from labels.judge import judge_metrics, judge_text  # noqa: E402
from labels.ledger import Ledger, LedgerError, Question, in_words  # noqa: E402
from labels.oracle import wilson  # noqa: E402
from runtime.errors import UsageError  # noqa: E402
from runtime.files import printing  # noqa: E402
from tools.exchange import as_text, filled, replace_file  # noqa: E402

PATIENCE = 10  # seconds to wait while another process holds the ledger
ANSWERS = "pair, label, source, annotator, margin, step, audit, answered_at, seconds, cost, used, detail"
VERDICTS = "id, pair, annotator, verdict, seconds, cost, detail, person"
NEEDED = {"answers": ANSWERS, "questions": "pair", "leases": "pair, until", "verdicts": VERDICTS}  # for the report
WITH_TEXTS = {"answers": ANSWERS, "questions": "pair, prompt, first, second", "verdicts": VERDICTS}
# A ledger of version 2, which is read as it is, because nothing is written here.
AS_BEFORE = {"answers": "SELECT *, NULL AS detail FROM main.answers",
             "verdicts": "SELECT *, detail IS NULL AS person FROM main.verdicts",
             "leases": "SELECT pair, leased_until AS until FROM main.questions WHERE leased_to IS NOT NULL"}


def read_ledger(folder, needed=NEEDED):
    """{table: its rows}, as of one moment, read through a connection that cannot write. needed: {table: its columns}. Raises
    LedgerError."""
    path = Path(folder) / "labels.sqlite"
    if not path.is_file():
        raise LedgerError(f"no ledger: {path} does not exist; name a run's output_dir")
    real = path.resolve()  # of a link, SQLite keeps its files beside the file to which it leads

    def moment():
        """What shows that another process has, or had, the ledger open."""
        return real.stat().st_mtime_ns, *(real.with_name(real.name + end).exists() for end in ("-wal", "-journal"))

    for attempt in itertools.count():
        # If no other process has the ledger open, even a reader would leave files beside it, unless SQLite is told that
        # the file cannot change. If it does change while we read it, we read it again. If it changes each time, as it may
        # with a busy page and a million answers, we read it as any other process does, and may leave files.
        if attempt:
            time.sleep(0.05)  # longer than a tick of the clock that dates files
        before = moment()
        alone, db = attempt < 5 and not any(before[1:]), None
        try:
            db = sqlite3.connect(f"{real.as_uri()}?{'immutable=1' if alone else 'mode=ro'}", uri=True,
                                 timeout=PATIENCE, isolation_level=None)
            db.row_factory = sqlite3.Row
            db.execute("BEGIN")
            if db.execute("PRAGMA user_version").fetchone()[0] == 2:
                for name, view in AS_BEFORE.items():
                    db.execute(f"CREATE TEMP VIEW {name} AS {view}")
            tables = {name: db.execute(f"SELECT {columns} FROM {name}").fetchall() for name, columns in needed.items()}
        except sqlite3.Error as error:
            if alone and moment() != before:
                continue
            raise LedgerError(in_words(path, error))
        finally:
            if db:
                db.close()
        if not alone or moment() == before:
            return tables


# The report.

def report(folder, now=None):
    """The report as text. now: seconds since 1970, to tell which leases have run out; default: the present."""
    tables = read_ledger(folder)
    answers, verdicts = tables["answers"], tables["verdicts"]
    bought, labelled = [row for row in answers if row["step"] >= 0], [row for row in answers if row["label"]]
    audited = [row for row in bought if row["audit"] and row["label"] and row["margin"] is not None]
    answered = {row["pair"] for row in answers}
    questions = {row["pair"] for row in tables["questions"]} - answered
    leased = {row["pair"] for row in tables["leases"] if row["until"] > (time.time() if now is None else now)} & questions
    opinions, _ = opinions_and_decisions(verdicts)
    lines = [
        ("answers", f"{len(answers):,}: {len(bought):,} bought by this run, {len(answers) - len(bought):,} reused"),
        ("no preference", share(len(answers) - len(labelled), len(answers))),
        ("y1 preferred", share(sum(row["label"] > 0 for row in labelled), len(labelled))),
        ("audited", share(sum((row["margin"] > 0) == (row["label"] > 0) for row in audited), len(audited))
         + (" have the label that the margin's sign predicts" if audited else "")),
        ("judge", judge_text(judge_metrics([(row["detail"], 1) for row in bought if row["detail"]])) or "none"),
        ("open questions", f"{len(questions):,}, of which leased: {len(leased):,}"),
        ("cost", money(bought)),
        ("verdicts", f"{len(verdicts):,} on {len({row['pair'] for row in verdicts}):,} pairs, cost {money(verdicts)}"),
        ("two annotators", agreement_between(opinions, verdicts)),
        ("people", agreement_of_people(opinions))]
    out = [str(Path(folder) / "labels.sqlite"), ""]
    out += [f"{name:<16}{words}" for name, words in lines]
    out += ["", *table(HEAD, [(*key, *figures(rows)) for key, rows in groups(answers, "source")]
                       + [("all", *figures(answers))])]
    out += ["", *table(("source", "annotator", *HEAD[1:]),
                       [(*key, *figures(rows)) for key, rows in groups(answers, "source", "annotator")], words=2)]
    if any(len(said) > 1 for said in opinions.values()):
        out += ["", "People, and whether they say what became the label, where several have an opinion",
                *table(PEOPLE, people(opinions, {row["pair"]: row["label"] for row in answers}))]
    twice = asked_twice([row for row in verdicts if not row["person"] and not is_unusable(row)])
    if twice:
        out += ["", "Pairs with two or more verdicts by the same annotator (for a judge: both orders)",
                *table(("annotator", "pairs", "agree", "contradict", "no preference", "share that agrees"), twice)]
    return "\n".join(line.rstrip() for line in out)


HEAD = ("source", "answers", "no preference", "y1 preferred", "median seconds", "labels an hour", "cost", "cost unknown")


def figures(rows):
    """A table row about some answers, without its first cell; see HEAD. Labels an hour count the annotators' own time; y1 is
    preferred in a share of the answers that have a preference."""
    labels = [row["label"] for row in rows if row["label"]]
    bought = [row for row in rows if row["step"] >= 0]
    seconds = [row["seconds"] for row in bought if row["seconds"] is not None]
    known = [row["cost"] for row in bought if row["cost"] is not None]
    return (f"{len(rows):,}", f"{len(rows) - len(labels):,}",
            f"{sum(label > 0 for label in labels) / len(labels):.1%}" if labels else "–",
            f"{statistics.median(seconds):.1f}" if seconds else "–",
            f"{3600 * len(seconds) / sum(seconds):,.0f}" if sum(seconds) else "–",
            f"{sum(known):,.4f}" if known else "–", f"{len(bought) - len(known):,}")


def groups(rows, *names):
    """Group rows by some of their columns: [((value, …), rows)], sorted, None first."""
    found = defaultdict(list)
    for row in rows:
        found[tuple(row[name] for name in names)].append(row)
    return sorted(found.items(), key=lambda group: [(value is not None, value) for value in group[0]])


def share(part, whole):
    if not whole:
        return "none"
    low, high = wilson(part, whole)
    return f"{part:,} of {whole:,}, {part / whole:.1%} (95 % interval {low:.1%} to {high:.1%})"


def money(rows):
    known = [row["cost"] for row in rows if row["cost"] is not None]
    return f"{sum(known):,.4f} ({len(rows) - len(known):,} without a known cost)"


def agreement_between(opinions, verdicts):
    """How often annotators agree, over the pairs on which two or more of them have a view. A judge that chose each response
    equally often (its orders contradict each other) has no view.  opinions: people's, without adjudications."""
    views = defaultdict(lambda: defaultdict(int))
    for row in [row for said in opinions.values() for row in said.values()] + [row for row in verdicts if not row["person"]]:
        views[row["pair"]][row["annotator"]] += row["verdict"]
    signs = [[total > 0 for total in by.values() if total] for by in views.values()]
    several = [found for found in signs if len(found) > 1]
    return share(sum(len(set(found)) == 1 for found in several), len(several)) + (" agree" if several else "")


def opinions_of(verdicts):
    """{pair: {person: the row of their last verdict}}."""
    found = defaultdict(dict)
    for row in sorted((row for row in verdicts if row["person"]), key=lambda row: row["id"]):
        found[row["pair"]][row["annotator"]] = row
    return found


def opinions_and_decisions(verdicts):
    """What people said on their own, and what those said who decide, each as in opinions_of: somebody may do both."""
    return (opinions_of([row for row in verdicts if not adjudicates(row)]),
            opinions_of([row for row in verdicts if adjudicates(row)]))


def adjudicates(row):
    """Whether a verdict decides between the others. Such a person has seen the others' opinions, and theirs becomes the
    label, so it says nothing about how well people agree."""
    return bool(row["person"]) and bool(json.loads(row["detail"] or "{}").get("adjudicates"))


def is_unusable(row):
    """Whether a judge's verdict is none: a reply that held no verdict or never came, or a text that was refused."""
    detail = json.loads(row["detail"] or "{}")
    return "unanswerable" in detail or "lost" in detail or detail.get("said", "") is None


def said_by(row):
    """What a person said, in words."""
    return json.loads(row["detail"] or "{}").get("said") or {1: "y1", -1: "y2", 0: "no preference"}[row["verdict"]]


def agreement_of_people(opinions):
    """Krippendorff's alpha of people's opinions, with y1, y2 and no preference as three values; "cannot judge" is none.

    opinions: without adjudications.
    """
    views = [[row["verdict"] for row in said.values() if said_by(row) != "cannot judge"] for said in opinions.values()]
    counts = [[found.count(value) for value in (1, 0, -1)] for found in views if len(found) > 1]
    if not counts:
        return "no pair has two opinions"
    split = sum(max(row) < sum(row) for row in counts)
    words = f"{len(counts):,} pairs with two or more opinions, {split:,} with a disagreement"
    if split:
        words += " (--disagreements lists them)"
    if sum(any(column) for column in zip(*counts)) < 2:
        return f"{words}; all say the same, so alpha is undefined"
    try:
        import krippendorff
    except ImportError:
        return f"{words}; for Krippendorff's alpha, pip install -r tools/requirements.txt"
    return f"{words}; Krippendorff's alpha {krippendorff.alpha(value_counts=counts, level_of_measurement='nominal'):.3f}"


PEOPLE = ("person", "opinions", "no preference", "with others", "say the label", "median seconds", "an hour")


def people(opinions, labels):
    """Rows of the table PEOPLE. opinions: without adjudications.  labels: {pair: label}."""
    of = defaultdict(list)
    for pair, said in opinions.items():
        for who, row in said.items():
            of[who].append((row, len(said) > 1 and pair in labels, row["verdict"] == labels.get(pair)))
    for who, rows in sorted(of.items()):
        shared = [right for _, several, right in rows if several]
        seconds = [row["seconds"] for row, *_ in rows if row["seconds"] is not None]
        yield (who, f"{len(rows):,}", f"{sum(row['verdict'] == 0 for row, *_ in rows):,}", f"{len(shared):,}",
               f"{sum(shared) / len(shared):.1%}" if shared else "–",
               f"{statistics.median(seconds):.1f}" if seconds else "–",
               f"{3600 * len(seconds) / sum(seconds):,.0f}" if sum(seconds) else "–")


def disagreements(folder):
    """The pairs about which people disagree as text: who says what, the label, and how the prompt begins."""
    tables = read_ledger(folder, WITH_TEXTS)
    labels = {row["pair"]: row["label"] for row in tables["answers"]}
    prompts = {row["pair"]: as_text(json.loads(row["prompt"])) for row in tables["questions"]}
    rows, (opinions, decided) = [], opinions_and_decisions(tables["verdicts"])
    for pair, said in sorted(opinions.items()):
        if len({row["verdict"] for row in said.values()}) > 1:
            label = {1: "y1", -1: "y2", 0: "no preference", None: "open"}[labels.get(pair)]
            words = [f"{who}: {said_by(row)}" for who, row in said.items()]
            words += [f"{who} decides: {said_by(row)}" for who, row in decided[pair].items()]
            rows.append((pair, label, ", ".join(words), " ".join(prompts.get(pair, "").split())[:60]))
    return "\n".join(line.rstrip() for line in table(("pair", "label", "opinions", "prompt"), rows, words=4)) if rows else (
        "nobody disagrees")


def asked_twice(verdicts):
    """(annotator, pairs, agree, contradict, no preference, share that agrees) for each annotator with two or more verdicts
    on one pair. No preference: at least one verdict says so, and the others do not contradict each other."""
    kinds = defaultdict(lambda: [0, 0, 0])
    for (who, _), rows in groups(verdicts, "annotator", "pair"):
        said = {row["verdict"] for row in rows}
        if len(rows) > 1:
            kinds[who][1 if {1, -1} <= said else 2 if 0 in said else 0] += 1
    return [(who, *(f"{n:,}" for n in (sum(kind), *kind)), f"{kind[0] / sum(kind):.1%}")
            for who, kind in sorted(kinds.items())]


def table(head, rows, words=1):
    """Lines of a table: the first `words` columns aligned left, the others right."""
    rows = [head, *([printable(cell) or "–" for cell in row] for row in rows)]
    widths = [max(len(row[k]) for row in rows) for k in range(len(head))]
    return ["  ".join(f"{cell:{'<' if k < words else '>'}{widths[k]}}" for k, cell in enumerate(row)) for row in rows]


def printable(text):
    """A text that stays on its line and cannot control the terminal: an annotator's name may come from anywhere."""
    return "".join(c if c.isprintable() else "?" for c in text)


# The export and the seed.

def export_csv(folder, path, force=False):
    """Write one row per answer, oldest first, with texts as `no_formula` gives them. Returns how many there are."""
    if Path(path).exists() and not force:
        raise LedgerError(f"{path} exists: say --force to replace it")
    if Path(path).exists() and Path(path).samefile(Path(folder) / "labels.sqlite"):
        raise LedgerError(f"{path} is the ledger: choose another file")
    tables = read_ledger(folder, WITH_TEXTS)
    texts = {row["pair"]: [as_text(json.loads(row[name])) for name in ("prompt", "first", "second")]
             for row in tables["questions"]}
    opinions, decided = opinions_and_decisions(tables["verdicts"])
    rows = sorted(tables["answers"], key=lambda row: (row["answered_at"], row["step"], row["pair"]))
    text = io.StringIO()
    writer = csv.writer(text)  # its line ends are \r\n; with others, some versions of Python leave a \r without quotes
    writer.writerow([*ANSWERS.split(", "), "prompt", "y1", "y2", "opinions"])
    for row in rows:
        said = [{"annotator": who, "verdict": found["verdict"], "seconds": found["seconds"],
                 **json.loads(found["detail"] or "{}")}
                for who, found in [*opinions[row["pair"]].items(), *decided[row["pair"]].items()]]
        cells = [*row, *texts.get(row["pair"], ("", "", "")), json.dumps(said, ensure_ascii=False) if said else ""]
        writer.writerow(map(no_formula, cells))
    replace_file(path, "\ufeff" + text.getvalue())  # without the byte order mark, Excel takes é for two letters
    return len(rows)


def no_formula(cell):
    """A cell as it is, or with a ' before it if it is a text that a spreadsheet would run as a formula."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(tuple("=+-@\t\r")) else cell


def reuse(folder, old):
    """Copy another run's answers into a folder's ledger, which is created if missing.

    Returns (answers copied, answers that were already there, how many of these have the other label).
    """
    path = Path(folder) / "labels.sqlite"
    answers = read_ledger(old)["answers"]
    if path.exists():
        if path.samefile(Path(old) / "labels.sqlite"):
            raise LedgerError(f"{old} is the same run: name another one")
        read_ledger(folder)  # check that it is a ledger before opening it for writing
    ledger = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        ledger = Ledger(path, PATIENCE)
        with ledger.transaction():
            there = dict(ledger.db.execute("SELECT pair, label FROM answers"))
            new = [row for row in answers if row["pair"] not in there]
            for (detail,), rows in groups(new, "detail"):
                ledger.add("reused", [(Question(row["pair"], None, -1), row["label"], row["annotator"], None, None)
                                      for row in rows], detail=detail)
    except sqlite3.Error as error:
        raise LedgerError(in_words(path, error))
    except OSError as error:
        raise LedgerError(f"{path.parent}: {error.strerror}")
    finally:
        if ledger:
            ledger.close()
    contradict = sum(there.get(row["pair"], 0) * row["label"] < 0 for row in answers)
    return len(new), len(answers) - len(new), contradict


def main(argv=None):
    parser = argparse.ArgumentParser(prog="tools/ledger.py", description="Look at a run's ledger of labels.")
    parser.add_argument("output_dir", type=filled, help="the run's folder")
    parser.add_argument("--disagreements", action="store_true", help="list the pairs about which people disagree")
    parser.add_argument("--csv", metavar="FILE", type=filled, help="export one row per answer")
    parser.add_argument("--force", action="store_true", help="let --csv replace a file")
    parser.add_argument("--reuse", metavar="OLD_OUTPUT_DIR", type=filled,
                        help="copy another run's answers into this one's ledger")
    args = parser.parse_args(argv)
    try:
        with printing():
            if args.reuse:
                copied, there, contradict = reuse(args.output_dir, args.reuse)
                print(f"{copied:,} answers copied from {args.reuse}; {there:,} were there already"
                      + (f", {contradict:,} of them with the other label (kept as they are)" if contradict else ""))
            if args.csv:
                print(f"{export_csv(args.output_dir, args.csv, args.force):,} answers written to {args.csv}")
            if args.disagreements:
                print(disagreements(args.output_dir))
            if not (args.reuse or args.csv or args.disagreements):
                print(report(args.output_dir))
    except (UsageError, OSError) as error:  # OSError: a folder that we may not enter
        print(f"tools/ledger.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show some letters shows ? instead
    sys.exit(main())
