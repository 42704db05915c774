"""A page on which people answer a run's open questions.

    python tools/label.py OUTPUT_DIR [--host 127.0.0.1] [--port 8642]              serve it, until Ctrl-C
    python tools/label.py OUTPUT_DIR --annotator Ann --annotator Bob               a link of their own for each person
    python tools/label.py OUTPUT_DIR --annotators-per-pair 3 [--adjudicator Ann]   three opinions a question
    python tools/label.py OUTPUT_DIR --export FILE [--format label-studio]         open questions, for another tool
    python tools/label.py OUTPUT_DIR --import FILE [--format label-studio]         answers from there

The page and the run share only OUTPUT_DIR/labels.sqlite. An answer is committed before the page shows the next question,
either program can be killed and restarted, and the page waits while the run asks nothing. Each open question is leased
to as many annotators as it needs opinions. Which response is on the left is drawn at random for each annotator and
question. A choice is sent as the digest of the chosen response, so its meaning does not depend on the side or on this
process. "Equal", "both bad" and "cannot judge" settle a question without a preference: the pair has no loss, and is not
asked again.

A label needs more than half of the opinions. Where no response has that (a split), the pair has no preference, or, with
--adjudicator NAME, that person sees the opinions and decides. No command remembers these two flags, so give them to each: a
page that starts settles the open questions by its own, --import only those that its file answers, and --export none.

On loopback, everybody on this machine may label, under a name of their choice. On any other host, or with --public-url, a
token is required, and --annotator gives each person one of their own, so that nobody can label under another's name. The
printed links contain the tokens. They stay the same after a restart; without the file OUTPUT_DIR/label.key, the page makes
new ones.

Serving needs tools/requirements.txt. Exit code 2: it cannot start, or a file cannot be used; one line says why. The
paper and the official code ask nobody.
"""

import argparse
import collections
import contextlib
import hashlib
import hmac
import re
import secrets
import signal
import socket
import sqlite3
import sys
import threading
import time
import unicodedata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from labels.ledger import Ledger, LedgerError, Panel, in_words  # noqa: E402
from runtime.errors import UsageError  # noqa: E402
from tools import serving  # noqa: E402
from tools.exchange import THIRD_ANSWERS, Names, export_questions, filled, fold, import_answers, possible_seconds  # noqa: E402
from tools.serving import Refused  # noqa: E402

LEASE = 90  # seconds that a lease lasts; the page renews it every 25 s, or every 60 s in the background
LEAVING = 2  # seconds that a lease lasts after its page was closed, so that a reload finds the question again
PATIENCE = 10  # seconds to wait while another process holds the ledger
RATE_WINDOW = 3600  # seconds over which labels per hour are counted
LONGEST_NAME, LONGEST_COMMENT = 40, 2000  # characters
LONGEST_GUIDELINES = 1_000_000  # bytes
FORBIDDEN = {"Cc", "Cs", "Zl", "Zp"}  # Unicode's controls, surrogates, and separators of lines and paragraphs
DECIDING = "adjudicate"  # the round of a question whose answer decides a split; of all others it is ""


# What the page asks of the ledger. Each action is one transaction, so what it checks is still true when it writes.

class Desk:
    """Hands out questions and takes answers. It can afford to lose whatever it keeps outside the ledger.

    path: the ledger.  panel: how opinions become labels.  guidelines: Markdown, or None.  names: how people are spelled.
    skipped: {annotator: pairs}.  views: {annotator: {open page: time of its last request}}.  given: {annotator: times of
    their answers in the last hour}.
    """

    ACTIONS = ("hello", "difference", "next", "answer", "skip", "undo", "leave")

    def __init__(self, path, panel=Panel(), guidelines=None, names=None):
        self.path, self.panel, self.guidelines, self.names = path, panel, guidelines, names or Names()
        self.skipped, self.views, self.given = {}, {}, collections.defaultdict(collections.deque)
        self.secret = secrets.token_bytes(16)  # seeds the draw of sides
        self.one_at_a_time = threading.Lock()  # SQLite lets one write; who waits for it there sleeps longer than needed

    def __call__(self, action, message):
        """Carry out a page's action. Returns what the page should show next."""
        if action not in self.ACTIONS:
            raise Refused(404, "There is nothing here.")
        me, view, pair = (text_of(message, name) for name in ("annotator", "view", "pair"))
        if action == "hello":
            return self.hello(me)
        if not (me.isprintable() and 0 < len(me) <= LONGEST_NAME):  # people must be able to see what tells two names apart
            raise Refused(400, f"An annotator needs a name of 1 to {LONGEST_NAME} printable characters.")
        if not self.path.is_file():  # opening it would create an empty ledger
            raise Refused(503, f"The ledger {self.path} is gone.")
        try:
            with self.one_at_a_time, contextlib.closing(Ledger(self.path, timeout=PATIENCE)) as ledger:
                me = self.names.of(ledger, me)
                if action == "difference":
                    return {"sides": self.difference(ledger, pair)}
                with ledger.transaction():
                    self.note_view(me, view, action)
                    note = getattr(self, action)(ledger, me, pair, message)
                    if action == "leave":
                        return {}
                    row, said = self.question(ledger, me)
                    figures = self.progress(ledger, me)
        except (sqlite3.Error, LedgerError) as error:
            raise Refused(503, f"The ledger cannot be used: {error}")
        return {"note": note, "question": row and self.shown(me, row, said), **figures}

    def hello(self, me):
        """What a page needs before its first question. me: the person that its link belongs to, or ""."""
        from tools.reading import rendered
        guidelines = self.guidelines and {"text": self.guidelines, "html": rendered(self.guidelines)}
        return {"you": me or None, "guidelines": guidelines}

    def difference(self, ledger, pair):
        """{choice: [[text, differs], …]} for both responses."""
        from tools.reading import difference, turns
        asked = ledger.db.execute("SELECT first, second FROM questions WHERE pair = ?", (pair,)).fetchone()
        if asked is None:
            raise Refused(409, "That question was never asked.")
        parts = difference(*map(turns, asked))
        if parts is None:
            raise Refused(413, "These responses are too long to show where they differ.")
        return dict(zip(map(digest, asked), parts))

    def note_view(self, me, view, action):
        now = time.monotonic()
        views = {v: seen for v, seen in self.views.get(me, {}).items() if seen > now - LEASE and v != view}
        self.views[me] = views if action == "leave" else {**views, view: now}

    def next(self, ledger, me, pair, message):
        return ""  # __call__ then leases a question, or renews the lease

    def answer(self, ledger, me, pair, message):
        asked = ledger.db.execute("SELECT first, second, asked_at, open FROM questions WHERE pair = ?", (pair,)).fetchone()
        if asked is None:
            raise Refused(409, "That question was never asked.")
        choice, comment = text_of(message, "choice"), text_of(message, "comment", LONGEST_COMMENT)
        label = {digest(asked[0]): 1, digest(asked[1]): -1, **dict.fromkeys(THIRD_ANSWERS, 0)}.get(choice)
        if label is None:
            raise Refused(400, "That is neither of the two responses.")
        said = {"said": choice} if label == 0 else {}
        seconds = message.get("seconds")
        if seconds is not None and (type(seconds) not in (int, float) or not abs(seconds) < 1e18):
            raise Refused(400, "Seconds must be a number.")
        deciding = text_of(message, "round") == DECIDING  # what the page showed; it may send an earlier answer again
        adjudicates = deciding and me == self.panel.adjudicator and ledger.is_split(pair, self.panel)
        mine = ledger.opinions(pair).get(me)
        if mine and not adjudicates:
            if (mine.label, mine.said, mine.adjudicates) == (label, said.get("said"), deciding):
                return ""  # sent again, because the page never got our reply
            raise Refused(409, "You have answered that question already. Here is another.")
        if not asked[3]:
            raise Refused(409, "That question has been answered in the meantime. Here is another.")
        if deciding and not adjudicates:
            raise Refused(409, "Nothing has to be decided there any more. Please look again.")
        if not ledger.renew(me, pair, LEASE, self.panel):
            raise Refused(409, "That question was given back while you were away. Please look again.")
        detail = {**said, **({"comment": comment} if comment else {}), **({"adjudicates": True} if adjudicates else {})}
        ledger.answer_question(pair, label, me, possible_seconds(seconds, asked[2]), panel=self.panel, detail=detail)
        self.given[me].append(time.time())
        return ""

    def skip(self, ledger, me, pair, message):
        if not ledger.renew(me, pair, LEASE, self.panel):  # the page sends it again, see answer
            return ""
        ledger.release(me, pair)
        self.skipped.setdefault(me, []).append(pair)
        return "Skipped. It will come back when nothing else is left."

    def undo(self, ledger, me, pair, message):
        mine = ledger.opinions(pair).get(me)
        if mine is None or mine.adjudicates != (text_of(message, "round") == DECIDING):
            if ledger.renew(me, pair, LEASE, self.panel):  # the page sends it again, see answer
                return "Undone. Here is the question again."
            raise Refused(409, "You have no answer to undo here.")
        if not ledger.retract(pair, me, self.panel):
            return "The run has already used that answer, so it cannot be undone."
        ledger.release(me)
        self.skipped[me] = [other for other in self.skipped.get(me, []) if other != pair]
        if self.given[me]:
            self.given[me].pop()
        decides = me == self.panel.adjudicator and ledger.is_split(pair, self.panel)
        if me in ledger.opinions(pair) and not decides:  # what a file had, before another file changed it
            return "Undone. What you had said before counts again."
        if not ledger.unanswered([pair]):
            return "Undone. The others have settled that question without you."
        ledger.hold(me, pair, LEASE)
        return "Undone. Here is the question again."

    def leave(self, ledger, me, pair, message):
        """Give the question back soon, unless its annotator has another page open or has already reloaded this one."""
        if not self.views[me]:
            ledger.renew(me, pair, LEAVING, self.panel)

    def question(self, ledger, me):
        """(row, opinions) of the annotator's question, both None if there is none for them. The opinions are those that an
        adjudicator decides between; others see none."""
        skipped = self.skipped.setdefault(me, [])
        row = ledger.lease(me, LEASE, skipped, self.panel)
        while row and row[0] in skipped:  # nothing else is left: the pair that was skipped first comes back
            ledger.release(me, row[0])
            skipped.pop(0)
            row = ledger.lease(me, LEASE, skipped, self.panel)
        if row is None:
            return None, None
        split = me == self.panel.adjudicator and ledger.is_split(row[0], self.panel)
        return row, ledger.opinions(row[0]) if split else {}

    def shown(self, me, row, opinions):
        """A question as the page shows it; the page sends its round back with the answer. Outside of the transaction,
        because rendering takes time."""
        from tools.reading import nearly_equal, turns
        pair, prompt, *responses = row
        sides = [{"choice": digest(text), "turns": turns(text)} for text in responses]
        same = nearly_equal(*(side["turns"] for side in sides))
        said = [{"who": who, "said": sides[opinion.label < 0]["choice"] if opinion.label else opinion.said,
                 "comment": opinion.comment} for who, opinion in opinions.items()]
        if hmac.digest(self.secret, f"{me}\0{pair}".encode(), "sha256")[0] & 1:
            sides.reverse()
        return {"pair": pair, "round": DECIDING if said else "", "prompt": turns(prompt), "sides": sides,
                "nearly_equal": same, "opinions": said}

    def progress(self, ledger, me):
        """The page's figures. `answered` and `asked` count the questions of those steps that still have an open one. `last`
        and `last_round` say what an undo takes back."""
        now = time.time()
        for who, times in list(self.given.items()):
            while times and times[0] < now - RATE_WINDOW:
                times.popleft()
            if not times:
                del self.given[who]
        mine = self.given.get(me, ())
        everybody = list(self.given.values())
        rates = [an_hour(len(mine), mine and mine[0], now),
                 an_hour(sum(map(len, everybody)), min((times[0] for times in everybody), default=now), now)]
        left, asked = ledger.progress()
        count, last = ledger.given_by(me)
        decided = last is not None and ledger.opinions(last)[me].adjudicates
        return {"left": left, "answered": asked - left, "asked": asked, "rates": rates, "last": last,
                "last_round": DECIDING if decided else "", "mine": count}


def an_hour(count, since, now):
    """Labels an hour, or None where there are too few to tell."""
    return round(count * 3600 / max(now - since, 60)) if count > 2 else None


def text_of(message, name, longest=200):
    """A line of text from a message, stripped. Any language: French needs spaces that do not break, Persian and emoji need
    joiners, Hebrew needs marks of direction. Raises Refused."""
    value = message.get(name, "")
    if not isinstance(value, str) or len(value) > longest or not FORBIDDEN.isdisjoint(map(unicodedata.category, value)):
        raise Refused(400, f"{name} must be a text of at most {longest} characters, on one line, without controls.")
    return value.strip()


def digest(text):
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


# The command line.

def links(args, port, public, tokens):
    """The lines that say where to label."""
    host = f"[{args.host}]" if ":" in args.host else args.host
    host = socket.gethostname() if args.host in ("", "0.0.0.0", "::") else host
    address = f"{public[0]}{public[2]}/" if public else f"http://{host}:{port}/"
    stops = f" (listening on port {port}; Ctrl-C stops)" if public else " (Ctrl-C stops)"
    if not tokens:
        return [f"label at {address}{stops}"]
    return [f"{f'{who} labels' if who else 'label'} at {address}?token={token}{'' if n else stops}"
            for n, (token, who) in enumerate(tokens.items())]


def tokens_of(args, folder, people, local):
    """{token: its person, or None}: empty where everybody may come in."""
    if people:
        key = serving.key_of(folder)
        return {serving.token_for(key, fold(who)): who for who in people}
    if args.token:
        return {args.token: None}
    return {} if local and not args.public_url else {serving.token_for(serving.key_of(folder), None): None}


def people_of(ledger, args, names):
    """(the people with links of their own, the adjudicator), spelled as in the ledger. Raises UsageError."""
    for who in (*args.annotator, *filter(None, [args.adjudicator])):
        if not (who.isprintable() and 0 < len(who.strip()) <= LONGEST_NAME):
            raise UsageError(f"{who!r}: a name needs 1 to {LONGEST_NAME} printable characters")
    adjudicator = args.adjudicator and names.of(ledger, args.adjudicator.strip())
    people = [names.of(ledger, who.strip()) for who in args.annotator]
    if len(set(people)) < len(people):
        raise UsageError(f"--annotator {max(people, key=people.count)}: is named twice; two people need two names")
    if people and adjudicator and adjudicator not in people:
        people.append(adjudicator)
    return people, adjudicator


def guidelines_of(path):
    if path is None:
        return None
    try:
        text = Path(path).read_bytes()[:LONGEST_GUIDELINES + 1].decode("utf-8")
    except OSError as error:
        raise UsageError(f"--guidelines {path}: {error.strerror}")
    except UnicodeDecodeError as error:
        raise UsageError(f"--guidelines {path}: is not UTF-8 (at byte {error.start})")
    if not text.strip():
        raise UsageError(f"--guidelines {path}: is empty; write the guidelines into it, or leave it out")
    if len(text.encode()) > LONGEST_GUIDELINES:
        raise UsageError(f"--guidelines {path}: expected a text of at most {LONGEST_GUIDELINES:,} bytes, in Markdown")
    return text


def serve(path, args, desk, people):
    """Serve the page until Ctrl-C. Raises UsageError if it cannot start."""
    local = serving.is_loopback(f"[{args.host}]" if ":" in args.host else args.host)
    public = args.public_url and serving.public_address(args.public_url)
    tokens = tokens_of(args, path.parent, people, local)
    page = (Path(__file__).parent / "label.html").read_text(encoding="utf-8")
    try:
        desk.hello("")  # imports what shows the texts
        listening = serving.listen(args.host, args.port)
        port = listening.getsockname()[1]
        app = serving.make_app(desk, page, serving.Door(tokens), local, port, public)
    except ImportError as error:
        raise UsageError(f"{error}: pip install -r tools/requirements.txt")
    print("\n".join(links(args, port, public, tokens)), flush=True)
    serving.serve(app, listening)


def exchange(ledger, args, panel):
    """Carry out --import and --export."""
    if args.import_:
        counts = import_answers(ledger, args.import_, args.format, panel=panel)
        print(f"{args.import_}: {', '.join(f'{n:,} {what}' for what, n in counts.items()).replace('_', ' ')}")
    if args.export:
        print(f"{export_questions(ledger, args.export, args.format):,} open questions written to {args.export}")
        if args.format == "label-studio":
            print(f"the labelling interface written to {args.export}.xml: in a Label Studio project, paste it under "
                  f"Settings, Labeling Interface, Code; then import {args.export}")


def parser_of():
    parser = argparse.ArgumentParser(prog="tools/label.py", description="Let people answer a run's open questions.")
    parser.add_argument("output_dir", type=filled, help="the run's folder")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; any but loopback requires a token")
    parser.add_argument("--port", type=int, default=8642, help="default %(default)s; 0: any free port")
    parser.add_argument("--public-url", metavar="URL", help="the address that people see, where a proxy stands in front")
    parser.add_argument("--annotator", metavar="NAME", action="append", default=[],
                        help="print a link of their own for this person; may be repeated. Then nobody else can label")
    parser.add_argument("--token", help="require this token, the same for all; letters, digits, - and _, at least "
                                        f"{serving.SHORTEST_TOKEN} of them")
    parser.add_argument("--annotators-per-pair", metavar="N", type=int, default=1,
                        help="ask each question of this many people; the label is what more than half of them say")
    parser.add_argument("--adjudicator", metavar="NAME",
                        help="who decides where no response has more than half; without one, such a pair has no preference")
    parser.add_argument("--guidelines", metavar="FILE", help="a text in Markdown that the page shows beside the task")
    parser.add_argument("--export", metavar="FILE", type=filled, help="write the open questions for another tool")
    parser.add_argument("--import", metavar="FILE", dest="import_", type=filled,
                        help="read answers that were given elsewhere; --annotators-per-pair and --adjudicator decide when "
                             "the questions of this file are settled")
    parser.add_argument("--format", choices=("jsonl", "label-studio"), default="jsonl", help="format of FILE")
    return parser


def main(argv=None):
    parser = parser_of()
    args = parser.parse_args(argv)
    if args.token is not None and not re.fullmatch(rf"[\w-]{{{serving.SHORTEST_TOKEN},200}}", args.token, re.ASCII):
        parser.error(f"--token must consist of letters, digits, - and _, at least {serving.SHORTEST_TOKEN} of them, so that "
                     "nobody guesses it")
    if args.token is not None and args.annotator:
        parser.error("--token is the same for all and --annotator gives each person their own: say one of them")
    if not 1 <= args.annotators_per_pair <= 100:
        parser.error(f"--annotators-per-pair {args.annotators_per_pair}: expected 1 to 100")
    path = Path(args.output_dir) / "labels.sqlite"
    try:
        if not path.is_file():
            raise LedgerError(f"no ledger: {path} does not exist (a run with --oracle human creates it)")
        with contextlib.closing(Ledger(path, timeout=PATIENCE)) as ledger:
            names = Names()
            people, adjudicator = people_of(ledger, args, names)
            panel = Panel(args.annotators_per_pair, adjudicator)
            if args.import_ or args.export:
                exchange(ledger, args, panel)
                return 0
            if 0 < len(people) < panel.needed:
                raise UsageError(f"--annotators-per-pair {panel.needed}: at least {panel.needed} --annotator names are "
                                 "needed, or no question can be settled")
            if settled := ledger.settle_all(panel):  # the panel may ask for fewer opinions than the page before did
                print(f"{settled:,} open questions had the opinions that --annotators-per-pair {panel.needed} asks for, and "
                      "are settled", file=sys.stderr, flush=True)
        serve(path, args, Desk(path, panel, guidelines_of(args.guidelines), names), people)
    except (UsageError, OSError, sqlite3.Error) as error:  # OSError: a folder that we may not enter
        print(f"tools/label.py: {in_words(path, error) if isinstance(error, sqlite3.Error) else error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # the page has done its work; an import that was stopped has changed nothing
        return 130 if args.import_ or args.export else 0
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show some letters shows ? instead
    sys.exit(main())
