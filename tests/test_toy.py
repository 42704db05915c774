"""runtime/toy.py, the built-in task, at a small size: `python -m pytest tests/test_toy.py`."""

import json

import pytest
import torch
import transformers

from runtime import toy


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A small build: half of the fine-tuning, few pairs."""
    folder = tmp_path_factory.mktemp("toy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "SFT_SENTENCES", 7680)
        return folder, *toy.build(folder, label_noise=0.2, train_pairs=400, test_pairs=100, quiet=True)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_gold_reward_by_hand():
    assert toy.gold_reward(" the staff was perfect and the view seemed atrocious .") == 0.0
    assert toy.gold_reward("perfect , flawless") == 1.99
    assert toy.gold_reward("nothing of the kind") == 0.0


def test_the_lexicon_has_200_words_of_different_values():
    assert len(toy.OPINIONS) == len(set(toy.HUNDREDTHS.values())) == 200
    assert sum(value > 0 for value in toy.HUNDREDTHS.values()) == 100


def test_labels_follow_bradley_terry_with_the_noise_that_was_asked_for(built):
    train = rows(built[2] / "train.jsonl")
    gaps = torch.tensor([toy.gold_reward(row["response_a"]) - toy.gold_reward(row["response_b"]) for row in train]).double()
    assert [row["truth"] for row in train] == ["a" if gap > 0 else "b" for gap in gaps.tolist()]
    wrong = torch.tensor([row["label"] != row["truth"] for row in train]).double()
    assert abs(wrong.mean() - 0.2) < 3 * (0.2 * 0.8 / 400) ** 0.5
    scale = toy.find_scale(gaps, 0.2)
    assert torch.sigmoid(-scale * gaps.abs()).mean().item() == pytest.approx(0.2, abs=1e-6)
    near = gaps.abs() < gaps.abs().median()
    assert wrong[near].mean() > wrong[~near].mean()  # the noise is where the responses are alike


def test_flips_are_wrong_wherever_they_fall(built):
    folder = toy.build(built[0], label_noise=0.2, train_pairs=400, test_pairs=100, flips=True)[1]
    train = rows(folder / "train.jsonl")
    gaps = toy.reward_gaps(train).abs()
    wrong = torch.tensor([row["label"] != row["truth"] for row in train]).double()
    assert folder.name == "pairs-flips-0.2" and abs(wrong.mean() - 0.2) < 3 * (0.2 * 0.8 / 400) ** 0.5
    far = wrong[gaps > gaps.median()].mean()
    assert far > 0.13 and all(row["label"] == row["truth"] for row in rows(folder / "test.jsonl"))
    by_difference = rows(built[2] / "train.jsonl")
    assert far > sum(by_difference[i]["label"] != by_difference[i]["truth"] for i in (gaps > gaps.median()).nonzero()) / 200


def test_test_labels_are_noiseless_and_no_prompt_is_in_both_splits(built):
    train, test = rows(built[2] / "train.jsonl"), rows(built[2] / "test.jsonl")
    assert len(train) == 400 and len(test) == 100
    assert all(row["label"] == row["truth"] for row in test)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}


def test_prompt_tokens_begin_the_tokens_of_prompt_and_response(built):
    tokenizer = transformers.AutoTokenizer.from_pretrained(built[1])
    for row in rows(built[2] / "train.jsonl")[:50]:
        prompt, whole = tokenizer(row["prompt"]).input_ids, tokenizer(row["prompt"] + row["response_a"]).input_ids
        assert whole[:len(prompt)] == prompt and prompt[0] == tokenizer.bos_token_id
        assert tokenizer.unk_token_id not in whole


def test_a_second_build_reuses_the_first_and_other_settings_are_refused(built, monkeypatch):
    folder = built[0]
    monkeypatch.setattr(toy, "train_sft", lambda *args: pytest.fail("the model exists already"))
    monkeypatch.setattr(toy, "sample_pairs", lambda *args: pytest.fail("the responses exist already"))
    assert toy.build(folder, label_noise=0.2, train_pairs=400, test_pairs=100) == built[1:]
    other = toy.build(folder, label_noise=0.0, train_pairs=400, test_pairs=100)[1]  # other labels, the same responses
    assert all(row["label"] == row["truth"] for row in rows(other / "train.jsonl"))
    with pytest.raises(ValueError, match="choose another folder, or delete this one"):
        toy.build(folder, label_noise=0.2, train_pairs=401, test_pairs=100)
    for noise in (-0.1, 0.5):
        with pytest.raises(ValueError, match="label_noise is"):
            toy.build(folder, label_noise=noise)


def test_a_build_that_is_killed_leaves_nothing_that_looks_finished(tmp_path):
    def fill(folder):
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        toy.build_folder(tmp_path / "model", {"seed": 0}, fill)
    assert not (tmp_path / "model").exists()


def test_a_fine_tuning_that_fails_is_reported_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(toy.SFT, "learning_rat", 1)
    with pytest.raises(ValueError, match="of the toy model ended with exit code 2: error: .*learning_rat"):
        toy.build(tmp_path, train_pairs=8, test_pairs=8, quiet=True)
    assert not list(tmp_path.iterdir())


def test_mean_gold_reward_is_seeded_and_reads_a_saved_model(built):
    prompts = [row["prompt"] for row in rows(built[2] / "test.jsonl")]
    first = toy.mean_gold_reward(built[1], prompts)
    assert first == toy.mean_gold_reward(built[1], prompts) != toy.mean_gold_reward(built[1], prompts, seed=1)
    assert abs(first) < 1  # the SFT model has no preferences: 2 to 4 words, of mean 0


def test_train_builds_the_task_that_the_config_names(built, train, monkeypatch):
    build = toy.build
    monkeypatch.setattr(toy, "build", lambda folder, label_noise: build(folder, label_noise, 400, 100, quiet=True))
    run = train("toy", model_name_or_path="toy", dataset_mixer="{toy: 1.0}", toy_dir=built[0], toy_label_noise=0.2,
                max_steps=2)
    summary = run.summary()
    assert summary["gold_reward_before"] == toy.mean_gold_reward(
        built[1], [row["prompt"] for row in rows(built[2] / "test.jsonl")])
    assert "gold_reward_after" in summary and "gold reward of generations" in run.stdout
    refused = train("refused-toy", check=2, model_name_or_path="toy", dataset_mixer="{toy: 1.0}", toy_dir=built[0],
                    toy_label_noise=0.5)
    assert "error: toy: label_noise is 0.5" in refused.stderr
