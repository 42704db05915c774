"""Export a run's open questions to other annotation tools, and import the answers: tools/label.py --export and --import.

    from labels.ledger import Ledger
    from tools.exchange import export_questions, import_answers
    export_questions(Ledger("OUTPUT_DIR/labels.sqlite"), "questions.jsonl", "jsonl")
    import_answers(Ledger("OUTPUT_DIR/labels.sqlite"), "answers.jsonl", "jsonl")

Format "jsonl": JSON Lines in UTF-8.
    Export: one open question per line, {"pair", "prompt", "response_a", "response_b"}. Each text has the form it has in
        the data, a string or a list of {"role", "content"}.
    Import: {"pair", "label", "annotator", "seconds", "comment"}, the last three optional. What has no annotator is of one
        person, "import", so the files of several people need their names. The label is "a" or "b", or, for no preference,
        "equal", "both bad" or "cannot judge". A label that is missing, null, "" or "skip" skips the question. It is best to
        add `label` to the exported line: if the line contains response_a and response_b, the label refers to them, even if
        they were swapped; otherwise it refers to the exported sides.

Format "label-studio": the JSON of Label Studio 1.x (labelstud.io/guide/task_format, /tags/pairwise, and its template
"Pairwise Classification").
    Export: a list of tasks {"data": {"pair", "prompt", "response_a", "response_b"}} in plain text, and the labelling
        configuration beside it in FILE.xml.
    Import: what Label Studio exports as "JSON" (not "JSON-MIN"). The label is in annotations[].result[] of type
        "pairwise", with value {"selected": "left" or "right"}; left is response_a. A choice of "Equal", "Both bad" or
        "Cannot judge" is no preference, and counts where a response was clicked as well, which cannot be undone there.
        completed_by is the annotator, lead_time the seconds. What the team asks beside these is left out. A cancelled
        annotation, one without a choice, and a task without annotations skip the question.

A hash of the pair's id decides which side a response is on, so neither y1 nor y2 is always on the left. An import writes
everything or nothing: it checks the whole file first, then writes in one transaction. What a person says last about a pair
is their opinion, within a file too. An opinion that they have by now is not written again, so importing a file twice changes
nothing. If several people have an opinion on a pair, the label is what more than half of them say, in whatever order they
come (labels/ledger.py, Panel).

The paper and the official code ask nobody.
"""

import argparse
import errno
import hashlib
import json
import math
import os
import re
import time
import unicodedata

from labels.ledger import Panel
from runtime.errors import UsageError
from runtime.files import replacing
from runtime.formats import message_text, unique_keys

CONFIGURATION = """\
<View>
  <Style>.htx-text { white-space: pre-wrap; }</Style>
  <Header value="Prompt"/>
  <Text name="prompt" value="$prompt" valueType="text"/>
  <Header value="Click the better response"/>
  <Pairwise name="preference" toName="response_a,response_b"/>
  <Choices name="no_preference" toName="prompt" choice="single" showInline="true">
    <Choice value="Equal"/>
    <Choice value="Both bad"/>
    <Choice value="Cannot judge"/>
  </Choices>
  <View style="display: grid; grid-template-columns: 1fr 1fr; column-gap: 1em">
    <Text name="response_a" value="$response_a" valueType="text"/>
    <Text name="response_b" value="$response_b" valueType="text"/>
  </View>
</View>
"""
OURS = ("preference", "no_preference")  # the names of its questions
SKIPPED = (None, "", "skip")
THIRD_ANSWERS = ("equal", "both bad", "cannot judge")  # no preference, label 0; the ledger keeps which it was

SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: JSON can hold it, a file in UTF-8 cannot


class ExchangeError(UsageError):
    """A file cannot be read, written or used. The message names the file, the line or task, and the field."""


# Export.

def export_questions(ledger, path, format):
    """Write the open questions to a file, which may replace an earlier export, but nothing else. It appears complete or not
    at all.

    format: "jsonl" or "label-studio"; the latter writes FILE.xml too. Returns the number of questions. Raises
    ExchangeError.
    """
    if os.path.isfile(path) and not os.path.samefile(path, ledger.path) and not _is_export(path, format):
        raise ExchangeError(f"--export {path}: there is a file that holds more than questions, answers perhaps: import "
                            "it, or choose another file")
    tasks = []
    for pair, prompt, first, second in ledger.open_questions():
        prompt, y1, y2 = map(json.loads, (prompt, first, second))
        a, b = (y1, y2) if drawn_sides(pair)[0] == 1 else (y2, y1)
        tasks.append({"pair": pair, "prompt": prompt, "response_a": a, "response_b": b})
    if format == "jsonl":
        replace_file(path, "".join(f"{_dump(task)}\n" for task in tasks), ledger)
    elif format == "label-studio":
        tasks = [{"data": {name: as_text(value) for name, value in task.items()}} for task in tasks]
        replace_file(f"{os.fspath(path)}.xml", CONFIGURATION, ledger)
        replace_file(path, "[" + ",\n ".join(map(_dump, tasks)) + "]\n", ledger)
    else:
        raise ValueError(f"format {format!r}: expected \"jsonl\" or \"label-studio\"")
    return len(tasks)


def _is_export(path, format):
    """Whether a file holds questions and nothing else, so that no answer is lost with it."""
    with open(path, "rb") as file:
        content = file.read()
    try:
        rows = map(json.loads, filter(None, content.split(b"\n"))) if format == "jsonl" else json.loads(content)
        return all(row.keys() == ({"pair", "prompt", "response_a", "response_b"} if format == "jsonl" else {"data"})
                   for row in rows)
    except (ValueError, TypeError, AttributeError):
        return False


def drawn_sides(pair):
    """(label of side a, label of side b) as exported: (1, −1) if response_a is y1, (−1, 1) if it is y2."""
    odd = hashlib.blake2b(f"sides {pair}".encode(), digest_size=1).digest()[0] & 1
    return (-1, 1) if odd else (1, -1)


def as_text(value):
    """A string unchanged; messages as plain text with the role above each, or without if there is only the assistant's."""
    if isinstance(value, str):
        return value
    if [message["role"] for message in value] == ["assistant"]:
        return message_text(value[0])
    return "\n\n".join(f"{message['role']}:\n{message_text(message)}" for message in value)


def _dump(value):
    """Readable JSON on one line. It escapes only lone surrogates, and characters that some programs take for line ends."""
    return re.sub("[\x85\u2028\u2029\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}",
                  json.dumps(value, ensure_ascii=False))


def replace_file(path, text, ledger=None):
    """Write a text file in one go, as UTF-8; of a link, the file that it leads to. Raises ExchangeError, also if the path is
    the ledger's, or that of a device or a pipe, such as /dev/null, which would be replaced."""
    try:
        if ledger and os.path.exists(path) and os.path.samefile(path, ledger.path):
            raise ExchangeError(f"{path} is the ledger: choose another file")
        if os.path.isdir(path):
            raise ExchangeError(f"{path}: {os.strerror(errno.EISDIR)}; name a file")
        if os.path.exists(path) and not os.path.isfile(path):
            raise ExchangeError(f"{path}: is not a file that can be replaced; name another")
        with replacing(os.path.realpath(path)) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
            file.write(text)
    except OSError as error:
        raise ExchangeError(f"{path}: {error.strerror}")


# Import.

def import_answers(ledger, path, format, annotator="import", panel=Panel()):
    """Answer questions from a file.

    format: "jsonl" or "label-studio".  annotator: the name for labels that come without one.  panel: how many opinions a
    question needs. Returns counts: `answered`, first opinions; `second_opinions`, on pairs that already had one of somebody
    else, which may change the label; `already_there`, what the annotator says already; `replaced`, opinions in the file or
    the ledger in whose place the file has a later one of the same annotator; `skipped`, without a label.
    Raises ExchangeError if anything in the file is wrong; then nothing is imported.
    """
    if format not in READERS:
        raise ValueError(f"format {format!r}: expected \"jsonl\" or \"label-studio\"")
    questions = {pair: (first, second) for pair, first, second in
                 ledger.db.execute("SELECT pair, first, second FROM questions")}
    answers = list(READERS[format](path, questions, annotator))
    asked_at, names = dict(ledger.db.execute("SELECT pair, asked_at FROM questions")), Names()
    counts = {"answered": 0, "second_opinions": 0, "already_there": 0, "replaced": 0, "skipped": 0}
    with ledger.transaction():
        given = [(pair, names.of(ledger, who), label, detail, seconds) for pair, label, detail, who, seconds in answers
                 if label is not None]
        last = {(pair, who): said for pair, who, *said in given}  # of each person about each pair
        counts["skipped"], counts["replaced"] = len(answers) - len(given), len(given) - len(last)
        for (pair, who), (label, detail, seconds) in last.items():
            if _already_there(ledger, pair, label, detail, who):
                counts["already_there"] += 1
                continue
            there = ledger.opinions(pair)
            ledger.answer_question(pair, label, who, possible_seconds(seconds, asked_at[pair]), panel=panel, detail=detail)
            counts["replaced" if who in there else "second_opinions" if there else "answered"] += 1
    return counts


def _already_there(ledger, pair, label, detail, annotator):
    """Whether this is what the annotator says about the pair by now: the label, or which kind of no preference. What they
    decided as an adjudicator, on the page, is another matter, and stays."""
    mine = ledger.opinions(pair, decisions=False).get(annotator)
    return mine is not None and (mine.label, mine.said) == (label, detail.get("said"))


# Who said it, and how long they took.

def filled(text):
    """A path on a command line. An empty one is a shell variable that was never set; ~ is the home folder, which a shell
    leaves as it is in --output=~/pairs.jsonl."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; name a file or folder")
    return os.path.expanduser(text)


def fold(name):
    """A name without what does not tell people apart: case, spaces, and how Unicode writes a letter."""
    return " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold()).split())


class Names:
    """The names of the people in a ledger. One who comes as "ann" is the "Ann" that is there already."""

    def __init__(self):
        self.spelling = {}  # {folded: as first written}

    def of(self, ledger, name):
        if fold(name) not in self.spelling:
            for there, in ledger.db.execute("SELECT DISTINCT annotator FROM verdicts WHERE person"):
                self.spelling.setdefault(fold(there), there)
        return self.spelling.setdefault(fold(name), unicodedata.normalize("NFKC", name).strip())


def possible_seconds(seconds, asked_at):
    """The time that an answer took, or None if it cannot be true: not more than 0, or longer than the question has been
    there. Medians and labels an hour are then computed without it."""
    return seconds if seconds is not None and 0 < seconds <= time.time() - asked_at + 1 else None


def _from_jsonl(path, questions, annotator):
    """Yield (pair, label or None, detail, annotator, seconds) for each line."""
    for n, line in enumerate(_read(path).split(b"\n"), 1):
        if not line.strip():
            continue
        place = f"{path}, line {n}"
        row = _parse(line, place, "; the format is JSON Lines, one {\"pair\", \"label\"} a line" if n == 1 else "")
        if not isinstance(row, dict):
            advice = " (is it Label Studio's? say --format label-studio)" if isinstance(row, list) else ""
            raise ExchangeError(f"{place}: expected an object, found {row!r:.80}{advice}")
        pair, (first, second) = _question(row, questions, place)
        sides = _sides(row, pair, (json.loads(first), json.loads(second)), place)
        label = row.get("label")
        if label not in (*SKIPPED, "a", "b", *THIRD_ANSWERS):
            raise ExchangeError(f"{place}, field label: expected \"a\", \"b\", \"equal\", \"both bad\", \"cannot judge\" or "
                                f"null, found {label!r:.80}")
        who, comment = row.get("annotator"), row.get("comment")
        if not isinstance(comment, str | None) or SURROGATE.search(comment or ""):
            raise ExchangeError(f"{place}, field comment: expected a text, found {comment!r:.80}")
        detail = {**({"said": label} if label in THIRD_ANSWERS else {}), **({"comment": comment} if comment else {})}
        yield (pair, None if label in SKIPPED else 0 if label in THIRD_ANSWERS else sides["ab".index(label)], detail,
               annotator if who is None else _name(who, f"{place}, field annotator"),
               _seconds(row.get("seconds"), f"{place}, field seconds"))


def _from_label_studio(path, questions, annotator):
    """Yield (pair, label or None, detail, annotator, seconds) for each annotation, and for each task without annotations."""
    tasks = _parse(_read(path), path, "; export from Label Studio as \"JSON\"")
    if not isinstance(tasks, list):
        raise ExchangeError(f"{path}: expected a list of tasks, found {tasks!r:.80}")
    ours = _asks_ours(tasks)
    for n, task in enumerate(tasks, 1):
        place = f"{path}, task {n}"
        for name, kind in (("data", dict), ("annotations", list)):
            if not isinstance(task, dict) or not isinstance(task.get(name), kind):
                raise ExchangeError(f"{place}, field {name}: is missing; export from Label Studio as \"JSON\"")
        pair, (first, second) = _question(task["data"], questions, f"{place}, field data")
        texts = as_text(json.loads(first)), as_text(json.loads(second))
        sides = _sides(task["data"], pair, texts, f"{place}, field data")
        if not task["annotations"]:
            yield pair, None, {}, annotator, None
        places = [f"{place}, annotation {k}" for k in range(1, len(task["annotations"]) + 1)]
        for annotation, place in sorted(zip(task["annotations"], places), key=lambda one: _created(*one)):
            side = _selected(annotation, place, ours)
            third = side in THIRD_ANSWERS
            yield (pair, None if side is None else 0 if third else sides["left right".split().index(side)],
                   {"said": side} if third else {},
                   _completed_by(annotation.get("completed_by"), f"{place}, field completed_by", annotator),
                   _seconds(annotation.get("lead_time"), f"{place}, field lead_time"))


READERS = {"jsonl": _from_jsonl, "label-studio": _from_label_studio}


def _read(path):
    try:
        with open(path, "rb") as file:
            return file.read().removeprefix(b"\xef\xbb\xbf")  # a byte order mark, which some editors write
    except OSError as error:
        raise ExchangeError(f"--import {path}: cannot be read ({error.strerror}); name the file with the answers")


def _parse(text, place, advice=""):
    """advice: what to do where a text is not JSON."""
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique_keys)
    except UnicodeDecodeError as error:
        raise ExchangeError(f"{place}: not UTF-8 (at byte {error.start}){advice}")
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ExchangeError(f"{place}: not JSON ({line}column {error.colno}: {error.msg}){advice}")
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, or thousands of brackets
        raise ExchangeError(f"{place}: not usable JSON ({error}){advice}")


def _question(row, questions, place):
    """(pair, (first, second) as JSON) of the question that a row is about."""
    pair = row.get("pair")
    if not isinstance(pair, str):
        raise ExchangeError(f"{place}, field pair: expected a pair's id, found {pair!r:.80}")
    if pair not in questions:
        raise ExchangeError(f"{place}, field pair: {pair!r:.80} was never asked in this ledger")
    return pair, questions[pair]


def _sides(row, pair, texts, place):
    """(label of side a, label of side b) in this row. texts: (y1, y2) in the form that the row's format gives them."""
    if "response_a" not in row and "response_b" not in row:
        return drawn_sides(pair)
    shown = [row.get("response_a"), row.get("response_b")]
    for name, text in zip(("response_a", "response_b"), shown):
        if text not in texts:
            raise ExchangeError(f"{place}, field {name}: is neither response of the pair {pair} in the ledger; the "
                                f"texts must come back unchanged, found {text!r:.80}")
    fitting = [labels for labels in ((1, -1), (-1, 1)) if shown == [texts[label < 0] for label in labels]]
    if not fitting:
        raise ExchangeError(f"{place}, field response_b: is the same response of the pair {pair} as response_a")
    return fitting[0] if len(fitting) == 1 else drawn_sides(pair)  # both responses read the same: as exported


def _name(value, place):
    if not isinstance(value, str) or not value.strip() or not fold(value).isprintable() or len(value) > 200:
        raise ExchangeError(f"{place}: expected a name of 1 to 200 printable characters, found {value!r:.80}")
    return value


def _seconds(value, place):
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 <= value < 1e12 or not math.isfinite(value):
        raise ExchangeError(f"{place}: expected a number of seconds, found {value!r:.80}")
    return float(value)


def _created(annotation, place):
    """The key by which a task's annotations are sorted: Label Studio's time. It is ISO text, which sorts correctly."""
    if not isinstance(annotation, dict):
        raise ExchangeError(f"{place}: expected an object, found {annotation!r:.80}")
    return str(annotation.get("created_at") or "")


def _asks_ours(tasks):
    """Whether the labelling interface was CONFIGURATION, perhaps with other questions of the team's beside ours."""
    listed = [tasks]
    for name in ("annotations", "result"):  # what is not as it should be is refused later
        rows = [row for rows in listed for row in rows if isinstance(row, dict)]
        listed = [row[name] for row in rows if isinstance(row.get(name), list)]
    return any(isinstance(row, dict) and row.get("from_name") in OURS for rows in listed for row in rows)


def _selected(annotation, place, ours):
    """The chosen side, "left" or "right", one of THIRD_ANSWERS, or None if nothing was chosen.  ours: take only what was
    said to our own questions."""
    if annotation.get("was_cancelled"):
        return None
    results = annotation.get("result")
    if not isinstance(results, list) or not all(isinstance(result, dict) for result in results):
        raise ExchangeError(f"{place}, field result: expected a list of objects, found {results!r:.80}")
    if ours:
        results = [result for result in results if result.get("from_name", OURS[0]) in OURS]
    for result in results:
        if result.get("type") == "choices":
            value = result.get("value")
            third = value.get("choices") if isinstance(value, dict) else None
            third = third[0].lower() if isinstance(third, list) and len(third) == 1 and isinstance(third[0], str) else third
            if third not in THIRD_ANSWERS and result.get("from_name", "no_preference") != "no_preference":
                continue  # of another question that the team has put into the labelling interface
            if third not in THIRD_ANSWERS:
                raise ExchangeError(f"{place}, field choices: expected one \"Equal\", \"Both bad\" or \"Cannot judge\", "
                                    f"found {value!r:.80}")
            return third
    values = [result.get("value") for result in results if result.get("type") == "pairwise"]
    chosen = [value.get("selected") if isinstance(value, dict) else value for value in values]
    if not chosen:
        return None
    if len(chosen) > 1 or chosen[0] not in ("left", "right"):
        raise ExchangeError(f"{place}, field selected: expected one \"left\" or \"right\", found {chosen!r:.80}")
    return chosen[0]


def _completed_by(value, place, nobody):
    """An annotator's name: the user's mail address if the export has it, otherwise label-studio-NUMBER."""
    if isinstance(value, dict):
        value = value.get("email") or value.get("id")
    if value is None:
        return nobody
    return f"label-studio-{value}" if type(value) is int else _name(value, place)
