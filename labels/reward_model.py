"""A reward model that answers queries on this machine: a sequence classifier with one output, the score of a response.

    RewardModelJudge(texts, name_or_path).answer(questions, ledger)     scores both responses; offline and free

    deepspeed train.py --config … --oracle judge --judge reward_model --judge_model DIR

The response with the higher score is preferred. Equal scores are a tie, or whatever else the key judge_disagreement says,
and a pair that cannot be scored is left to judge_unanswerable, as with any judge (labels/judge.py).
"""

import inspect
import json
import math
import time

import torch

from labels.annotators import Waiting
from labels.judge import Judge, plain
from runtime.errors import one_line
from runtime.formats import hh_messages, template_input


def compare(first, second):
    """1 if the first score is higher, −1 if the second is, 0 if they are equal."""
    return (first > second) - (first < second)


def exact_scores(lm):
    """`lm`, whose head is in fp32. A score in bf16 has three digits, so that two unlike responses may get equal ones and
    lose their label."""
    for head in (child for child in lm.children() if child is not lm.base_model):
        for layer in head.modules():
            if isinstance(layer, torch.nn.Linear) and layer.out_features == 1:
                layer.float().register_forward_pre_hook(lambda _, states: states[0].float())
    return lm


class RewardModelJudge(Judge):
    """Prefers the response with the higher score.

    name_or_path: a model that AutoModelForSequenceClassification loads.  batch_size: pairs at once.  device: by default the
    current GPU, or the CPU if there is none.  max_length: in tokens; a longer text loses its beginning.  rest: as in Judge.
    Raises ValueError, in one line, if the model is not a reward model.
    """

    needs = ("judge_model",)
    source_key, other_version = "judge_model", "by other weights"
    useless = 0  # how many pairs in a row could not be scored

    def __init__(self, texts, name_or_path, batch_size=8, device=None, max_length=2048, **rest):
        super().__init__(texts, str(name_or_path), **rest)
        self.batch_size = batch_size
        try:
            self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            torch.empty(1, device=self.device)  # fails where this machine has no such device
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"judge_device {device}: {one_line(error, 100)}")
        self.tokenizer, self.lm = self._load(name_or_path)
        self.inputs = inspect.signature(self.lm.forward).parameters
        self.pads = self._set_padding()
        self.tokenizer.truncation_side = "left"
        self.max_length = min(max_length, self.tokenizer.model_max_length, self._positions() or max_length)

    @classmethod
    def configured(cls, config, texts, **shared):
        return cls(texts, config.judge_model, device=config.judge_device, **shared)

    def _load(self, name_or_path):
        """(tokenizer, model on the device). Sets version, settings and source, as Judge has them."""
        from transformers import AutoModelForSequenceClassification, AutoTokenizer  # slow; tools import this module too

        from runtime.model import content_of, not_local
        try:
            tokenizer = AutoTokenizer.from_pretrained(name_or_path)
            lm, loading = AutoModelForSequenceClassification.from_pretrained(
                name_or_path, output_loading_info=True, use_safetensors=True,
                dtype="auto" if self.device.type == "cuda" else torch.float32)
        except (OSError, ValueError) as error:
            raise ValueError(f"reward model {self.model}: cannot be loaded: {not_local(name_or_path)}{one_line(error, 300)}")
        if lm.config.num_labels != 1:
            raise ValueError(f"reward model {self.model}: has {lm.config.num_labels} outputs; take a model with one output")
        if loading["missing_keys"]:  # transformers would fill them at random
            raise ValueError(f"reward model {self.model}: its weights lack {sorted(loading['missing_keys'])[0]}; "
                             "take a model that was trained to score")
        tokens, size = max(tokenizer.get_vocab().values()) + 1, len(lm.get_input_embeddings().weight)
        if tokens > size:
            raise ValueError(f"reward model {self.model}: has embeddings for {size:,} tokens, but its tokenizer has "
                             f"{tokens:,}: put the model's own tokenizer beside it")
        self.version = self.settings = content_of(name_or_path)
        self.source = f"those of {name_or_path}"
        try:
            return tokenizer, exact_scores(lm.to(self.device).eval())
        except torch.OutOfMemoryError:
            raise ValueError(f"reward model {self.model}: does not fit on {self.device}: name another judge_device, such as "
                             "cpu, or take a smaller model")

    def _set_padding(self):
        """Make the tokenizer pad as the model expects. Returns whether rows can be padded at all.

        The model reads the score at the last token that is not its padding token, so we must pad with exactly that one. A
        model without a padding token gets the tokenizer's, unless that is EOS: then every row is scored alone.
        """
        config, tokenizer = self.lm.config.get_text_config(), self.tokenizer
        if config.pad_token_id is None and tokenizer.pad_token_id != tokenizer.eos_token_id:
            config.pad_token_id = tokenizer.pad_token_id
        pads = config.pad_token_id is not None and 0 <= config.pad_token_id < len(tokenizer)
        if pads:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)
        tokenizer.padding_side = "right"
        return pads

    def _positions(self):
        """How many tokens the model has positions for, or None if any number."""
        positions = getattr(self.lm.config.get_text_config(), "max_position_embeddings", None)
        for name, table in self.lm.named_modules():  # RoBERTa counts its positions from after the padding token
            if name.endswith("position_embeddings") and getattr(table, "padding_idx", None) is not None:
                positions = table.num_embeddings - table.padding_idx - 1
        return positions

    def version_in(self, detail):
        return detail.get("weights")

    def answer(self, questions, ledger):
        """Settle every question. Raises Waiting on Ctrl-C, or where the key judge_unanswerable asks for it."""
        missing = self.unanswered(questions, ledger)
        asked, unanswerable = len(missing), {}
        verdicts = {pair: compare(*detail["scores"]) for pair in missing for detail in self.past_verdicts(pair, ledger)
                    if self.version_in(detail) == self.version}  # from a run that was killed before it could settle them
        try:
            while missing:
                self.show(len(missing))
                some = list(missing.values())[:self.batch_size]
                unanswerable |= self.judge([q for q in some if q.pair not in verdicts], verdicts, ledger)
                for question in some:
                    if question not in unanswerable:
                        self.settle(question, verdicts[question.pair], ledger, weights=self.version)
                    del missing[question.pair]
            if unanswerable:
                self.give_up_on(unanswerable, ledger, weights=self.version)
            else:
                self.show(0)
        except KeyboardInterrupt:
            raise Waiting(f"interrupted, {len(missing) + len(unanswerable)} of {asked} answers are missing")

    def judge(self, questions, verdicts, ledger):
        """Score a batch of pairs; store their verdicts in the ledger and in `verdicts`. Returns {Question: why} for those
        that cannot be scored. Raises ValueError if these are `patience` or more in a row: then the model is useless."""
        started, rows, unanswerable = time.monotonic(), {}, {}
        for question in questions:
            try:
                rows[question] = self.rows(question.pair)
            except ValueError as error:
                unanswerable[question] = str(error)
        scores = self.scores([row for two in rows.values() for row in two])
        for question, first, second in zip(rows, scores[::2], scores[1::2]):
            if not (math.isfinite(first) and math.isfinite(second)):
                unanswerable[question] = f"its scores are {first} and {second}"
                continue
            verdicts[question.pair] = compare(first, second)
            ledger.add_verdict(question.pair, self.model, verdicts[question.pair],
                               (time.monotonic() - started) / len(questions), None,
                               json.dumps({"scores": [first, second], "weights": self.version}))
        self.useless = self.useless + len(unanswerable) if len(unanswerable) == len(questions) else 0
        if self.useless >= self.patience:
            raise ValueError(f"reward model {self.model}: it could not score any of the last {self.useless} pairs "
                             f"({question.pair}: {unanswerable[question]}); take another model")
        return unanswerable

    def rows(self, pair):
        """The two texts to score: rendered by the chat template if there is one, otherwise (prompt, response) each."""
        if not self.tokenizer.chat_template:
            prompt, *responses = map(plain, self.texts(pair))
            return [(prompt, response) for response in responses]
        import jinja2

        prompt, *responses = map(json.loads, self.texts(pair))
        prompt = hh_messages(prompt) or prompt

        def messages(role, part):
            return [{"role": role, "content": part.strip()}] if isinstance(part, str) else part

        try:
            talks = [template_input(messages("user", prompt) + messages("assistant", response)) for response in responses]
            return [self.tokenizer.apply_chat_template(talk, tools=tools, tokenize=False) for talk, tools in talks]
        except jinja2.TemplateError as error:
            raise ValueError(f"the model's chat template refuses it: {one_line(error, 300)}")

    def scores(self, rows):
        """A list of floats, one score a row. Raises ValueError if the device has no memory for them."""
        scores = []
        for some in [rows] if self.pads and rows else [[row] for row in rows]:
            options = {"padding": self.pads, "truncation": True, "max_length": self.max_length, "return_tensors": "pt"}
            if self.tokenizer.chat_template:  # the template has already written the special tokens
                batch = self.tokenizer(some, add_special_tokens=False, **options)
            elif self.tokenizer.sep_token:  # an encoder takes two texts
                batch = self.tokenizer([prompt for prompt, _ in some], [response for _, response in some], **options)
            else:
                batch = self.tokenizer([prompt + response for prompt, response in some], **options)
            # Tokenizers may return token_type_ids, which some models need and others do not accept.
            batch = {name: ids.to(self.device) for name, ids in batch.items() if name in self.inputs}
            try:
                with torch.no_grad():
                    logits = self.lm(**batch).logits  # (rows, 1)
            except torch.OutOfMemoryError:
                raise ValueError(f"reward model {self.model}: has no memory left on {self.device}: name another "
                                 "judge_device, such as cpu, or lower micro_batch_tokens if the policy is there too")
            scores += logits[:, 0].float().tolist()
        return scores
