"""An OpenAI-compatible chat endpoint: a request with its retries, and many requests at once.

    Endpoint(url, model, …).ask(text, stop, draw)     a Reply, or Refused, TextRefused, GaveUp
    for request, reply in Exchange(send, 8): …        from eight threads, as the replies arrive

What a failure means decides who pays for it:

    Refused        wrong url, key or model: nothing will get through, so the caller should stop
    TextRefused    the endpoint works, but not for this text (content filter, context length, always an error)
    GaveUp         it failed as often as it may; later it could work

An HTTP 400, 403, 413 or 422 can mean either of the first two, and what fails however often it is sent, either of the last
two: a short question of our own tells them apart. A timeout or an HTTP status of BUSY is never held against the text: an
endpoint that is slow or busy may well answer a short question. A field of ours that a server does not know (newer models
want max_completion_tokens, and no temperature) is renamed or left out from then on.
"""

import email.utils
import http.client
import json
import re
import ssl
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from queue import SimpleQueue
from urllib.parse import urlsplit, urlunsplit

from runtime.errors import one_line


class Refused(Exception):
    """The endpoint will never answer: wrong key, model or address."""


class TextRefused(Exception):
    """The endpoint works, but refuses this text."""


class GaveUp(Exception):
    """A request failed as often as it may. started: when it was first sent, in seconds of time.monotonic."""

    def __init__(self, message, started):
        super().__init__(message)
        self.started = started


class Retry(Exception):
    """A request failed and may be sent again. wait: seconds that the server asks us to wait, or None.  busy: the endpoint
    has too much to do, or is too slow, which says nothing about the text."""

    def __init__(self, message, wait=None, busy=False):
        super().__init__(message)
        self.wait, self.busy = wait, busy or wait is not None


class Rejected(Exception):
    """The server does not take a request. about: what it says is wrong with it."""

    def __init__(self, message, about):
        super().__init__(message)
        self.about = about


@dataclass
class Reply:
    """What the server replied.

    text: without the reasoning before it.  finish: its finish_reason.  tokens: (prompt, completion); None where the server
    does not say.  seconds: how long it took.  thought: the text may be reasoning that never came to its end.  content: as
    the server sent it, if it is a text.
    """
    text: str
    finish: str | None
    tokens: tuple
    seconds: float
    thought: bool = False
    content: str = ""


class Exchange:
    """Sends requests from several threads.

    Iterate to get (request, Reply, Refused, TextRefused or GaveUp) as they arrive, until none is in flight. More requests
    may be put in the meantime. Once `stop` is set, no request is sent any more, but what was sent before is paid for, and
    still arrives; leaving the `with` block abandons it. send: function called with a request and `stop`.

    At most `concurrency` replies are ever paid for but not yet processed: a thread sends its next request only once the
    consumer has asked for the next reply. So a kill cannot lose more than that, however slow the ledger's disk is.
    The threads are daemons: those of a thread pool would keep the process alive after Ctrl-C until the slowest request ends.
    """

    def __init__(self, send, concurrency):
        self.send, self.concurrency, self.threads, self.in_flight = send, concurrency, 0, 0
        self.requests, self.replies, self.stop = SimpleQueue(), SimpleQueue(), threading.Event()
        self.unprocessed = threading.Semaphore(concurrency)

    def put(self, request):
        self.requests.put(request)
        self.in_flight += 1
        if self.threads < min(self.concurrency, self.in_flight):
            threading.Thread(target=self._work, daemon=True).start()
            self.threads += 1

    def _work(self):
        while request := self.requests.get():
            if not self.stop.is_set():
                self.unprocessed.acquire()
            try:
                self.replies.put((request, None if self.stop.is_set() else self.send(request, self.stop)))
            except BaseException as error:  # __iter__ raises it in the main thread, unless it is one of the three
                self.replies.put((request, error))

    def __iter__(self):
        while self.in_flight:
            request, reply = self.replies.get()
            self.in_flight -= 1
            if isinstance(reply, BaseException) and not isinstance(reply, (Refused, TextRefused, GaveUp)):
                raise reply
            if reply is not None:  # None: it was not sent
                yield request, reply
            self.unprocessed.release()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop.set()
        for _ in range(self.threads):
            self.requests.put(None)
            self.unprocessed.release()


class Endpoint:
    """Asks POST {url}/chat/completions, or the url itself if it already ends that way. Threads may share one.

    api_key: sent as a bearer token, if given.  timeout: seconds per request.  retries: how often a failed request is sent
    again.  max_tokens: of a reply.  extra: more fields of each request; they win over ours, and null takes a field out.
    news: what it has learned about the server since somebody last looked, in words.
    Raises ValueError, in one line, if an argument cannot work.
    """

    backoff_seconds, longest_wait = 2.0, 120.0  # retry after about 2, 4, 8 … s; give up on a server that asks for longer
    largest_reply = 4_000_000  # bytes
    # The length limit under its old and its new name; None: no limit.
    length_fields = {"max_tokens": "max_completion_tokens", "max_completion_tokens": None}

    def __init__(self, url, model, api_key=None, timeout=60.0, retries=5, max_tokens=512, extra=None):
        parts = self.parts_of(url)
        path = parts.path.rstrip("/")
        path += "" if path.endswith("/chat/completions") else "/chat/completions"
        self.url = urlunsplit(parts._replace(path=path, fragment=""))
        self.where = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{path}"  # for messages, without secrets
        self.key = (api_key or "").strip()
        if not (self.key.isascii() and self.key.isprintable()):
            raise ValueError("judge API key: it contains characters that no key has; set the environment variable again")
        self.model, self.timeout, self.retries = model, timeout, retries
        self.max_tokens, self.extra = max_tokens, extra or {}
        self.opener = urllib.request.build_opener(NoRedirect)
        self.length_field, self.has_temperature, self.news = "max_tokens", True, []
        self.lock = threading.Lock()

    @staticmethod
    def parts_of(url):
        """The parts of a url to which a request can be sent. Raises ValueError."""
        try:
            parts = urlsplit(url)
            host, _ = (parts.hostname or "").encode("idna").decode(), parts.port
            good = parts.scheme in ("http", "https") and host and re.fullmatch("[!-~]+", host + parts.path + parts.query)
        except ValueError:
            good = False
        if not good:
            raise ValueError(f"judge url {url!r}: give one that begins with http:// or https:// and a host, such as "
                             "http://HOST:8000/v1, without spaces or accents")
        if "@" in parts.netloc:  # urllib would take it for a part of the host's name
            raise ValueError(f"judge url of {parts.hostname}: leave out the user's name and password; a key goes into an "
                             "environment variable")
        return parts

    def ask(self, text, stop, draw, temperature=0, lost=None):
        """Send a text and return the Reply. A request that fails is sent again, with exponential back-off and jitter.

        stop: an Event after which nothing is sent again.  draw: a random.Random for the jitter.  lost: a list, which gets
        (why, tokens, seconds) of each request that may have been paid for, but brought no Reply to this text. Raises
        Refused, TextRefused or GaveUp.
        """
        started, lost = time.monotonic(), [] if lost is None else lost
        for attempt in range(self.retries + 1):
            try:
                return self.post(text, temperature, lost)
            except Retry as failed:
                if failed.wait is None:
                    wait = min(self.backoff_seconds * 2 ** attempt * draw.uniform(0.5, 1.5), self.longest_wait)
                else:  # with jitter here too, so that the threads do not all come back at once
                    wait = failed.wait + self.backoff_seconds * draw.random()
                    if failed.wait > self.longest_wait:
                        raise GaveUp(f"{failed}, and asks to wait {failed.wait:.0f} s", started)
                if attempt == self.retries and not failed.busy and not stop.is_set():
                    return self.last_try(text, temperature, lost, failed, started)
                if attempt == self.retries or stop.wait(wait):
                    raise GaveUp(f"{failed} ({attempt + 1} attempts)", started)

    def last_try(self, text, temperature, lost, failed, started):
        """After all retries: does the endpoint fail, or the text? If a short question gets an answer, try the text again."""
        try:
            self.check_works(lost)
        except Retry:
            raise GaveUp(f"{failed} ({self.retries + 1} attempts)", started)
        try:
            return self.post(text, temperature, lost)
        except Retry as again:
            if again.busy:
                raise GaveUp(f"{again} ({self.retries + 2} attempts)", started)
            raise TextRefused(f"{again} ({self.retries + 2} attempts, while another question got an answer)")

    def post(self, text, temperature, lost):
        """Send a text once, or again while the server objects to a field of ours. Raises Retry, Refused or TextRefused."""
        while True:
            body = self.body(text, temperature)
            try:
                return self.send(body, lost)
            except Rejected as error:
                if not self.adapt(error, body):
                    self.check_works(lost)
                    raise TextRefused(str(error))

    def body(self, text, temperature):
        """The fields of a request."""
        body = {"model": self.model, "messages": [{"role": "user", "content": text}]}
        if self.has_temperature:
            body["temperature"] = temperature
        if self.length_field:
            body[self.length_field] = self.max_tokens
        return {name: value for name, value in (body | self.extra).items() if value is not None}

    def adapt(self, error, body):
        """Leave out the temperature, or rename the length limit, if that is what the server objects to; whatever the user
        has set stays. Returns whether the next request will differ from `body`."""
        with self.lock:
            if "temperature" in body and "temperature" not in self.extra and objects_to(error.about, "temperature"):
                if self.has_temperature:
                    self.has_temperature = False
                    self.news.append("it takes no temperature, so none is sent any more")
                return True
            for name, instead in self.length_fields.items():
                if name in body and name not in self.extra and objects_to(error.about, name):
                    if self.length_field == name:
                        self.length_field = instead
                        self.news.append(f"it takes no {name}, so " + (f"{instead} is sent instead" if instead else
                                                                       "the length of its replies is not limited"))
                    return True
        return False

    def check_works(self, lost):
        """After a rejection: raise Refused if a question that nobody can object to is rejected too. It is asked each time: a
        key can be revoked, or a model unloaded, in the middle of a run."""
        try:
            reply = self.send(self.body("Reply with the word yes.", 0), lost)
            lost.append(("another question, to see whether the endpoint works", reply.tokens, reply.seconds))
        except Rejected as error:
            raise Refused(str(error))

    def send(self, body, lost):
        """Send one HTTP request and return its Reply. Raises Retry, Refused or Rejected."""
        headers = {"Content-Type": "application/json", "User-Agent": "active-dpo"}  # some servers reject Python's default
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        started = time.monotonic()
        try:
            http_request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
            with self.opener.open(http_request, timeout=self.timeout) as response:
                content = b""
                while piece := response.read1(65536):
                    content += piece
                    if len(content) > self.largest_reply:
                        raise http.client.HTTPException(f"the reply is longer than {self.largest_reply:,} bytes")
                    # The timeout above only covers silence, and some servers send spaces while they think.
                    if time.monotonic() > started + self.timeout:
                        raise TimeoutError(f"no whole reply, only {len(content):,} bytes")
                if response.length:  # read1 ends where the connection does
                    raise http.client.IncompleteRead(content, response.length)
        except urllib.error.HTTPError as error:
            raise self.failure(error, started)
        except (OSError, http.client.HTTPException) as error:  # refused, closed, timed out, unknown host, cut short
            cause = getattr(error, "reason", "") or error
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise Refused(f"{one_line(cause, 300)}: if you trust it, put its certificate, or that of its authority, "
                              "into a file that the environment variable SSL_CERT_FILE names")
            if getattr(cause, "reason", None) in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):  # by version of OpenSSL
                raise Refused(f"{one_line(cause, 300)}: nothing there speaks TLS, so begin the url with http://")
            words, late = one_line(cause, 300) or type(cause).__name__, isinstance(cause, TimeoutError)
            if not isinstance(error, urllib.error.URLError):  # it was sent
                lost.append((words, (None, None), time.monotonic() - started))
            raise Retry(f"{words} (the timeout is {self.timeout:g} s)" if late else words, busy=late)
        return read_reply(content, time.monotonic() - started, lost)

    def failure(self, error, started):
        """The Retry, Refused or Rejected for an HTTP error, with the server's own message but never the key."""
        said = b""
        try:
            with error:  # the whole of it, however it is cut into packets: a half of some JSON cannot be read
                while (piece := error.read1(65536)) and len(said) <= self.largest_reply:
                    said += piece
                    if time.monotonic() > started + self.timeout:
                        break
        except (OSError, http.client.HTTPException):
            pass  # what has come may say enough
        said, about = complaint(said.decode(errors="replace"))
        if self.key:
            said = said.replace(self.key, "(key)")
        message = f"HTTP {error.code} {one_line(said or error.reason, 300)}"
        if 300 <= error.code < 400:
            return Refused(f"{message}: the endpoint has moved to {error.headers.get('Location')}; use that as the url")
        if error.code in (408, 429) or error.code >= 500:
            return Retry(message, retry_after(error.headers.get("Retry-After")), busy=error.code in BUSY)
        return Rejected(message, about) if error.code in (400, 403, 413, 422) else Refused(message)


# HTTP errors that are about the endpoint: too much to do, or too slow. LiteLLM sends 408 for a timeout, Cloudflare 524.
BUSY = (408, 429, 503, 504, 522, 524, 529)


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects: urllib would turn the POST into a GET and send the key to wherever the redirect leads."""

    def redirect_request(self, *args):
        return None


def complaint(body):
    """(the message of an error, all that it says about the request), from the body of an HTTP error."""
    try:
        parsed = json.loads(body)
        inner, details = parsed.get("error", parsed), parsed.get("detail")
        if isinstance(details, list):  # FastAPI's; each also repeats the part of the request, which may say anything
            return body, " ".join(f"{detail['loc']} {detail['msg']}" for detail in details)
        if isinstance(inner, dict):
            message = str(inner.get("message") or body)
            return message, f"{message} {inner.get('param')} {inner.get('code')}"
        return str(inner), str(inner)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return body, body


def objects_to(about, field):
    """Whether an error says that a field is not taken, rather than that its value does not fit (max_tokens is too large)."""
    return re.search(rf"(?<!\w){field}(?!\w)", about) is not None and re.search(
        r"unsupported|(not|n't) support|unrecogni[sz]ed|unknown|unexpected|deprecated|(not|n't) (permitted|allowed)", about,
        re.IGNORECASE) is not None


def retry_after(value):
    """Seconds that a Retry-After header asks for, as a number or a date; None if it says neither."""
    value = (value or "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d*)?", value, re.ASCII):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None


# The finish_reason of a reply that ends before its end: at its maximum length, or broken off by a filter or the server.
CUT = ("length", "content_filter", "abort", "error")


def read_reply(content, seconds, lost):
    """Parse a response body into a Reply. Raises Retry if it is not one, such as an error sent with HTTP 200."""
    body = None
    try:
        body = json.loads(content)
        choice = body["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        text, thought = spoken(message, cut=finish in CUT)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        words = f"the reply is not a chat completion: {one_line(content[:300].decode(errors='replace'), 120)!r}"
        if any(tokens_of(body)):
            lost.append((words, tokens_of(body), seconds))
        raise Retry(words, busy=status_of(body) in BUSY)
    content = message.get("content")
    finish = finish if isinstance(finish, str) else None
    return Reply(text, finish, tokens_of(body), seconds, thought, content if isinstance(content, str) else "")


def tokens_of(body):
    """(prompt, completion) tokens that a response body says were used, each None if it does not."""
    usage = body.get("usage") if isinstance(body, dict) else None
    counts = [usage.get(key) if isinstance(usage, dict) else None for key in ("prompt_tokens", "completion_tokens")]
    return tuple(count if type(count) is int and 0 <= count < 2**53 else None for count in counts)


def status_of(body):
    """The HTTP status that an error within an HTTP 200 names, as routers in front of several servers send it, or None."""
    try:
        return int(body["error"]["code"])
    except (LookupError, TypeError, ValueError, OverflowError):
        return None


TAG = re.compile(r"<(/?)(?:think|thinking|thought|reasoning)>", re.IGNORECASE)


def spoken(message, cut):
    """(what a message says, whether that may be unfinished reasoning). Reasoning comes in a field of its own, or in tags at
    the beginning of the content.  cut: the reply ends before its end."""
    content = message.get("content")
    if isinstance(content, list):  # a list of parts; some may be reasoning
        content = "".join(part.get("text") or "" for part in content if part.get("type") == "text")
    content = content if isinstance(content, str) else ""  # null for a refusal, a tool call, or reasoning alone
    if not content.strip():
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        if isinstance(reasoning, str):
            return reasoning, True
        return str(message.get("refusal") or ""), False
    tags = list(TAG.finditer(content))
    if not tags:
        return content, False
    # A reply that was cut off may have quoted the closing tag.
    return content[tags[-1].end():], cut or not tags[-1][1]
