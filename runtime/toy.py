"""The built-in task of the quickstart: a tiny model, preference pairs, and a reward whose truth is known.

A small grammar writes reviews such as "the view was lovely , the staff seemed rude ." with 200 opinion words, each
worth -1 to +1. The gold reward of a response is the sum of its opinion words, so label noise, wrong pseudo-labels and the
quality of a policy can be measured exactly, without a download. It makes:

    DIR/model/             a Llama of about 0.2 M parameters and its tokenizer, trained by `objective: sft` on the grammar
    DIR/responses/         two responses per prompt, sampled from that model, without labels; all noise levels share them
    DIR/pairs-noise-0.05/  train.jsonl (Bradley-Terry labels, 5 % of them wrong) and test.jsonl (noiseless labels)

Departures: the paper (arXiv 2402.09401) and its official code train 7B models on pairs ranked by people or a
judge model, and nobody knows the true label. Here labels follow the Bradley-Terry model that the paper assumes, and
both responses come from the reference policy itself. Results on it are about the method, not about language.

To build the task alone and print a few pairs:    python -m runtime.toy DIR [LABEL_NOISE]
"""

import json
import math
import os
import random
import shutil
import subprocess
import sys
import uuid
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from runtime.config import ROOT
from runtime.errors import UsageError
from runtime.ranks import rank_0_first
from runtime.sources import read_rows

VERSION = 2  # raise it whenever the task changes, so that folders of an older task are not reused
SFT_SENTENCES = 15360  # 120 steps
SFT = {"objective": "sft", "max_length": 96, "max_prompt_length": 32, "num_train_epochs": 1, "do_eval": False,
       "per_device_train_batch_size": 128, "learning_rate": 4e-3, "lr_scheduler_type": "linear", "warmup_ratio": 0.08,
       "weight_decay": 0.01, "num_threads": 1, "save_strategy": "no"}  # keys of train.py
# Variables that a launcher sets for its ranks. The run that trains the toy model is not one of them.
LAUNCHER = {"RANK", "LOCAL_RANK", "CROSS_RANK", "CROSS_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "MASTER_ADDR",
            "MASTER_PORT"}
SAMPLE_BATCH = 1024  # responses sampled at once
MAX_NEW_TOKENS = 48  # the grammar needs at most 20 and EOS

# The lexicon, from the worst word to the mildest: -1.00, -0.99 ... -0.01. The order is a matter of taste and harmless:
# the task only needs a fixed value for each word.
NEGATIVE = """
    atrocious abysmal horrendous appalling disgusting horrific vile hideous revolting repulsive
    horrible terrible awful dreadful ghastly deplorable loathsome nauseating unbearable disastrous
    foul filthy rotten wretched miserable pathetic shameful nasty squalid dire
    lousy hopeless unacceptable dismal hostile shoddy rude ugly grim useless
    disgraceful hateful offensive toxic sickening broken dirty gloomy sloppy careless
    poor bad inferior unpleasant dreary grubby faulty stale crude harsh
    disappointing frustrating annoying irritating tedious messy cold noisy bleak shabby
    overpriced cramped boring bland dull tired clumsy awkward chaotic flawed
    weak slow dated lacking uneven mediocre cheap tacky stuffy confusing
    forgettable uninspired underwhelming lukewarm flat pale thin dim plain ordinary""".split()
# From the mildest word to the best: +0.01, +0.02 ... +1.00.
POSITIVE = """
    passable tolerable okay acceptable adequate sufficient usable fair alright modest
    decent reasonable satisfactory fine functional suitable practical tidy steady sensible
    clean neat solid handy quiet calm pleasant agreeable nice likable
    cosy comfortable friendly helpful polite cheerful warm fresh bright airy
    good enjoyable inviting attentive thoughtful generous relaxing charming lively tasteful
    lovely delightful appealing refreshing satisfying impressive elegant stylish classy graceful
    great admirable excellent splendid marvelous beautiful gorgeous radiant enchanting captivating
    wonderful fantastic terrific fabulous superb amazing brilliant glorious dazzling luxurious
    astonishing remarkable incredible extraordinary spectacular stunning exquisite majestic unforgettable heavenly
    outstanding exceptional sensational phenomenal breathtaking magnificent sublime divine flawless perfect""".split()
HUNDREDTHS = {w: i - 100 for i, w in enumerate(NEGATIVE)} | {w: i + 1 for i, w in enumerate(POSITIVE)}
OPINIONS = list(HUNDREDTHS)

PLACES = """hotel hostel inn motel lodge resort spa villa cabin campsite restaurant cafe bistro bakery bar pub diner
    tavern brewery winery museum gallery theatre cinema opera library zoo aquarium park garden market shop mall
    bookshop gym pool stadium arena club casino church castle palace tower harbour station airport beach""".split()
CITIES = """paris london rome madrid lisbon berlin vienna prague budapest warsaw athens dublin oslo stockholm helsinki
    copenhagen amsterdam brussels zurich geneva milan venice florence naples seville barcelona porto lyon marseille
    hamburg munich cologne krakow riga tallinn vilnius sofia bucharest belgrade zagreb istanbul cairo tunis nairobi
    lagos accra dakar tokyo kyoto osaka seoul beijing shanghai hanoi bangkok jakarta manila delhi mumbai""".split()
ASPECTS = ["staff", "service", "food", "coffee", "music", "decor", "view", "location"]
CLAUSES = ["the {aspect} was {word}", "the {aspect} seemed {word}"]
JOINS = [" , ", " and ", " but "]
PROMPT = "review of the {place} in {city} :"
SPECIALS = ["<pad>", "<unk>", "<s>", "</s>"]


def gold_reward(response):
    """The sum of the values of the opinion words of `response`, each in [-1, 1]. Other words count nothing. The sum is
    taken in whole hundredths, so that equal rewards compare equal."""
    return sum(HUNDREDTHS.get(word, 0) for word in response.split()) / 100


def rewards_differ(a, b):
    """Whether one of two responses is better."""
    return gold_reward(a) != gold_reward(b)


def write_response(rng):
    """A sentence of the grammar: 2 to 4 clauses with one opinion word each, all words equally likely."""
    text = ""
    for i in range(rng.randint(2, 4)):
        text += rng.choice(JOINS) if i else " "
        text += rng.choice(CLAUSES).format(aspect=rng.choice(ASPECTS), word=rng.choice(OPINIONS))
    return text + " ."


def split_prompts(seed):
    """(prompts for training, prompts of the test split): five sixths of all, in a seeded order, and the others."""
    prompts = [PROMPT.format(place=place, city=city) for place in PLACES for city in CITIES]
    random.Random(f"prompts {seed}").shuffle(prompts)
    cut = len(prompts) * 5 // 6
    return prompts[:cut], prompts[cut:]


def make_tokenizer():
    """One token a word of the grammar. Adds BOS by itself, as Llama's tokenizer does, and no EOS."""
    texts = [*PLACES, *CITIES, *ASPECTS, *OPINIONS, *JOINS, *CLAUSES, PROMPT, "."]
    words = {word for text in texts for word in text.split() if "{" not in word}
    vocab = {word: i for i, word in enumerate(SPECIALS + sorted(words))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocab["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        padding_side="left", model_max_length=128, clean_up_tokenization_spaces=False)


def make_model(tokenizer):
    """A random Llama of about 0.2 M parameters."""
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=80, intermediate_size=240, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=True, initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id))


def train_sft(model, tokenizer, folder, prompts, rng, seed, quiet):
    """Fine-tune `model` on fresh sentences and write it and its tokenizer into `folder`. Raises ValueError if that fails."""
    work = folder / ".sft"
    for part in (model, tokenizer):
        part.save_pretrained(work / "start")
    (work / "texts").mkdir()
    write_jsonl(work / "texts" / "train.jsonl", [
        {"prompt": rng.choice(prompts), "completion": write_response(rng)} for _ in range(SFT_SENTENCES)])
    run_train(SFT | {"model_name_or_path": str(work / "start"), "dataset_mixer": {str(work / "texts"): 1.0},
                     "dataset_splits": ["train"], "seed": seed, "output_dir": str(work / "run")},
              work / "sft.yaml", "the fine-tuning of the toy model", quiet)
    for part in load(work / "run"):
        part.save_pretrained(folder)
    shutil.rmtree(work)


def run_train(keys, config, what, quiet):
    """Run train.py with these keys, which are written to the file `config`.

    It runs in a process of its own, because this one may be one rank of many, and on the CPU even if there is a GPU.
    what: the run's name in the error.  quiet: no progress bars.  Raises ValueError if the run fails."""
    config.write_text(json.dumps(keys), encoding="utf-8")  # JSON is YAML
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER} | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, ROOT / "train.py", "--config", config], env=environment, text=True,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE if quiet else None)  # there its bar is
    if done.returncode:
        raise ValueError(f"{what} ended with exit code {done.returncode}: "
                         f"{(done.stderr or 'its error stands above').strip().splitlines()[-1]}")


@torch.no_grad()
def sample(model, tokenizer, prompts, max_new_tokens=MAX_NEW_TOKENS):
    """One response per prompt from the policy itself (temperature 1, nothing cut off), with the global random state.
    Returns the texts, with what separates them from the prompt, and whether each came to its EOS within `max_new_tokens`."""
    texts, finished = [], []
    for start in range(0, len(prompts), SAMPLE_BATCH):
        part = prompts[start : start + SAMPLE_BATCH]
        batch = tokenizer(part, padding=True, padding_side="left", return_tensors="pt")
        out = model.generate(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=max_new_tokens,
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
        new = out[:, batch.input_ids.size(1) :]  # (B, N)
        finished += (new == tokenizer.eos_token_id).any(1).tolist()
        # What the whole text has and the prompt has not: whether a token brings its space with it is up to the tokenizer.
        starts, wholes = (tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (batch.input_ids, out))
        texts += [whole[len(start):] for start, whole in zip(starts, wholes)]
    return texts, finished


def sample_pairs(model, tokenizer, prompts, quiet, usable=rewards_differ, max_new_tokens=MAX_NEW_TOKENS):
    """Rows {prompt, response_a, response_b}. A pair with an unfinished response is drawn again, and so is one that is not
    `usable`, a function of two responses: by default if their rewards are equal (so also if they are).

    Raises RuntimeError if 100 draws do not give a usable pair."""
    rows = [None] * len(prompts)
    bar = tqdm(total=len(prompts), desc="pairs (sampling)", disable=quiet)
    todo = list(range(len(prompts)))
    for _ in range(100):
        for start in range(0, len(todo), SAMPLE_BATCH // 2):
            part = todo[start : start + SAMPLE_BATCH // 2]
            texts, finished = sample(model, tokenizer, [prompts[i] for i in part for _ in "ab"], max_new_tokens)
            for k, i in enumerate(part):
                (a, b), done = texts[2 * k : 2 * k + 2], all(finished[2 * k : 2 * k + 2])
                if done and usable(a, b):
                    rows[i] = {"prompt": prompts[i], "response_a": a, "response_b": b}
                    bar.update()
        todo = [i for i, row in enumerate(rows) if row is None]
        if not todo:
            bar.close()
            return rows
    raise RuntimeError(f"the model gave no usable pair in 100 draws for the prompt {prompts[todo[0]]!r}")


def find_scale(gaps, label_noise):
    """The Bradley-Terry scale at which the expected share of wrong labels, mean of sigmoid(-scale * |gap|), is
    `label_noise`: bisection on the logarithm of the scale, since that share falls from 1/2 to 0 as the scale grows."""
    low, high = 1e-9, 1e9
    for _ in range(100):
        scale = math.sqrt(low * high)
        wrong = torch.sigmoid(-scale * gaps.abs()).mean().item()
        low, high = (scale, high) if wrong > label_noise else (low, scale)
    return scale


def reward_gaps(rows):
    """Gold reward of a minus that of b: (rows,) fp64."""
    return torch.tensor([gold_reward(row["response_a"]) - gold_reward(row["response_b"]) for row in rows],
                        dtype=torch.float64)


def label_rows(rows, gaps, label_noise, seed, flips=False):
    """Add "truth", the noiseless label, and "label", drawn with P(a preferred) = sigmoid(scale * gap); with `flips`, an
    annotator who errs as often on each pair.  gaps: (rows,) fp64, none is 0.

    The random numbers depend only on the seed: a label that is wrong at a low noise is wrong at each higher one too."""
    right = torch.sigmoid(find_scale(gaps, label_noise) * gaps.abs())  # probability of the true label
    if flips:
        right = torch.full_like(gaps, 1 - label_noise)
    rng = random.Random(f"labels {seed}")
    labelled = []
    for row, gap, p in zip(rows, gaps.tolist(), right.tolist()):
        truth, other = ("a", "b") if gap > 0 else ("b", "a")
        labelled.append(row | {"label": truth if rng.random() < p else other, "truth": truth})
    return labelled


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@contextmanager
def seeded_and_silent(seed):
    """A separate CPU random state, and no progress bars of transformers; afterwards the caller's settings are restored."""
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            yield
    finally:
        if bars:
            logging.enable_progress_bar()


def build_folder(target, settings, fill):
    """Make `target` with `fill(folder)`, or reuse it if its toy.json holds the same `settings`. The work is done in a
    temporary folder that is renamed at the end: a killed build never looks finished, and if two processes build at
    once, the first to finish wins and the other takes its result.

    Raises ValueError if `target` was built with other settings, or is something else."""
    marker, advice = target / "toy.json", "choose another folder, or delete this one"
    occupied = target.exists() and any(target.iterdir())  # checked before the marker, which arrives with the folder
    if occupied and not marker.exists():
        raise ValueError(f"{target} exists but was not built here: {advice}")
    if not marker.exists():
        temporary = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}")
        temporary.mkdir(parents=True)
        try:
            fill(temporary)
            (temporary / "toy.json").write_text(json.dumps(settings) + "\n", encoding="utf-8")
            os.replace(temporary, target)
        except OSError:
            if not marker.exists():  # not the other process, which would have left a finished folder
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    found = json.loads(marker.read_text(encoding="utf-8"))
    if found != settings:
        raise ValueError(f"{target} was built with {found}, not {settings}: {advice}")
    return target


def build(directory, label_noise=0.05, train_pairs=16384, test_pairs=512, seed=0, flips=False, quiet=False):
    """Build the task under `directory`, or reuse what is there. Returns the folders of the model and of the pairs.

    label_noise: expected share of wrong labels among the training pairs, at least 0 and less than 0.5.  train_pairs,
    test_pairs: rows of train.jsonl and test.jsonl, {prompt, response_a, response_b, label, truth}; no prompt is in both, and
    test labels are noiseless.  flips: labels are wrong at random, not where the rewards are close.  quiet: no progress bars.
    The caller's random state does not change.
    Raises ValueError for a noise out of range, or a folder that was built with other settings.
    """
    if not 0 <= label_noise < 0.5:
        raise ValueError(f"label_noise is {label_noise}, expected at least 0 and less than 0.5")
    root, train_prompts, test_prompts = Path(directory), *split_prompts(seed)
    of_model = {"version": VERSION, "seed": seed}
    sizes = of_model | {"train_pairs": train_pairs, "test_pairs": test_pairs}

    def fill_model(folder):
        tokenizer = make_tokenizer()
        train_sft(make_model(tokenizer), tokenizer, folder, train_prompts, random.Random(f"sentences {seed}"), seed, quiet)

    def fill_responses(folder):
        model, tokenizer = load(model_dir)
        prompts = [train_prompts[i % len(train_prompts)] for i in range(train_pairs)]
        prompts += [test_prompts[i % len(test_prompts)] for i in range(test_pairs)]
        rows = sample_pairs(model, tokenizer, prompts, quiet)
        write_jsonl(folder / "train.jsonl", rows[:train_pairs])
        write_jsonl(folder / "test.jsonl", rows[train_pairs:])

    def fill_pairs(folder):
        for name, noise in (("train.jsonl", label_noise), ("test.jsonl", 0)):
            rows = read_jsonl(responses_dir / name)
            write_jsonl(folder / name, label_rows(rows, reward_gaps(rows), noise, seed, flips))

    with seeded_and_silent(seed):
        model_dir = build_folder(root / "model", of_model, fill_model)
    with seeded_and_silent(seed):
        responses_dir = build_folder(root / "responses", sizes, fill_responses)
    pairs_dir = build_folder(root / f"pairs-{'flips' if flips else 'noise'}-{label_noise:g}",
                             sizes | {"label_noise": label_noise} | ({"flips": True} if flips else {}), fill_pairs)
    return model_dir, pairs_dir


def write_untrained(folder, sizes):
    """A small task without training, for tests and benchmarks: folder/model with random weights, and for each file of
    `sizes` {path in folder: number of pairs} sentences of the grammar, labelled by the gold reward."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    make_model(tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rng = random.Random(0)
    for name, count in sizes.items():
        rows = []
        for _ in range(count):
            a, b = write_response(rng), write_response(rng)
            rows.append({"prompt": f"review of the {rng.choice(PLACES)} :", "response_a": a, "response_b": b,
                         "label": "a" if gold_reward(a) >= gold_reward(b) else "b"})
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(folder / name, rows)


def put_in_place(config):
    """Build the task if the config names `toy`, and put its folders in place of that name.

    Returns the prompts of its test split, to generate from, or None. Raises UsageError."""
    if "toy" not in (config.model_name_or_path, *config.dataset_mixer):
        return None
    try:
        model, pairs = rank_0_first(lambda: build(config.toy_dir, label_noise=config.toy_label_noise))
    except ValueError as error:
        raise UsageError(f"toy: {error}")
    config.dataset_mixer = {str(pairs) if source == "toy" else source: share
                            for source, share in config.dataset_mixer.items()}
    if config.model_name_or_path == "toy":
        config.model_name_or_path = str(model)
    return [row["prompt"] for _, row in read_rows(str(pairs), "test")]


def load(model_dir):
    """(the model in fp32, ready to sample from, its tokenizer)."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(model_dir)


def gold_rewards_of(prompts, responses):
    return [gold_reward(response) for response in responses]


def mean_gold_reward(model_dir, prompts, samples=1, max_new_tokens=MAX_NEW_TOKENS, seed=0, rewards=gold_rewards_of):
    """Mean gold reward of `samples` responses a prompt, sampled at temperature 1 from the model saved in `model_dir`.
    A response that does not end within `max_new_tokens` counts as it is. The same seed gives the same samples; the
    caller's random state is left as it was.  rewards: of lists of prompts and responses."""
    with seeded_and_silent(seed):
        model, tokenizer = load(model_dir)
        texts, _ = sample(model, tokenizer, prompts * samples, max_new_tokens)
    return sum(rewards(prompts * samples, texts)) / len(texts)


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        sys.exit("usage: python -m runtime.toy DIR [LABEL_NOISE]")
    torch.set_num_threads(1)  # a model this small is several times faster on one thread
    model_dir, pairs_dir = build(sys.argv[1], *map(float, sys.argv[2:]))
    rows = read_jsonl(pairs_dir / "train.jsonl")
    for row in rows[:4]:
        print(row["prompt"])
        for side in "ab":
            text = row[f"response_{side}"]
            print(f"  {side} {gold_reward(text):+.2f} {'preferred' if row['label'] == side else '':9} {text.strip()}")
    wrong = sum(row["label"] != row["truth"] for row in rows) / len(rows)
    prompts = [row["prompt"] for row in read_jsonl(pairs_dir / "test.jsonl")]
    print(f"{pairs_dir}: {len(rows):,} training pairs, {wrong:.1%} of the labels wrong")
    print(f"{model_dir}: mean gold reward {mean_gold_reward(model_dir, prompts):+.3f}")
