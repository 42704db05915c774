"""Runs whose labels come from judges, through the command line: `python -m pytest tests/test_judge_runs.py`.

The judges themselves are tested in test_judge.py and test_reward_model.py.
"""

import re

import pytest
import torch
import transformers
from helpers import Person, completion, errors

from labels.annotators import HumanAnnotator
from labels.endpoint import Endpoint
from labels.judge import Rubric
from runtime import toy


def by_gold_reward(prompt, n):
    """The reply of a chat model that agrees with the labels of the tiny pairs."""
    a, b = (re.search(rf"response {side} begins\n(.*)\n=== \w+ response {side} ends", prompt, re.DOTALL)[1] for side in "AB")
    a, b = toy.gold_reward(a), toy.gold_reward(b)
    return completion("[[C]]" if a == b else "[[A]]" if a > b else "[[B]]")


@pytest.mark.parametrize("processes", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_a_chat_judge_labels_what_a_data_set_would_have(processes, train, unlabelled, by_dataset, serve, tmp_path):
    server = serve(by_gold_reward)
    run = train("judge", processes, output_dir=tmp_path / "run", oracle="judge", judge_url=server.url, judge_model="m",
                dataset_mixer=f"{{{unlabelled}: 1.0}}", per_device_train_batch_size=4 if processes else 8,
                judge_prompt_price=10, judge_completion_price=100)
    assert run.ledger() == by_dataset.ledger()
    assert run.losses() == pytest.approx(by_dataset.losses(), rel=1e-5)
    queries = run.summary()["queries"]
    assert len(server.bodies) == 2 * queries  # both orders, and nothing twice
    assert run.summary()["cost"] == pytest.approx(2 * queries * (100 * 10e-6 + 5 * 100e-6))


def test_a_judge_that_breaks_down_stops_the_run_resumable_and_no_label_is_invented(train, unlabelled, by_dataset, serve,
                                                                                   tmp_path, monkeypatch):
    monkeypatch.setattr(Endpoint, "backoff_seconds", 0.01)
    steps = sorted(step for _, _, step in by_dataset.ledger())
    working = 2 * steps.count(0)
    broken = serve(lambda prompt, n: by_gold_reward(prompt, n) if len(broken.bodies) <= working else (500, {}, "down"))
    keys = dict(oracle="judge", judge_model="m", dataset_mixer=f"{{{unlabelled}: 1.0}}", output_dir=tmp_path / "run")
    stopped = train("down", check=75, judge_url=broken.url, **keys)
    assert "answers are missing" in stopped.stdout and "Resume with" in stopped.stdout
    assert len(stopped.ledger()) == steps.count(0)
    run = train("up", judge_url=serve(by_gold_reward).url, **keys)
    assert run.ledger() == by_dataset.ledger()


def test_a_reward_model_is_the_offline_judge(train, unlabelled, tiny, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny / "model")
    torch.manual_seed(1)
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                      num_attention_heads=2, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    run = train("reward", oracle="judge", judge="reward_model", judge_model=tmp_path / "reward",
                dataset_mixer=f"{{{unlabelled}: 1.0}}", output_dir=tmp_path / "run")
    assert len(run.ledger()) == run.summary()["queries"] > 8
    assert {label for _, label, _ in run.ledger()} == {1, -1}


def card(run):
    return (run.output / "README.md").read_text()


def test_a_judge_that_always_says_a_is_seen_in_bar_summary_and_card_and_warned_of(train, unlabelled, serve):
    server = serve(lambda prompt, n: completion("[[A]]"))
    for kind, coins, ties in (("coin", 32, 0), ("tie", 0, 32)):
        run = train("always-a", oracle="judge", judge_url=server.url, judge_model="m", judge_disagreement=kind,
                    dataset_mixer=f"{{{unlabelled}: 1.0}}", gamma=100)
        summary, row = run.summary(), run.rows()[-1]
        for told in (summary, row):
            assert (told["judge_coins"], told["judge_ties"]) == (coins, ties)
            assert (told["judge_agreement"], told["judge_first_position"]) == (0, 1)
        words = "orders agree on 0 %, first position preferred in 100 %, 32 " + ("by coin" if coins else "ties")
        assert words in run.stdout  # the closing line
        assert run.stdout.count("WARNING: the judge is hardly of use: of ") == 1
        assert "judge: orders agree on 0%" in run.stderr  # the progress bar
        assert "| pairs on which both orders agree | 0.0% |" in card(run)
        assert "| verdicts for the first position | 100.0% |" in card(run)
        assert f"| {'labels by coin' if coins else 'ties'} | 32 |" in card(run)
        assert summary["queries_without_preference"] == ties and len(run.ledger()) == 32
        assert {label for _, label, _ in run.ledger()} == ({1, -1} if coins else {0})


def test_a_pair_that_the_endpoint_refuses_does_not_stop_the_run(train, unlabelled, by_dataset, serve, tmp_path):
    """A filter refuses every third pair. The others get their labels, and the policy never trains on a refused one."""
    labels = {pair: label for pair, label, _ in by_dataset.ledger()}
    refused = {}

    def behave(prompt, n):
        reply = by_gold_reward(prompt, n) if "response A" in prompt else completion("yes")
        texts = frozenset(re.findall(r"response [AB] begins\n(.*)\n=== \w+ response [AB] ends", prompt))
        if texts and refused.setdefault(texts, len(refused) % 3 == 0):
            return 400, {}, {"error": {"message": "content filter"}}
        return reply

    server = serve(behave)
    run = train("refused", oracle="judge", judge_url=server.url, judge_model="m", gamma=100,
                dataset_mixer=f"{{{unlabelled}: 1.0}}", output_dir=tmp_path / "run")
    n, neither = sum(refused.values()), [label for _, label, _ in run.ledger()].count(0)
    assert all(label == labels.get(pair, label) for pair, label, _ in run.ledger() if label) and len(run.ledger()) == 32
    summary = run.summary()
    assert summary["judge_unanswerable"] == n > 5 and summary["judge_ties"] + n == neither  # a pair can have equal rewards
    assert summary["queries_without_preference"] == neither
    assert f"| pairs that the judge could not answer | {n} |" in card(run)
    assert f"{n} unanswerable" in run.stdout and "HTTP 400 content filter: settled without a preference" in run.stdout
    assert "WARNING" not in run.stdout


def test_people_answer_what_the_judge_cannot(train, unlabelled, by_dataset, serve, tmp_path, monkeypatch):
    monkeypatch.setattr(HumanAnnotator, "poll_seconds", 0.02)
    server = serve(lambda prompt, n: (400, {}, {}) if "response A" in prompt and len(server.bodies) % 4 == 0
                   else by_gold_reward(prompt, n) if "response A" in prompt else completion("yes"))
    with Person(tmp_path / "run") as person:
        run = train("human", output_dir=tmp_path / "run", oracle="judge", judge_url=server.url, judge_model="m",
                    judge_unanswerable="human", dataset_mixer=f"{{{unlabelled}: 1.0}}")
    assert run.ledger() == by_dataset.ledger() and 0 < person.answered < len(run.ledger())
    assert f"waiting for people: python tools/label.py {tmp_path / 'run'}" in run.stdout


def test_another_rubric_is_another_run_and_the_card_names_it(train, unlabelled, serve, tmp_path):
    server, mine = serve(by_gold_reward), tmp_path / "mine.yaml"
    mine.write_text(Rubric.DEFAULT.read_text() + "  Think well.\n")
    keys = dict(oracle="judge", judge_url=server.url, judge_model="m", dataset_mixer=f"{{{unlabelled}: 1.0}}",
                output_dir=tmp_path / "run", judge_prompt=mine, judge_extra_body="{top_p: 0.5, stop: [x]}")
    run = train("mine", **keys)
    rubric = Rubric(mine).hash
    assert all(body["top_p"] == 0.5 and body["stop"] == ["x"] for body in server.bodies)
    assert all(prompt.endswith("Think well.") for prompt in server.prompts())
    assert run.summary()["judge_rubric"] == rubric and f"| rubric | `mine.yaml`, {rubric} |" in card(run)
    (run.output / "summary.json").unlink()
    before = len(server.bodies)
    mine.write_text(Rubric.DEFAULT.read_text())
    again = train("changed", check=2, **keys)
    assert f"were given under another rubric ({rubric}) than {mine}" in errors(again)[0] and len(server.bodies) == before


def test_a_reward_model_that_is_not_there_says_so(train, unlabelled, tmp_path):
    run = train("nowhere", check=2, oracle="judge", judge="reward_model", judge_model=tmp_path / "nowhere",
                dataset_mixer=f"{{{unlabelled}: 1.0}}")
    assert f"reward model {tmp_path}/nowhere: cannot be loaded: not a local folder, and loading" in errors(run)[0]


def test_a_judge_needs_its_keys(train, unlabelled):
    run = train("keys", check=2, oracle="judge", dataset_mixer=f"{{{unlabelled}: 1.0}}")
    assert "oracle judge (chat) needs judge_url" in run.stderr
