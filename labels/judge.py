"""A chat model that answers queries, behind an OpenAI-compatible endpoint; and Judge, the base class of all judges.

    ChatJudge(texts, url, model).answer(questions, ledger)     asks about both orders of the responses, many at once

    deepspeed train.py --config … --oracle judge --judge_url http://HOST/v1 --judge_model NAME

The endpoint itself is in labels/endpoint.py, what the judge is asked in labels/rubrics/, and the other judge, a reward model
on this machine, in labels/reward_model.py. Each verdict goes into the ledger with the reply and its cost, and each answer as
soon as its pair is settled. A run that is killed pays again only for the requests that were in flight. A pair gets

    the judge's label          if it prefers the same response in both orders
    what judge_disagreement    if the orders disagree, or neither response is preferred: no preference (tie), a random label
        says                   (coin; its annotator is "MODEL (coin)"), or a second round, then a tie (again)
    what judge_unanswerable    if the endpoint refuses the pair's texts, or three replies had no usable verdict: no
        says                   preference (skip), a person's answer (human), or the run stops (stop)

and the ledger keeps with the answer which of these it was. An endpoint that is down, or that talks nonsense about
everything, stops the run, and the same command resumes it: answer() raises Waiting.

Asking in both orders, against position bias, and calling a disagreement a tie are from Zheng et al. 2023 (arXiv 2306.05685).
"""

import abc
import hashlib
import json
import math
import os
import random
import re
import shlex
import time
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from labels.annotators import Annotator, HumanAnnotator, Waiting
from labels.endpoint import CUT, Endpoint, Exchange, GaveUp, Refused, TextRefused
from labels.ledger import LedgerError, Question
from runtime.errors import UsageError, one_line
from runtime.formats import message_text
from runtime.ranks import say


def coin(pair, seed):
    """1 or −1, from a hash, so that a resumed or repeated run draws the same."""
    return 1 if hashlib.blake2b(f"coin {seed} {pair}".encode(), digest_size=1).digest()[0] & 1 else -1


def digest(*parts):
    """A short hash of some JSON."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=4).hexdigest()


def plain(part):
    """A prompt or response as text, from its JSON: a string, or messages."""
    part = json.loads(part)
    return part if isinstance(part, str) else "\n\n".join(f"{m['role']}: {message_text(m)}" for m in part)


class Judge(Annotator):
    """What all judges share.

    texts: function from a pair id to (prompt, y1, y2), each JSON of a string or of messages.  model: its name in the
    ledger.  seed: of the coin.  disagreement, unanswerable: as the keys judge_…  wait_minutes: how long to wait for people.
    version: a hash of what else decides its answers, which comes from `source`, named by the key `source_key`.
    """

    name = "judge"
    patience = 20  # stop asking the judge after this many useless replies in a row

    def __init__(self, texts, model, seed=0, disagreement="tie", unanswerable="skip", wait_minutes=60.0):
        self.texts, self.model, self.seed = texts, model, seed
        self.disagreement, self.unanswerable = disagreement, unanswerable
        self.people = HumanAnnotator(texts, wait_minutes)
        self.settings = None  # what a refusal depends on; where it has changed, a refused pair is asked again

    @classmethod
    def from_config(cls, config, pairs, labels, truths):
        shared = {"seed": config.seed, "disagreement": config.judge_disagreement, "unanswerable": config.judge_unanswerable,
                  "wait_minutes": config.oracle_wait_minutes}
        try:
            return cls.configured(config, pairs.text_by_id(), **shared)
        except (OSError, ValueError) as error:
            raise UsageError(f"oracle judge: {one_line(error)}")

    @classmethod
    @abc.abstractmethod
    def configured(cls, config, texts, **shared):
        """Make the judge that the config describes. shared: arguments of Judge. Raises OSError or ValueError if it fails."""

    def unanswered(self, questions, ledger):
        """{pair: Question} for the questions without an answer in the ledger."""
        by_pair = {q.pair: q for q in questions}
        return {pair: by_pair[pair] for pair in ledger.unanswered(list(by_pair))}

    def past_verdicts(self, pair, ledger):
        """[detail] of this model's verdicts on a pair, oldest first."""
        return [json.loads(detail) for detail in ledger.verdicts(pair, self.model)]

    def check(self, ledger):
        """Refuse to mix two judges: raises LedgerError if this run's labels were given under another rubric, or by a reward
        model of the same name with other weights. Says so if those of other runs were."""
        here, reused = Counter(), Counter()
        for counts, details in ((here, ledger.details()), (reused, ledger.details(-1, -1))):
            for text, n in details:
                if version := self.version_in(json.loads(text)):
                    counts[version] += n
        if others := here.total() - here.pop(self.version, 0):
            raise LedgerError(
                f"{ledger.path}: {others:,} of its answers were given {self.other_version} ({', '.join(here)}) than "
                f"{self.source} ({self.version}): put {self.source_key} back as it was, or choose another output_dir; "
                "`python tools/ledger.py NEW --reuse OLD` takes over the labels")
        if others := reused.total() - reused.pop(self.version, 0):
            say(f"{others:,} of the answers of other runs were given {self.other_version} ({', '.join(reused)}) than this "
                f"run's ({self.version})")

    @abc.abstractmethod
    def version_in(self, detail):
        """The `version` under which an answer was given, from what the ledger keeps about it; None: it has none."""

    def settle(self, question, verdict, ledger, **detail):
        """Commit an answer: the verdict, or what a pair without one gets. It cost what the pair's verdicts cost.

        detail: what the ledger keeps about it. If a person has answered in the meantime (tools/label.py), that answer stays.
        """
        label, annotator = verdict, self.model
        if not verdict and self.disagreement == "coin":
            label, annotator, detail["coin"] = coin(question.pair, self.seed), f"{self.model} (coin)", True
        elif not verdict:
            detail["tie"] = True
        self.commit(question, label, annotator, ledger, detail)

    def commit(self, question, label, annotator, ledger, detail):
        ledger.add(self.name, [(question, label, annotator, *ledger.spent(question.pair, self.model))],
                   detail=json.dumps(detail))

    def give_up_on(self, pairs, ledger, **detail):
        """Do what the key judge_unanswerable says with pairs that cannot be judged.  pairs: {Question: why}.

        Raises Waiting if the run has to stop for them, or if people have not answered yet.
        """
        question, why = next(iter(pairs.items()))
        first = f"{len(pairs):,} pair{'s' if len(pairs) > 1 else ''} cannot be judged; {question.pair}: {why}"
        if self.unanswerable == "stop":
            raise Waiting(f"judge {self.model}: {first}. Say --judge_unanswerable=skip or =human to go on without the judge")
        with ledger.transaction():
            for question, why in pairs.items():
                if not any("unanswerable" in past and past["settings"] == self.settings
                           for past in self.past_verdicts(question.pair, ledger)):
                    ledger.add_verdict(question.pair, self.model, 0,
                                       detail=json.dumps({"unanswerable": why, "settings": self.settings}))
                if self.unanswerable == "skip":
                    self.commit(question, 0, self.model, ledger, {**detail, "unanswerable": True})
        if self.unanswerable == "skip":
            say(f"{first}: settled without a preference (judge_unanswerable: skip)")
            self.show(0)
        else:
            say(f"{first}: waiting for people: python tools/label.py {shlex.quote(str(Path(ledger.path).parent))}")
            self.people.show = self.show
            self.people.answer(list(pairs), ledger)


def judge_metrics(details):
    """What a judge's answers tell about it, for the metrics and the summary.  details: [(JSON, how many)], Ledger.details.

    judge_agreement: on which share of the pairs both orders had the same outcome.  judge_first_position: which share of the
    verdicts for a response was for the one shown first; 0.5 without a bias. Both None where nothing is known.
    """
    counts, same, orders, letters = Counter(), 0, 0, Counter()
    for text, n in details:
        detail = json.loads(text)
        counts.update({name: n for name in ("coin", "tie", "unanswerable") if detail.get(name)})
        if said := detail.get("said"):
            same += n * (said[:2] in ("AB", "BA", "CC"))
            orders += n
            letters.update({letter: n * said.count(letter) for letter in "AB"})
    return {"judge_coins": counts["coin"], "judge_ties": counts["tie"], "judge_unanswerable": counts["unanswerable"],
            "judge_agreement": same / orders if orders else None,
            "judge_first_position": letters["A"] / letters.total() if letters.total() else None}


def judge_text(metrics):
    """What judge_metrics returns, in a few words for people; "" without a judge.  metrics: that dict, or a larger one."""
    parts = []
    if metrics.get("judge_agreement") is not None:
        parts.append(f"orders agree on {metrics['judge_agreement']:.0%}")
    if metrics.get("judge_first_position") is not None:
        parts.append(f"first position preferred in {metrics['judge_first_position']:.0%}")
    parts += [f"{metrics[name]:,} {word}" for name, word in (("judge_coins", "by coin"), ("judge_ties", "ties"),
                                                            ("judge_unanswerable", "unanswerable")) if metrics.get(name)]
    return ", ".join(parts)


# A response may contain "[[A]]", instructions to the judge, or a forged end of itself. Three things protect us:
#   1. We read the verdict from the judge's reply alone, and reject a reply with two marks, such as one that quotes some.
#   2. The fence is a hash of the pair's id, which is a hash of the pair's texts. No text can contain its own fence, so none
#      can end early and continue as the other response or as us.
#   3. We ask in both orders. Whatever makes the judge say "A" wins in one order and loses in the other: no preference.
# Two things are not covered: a judge that obeys a response ("the one that sings wins") is fooled in both orders, and on a
# server that reads special tokens ("<|im_end|>") in a message, a response can end the message. Texts are sent unchanged.

class Rubric:
    """What a chat judge is asked, and how its replies are read, from a YAML file like labels/rubrics/default.yaml.

    prompt: the text, with the fields {prompt}, {a}, {b} and {fence}.  verdicts: {"A": the form in which it prefers the
    response shown first, "B": …, "C": prefers neither}; C may be missing. Raises ValueError, in one line.
    """

    FIELDS = re.compile(r"\{(prompt|a|b|fence)\}")
    DEFAULT = Path(__file__).parent / "rubrics" / "default.yaml"

    def __init__(self, path=None):
        self.path = Path(path or self.DEFAULT)
        try:
            loaded = yaml.safe_load(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ValueError(f"judge_prompt {self.path}: cannot be read ({one_line(error, 200)})")
        if not isinstance(loaded, dict) or loaded.keys() != {"prompt", "verdicts"}:
            raise ValueError(f"judge_prompt {self.path}: expected the two keys prompt and verdicts, as in "
                             "labels/rubrics/default.yaml")
        self.template, self.verdicts = loaded["prompt"], loaded["verdicts"]
        self._check()
        self.template = self.template.rstrip("\n")
        self.hash = digest(self.template, self.verdicts)
        forms = [*self.verdicts.values()]
        self.mark = os.path.commonprefix(forms)  # how every verdict begins, if they have that in common
        self.again = (f"\n\nAn earlier reply to this had no verdict, or more than one. Reply with {', '.join(forms[:-1])} "
                      f"or {forms[-1]} and nothing else.")

    def _check(self):
        place, verdicts = f"judge_prompt {self.path}", self.verdicts
        missing = {"prompt", "a", "b", "fence"}.difference(self.FIELDS.findall(str(self.template)))
        if not isinstance(self.template, str) or missing:
            raise ValueError(f"{place}, prompt: expected a text with {{prompt}}, {{a}}, {{b}} and {{fence}}, and "
                             f"{{{min(missing or ['prompt'])}}} is missing")
        if (not isinstance(verdicts, dict) or not {"A", "B"} <= verdicts.keys() <= {"A", "B", "C"}
                or not all(isinstance(form, str) for form in verdicts.values())):
            raise ValueError(f"{place}, verdicts: expected a text for A, for B and, if you like, for C")
        for name, form in verdicts.items():
            if form.strip() != form or re.fullmatch(r"\w*", form):
                raise ValueError(f"{place}, verdicts, {name}: {form!r} may occur in any sentence; take a form such as [[A]]")
            if any(form in other for key, other in verdicts.items() if key != name):
                raise ValueError(f"{place}, verdicts, {name}: {form!r} is part of another form")

    def render(self, prompt, a, b, fence):
        """The request's text. What looks like a field within a text stays as it is."""
        fields = {"prompt": prompt, "a": a, "b": b, "fence": fence}
        return self.FIELDS.sub(lambda match: fields[match[1]], self.template)

    def read(self, reply):
        """"A", "B", "C" (neither is preferred), or None if the reply is not a usable verdict.

        The whole reply must hold exactly one of the forms, once. A reply that was cut off (endpoint.CUT) must begin with it:
        later on it could be a quotation, with the verdict still to come. Reasoning must have come to its end.
        """
        found = [name for name, form in self.verdicts.items() for _ in range(reply.text.count(form))]
        if len(found) != 1 or self.mark and reply.text.count(self.mark) != 1:
            return None
        form, cut = self.verdicts[found[0]], reply.finish in CUT
        if reply.thought and (cut or not reply.text.rstrip(" \n\t.*_`\"").endswith(form)):
            return None
        if cut and not reply.text.lstrip().startswith(form):
            return None
        return found[0]


@dataclass
class Request:
    """A question to the chat model about one pair.

    round: 1, or 2 after a disagreement.  order: 1 shows y1 as A, −1 shows y2 as A.  attempt: 1, or more after replies
    without a usable verdict.  lost: as in Endpoint.ask.
    """
    pair: str
    round: int
    order: int
    text: str
    attempt: int = 1
    lost: list = field(default_factory=list)


@dataclass
class Case:
    """A pair before the judge.

    said: {(round, order): "A", "B" or "C"}.  tries: how many replies in the ledger had no usable verdict, by (round, order).
    asked: what has been asked in this process.  why: why the pair cannot be judged, if so.
    """
    question: Question
    said: dict = field(default_factory=dict)
    tries: Counter = field(default_factory=Counter)
    asked: set = field(default_factory=set)
    why: str | None = None


class ChatJudge(Judge):
    """Asks a chat model. rubric: a Rubric; default: labels/rubrics/default.yaml.  concurrency: requests at once.  price: of
    a prompt token and of a completion token, or None.  options: those of Endpoint.
    """

    needs = ("judge_url", "judge_model")
    source_key, other_version = "judge_prompt", "under another rubric"
    attempts = 3  # replies to read for one verdict before giving up on the pair

    def __init__(self, texts, url, model, rubric=None, concurrency=8, seed=0, price=None, disagreement="tie",
                 unanswerable="skip", wait_minutes=60.0, **options):
        super().__init__(texts, model, seed, disagreement, unanswerable, wait_minutes)
        if concurrency < 1:
            raise ValueError(f"judge concurrency {concurrency}: must be at least 1")
        self.endpoint, self.rubric = Endpoint(url, model, **options), rubric or Rubric()
        self.concurrency, self.price = concurrency, price
        self.settings = digest(self.endpoint.where, self.rubric.hash, self.endpoint.max_tokens, self.endpoint.extra)
        self.version, self.source = self.rubric.hash, self.rubric.path
        self.about = {"judge_rubric": self.rubric.hash, "judge_rubric_file": self.rubric.path.name}
        self.useless = None  # the last replies, as long as none was usable: [(text, finish)]; None: not read back yet

    @classmethod
    def configured(cls, config, texts, **shared):
        price = None
        if config.judge_prompt_price is not None:  # the config's prices are for a million tokens
            price = config.judge_prompt_price / 1e6, config.judge_completion_price / 1e6
        return cls(texts, config.judge_url, config.judge_model, Rubric(config.judge_prompt), config.judge_concurrency,
                   price=price, api_key=os.environ.get(config.judge_api_key_env), timeout=config.judge_timeout,
                   max_tokens=config.judge_max_tokens, extra=config.judge_extra_body, **shared)

    def version_in(self, detail):
        if "rubric" in detail:
            return detail["rubric"] or Rubric().hash  # null: from before there was a choice

    def answer(self, questions, ledger):
        """Settle every question, or raise Waiting. What was settled before that is in the ledger."""
        if self.useless is None:
            self.useless = self.recall_useless(ledger)
        missing = {pair: self.recall(question, ledger) for pair, question in self.unanswered(questions, ledger).items()}
        asked, error = len(missing), ""
        try:
            self.show(asked)
            with Exchange(self.ask, self.concurrency) as exchange:
                error = self.hear(missing, exchange, ledger)
        except KeyboardInterrupt:
            raise Waiting(f"interrupted, {len(missing)} of {asked} answers are missing")
        if error:
            raise Waiting(f"judge {self.model} at {self.endpoint.where}: {len(missing)} of {asked} answers are missing; "
                          f"{error}")
        if missing:
            self.give_up_on({case.question: case.why for case in missing.values()}, ledger, rubric=self.rubric.hash)

    def hear(self, missing, exchange, ledger):
        """Ask about all pairs, settle those that can be settled, and take them out of `missing`. Returns why others are
        left, or "" if each of them has its own reason (Case.why).  missing: {pair: Case}."""
        requests = [request for case in list(missing.values()) for request in self.advance(case, missing, ledger)]
        first = 1 if self.is_useless() else len(requests)  # one reply has to show that the judge works now
        for request in requests[:first]:
            exchange.put(request)
        waiting, last_reply_at, error = requests[first:], -math.inf, ""
        for request, reply in exchange:
            case, problem, stopped = missing.get(request.pair), None, exchange.stop.is_set()
            self.keep_lost(request, ledger)
            if isinstance(reply, Refused):
                problem = f"{reply}; check the url, the model, the key and judge_extra_body, then resume"
                exchange.stop.set()
            elif isinstance(reply, GaveUp):
                problem = f"pair {request.pair}: {reply}; resume when the endpoint answers again"
                if last_reply_at < reply.started:  # no other request got through either: the endpoint is down
                    exchange.stop.set()
            else:
                last_reply_at = time.monotonic()
                if self.note(case, request, reply, ledger):
                    more, waiting = waiting + self.advance(case, missing, ledger), []
                else:
                    more = [] if case.why else [replace(request, attempt=request.attempt + 1)]
                for another in more:
                    exchange.put(another)
                if self.is_useless():
                    problem = self.what_it_said()
                    exchange.stop.set()
            while self.endpoint.news:
                say(f"judge {self.model}: {self.endpoint.news.pop(0)}")
            if problem and not stopped:  # what fails after the stop is not the reason for it
                error = problem
        return error

    def recall(self, question, ledger):
        """The Case of a pair, beginning with what an earlier run already paid for."""
        case = Case(question)
        for past in self.past_verdicts(question.pair, ledger):
            place, same = (past.get("round", 1), past.get("order")), past.get("settings") == self.settings
            if past.get("said") and past.get("rubric", Rubric().hash) == self.rubric.hash:
                case.said[place] = past["said"]
            elif same and "unanswerable" in past:
                case.why = past["unanswerable"]
            elif same and not self.is_useless():  # replies of a useless judge say nothing about a pair
                case.tries[place] += 1
                case.why = case.why or self.no_verdict(case.tries[place], past["reply"], past["finish_reason"])
        return case

    def recall_useless(self, ledger):
        """The last replies in the ledger, back to the last usable one or one under other settings, oldest first."""
        useless = deque(maxlen=self.patience)
        for past in map(json.loads, ledger.last_verdicts(self.model, 10 * self.patience)):
            if "reply" not in past:  # what was refused is written together, at the end, whatever came in between
                continue
            if len(useless) == self.patience or past.get("said") or past.get("settings") != self.settings:
                break
            useless.appendleft((past["reply"], past.get("finish_reason")))
        return useless

    def is_useless(self):
        """Whether so many replies in a row were useless that the judge must be useless itself."""
        return len(self.useless) == self.patience

    def advance(self, case, missing, ledger):
        """Settle a pair if its verdicts are complete, or return the Requests that it still needs."""
        for round in (1, 2):
            places = [(round, order) for order in (1, -1)]
            if not all(place in case.said for place in places):
                new = [place for place in places if place not in case.said and place not in case.asked and not case.why]
                case.asked.update(new)
                return [Request(case.question.pair, *place, self.prompt(case.question.pair, place[1]), case.tries[place] + 1)
                        for place in new]
            first, second = ({"A": order, "B": -order, "C": 0}[case.said[round, order]] for _, order in places)
            if first == second or round == 2 or self.disagreement != "again":
                break
        said = " ".join("".join(case.said[r, order] for order in (1, -1)) for r in range(1, round + 1))
        self.settle(case.question, first if first == second else 0, ledger, rubric=self.rubric.hash, said=said)
        del missing[case.question.pair]
        self.show(len(missing))
        return []

    def note(self, case, request, reply, ledger):
        """Keep what came back in the ledger and in the case. Returns whether it is a usable verdict."""
        if isinstance(reply, TextRefused):
            case.why = str(reply)
            self.useless.append((case.why, None))
            return False
        said = self.rubric.read(reply)
        self.keep(request, reply, said, ledger)
        if said:
            case.said[request.round, request.order] = said
            self.useless.clear()
        else:
            self.useless.append((reply.text, reply.finish))
            case.why = case.why or self.no_verdict(request.attempt, reply.text, reply.finish)
        return bool(said)

    def no_verdict(self, replies, text, finish):
        """Why so many replies to a question are enough, or None.  text, finish: of the last one."""
        if replies >= self.attempts or finish == "content_filter":
            return (f"no usable verdict in {replies} repl{'y' if replies == 1 else 'ies'}, the last {one_line(text, 80)!r} "
                    f"(finish_reason {one_line(finish, 20)})")

    def what_it_said(self):
        """Why the run no longer asks the judge, for the user: what its last replies looked like, and what to do."""
        common = Counter(one_line(text, 50) for text, _ in self.useless).most_common(3)
        seen = ", ".join(f"{n} × {text!r}" for text, n in common)
        cut = sum(finish == "length" for _, finish in self.useless)
        room = f"; {cut} were cut off at judge_max_tokens {self.endpoint.max_tokens}, so raise that first" if cut else ""
        return (f"the last {self.patience} replies held no usable verdict: {seen}{room}. Take another judge model or "
                "another judge_prompt, then resume; what was paid for is in the ledger")

    def prompt(self, pair, order):
        """The request's text. order: 1 shows y1 as A, −1 shows y2 as A."""
        prompt, *responses = map(plain, self.texts(pair))
        fence = "=== " + hashlib.blake2b(f"fence {self.seed} {pair}".encode(), digest_size=8).hexdigest()
        a, b = responses[::order]
        return self.rubric.render(prompt, a, b, fence)

    def keep(self, request, reply, said, ledger):
        """Store a reply in the ledger. Its verdict: 1 for y1, −1 for y2, 0 for neither or an unusable reply."""
        verdict = {"A": request.order, "B": -request.order}.get(said, 0)
        detail = {"order": request.order, "round": request.round, "said": said, "reply": reply.text[:500],
                  "finish_reason": reply.finish, "prompt_tokens": reply.tokens[0], "completion_tokens": reply.tokens[1],
                  "rubric": self.rubric.hash, "settings": self.settings}
        ledger.add_verdict(request.pair, self.model, verdict, reply.seconds, self.cost(reply.tokens), json.dumps(detail))

    def keep_lost(self, request, ledger):
        """Store in the ledger what brought no reply to a request, but may have been paid for: a timeout, for example."""
        for why, tokens, seconds in request.lost:
            ledger.add_verdict(request.pair, self.model, 0, seconds, self.cost(tokens), json.dumps({"lost": why}))
        request.lost.clear()

    def cost(self, tokens):
        """What tokens cost, as in Reply; None if that is not known."""
        if self.price and None not in tokens:
            return sum(count * price for count, price in zip(tokens, self.price))

    def ask(self, request, stop):
        """Send a request, from a thread of an Exchange; neither the ledger nor the texts may be used here. A second round
        samples: at temperature 0 it would repeat the first."""
        draw = random.Random(f"{self.seed} {request.pair} {request.round} {request.order} {request.attempt}")
        text = request.text + (self.rubric.again if request.attempt > 1 else "")
        return self.endpoint.ask(text, stop, draw, 0 if request.round == 1 else 1, request.lost)
