"""Two models' answers side by side in a terminal.

    python tools/compare.py A B [--questions FILE]
    python tools/generate.py --compare A B [--questions FILE]      the same

A, B: files written by tools/generate.py (responses.jsonl, AlpacaEval's model_outputs.json, FastChat's NAME.jsonl), or
folders that contain one. Answers are matched by their question. FastChat's files do not contain the questions:
--questions question.jsonl adds them.

In a terminal the text goes through $PAGER (or less). Into a pipe it is printed, as wide as $COLUMNS (default 80). Control
characters are written out, as in \\x1b, so that an answer cannot control the terminal. Exit code 2: a file cannot be used;
one line says why.
"""

import argparse
import pydoc
import re
import shutil
import sys
import unicodedata
from collections import Counter
from itertools import zip_longest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository root, for the imports below

from runtime.errors import DataError, UsageError  # noqa: E402
from runtime.files import printing  # noqa: E402
from runtime.formats import parse_prompt  # noqa: E402
from runtime.sources import find_file, read_file  # noqa: E402
from tools.exchange import as_text  # noqa: E402

FOLDER = ("responses.jsonl", "model_outputs.json", "data/mt_bench/model_answer/*.jsonl")  # where a folder keeps its answers


def harmless(text):
    """A text without control characters except line feeds: other white space becomes spaces, the rest is written out."""
    text = text.replace("\r\n", "\n").expandtabs(4)
    return "".join(c if c.isprintable() or c == "\n" else " " if c.isspace() else ascii(c)[1:-1] for c in text)


def columns(text):
    """How many columns a text takes in a terminal."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.category(c) in ("Mn", "Me") else 2 if unicodedata.east_asian_width(c) in "WF" else 1
               for c in text)


def wrap(text, width):
    """Break a text into lines of at most `width` columns, at spaces, or inside a word that is longer than a line."""
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for piece in re.findall(" +|[^ ]+", paragraph.rstrip()):
            if line.strip() and columns(line) + columns(piece) > width:
                lines.append(line.rstrip())
                line = ""
                if piece.isspace():
                    continue
            if columns(line) + columns(piece) <= width:
                line += piece
                continue
            for c in piece:
                if columns(line) + columns(c) > width:
                    lines.append(line)
                    line = ""
                line += c
        lines.append(line.rstrip())
    return lines


def beside(left, right, width):
    """The lines of two texts, side by side in two columns."""
    half = (width - 3) // 2
    left, right = wrap(left, half), wrap(right, half)
    height = max(len(left), len(right))
    left, right = (lines + [""] * (height - len(lines)) for lines in (left, right))
    return [f"{a}{' ' * (half - columns(a))} │ {b}".rstrip() for a, b in zip(left, right)]


def find(path):
    """The answer file that a path, perhaps of a folder, refers to. Raises DataError."""
    path = Path(path)
    if not path.is_dir():
        return path
    found = [file for pattern in FOLDER for file in sorted(path.glob(pattern))]
    if len(found) != 1:
        held = f"holds {len(found)} answer files ({', '.join(str(f.relative_to(path)) for f in found)}): name one"
        raise DataError(f"{path}: {held if found else 'holds no ' + ' or '.join(FOLDER)}")
    return found[0]


def rows_of(path):
    """[(place, row)] of a file of questions or answers, in the format that its suffix names. Raises DataError."""
    if not Path(path).is_file():
        raise DataError(f"{path}: there is no such file")
    rows = list(read_file(find_file(path, "train")))
    for place, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{place}: expected an object with fields, found {type(row).__name__}")
    return rows


def read(path):
    """(the model's name, {(question, which time it appears): its answers, one per turn}) from an answer file. Raises
    DataError."""
    name, answers, seen = None, {}, Counter()
    for place, row in rows_of(path):
        if "choices" in row:
            key, name = row.get("question_id"), row.get("model_id")
            turns = row["choices"][0].get("turns") if is_list_of(row["choices"], dict) else None
        elif "output" in row:
            key, name, turns = row.get("instruction"), row.get("generator"), [row["output"]]
        else:
            key, turns = as_text(parse_prompt(row, place)), [row.get("response")]
        if not isinstance(key, (str, int)) or not is_list_of(turns, str):
            raise DataError(f"{place}: is not an answer written by tools/generate.py")
        seen[key] += 1
        answers[key, seen[key]] = turns  # a question that appears twice has two answers
    return harmless(name if isinstance(name, str) and name else str(path.parent.name or path)), answers


def read_questions(path):
    """{question id: its turns} from FastChat's question.jsonl. Raises DataError."""
    questions = {}
    for place, row in rows_of(path):
        key, turns = row.get("question_id"), row.get("turns")
        if not isinstance(key, (str, int)) or not is_list_of(turns, str):
            raise DataError(f"{place}: needs question_id and turns, a list of texts, as in FastChat's question.jsonl")
        questions[key] = turns
    return questions


def is_list_of(value, kind):
    return isinstance(value, list) and value != [] and all(isinstance(item, kind) for item in value)


def side_by_side(a, b, width, questions=None):
    """The comparison as lines. a, b: of `read`.  questions: {question id: its turns}."""
    (name_a, answers_a), (name_b, answers_b) = a, b
    both = [key for key in answers_a if key in answers_b]
    lines, same = [], 0
    for n, key in enumerate(both, 1):
        asked, _ = key
        prompts = (questions or {}).get(asked, [asked if isinstance(asked, str) else f"question {asked}"])
        pairs = list(zip_longest(answers_a[key], answers_b[key], fillvalue="(no answer to this turn)"))
        for turn, (left, right) in enumerate(pairs):
            same += left == right
            title = f" {n:,} of {len(both):,}" + (f", turn {turn + 1}" if len(pairs) > 1 else "") + " "
            lines += ["", "══" + title + "═" * (width - 2 - len(title)), ""]
            lines += wrap(harmless(prompts[turn]), width) if turn < len(prompts) else []
            lines += ["", *beside(name_a, name_b, width), "─" * ((width - 3) // 2 + 1) + "┼" + "─" * ((width - 3) // 2 + 1)]
            lines += beside(harmless(left), harmless(right) if left != right else "(the same)", width)
    alone = [f"{len(mine) - len(both):,} only in {name}" for name, mine in ((name_a, answers_a), (name_b, answers_b))
             if len(mine) > len(both)]
    common = f"{len(both):,} question{'s' * (len(both) > 1)} in both, {same:,} answers the same"
    lines += ["", *wrap("; ".join([common, *alone]), width)]
    return lines


def main(a, b, question_file=None, command="tools/generate.py"):
    """Print the comparison of two files or folders, or show it in a pager. Returns the exit code.

    command: named in errors.
    """
    try:
        paths = [find(path) for path in (a, b)]
        sides = [read(path) for path in paths]
        if sides[0][0] == sides[1][0]:
            sides = [(harmless(str(path)), answers) for path, (_, answers) in zip(paths, sides)]
        questions = read_questions(question_file) if question_file else None
    except UsageError as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 2
    if not sides[0][1].keys() & sides[1][1].keys():
        print(f"{command}: {paths[0]} and {paths[1]} have no question in common; name two files with answers to the same "
              "questions", file=sys.stderr)
        return 2
    text = "\n".join(side_by_side(*sides, max(20, shutil.get_terminal_size().columns), questions))
    if sys.stdout.isatty():
        pydoc.pager(text)
        return 0
    with printing():
        print(text)
    return 0


def parse(argv=None):
    parser = argparse.ArgumentParser(prog="tools/compare.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("a", metavar="A", help="a file written by tools/generate.py, or a folder that holds one")
    parser.add_argument("b", metavar="B", help="the other model's")
    parser.add_argument("--questions", metavar="FILE", help="FastChat's question.jsonl, for files without the questions")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show some letters shows ? instead
    options = parse()
    sys.exit(main(options.a, options.b, options.questions, "tools/compare.py"))
