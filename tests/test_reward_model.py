"""labels/reward_model.py with a tiny reward model: `python -m pytest tests/test_reward_model.py`."""

import contextlib
import dataclasses
import json
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers import question, texts
from tokenizers import processors
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from labels.annotators import Waiting
from labels.judge import coin, judge_metrics
from labels.ledger import Ledger, LedgerError
from labels.reward_model import RewardModelJudge, exact_scores
from runtime import toy
from runtime.config import Config
from tools.ledger import reuse


def answers(ledger):
    return dict(ledger.db.execute("SELECT pair, label FROM answers"))


def annotators(ledger):
    return {name for name, in ledger.db.execute("SELECT annotator FROM answers")}


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    tokenizer = toy.make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=2, max_position_embeddings=128, initializer_range=0.5, num_labels=1,
                         pad_token_id=tokenizer.pad_token_id, bos_token_id=1, eos_token_id=2)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reviews():
    rng = random.Random(0)
    return {f"r{n}": ("review of the bar in rome :", *(toy.write_response(rng) for _ in "ab")) for n in range(20)}


def as_json(reviews):
    return lambda pair: tuple(json.dumps(text) for text in reviews[pair])


def reference_scores(folder, rendered, **options):
    """The scores of one row at a time, without padding."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return [model(**tokenizer(text, return_tensors="pt", **options)).logits.item() for text in rendered]


@pytest.mark.parametrize("make, config", [
    (LlamaForSequenceClassification, LlamaConfig), (RobertaForSequenceClassification, RobertaConfig)])
def test_a_model_in_bf16_gives_scores_in_fp32(make, config):
    """On a GPU a model keeps the dtype of its files. Rounded to bf16, some of its scores were equal."""
    torch.manual_seed(0)
    lm = make(config(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                     num_labels=1, pad_token_id=0)).bfloat16().eval()
    ids = torch.randint(2, 50, (400, 12))
    with torch.no_grad():
        rounded = lm(ids).logits[:, 0].float()
        scores = exact_scores(lm)(ids).logits[:, 0]
    assert scores.dtype == torch.float32 and len(scores.unique()) == 400 > len(rounded.unique())
    torch.testing.assert_close(scores, rounded, rtol=0.01, atol=0.01)


def test_a_reward_model_prefers_the_higher_score(reward_model, reviews, ledger):
    shown = []
    grader = RewardModelJudge(as_json(reviews), reward_model)
    grader.show = shown.append
    grader.answer([question(pair) for pair in reviews], ledger)
    expected = {}
    for pair, (prompt, first, second) in reviews.items():
        a, b = reference_scores(reward_model, [prompt + first, prompt + second])
        assert abs(a - b) > 1e-3
        expected[pair] = 1 if a > b else -1
        kept, = ledger.db.execute("SELECT detail FROM verdicts WHERE pair = ?", (pair,)).fetchone()
        assert json.loads(kept)["scores"] == pytest.approx([a, b], abs=1e-4)
    assert answers(ledger) == expected and set(expected.values()) == {1, -1}
    assert annotators(ledger) == {str(reward_model)}
    assert shown == [20, 12, 4, 0]
    assert grader.grade([("r0", 1)]) == (0, 0) and grader.name == "judge" and grader.asks_together


def test_the_chat_template_is_used_where_there_is_one(reward_model, reviews, ledger, tmp_path):
    folder = shutil.copytree(reward_model, tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}the {{ m.content }} {{ eos_token }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    RewardModelJudge(as_json(reviews), folder).answer([question("r0")], ledger)
    prompt, *responses = reviews["r0"]
    rendered = [f"<s>the {prompt} </s>the {response.strip()} </s>" for response in responses]
    a, b = reference_scores(folder, rendered, add_special_tokens=False)
    kept, = ledger.db.execute("SELECT detail FROM verdicts").fetchone()
    assert json.loads(kept)["scores"] == pytest.approx([a, b], abs=1e-4)
    assert answers(ledger) == {"r0": 1 if a > b else -1}
    # The same pair as messages, and as a dialogue of Anthropic's HH, is the same conversation.
    messages = ([{"role": "user", "content": prompt}],
                *([{"role": "assistant", "content": response.strip()}] for response in responses))
    dialogue = (f"\n\nHuman: {prompt}\n\nAssistant:", *responses)
    grader = RewardModelJudge(as_json({"r0": reviews["r0"], "messages": messages, "hh": dialogue}), folder)
    assert grader.rows("messages") == grader.rows("hh") == grader.rows("r0") == rendered
    grader.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    grader.unanswerable = "stop"
    with pytest.raises(Waiting, match="r0: the model's chat template refuses it: roles must alternate"):
        grader.answer([question("r0")], Ledger(tmp_path / "other.sqlite"))


def test_an_encoder_reads_two_texts_with_its_separator(reward_model, reviews, tmp_path):
    folder = shutil.copytree(reward_model, tmp_path / "encoder")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.sep_token = "</s>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A </s> $B:1", special_tokens=[("<s>", 2), ("</s>", 3)])
    tokenizer.save_pretrained(folder)
    grader = RewardModelJudge(as_json(reviews), folder)
    prompt, first, second = reviews["r0"]
    expected = reference_scores(reward_model, [f"{prompt} </s> {first}", f"{prompt} </s> {second}"])
    assert grader.scores(grader.rows("r0")) == pytest.approx(expected, abs=1e-4)


def test_a_model_without_a_padding_token_scores_the_same(reward_model, reviews, tmp_path):
    folder = shutil.copytree(reward_model, tmp_path / "no-pad")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": None}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    padded, single = RewardModelJudge(as_json(reviews), reward_model), RewardModelJudge(as_json(reviews), folder)
    assert padded.pads and not single.pads
    rows = [row for pair in reviews for row in padded.rows(pair)]
    assert padded.scores(rows) == pytest.approx(single.scores(rows), abs=1e-4)


def test_it_runs_where_the_key_says(reward_model, reviews, monkeypatch):
    """On the device "meta", which is there on any machine."""
    config = Config(judge_model=str(reward_model), judge_device="meta", seed=7, judge_disagreement="coin",
                    judge_unanswerable="stop", oracle_wait_minutes=5.0)
    made = RewardModelJudge.from_config(config, SimpleNamespace(text_by_id=lambda: as_json(reviews)), {}, {})
    assert made.lm.device.type == "meta"
    assert (made.seed, made.disagreement, made.unanswerable, made.people.wait_seconds) == (7, "coin", "stop", 300.0)
    with pytest.raises(ValueError, match="^judge_device gpu: Expected one of cpu, cuda"):
        RewardModelJudge.configured(dataclasses.replace(config, judge_device="gpu"), as_json(reviews))
    with pytest.raises(ValueError, match="^judge_device xpu: "):
        RewardModelJudge.configured(dataclasses.replace(config, judge_device="xpu"), as_json(reviews))

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(torch.nn.Module, "to", full)
    with pytest.raises(ValueError, match="does not fit on meta: name another judge_device"):
        RewardModelJudge.configured(config, as_json(reviews))


def test_a_judge_for_which_there_is_no_memory_is_one_line_about_its_device(reward_model, reviews, ledger, monkeypatch):
    """The policy takes the memory of the GPU after the judge is loaded."""
    grader = RewardModelJudge(as_json(reviews), reward_model)

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(grader.lm, "forward", full)
    with pytest.raises(ValueError, match="has no memory left on cpu: name another judge_device, such as"):
        grader.answer([question(pair) for pair in reviews], ledger)
    assert answers(ledger) == {}


def test_a_long_text_loses_its_beginning(reward_model, ledger):
    reviews = {"r0": ("lovely " * 500, " the food was bad .", " the food was good .")}
    grader = RewardModelJudge(as_json(reviews), reward_model, max_length=2048)
    assert grader.max_length == 128
    grader.answer([question("r0")], ledger)
    kept = ["lovely " * (127 - 5) + response.strip() for response in reviews["r0"][1:]]
    scores = json.loads(ledger.db.execute("SELECT detail FROM verdicts").fetchone()[0])["scores"]
    assert scores == pytest.approx(reference_scores(reward_model, kept), abs=1e-4) and scores[0] != scores[1]


def test_roberta_has_fewer_positions_than_its_config_says(reward_model, ledger, tmp_path):
    """Its positions start after the padding token's, and many of its tokenizers set no maximum length."""
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    config = RobertaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                           num_attention_heads=2, max_position_embeddings=40, num_labels=1,
                           pad_token_id=tokenizer.pad_token_id)
    RobertaForSequenceClassification(config).save_pretrained(tmp_path / "roberta")
    tokenizer.save_pretrained(tmp_path / "roberta")
    reviews = {"r0": ("lovely " * 500, " the food was bad .", " the food was good .")}
    grader = RewardModelJudge(as_json(reviews), tmp_path / "roberta")
    assert grader.max_length == 40 - tokenizer.pad_token_id - 1
    grader.answer([question("r0")], ledger)
    assert answers(ledger)["r0"]


def test_where_scores_are_equal_the_key_decides(reward_model, ledger, tmp_path):
    same = {f"r{n}": ("the", " food", " food") for n in range(10)}
    questions = [question(pair) for pair in same]
    RewardModelJudge(as_json(same), reward_model).answer(questions, ledger)
    assert answers(ledger) == dict.fromkeys(same, 0) and judge_metrics(ledger.details())["judge_ties"] == 10
    ledger = Ledger(tmp_path / "coins.sqlite")
    RewardModelJudge(as_json(same), reward_model, seed=5, disagreement="coin").answer(questions, ledger)
    assert answers(ledger) == {pair: coin(pair, 5) for pair in same}
    assert annotators(ledger) == {f"{reward_model} (coin)"} and judge_metrics(ledger.details())["judge_coins"] == 10


def nan_for(reviews, *pairs):
    """Scores that are not numbers for these pairs, and the texts' lengths for the others."""
    return lambda rows: [float("nan") if any(reviews[pair][1] in row[1] for pair in pairs) else float(len(row[1]))
                         for row in rows]


def test_a_score_that_is_not_a_number_gives_no_label_and_holds_up_no_other(reward_model, reviews, ledger, capsys):
    grader, questions = RewardModelJudge(as_json(reviews), reward_model), [question(pair) for pair in reviews]
    grader.scores, grader.unanswerable = nan_for(reviews, "r9"), "stop"
    with pytest.raises(Waiting, match="1 pair cannot be judged; r9: its scores are nan and"):
        grader.answer(questions, ledger)
    assert set(answers(ledger)) == set(reviews) - {"r9"}
    grader.unanswerable = "skip"
    grader.answer(questions, ledger)
    assert answers(ledger)["r9"] == 0 and judge_metrics(ledger.details())["judge_unanswerable"] == 1
    assert "r9: its scores are nan and" in capsys.readouterr().out


def test_a_model_that_scores_nothing_is_of_no_use(reward_model, reviews, ledger):
    grader = RewardModelJudge(as_json(reviews), reward_model)
    grader.scores = nan_for(reviews, *reviews)
    with pytest.raises(ValueError, match="could not score any of the last 20 pairs .*take another model"):
        grader.answer([question(pair) for pair in reviews], ledger)
    assert answers(ledger) == {}


def test_a_reward_model_goes_on_where_it_was_interrupted(reward_model, reviews, ledger):
    grader, calls = RewardModelJudge(as_json(reviews), reward_model), []
    score = grader.scores

    def interrupted(rows):
        calls.append(len(rows))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score(rows)

    grader.scores = interrupted
    questions = [question(pair) for pair in reviews]
    with pytest.raises(Waiting, match="interrupted, 12 of 20 answers are missing"):
        grader.answer(questions, ledger)
    for pair, weights in (("r8", grader.version), ("r9", "other")):  # scored before a kill; r9 by other weights
        ledger.add_verdict(pair, grader.model, -1, detail=json.dumps({"scores": [0, 1], "weights": weights}))
    grader.answer(questions, ledger)
    assert calls == [16, 16, 14, 8]
    assert len(answers(ledger)) == 20 and answers(ledger)["r8"] == -1


def test_labels_by_other_weights_are_not_mixed_in(reward_model, reviews, ledger, tmp_path, capsys):
    """A reward model that was trained again in its folder, between a run and its resume."""
    folder = shutil.copytree(reward_model, tmp_path / "judge")
    before = RewardModelJudge(as_json(reviews), folder)
    before.answer([question("r0"), question("r1")], ledger)
    RewardModelJudge(as_json(reviews), folder).check(ledger)
    model = LlamaForSequenceClassification.from_pretrained(folder)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    after = RewardModelJudge(as_json(reviews), folder)
    with pytest.raises(LedgerError, match=rf"2 of its answers were given by other weights \({before.version}\) than those "
                                          rf"of {folder} \({after.version}\): put judge_model back as it was"):
        after.check(ledger)
    (tmp_path / "new").mkdir()
    reuse(tmp_path / "new", tmp_path)
    with contextlib.closing(Ledger(tmp_path / "new" / "labels.sqlite")) as new:
        after.check(new)
    said = capsys.readouterr().out
    assert f"2 of the answers of other runs were given by other weights ({before.version}) than this run's" in said


def test_what_is_not_a_reward_model_is_refused_by_name(reward_model, tiny, tmp_path):
    with pytest.raises(ValueError, match="reward model .*/nowhere: cannot be loaded: not a local folder, and loading"):
        RewardModelJudge(texts, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has 2 outputs"):  # a language model
        RewardModelJudge(texts, tiny / "model")
    folder = shutil.copytree(tiny / "model", tmp_path / "headless")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "id2label": {"0": "reward"}}))
    with pytest.raises(ValueError, match="its weights lack score.weight"):
        RewardModelJudge(texts, folder)
    folder = shutil.copytree(reward_model, tmp_path / "other-tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    size = len(tokenizer)
    tokenizer.add_tokens(["something"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=f"has embeddings for {size} tokens, but its tokenizer has {size + 1}: put the"):
        RewardModelJudge(texts, folder)
