"""What becomes of each kind of reply that a chat judge can give: a label, a tie, another question, or a stop.

    python benchmarks/judge_replies.py [--results FILE]        a few seconds; writes benchmarks/results/judge_replies.md

Each row is a real ChatJudge with the default keys that asks a real HTTP server on loopback about four pairs. The server is
an honest judge, except that it treats one pair, or all of them ("every reply"), as the row says. The better response of each
pair is known, so a label that no verdict stands for would be seen. tests/test_judge.py runs every row too.
"""

import argparse
import contextlib
import io
import json
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers import Server, completion, question, right, texts, truth  # noqa: E402

from labels.annotators import Waiting  # noqa: E402
from labels.endpoint import Endpoint  # noqa: E402
from labels.judge import ChatJudge  # noqa: E402
from labels.ledger import Ledger  # noqa: E402

PAIRS = ["p0", "p1", "p2", "p3"]
ODD = "p1"  # the pair whose replies are odd


def verdict(prompt):
    """The mark of an honest judge."""
    return right(prompt, 0)[2]["choices"][0]["message"]["content"]


def other(mark):
    return {"[[A]]": "[[B]]", "[[B]]": "[[A]]"}[mark]


def message(finish="stop", **fields):
    """A completion whose message has these fields."""
    status, headers, body = completion(None, finish)
    body["choices"][0]["message"] |= fields
    return status, headers, body


def error(status, text, **fields):
    return status, {}, {"error": {"message": text, **fields}}


def rejects(field, text):
    """An honest judge on a server that does not take a field."""
    def behave(prompt, n):
        if field in prompt.body:
            return error(400, text, param=field, code="unsupported_parameter")
        return right(prompt, n)
    return behave


def in_one_order(mark):
    """Says this where the good response comes first, and the truth otherwise."""
    return lambda prompt, n: completion(mark if verdict(prompt) == "[[A]]" else verdict(prompt))


@dataclass
class Row:
    """what: the reply, for the table.  becomes: what has to become of it.  behave: (prompt, n) → the server's answer.
    every: whether the server treats all pairs like that."""
    what: str
    becomes: str
    behave: object
    every: bool = False


LABEL, AGAIN, TIE = "label", "label, asked again", "tie"
NONE, REFUSED = "no verdict, asked again", "no verdict"  # no preference, counted as unanswerable (judge_unanswerable: skip)
STOP = "stop"

ROWS = [
    Row("the mark alone", LABEL, right),
    Row("a sentence, then the mark", LABEL, lambda p, n: completion(f"Both try. The better one is {verdict(p)}.")),
    Row("the mark in bold, on a line of its own", LABEL, lambda p, n: completion(f"Verdict:\n\n**{verdict(p)}**\n")),
    Row("the mark first, then cut off at the maximum length", LABEL,
        lambda p, n: completion(f"{verdict(p)} because the other", "length")),
    Row("`<think>` with the wrong mark, then the right one", LABEL,
        lambda p, n: completion(f"<think>Perhaps {other(verdict(p))}? No.</think>\n{verdict(p)}")),
    Row("`</think>` alone: the template had opened it", LABEL,
        lambda p, n: completion(f"I lean to {other(verdict(p))}, but no.\n</think>\n\n{verdict(p)}")),
    Row("reasoning in `reasoning_content`, the mark in `content`", LABEL,
        lambda p, n: message(content=verdict(p), reasoning_content=f"{other(verdict(p))} at first sight")),
    Row("`content: null`, all in `reasoning_content`, which ends with the mark", LABEL,
        lambda p, n: message(content=None, reasoning_content=f"The first is off the point, so {verdict(p)}.")),
    Row("content in parts, one of them reasoning", LABEL, lambda p, n: message(content=[
        {"type": "thinking", "thinking": other(verdict(p))}, {"type": "text", "text": verdict(p)}])),
    Row("HTTP 400: the model takes no `max_tokens`", LABEL, every=True, behave=rejects(
        "max_tokens", "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens'.")),
    Row("HTTP 400: the model takes no temperature 0", LABEL, every=True, behave=rejects(
        "temperature", "Unsupported value: 'temperature' does not support 0 with this model, only the default (1).")),
    Row("HTTP 429, then the mark", AGAIN, lambda p, n: error(429, "slow down") if n == 0 else right(p, n)),
    Row("an error inside an HTTP 200, then the mark", AGAIN,
        lambda p, n: (200, {}, {"error": "overloaded"}) if n == 0 else right(p, n)),
    Row("prose without a mark; reminded of the form, the mark", AGAIN,
        lambda p, n: right(p, n) if "An earlier reply" in p else completion("It depends on what the user wants.")),
    Row("[[C]] in both orders", TIE, lambda p, n: completion("[[C]]")),
    Row("[[A]] whatever comes first", TIE, lambda p, n: completion("[[A]]")),
    Row("[[B]] whatever comes first", TIE, lambda p, n: completion("[[B]]")),
    Row("[[C]] in one order, a preference in the other", TIE, in_one_order("[[C]]")),
    Row("nothing", NONE, lambda p, n: completion("")),
    Row("prose without a mark", NONE, lambda p, n: completion("Response A is better.")),
    Row("two marks", NONE, lambda p, n: completion("[[A]] or [[B]]")),
    Row("the same mark twice", NONE, lambda p, n: completion(f"{verdict(p)} … {verdict(p)}")),
    Row("a mark in lower case", NONE, lambda p, n: completion(verdict(p).lower())),
    Row("a mark that does not exist", NONE, lambda p, n: completion("[[A+]]")),
    Row("the prompt, word for word", NONE, lambda p, n: completion(p)),
    Row("a tool call", NONE, lambda p, n: message(tool_calls=[{"function": {"name": "vote", "arguments": verdict(p)}}])),
    Row("`content: null` and a `refusal`", NONE, lambda p, n: message(refusal="I can't help with that.")),
    Row("the mark in the middle of a reply that is cut off", NONE,
        lambda p, n: completion(f"Response A says {other(verdict(p))}, and", "length")),
    Row("`<think>` that never ends", NONE, lambda p, n: completion(f"<think>{verdict(p)}? Let me see", "length")),
    Row("all in `reasoning_content`, the mark in the middle", NONE,
        lambda p, n: message(content="", reasoning_content=f"One could say {verdict(p)}, but on the other hand")),
    Row("`finish_reason: content_filter`", REFUSED, lambda p, n: completion("", "content_filter")),
    Row("HTTP 400 about this pair: too long", REFUSED, lambda p, n: error(
        400, "'max_tokens' or 'max_completion_tokens' is too large. This model's maximum context length is 8192 tokens")),
    Row("HTTP 400 about this pair: content filter", REFUSED,
        lambda p, n: error(400, "The prompt was filtered", code="content_filter")),
    Row("HTTP 413 about this pair", REFUSED, lambda p, n: error(413, "Request too large")),
    Row("HTTP 422 about this pair", REFUSED, lambda p, n: error(422, "Unprocessable")),
    Row("HTTP 500 about this pair, each time", NONE, lambda p, n: error(500, "CUDA error")),
    Row("HTTP 429 about this pair, each time", STOP, lambda p, n: error(429, "slow down")),
    Row("prose without a mark", STOP, lambda p, n: completion("I like turtles"), every=True),
    Row("HTTP 400: the model does not exist", STOP, lambda p, n: error(400, "The model `m` does not exist"), every=True),
    Row("HTTP 401", STOP, lambda p, n: error(401, "Incorrect API key"), every=True),
    Row("HTTP 404", STOP, lambda p, n: error(404, "Not Found"), every=True),
    Row("HTTP 503", STOP, lambda p, n: error(503, "no healthy upstream"), every=True),
    Row("a web page instead of JSON", STOP, lambda p, n: b"<html>[[A]]</html>", every=True),
]


def run(row, folder):
    """What becomes of the pair. Raises AssertionError if a label was invented, or if the pair held up another one."""
    def behave(prompt, n):
        about = re.search(r"response of (p\d)", prompt)  # the judge may also ask something of its own
        return row.behave(prompt, n) if row.every or about and about[1] == ODD else right(prompt, n)

    server, ledger = Server(behave), Ledger(Path(folder) / "labels.sqlite")
    judge, stopped = ChatJudge(texts, server.url, "m", retries=2), False
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            judge.answer([question(pair) for pair in PAIRS], ledger)
    except Waiting:
        stopped = True
    finally:
        server.http.shutdown()
        server.http.server_close()
    labels = {pair: (label, json.loads(detail)) for pair, label, detail in ledger.db.execute(
        "SELECT pair, label, detail FROM answers")}
    ledger.close()
    assert all(label in (0, truth(pair)) for pair, (label, _) in labels.items()), labels
    assert all(bool(label) == (detail.get("said") in ("AB", "BA")) for label, detail in labels.values()), labels
    assert row.every or labels.keys() >= set(PAIRS) - {ODD}
    requests = sum(f"response of {ODD}" in prompt for prompt in server.prompts())
    return STOP if stopped else in_words(*labels[ODD], requests > 2 and not row.every)


def in_words(label, detail, again):
    """What became of a pair, in the words of the table."""
    if label:
        return AGAIN if again else LABEL
    return TIE if detail.get("tie") else NONE if again else REFUSED


def table(results):
    lines = ["# What becomes of a judge's reply", "", "    python benchmarks/judge_replies.py", "",
             "The keys are the defaults: `judge_disagreement: tie`, `judge_unanswerable: skip`. Each pair is asked about",
             "twice, once in each order of its responses.", "",
             "- *label*: the judge's own, the same in both orders",
             "- *tie*: no preference, because the orders disagree or prefer neither",
             "- *no verdict*: no preference, because the judge cannot answer the pair",
             "- *asked again*: no usable reply at first; at most three in each order are paid for",
             "- *stop*: exit code 75; the same command resumes the run", "",
             "No row has a label that no verdict stands for, and no odd pair holds up another one.", "",
             "| the reply | what becomes of the pair |", "| --- | --- |"]
    lines += [f"| {row.what}{' (every reply)' if row.every else ''} | {became} |" for row, became in results]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "judge_replies.md")
    args = parser.parse_args()
    Endpoint.backoff_seconds = 0.02
    results = []
    for row in ROWS:
        with tempfile.TemporaryDirectory() as folder:
            results.append((row, run(row, folder)))
        assert results[-1][1] == row.becomes, results[-1]
    args.results.write_text(table(results), encoding="utf-8")
    print(args.results.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
