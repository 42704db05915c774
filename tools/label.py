"""A page on which people answer a run's open questions.

    python tools/label.py OUTPUT_DIR [--host 127.0.0.1] [--port 8642] [--token …]   serve it, until Ctrl-C
    python tools/label.py OUTPUT_DIR --export FILE [--format label-studio]          open questions, for another tool
    python tools/label.py OUTPUT_DIR --import FILE [--format label-studio]          answers from there

The page and the run share only OUTPUT_DIR/labels.sqlite. An answer is committed before the page shows the next question,
either program can be killed and restarted, and the page waits while the run asks nothing. Each open question is leased
to one annotator, who goes by a name of their choice. Which response is on the left is drawn at random for each annotator
and question. A choice is sent as the digest of the chosen response, so its meaning does not depend on the side or on
this process.

On loopback, everybody on this machine may label. On any other host a token is required; the printed URL contains it. The
page uses plain HTTP. To label from another machine, leave the page on loopback and run `ssh -L 8642:localhost:8642
MACHINE`, or give --host and put a TLS proxy in front.

Serving needs tools/requirements.txt. Exit code 2: it cannot start, or a file cannot be used; one line says why. The
paper and the official code ask nobody.
"""

import argparse
import base64
import contextlib
import hashlib
import hmac
import ipaddress
import json
import re
import secrets
import signal
import socket
import sqlite3
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from labels.ledger import Ledger, LedgerError  # noqa: E402
from runtime.errors import UsageError  # noqa: E402
from runtime.formats import hh_messages, message_text  # noqa: E402
from tools.exchange import export_questions, import_answers  # noqa: E402

LEASE = 90  # seconds that a lease lasts; the page renews it every 25 s, or every 60 s in the background
LEAVING = 2  # seconds that a lease lasts after its page was closed, so that a reload finds the question again
PATIENCE = 10  # seconds to wait while another process holds the ledger
BODY_LIMIT = 16 * 1024  # bytes of a request
RATE_WINDOW = 3600  # seconds over which labels per hour are counted


class Refused(Exception):
    """A request is refused: (HTTP status, why)."""


# What the page asks of the ledger. Each action is one transaction, so what it checks is still true when it writes.

class Desk:
    """Hands out questions and takes answers. It can afford to lose whatever it keeps outside the ledger.

    path: the ledger.  skipped: {annotator: pairs}.  views: {annotator: {open page: time of its last request}}.
    """

    ACTIONS = ("next", "answer", "skip", "undo", "leave")

    def __init__(self, path):
        self.path, self.skipped, self.views = path, {}, {}
        self.secret = secrets.token_bytes(16)  # seeds the draw of sides

    def __call__(self, action, message):
        """Carry out a page's action. Returns what the page should show next."""
        if action not in self.ACTIONS:
            raise Refused(404, "There is nothing here.")
        me, view, pair = (text_of(message, name) for name in ("annotator", "view", "pair"))
        if not 0 < len(me) <= 40:
            raise Refused(400, "An annotator needs a name of 1 to 40 characters.")
        if not self.path.is_file():  # opening it would create an empty ledger
            raise Refused(503, f"The ledger {self.path} is gone.")
        now = time.monotonic()
        views = {v: seen for v, seen in self.views.get(me, {}).items() if seen > now - LEASE and v != view}
        self.views[me] = views if action == "leave" else {**views, view: now}
        try:
            with contextlib.closing(Ledger(self.path, timeout=PATIENCE)) as ledger, ledger.transaction():
                note = getattr(self, action)(ledger, me, pair, message)
                if action == "leave":
                    return {}
                return {"note": note, "question": self.question(ledger, me), **progress(ledger, me)}
        except (sqlite3.Error, LedgerError) as error:
            raise Refused(503, f"The ledger cannot be used: {error}")

    def next(self, ledger, me, pair, message):
        return ""  # __call__ then leases a question, or renews the lease

    def answer(self, ledger, me, pair, message):
        asked = ledger.db.execute("SELECT first, second, label, annotator FROM questions "
                                  "LEFT JOIN answers USING (pair) WHERE pair = ?", (pair,)).fetchone()
        if asked is None:
            raise Refused(409, "That question was never asked.")
        labels = {digest(asked[0]): 1, digest(asked[1]): -1}
        label, seconds = labels.get(text_of(message, "choice")), message.get("seconds")
        if label is None:
            raise Refused(400, "That is neither of the two responses.")
        if seconds is not None and (type(seconds) not in (int, float) or not 0 <= seconds < 1e9):
            raise Refused(400, "Seconds must be a number.")
        if asked[2:] == (label, me):  # the page sends it again because it never got our reply
            return ""
        if asked[2] is not None:
            raise Refused(409, "That question has been answered in the meantime. Here is another.")
        if not keep(ledger, me, pair, LEASE):
            raise Refused(409, "That question was given back while you were away. Please look again.")
        ledger.answer_question(pair, label, me, seconds=seconds)
        return ""

    def skip(self, ledger, me, pair, message):
        if not keep(ledger, me, pair, LEASE):  # the page sends it again, see answer
            return ""
        ledger.release(me, pair)
        self.skipped.setdefault(me, []).append(pair)
        return "Skipped. It will come back when nothing else is left."

    def undo(self, ledger, me, pair, message):
        found = ledger.db.execute("SELECT annotator, source FROM answers WHERE pair = ?", (pair,)).fetchone()
        if found is None and keep(ledger, me, pair, LEASE):  # the page sends it again, see answer
            return "Undone. Here is the question again."
        if found != (me, "human"):
            raise Refused(409, "You have no answer to undo here.")
        if not ledger.retract(pair, me):
            return "The run has already used that answer, so it cannot be undone."
        ledger.release(me)
        self.skipped[me] = [other for other in self.skipped.get(me, []) if other != pair]
        ledger.db.execute("UPDATE questions SET leased_to = ?, leased_until = ? WHERE pair = ?",
                          (me, time.time() + LEASE, pair))
        return "Undone. Here is the question again."

    def leave(self, ledger, me, pair, message):
        """Give the question back soon, unless its annotator has another page open or has already reloaded this one."""
        if not self.views[me]:
            keep(ledger, me, pair, LEAVING)

    def question(self, ledger, me):
        """The annotator's question as the page shows it, or None if there is none for them."""
        skipped = self.skipped.setdefault(me, [])
        row = ledger.lease(me, LEASE, skipped)
        while row and row[0] in skipped:  # nothing else is left: the pair that was skipped first comes back
            ledger.release(me, row[0])
            skipped.pop(0)
            row = ledger.lease(me, LEASE, skipped)
        if row is None:
            return None
        pair, prompt, *responses = row
        sides = [{"choice": digest(text), "turns": turns(text)} for text in responses]
        if hmac.digest(self.secret, f"{me}\0{pair}".encode(), "sha256")[0] & 1:
            sides.reverse()
        return {"pair": pair, "prompt": turns(prompt), "sides": sides}


def keep(ledger, me, pair, seconds):
    """Make an annotator's lease of an open question last this many seconds from now. Returns False if it is not their
    lease. A lease that has expired is still theirs until somebody else takes the question."""
    return ledger.db.execute(
        "UPDATE questions SET leased_until = ? WHERE pair = ? AND leased_to = ? "
        "AND pair NOT IN (SELECT pair FROM answers)", (time.time() + seconds, pair, me)).rowcount == 1


def progress(ledger, me):
    """The page's figures. `answered` and `asked` count the questions of those steps that still have an open one."""
    def row(query, *values):
        return ledger.db.execute(query, values).fetchone()

    rates, now = [], time.time()
    for who in (me, None):
        count, since = row("SELECT COUNT(*), MIN(answered_at - COALESCE(seconds, 0)) FROM answers "
                           "WHERE source = 'human' AND annotator = COALESCE(?, annotator) AND answered_at > ?",
                           who, now - RATE_WINDOW)
        rates.append(round(count * 3600 / max(now - since, 60)) if count > 2 else None)  # too few to tell
    unanswered = "FROM questions WHERE pair NOT IN (SELECT pair FROM answers)"
    left, asked = (row(query)[0] for query in (
        f"SELECT COUNT(*) {unanswered}", f"SELECT COUNT(*) FROM questions WHERE step IN (SELECT step {unanswered})"))
    mine = "FROM answers WHERE source = 'human' AND annotator = ?"
    last = row(f"SELECT pair {mine} ORDER BY answered_at DESC LIMIT 1", me)
    return {"left": left, "answered": asked - left, "asked": asked, "rates": rates, "last": last and last[0],
            "mine": row(f"SELECT COUNT(*) {mine}", me)[0]}


def text_of(message, name):
    value = message.get(name, "")
    if not isinstance(value, str) or len(value) > 200 or not value.isprintable():
        raise Refused(400, f"{name} must be a short text.")
    return value.strip()


def digest(text):
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def turns(text):
    """A prompt or a response, from JSON, as [{"role", "content"}]; the role of a plain string is ""."""
    value = json.loads(text)
    if isinstance(value, str) and value.lstrip().startswith("Human:"):
        value = hh_messages(value) or value
    if isinstance(value, str):
        return [{"role": "", "content": value}]
    return [{"role": message["role"], "content": message_text(message)} for message in value]


# Which requests are allowed, and the headers of every reply.

def is_loopback(address):
    """Whether a host, or host:port, is a loopback address. IPv6 needs its brackets."""
    try:
        name = urlsplit(f"//{address}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def refusal(request, token, cookie, local):
    """(status, why) if a request must not be served, otherwise None."""
    headers, host = request.headers, request.headers.get("host", "")
    if local and not is_loopback(host):  # DNS rebinding: another site's name that points at us
        return 403, "This page is only served as localhost."
    given = request.query_params.get("token") or request.cookies.get(cookie) or ""
    if token is not None and not hmac.compare_digest(given.encode(), token.encode()):
        return 401, "This page needs its token: open the URL that tools/label.py printed."
    if request.method == "POST":
        if headers.get("sec-fetch-site", "same-origin") != "same-origin" or (
                headers.get("origin", f"//{host}").partition("//")[2] != host):
            return 403, "This request comes from another site."
        if headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            return 403, "Requests must be JSON."
    return None


def policy(page):
    """The security headers. Only the page's own script and style may run, identified by hash; nothing inside a text can."""
    hashes = {tag: base64.b64encode(hashlib.sha256(re.search(f"<{tag}>(.*?)</{tag}>", page, re.S)[1].encode()).digest())
              for tag in ("script", "style")}
    allowed = "; ".join(f"{tag}-src 'sha256-{value.decode()}'" for tag, value in hashes.items())
    return {"Content-Security-Policy": f"default-src 'none'; {allowed}; connect-src 'self'; img-src data:; "
                                       "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
                                       "require-trusted-types-for 'script'",
            "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store",
            "Cross-Origin-Resource-Policy": "same-origin"}


def make_app(path, token, local, port):
    """The web application. path: the ledger.  token: required if not None.  local: whether it listens on loopback."""
    from fastapi import FastAPI, Request
    from fastapi.responses import HTMLResponse, PlainTextResponse, Response
    from starlette.concurrency import run_in_threadpool

    page = (Path(__file__).parent / "label.html").read_text(encoding="utf-8")
    headers, cookie, desk = policy(page), f"label-{port}", Desk(path)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)

    @app.middleware("http")
    async def guard(request: Request, call_next):
        refused = refusal(request, token, cookie, local)
        response = PlainTextResponse(refused[1], refused[0]) if refused else await call_next(request)
        response.headers.update(headers)
        return response

    @app.get("/")
    def show(request: Request):
        response = HTMLResponse(page)
        if token is not None:  # the page then removes it from its address
            response.set_cookie(cookie, token, max_age=30 * 86400, httponly=True, samesite="strict",
                                secure=request.url.scheme == "https")
        return response

    @app.post("/ask/{action}")
    async def act(action: str, request: Request):
        try:
            body = b""
            async for chunk in request.stream():
                body += chunk
                if len(body) > BODY_LIMIT:
                    raise Refused(413, "That request is too long.")
            try:
                message = json.loads(body)
            except (ValueError, RecursionError):
                message = None
            if not isinstance(message, dict):
                raise Refused(400, "That is not a JSON object.")
            reply, status = await run_in_threadpool(desk, action, message), 200
        except Refused as refused:
            status, why = refused.args
            reply = {"error": why}
        return Response(json.dumps(reply), status, media_type="application/json")

    return app


def serve(path, host, port, token):
    """Serve the page until Ctrl-C. Raises UsageError if it cannot start."""
    try:
        import uvicorn
        shown = f"[{host}]" if ":" in host else host
        local = is_loopback(shown)
        token = token or (None if local else secrets.token_urlsafe(16))
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        port = listening.getsockname()[1]
        app = make_app(path, token, local, port)
    except ImportError as error:
        raise UsageError(f"{error}: pip install -r tools/requirements.txt")
    except (OSError, OverflowError) as error:
        raise UsageError(f"cannot listen on {host}, port {port}: {getattr(error, 'strerror', None) or error}")
    shown = socket.gethostname() if host in ("", "0.0.0.0", "::") else shown
    print(f"label at http://{shown}:{port}/{f'?token={token}' if token else ''} (Ctrl-C stops)", flush=True)
    config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, lifespan="off", ws="none",
                            timeout_graceful_shutdown=5)
    uvicorn.Server(config).run(sockets=[listening])


def main(argv=None):
    parser = argparse.ArgumentParser(prog="tools/label.py", description="Let people answer a run's open questions.")
    parser.add_argument("output_dir", help="the run's folder")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; any but loopback requires a token")
    parser.add_argument("--port", type=int, default=8642, help="default %(default)s; 0: any free port")
    parser.add_argument("--token", help="require this token; letters, digits, - and _")
    parser.add_argument("--export", metavar="FILE", help="write the open questions for another tool")
    parser.add_argument("--import", metavar="FILE", dest="import_", help="read answers that were given elsewhere")
    parser.add_argument("--format", choices=("jsonl", "label-studio"), default="jsonl", help="format of FILE")
    args = parser.parse_args(argv)
    if args.token is not None and not re.fullmatch(r"[\w-]+", args.token, re.ASCII):
        parser.error("--token must consist of letters, digits, - and _")
    path = Path(args.output_dir) / "labels.sqlite"
    try:
        if not path.is_file():
            raise LedgerError(f"no ledger: {path} does not exist (a run with --oracle human creates it)")
        with contextlib.closing(Ledger(path, timeout=PATIENCE)) as ledger:
            if args.import_:
                counts = import_answers(ledger, args.import_, args.format)
                print(f"{args.import_}: {', '.join(f'{n:,} {what}' for what, n in counts.items()).replace('_', ' ')}")
            if args.export:
                print(f"{export_questions(ledger, args.export, args.format):,} open questions written to {args.export}")
        if not args.import_ and not args.export:
            serve(path, args.host, args.port, args.token)
    except (UsageError, sqlite3.Error) as error:
        print(f"tools/label.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    sys.exit(main())
