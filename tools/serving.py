"""The labelling page over HTTP: who may come in, what a request may cost, and the headers of every reply.

    serve(make_app(desk, page, Door(tokens), local, port), listen(host, port))     until Ctrl-C; tools/label.py calls it

On loopback, whoever is on this machine may label, unless there are tokens. On any other host, and behind a public address,
nobody comes in without a token. A token is a secret in a link; the page moves it into a cookie. A personal token says who
somebody is, so nobody can label under another's name. Two people who share a browser take turns: a page whose cookie has
become another person's is refused.

The page is plain HTTP. To label from another machine, leave it on loopback and run `ssh -L 8642:localhost:8642 MACHINE`, or
put a proxy with TLS in front of it and name its address with --public-url.
"""

import asyncio
import base64
import collections
import contextlib
import hashlib
import hmac
import ipaddress
import json
import os
import re
import resource
import secrets
import socket
import time
from urllib.parse import urlsplit

from runtime.errors import UsageError
from tools.exchange import fold

BODY_LIMIT = 16 * 1024  # bytes of a request
BODY_SECONDS = 10  # for the body of a request to arrive
REQUEST_SECONDS = 10  # for a request to arrive on a connection, from its beginning or from the reply before
# Connections at once, at most a third of the files that the process may open. One more, and the connection that has waited
# longest without a request is closed.
CONNECTIONS = 300
GUESSES, GUESS_SECONDS = 10, 60  # wrong tokens from one address in so many seconds, before it has to wait as long
SHORTEST_TOKEN = 16  # characters of a token that somebody chooses; ours have 22


class Refused(Exception):
    """A request is refused: (HTTP status, why)."""


# Who may come in.

def key_of(folder):
    """The secret from which a folder's tokens are made, created on first use: the links stay valid after a restart. Whoever
    deletes the file makes all of them invalid. Raises UsageError."""
    path = folder / "label.key"
    try:
        with contextlib.suppress(FileExistsError):
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_hex(32))
        key = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be used as the secret of the links ({error}): make it readable, or delete it")
    if not re.fullmatch("[0-9a-f]{64}", key):
        raise UsageError(f"{path}: is damaged: delete it, and the page makes new links")
    return bytes.fromhex(key)


def token_for(key, who):
    """The token of a link: of one person, or of everybody (None)."""
    made = hmac.digest(key, f"person {who}".encode() if who is not None else b"everybody", "sha256")[:16]
    return base64.urlsafe_b64encode(made).decode().rstrip("=")


class Door:
    """Who may come in: {token: the person that it belongs to, or None where they say it themselves}. No tokens: everybody.

    An address that has sent too many wrong tokens has to wait, but whoever came in from there before does not: a guess costs
    the people behind the same proxy nothing.
    """

    def __init__(self, tokens):
        self.people = {self.fingerprint(token): who for token, who in tokens.items()}
        self.wrong = collections.defaultdict(collections.deque)  # {address: times of its wrong tokens}
        self.inside = set()  # (address, fingerprint) of those who have come in

    @staticmethod
    def fingerprint(token):
        return hashlib.sha256(token.encode()).digest()  # so that the time of a look-up says nothing about a token

    def enter(self, given, address):
        """The person that a token belongs to, or None. Raises Refused."""
        if not self.people:
            return None
        mark, now = self.fingerprint(given), time.monotonic()
        wrong = self.wrong[address]
        while wrong and wrong[0] < now - GUESS_SECONDS:
            wrong.popleft()
        if len(wrong) >= GUESSES and (address, mark) not in self.inside:
            raise Refused(429, "Too many wrong tokens came from your address. Wait a minute and try again.")
        if mark not in self.people:
            if given:
                wrong.append(now)
            if len(self.wrong) > 10_000:  # from ever new addresses
                self.wrong.clear()
            raise Refused(401, "This page needs its token: open the link that tools/label.py printed.")
        if not wrong:
            del self.wrong[address]
        self.inside.add((address, mark))
        return self.people[mark]


def is_loopback(address):
    """Whether a host, or host:port, is a loopback address. IPv6 needs its brackets."""
    try:
        name = urlsplit(f"//{address}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def public_address(url):
    """(origin, host, path) of a --public-url. Raises UsageError."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and not (parts.query or parts.fragment or parts.username)
        parts.port  # noqa: B018  raises ValueError
    except ValueError:
        good = False
    if not good:
        raise UsageError(f"--public-url {url}: expected an address such as https://label.example.org")
    return f"{parts.scheme}://{parts.netloc.lower()}", parts.netloc.lower(), parts.path.rstrip("/")


def check_request(request, local, public):
    """Raise Refused for a request that comes from another site. public: (origin, host, path) or None."""
    headers, host = request.headers, request.headers.get("host", "").lower()
    if local and not is_loopback(host) and not (public and host == public[1]):
        raise Refused(403, "This page is only served as localhost.")  # DNS rebinding: another site's name that points at us
    if request.method == "POST":
        origin = headers.get("origin", f"//{host}").lower()
        from_here = origin.partition("//")[2] == host or public and origin == public[0]
        if headers.get("sec-fetch-site", "same-origin") != "same-origin" or not from_here:
            raise Refused(403, "This request comes from another site.")
        if headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise Refused(403, "Requests must be JSON.")


def policy(page):
    """The security headers. Only the page's own script and style may run, identified by hash; nothing inside a text can."""
    hashes = {tag: base64.b64encode(hashlib.sha256(re.search(f"<{tag}>(.*?)</{tag}>", page, re.S)[1].encode()).digest())
              for tag in ("script", "style")}
    allowed = "; ".join(f"{tag}-src 'sha256-{value.decode()}'" for tag, value in hashes.items())
    return {"Content-Security-Policy": f"default-src 'none'; {allowed}; connect-src 'self'; img-src data:; "
                                       "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
                                       "require-trusted-types-for 'script'; trusted-types rendered",
            "X-Frame-Options": "DENY", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store", "Cross-Origin-Resource-Policy": "same-origin"}


# The application.

def make_app(desk, page, door, local, port, public=None):
    """The web application. desk: carries out actions.  local: whether it listens on loopback."""
    from fastapi import FastAPI, Request
    from fastapi.responses import HTMLResponse, PlainTextResponse, Response
    from starlette.concurrency import run_in_threadpool

    headers, cookie = policy(page), f"label-{port}"
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)

    @app.middleware("http")
    async def guard(request: Request, call_next):
        try:
            check_request(request, local, public)
            token = request.query_params.get("token") or request.cookies.get(cookie) or ""
            request.state.token, request.state.person = token, door.enter(token, request.client and request.client.host)
            response = await call_next(request)
        except Refused as refused:
            status, why = refused.args
            response = PlainTextResponse(why, status)
        response.headers.update(headers)
        return response

    @app.get("/")
    def show(request: Request):
        response = HTMLResponse(page)
        if door.people:  # the page then removes it from its address
            response.set_cookie(cookie, request.state.token, max_age=30 * 86400, httponly=True, samesite="strict",
                                secure=bool(public) and public[0].startswith("https:"))
        return response

    @app.post("/ask/{action}")
    async def act(action: str, request: Request):
        try:
            message = await json_of(request)
            if request.state.person is not None:
                message["annotator"] = checked_name(action, message.get("annotator"), request.state.person)
            reply, status = await run_in_threadpool(desk, action, message), 200
        except Refused as refused:
            status, why = refused.args
            reply = {"error": why}
        return Response(json.dumps(reply), status, media_type="application/json")

    return app


def checked_name(action, name, person):
    """The person that a link belongs to. Raises Refused where the page that asks is somebody else's: all pages of a browser
    share a cookie, so it names whoever opened their link last. A page learns its name from hello."""
    if action != "hello" and name and fold(str(name)) != fold(person):
        raise Refused(409, "Another person's link has been opened in this browser. Open your own link again.")
    return person


async def json_of(request):
    """The JSON object that a request holds. Raises Refused."""
    from starlette.requests import ClientDisconnect

    async def read():
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > BODY_LIMIT:
                raise Refused(413, "That request is too long.")
        return body
    try:
        message = json.loads(await asyncio.wait_for(read(), BODY_SECONDS))
    except (asyncio.TimeoutError, TimeoutError, ClientDisconnect):
        raise Refused(408, "That request did not arrive.")
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict):
        raise Refused(400, "That is not a JSON object.")
    return message


# Connections.

def patient_protocol(most):
    """uvicorn's HTTP protocol with two limits that it lacks: a request has to arrive in time, and there are at most so many
    connections, with room for the next one. Without them, some hundred half-sent requests make the page unreachable."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class PatientProtocol(H11Protocol):
        waiting = {}  # connections without a request, in the order in which they began to wait

        def connection_made(self, transport):
            super().connection_made(transport)
            self.wait()
            if len(self.connections) > most and self.waiting:
                next(iter(self.waiting)).hang_up()

        def wait(self):
            self.stop_waiting()
            self.waiting[self] = self.loop.call_later(REQUEST_SECONDS, self.hang_up)

        def stop_waiting(self):
            timer = self.waiting.pop(self, None)
            if timer:
                timer.cancel()

        def hang_up(self):
            self.stop_waiting()
            self.transport.abort()

        def data_received(self, data):
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:  # the request is here; json_of limits its body
                self.stop_waiting()

        def on_response_complete(self):
            super().on_response_complete()
            if self.cycle.response_complete and not self.transport.is_closing():  # no other request was there already
                self.wait()

        def connection_lost(self, error):
            self.stop_waiting()
            super().connection_lost(error)

    return PatientProtocol


def listen(host, port):
    """A listening socket. Raises UsageError."""
    try:
        made = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise UsageError(f"cannot listen on {host}, port {port}: {getattr(error, 'strerror', None) or error}: choose "
                         "another --host or --port")
    # asyncio sets TCP_NODELAY on sockets whose protocol says TCP. create_server leaves it at 0; a socket that is made from a
    # descriptor asks the system for it.
    return socket.socket(fileno=made.detach())


def serve(app, listening):
    """Serve the application until Ctrl-C."""
    import uvicorn
    most = min(CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 3)
    config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, lifespan="off", ws="none",
                            http=patient_protocol(most), proxy_headers=False, timeout_graceful_shutdown=5,
                            backlog=most // 4)  # asyncio accepts as many in one go, before any of them can be closed
    uvicorn.Server(config).run(sockets=[listening])
