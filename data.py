"""Preference pairs: from rows to token ids to batches.

    parsed row                   → canonical      its id, and which of the two responses is y1
    sources                      → load_pairs     Pairs (no label inside), and the labels, which only the oracle gets
    epoch                        → epoch_order    which pairs each step takes
    step                         → split_batch    which pairs each rank takes in each micro-step
    pairs                        → collate        PairBatch, one row per pair: [prompt | y1 | y2]

Files, folders, the hub, mixing and decontamination are in runtime/sources.py, the formats of rows in runtime/formats.py, the
chat template and the token ids of a pair in runtime/rendering.py.

Departures from the official code: the label is removed here, before anything else sees the pair. The prompt is what both
conversations share, and a row whose prompts differ is refused. Nothing is dropped or cut without being counted.

A hash of the pair's content decides which response is y1. That does not depend on the label and is the same in every
run, so a label in a ledger keeps its meaning.

Legend: B pairs, T tokens of a row, N response tokens of a batch.  Try it: `python data.py --config configs/quickstart.yaml`,
with the flags of train.py, prints three pairs as the model will see them.
"""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import datasets
import numpy as np
import torch

from runtime.errors import DataError, UsageError
from runtime.formats import parse_example, parse_row
from runtime.ranks import all_gather, rank_0_first, say
from runtime.rendering import Renderer
from runtime.sources import decontaminate, hash_of, hash_of_code, mix, processes, read_rows

# The code that decides which tokens a row becomes, for the keys of their caches.
CODE = hash_of_code("data.py", "runtime/formats.py", "runtime/rendering.py", "runtime/sources.py")
# epoch_order groups pairs of similar length within windows of this many pairs.
LENGTH_WINDOW = 2048


# ----------------------------------------------------------------------------------------------------------------------
# Rows

def canonical(parsed):
    """(id, order) of a parsed row. Neither depends on the order in which the row gives its responses.

    id: hash of the pair's content.  order: indices of the responses that become y1 and y2, drawn from that hash.
    """
    texts = [json.dumps(r, sort_keys=True) for r in parsed["responses"]]
    prompt = json.dumps(parsed["prompt"], sort_keys=True)
    digest = hashlib.blake2b("\0".join([prompt, *sorted(texts)]).encode(), digest_size=16)
    order = sorted(range(len(texts)), key=lambda k: texts[k])
    if hashlib.blake2b(digest.digest(), digest_size=1).digest()[0] & 1:
        order.reverse()
    return digest.hexdigest(), order


def parsed_rows(source, split, config_name):
    """Yield the pairs of a split as rows with the columns id; prompt, first (y1) and second (y2), as JSON; place; label and
    truth, +1 (y1 is better), −1, or 0 (unknown)."""
    place = None
    for place, row in read_rows(source, split, config_name):
        parsed = parse_row(row, place)
        id, order = canonical(parsed)
        sign = {None: 0, order[0]: 1, order[1]: -1}
        first, second = (json.dumps(parsed["responses"][k]) for k in order)
        yield {"id": id, "prompt": json.dumps(parsed["prompt"]), "first": first, "second": second, "place": place,
               "label": sign[parsed["label"]], "truth": sign[parsed["truth"]]}
    if place is None:
        raise DataError(f"{source}: its split {split} has no rows: add some, or take it out of dataset_splits")


def parsed_examples(source, split, config_name):
    """Yield the SFT examples of a split in the same columns, with None as the second response."""
    place = None
    for place, row in read_rows(source, split, config_name):
        for prompt, response in parse_example(row, place):
            id, _ = canonical({"prompt": prompt, "responses": [response]})
            yield {"id": id, "prompt": json.dumps(prompt), "first": json.dumps(response), "second": None, "place": place,
                   "label": 0, "truth": 0}
    if place is None:
        raise DataError(f"{source}: its split {split} has no rows: add some, or take it out of dataset_splits")


def tokenize_rows(rows, renderer):
    """For a batch of parsed rows: token ids, number of tokens, why to drop each row ("": keep it), and what happened to it
    (notes, one a line). Raises DataError, which names the row."""
    pairs = [(json.loads(prompt), [json.loads(response) for response in (first, second) if response is not None])
             for prompt, first, second in zip(rows["prompt"], rows["first"], rows["second"])]
    try:
        tokens = renderer.render(pairs)
    except Exception:
        for place, pair in zip(rows["place"], pairs):  # find the row that failed
            try:
                renderer(*pair)
            except DataError as error:
                raise DataError(f"{place}: {error}")
            except Exception as error:  # such as a template's own raise_exception
                raise DataError(f"{place}: the chat template failed ({type(error).__name__}: {error}): set another "
                                "chat_template, or change the row")
        raise
    prompts, notes = [prompt for prompt, _, _ in tokens], ["\n".join(notes) for *_, notes in tokens]
    firsts, seconds = [responses[0] for _, responses, _ in tokens], [responses[-1] for _, responses, _ in tokens]
    if rows["second"][0] is None:  # SFT examples
        drops, seconds = ["" if first else "empty response" for first in firsts], [[] for _ in firsts]
    else:
        drops = ["empty response" if not (first and second) else "equal responses" if first == second else ""
                 for first, second in zip(firsts, seconds)]
    return {"prompt_ids": prompts, "first_ids": firsts, "second_ids": seconds,
            "tokens": [sum(map(len, parts)) for parts in zip(prompts, firsts, seconds)],
            "drop": drops, "notes": notes}


# ----------------------------------------------------------------------------------------------------------------------
# The data set of a run

@dataclass
class Pairs:
    """Tokenised pairs of one split. The training split never holds a label.

    table: a datasets.Dataset with columns id, prompt_ids, first_ids, second_ids, tokens (of the whole pair).
    fingerprint: changes with any id or token, and with their order.  counts: what was read, what was dropped and why.
    texts: the columns prompt, first, second of the same rows as JSON (a string or messages), for people and judges; and
    place, the row's file and number.
    kind: "train" or "test".  shared: whether a row of a batch holds both responses, or one (see PairBatch).
    ref_logps: (pairs, 2) fp32, log π_ref(y|x), once it is known.  labels: (pairs,) ±1.0, of the test split alone.
    soft_labels: (pairs,) between −1 and 1, from a committee (labels/committee.py), where there is one.
    """
    table: datasets.Dataset
    fingerprint: str
    counts: dict
    texts: datasets.Dataset | None = None
    kind: str = "train"
    shared: bool = True
    ref_logps: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    soft_labels: torch.Tensor | None = None

    def __post_init__(self):
        self.ids = self.table["id"][:]
        self.lengths = self.table["tokens"][:]
        self._arrow = self.table.with_format("arrow")

    def __len__(self):
        return len(self.table)

    def place(self, id):
        """Where a pair was read: "FILE, row N"."""
        return self.texts[self.ids.index(id)]["place"]

    def text_by_id(self):
        """A function from a pair's id to (prompt, first, second), each JSON."""
        rows = {id: row for row, id in enumerate(self.ids)}
        return lambda id: tuple(self.texts[rows[id]][name] for name in ("prompt", "first", "second"))

    def token_ids(self, rows):
        """[(prompt, first, second)] of these rows: integer arrays, straight from the memory-mapped Arrow table."""
        table, columns = self._arrow[rows], []
        for name in ("prompt_ids", "first_ids", "second_ids"):
            column = table[name].combine_chunks()  # one flat array of tokens, and the offsets at which rows begin and end
            tokens = column.values.to_numpy(zero_copy_only=False)
            columns.append([tokens[start:end] for start, end in pairwise(column.offsets.tolist())])
        return list(zip(*columns))

    def batch(self, rows, device):
        """The PairBatch of these rows on `device`, with what is known of the pairs: reference log-probs, (soft) labels."""
        assert self.labels is None or self.kind == "test", "training pairs must not hold labels"
        batch = collate(self, rows, self.shared)
        if self.ref_logps is not None:  # (B, 2); a filler's pair may not be one of those that were scored
            batch.ref_logps = self.ref_logps[batch.rows] if rows else torch.zeros(1, 2)
        batch.labels = None if self.labels is None else self.labels[batch.rows]  # (B,)
        batch = batch.to(device)
        if self.soft_labels is not None:  # (B,), on the CPU, where labels are chosen
            batch.soft_labels = self.soft_labels[rows] if rows else torch.zeros(1)
        return batch


def load_pairs(mixer, splits, renderer, kind, configs=None, workers=None, decontaminate_with=None, max_samples=None,
               seed=42, say=print, examples=False):
    """Load one kind of split ("train" or "test") from a mix of sources.

    mixer: {source: fraction}; a source is a hub id, a `save_to_disk` folder, a folder with SPLIT.jsonl (parquet, csv,
    json), or one file, which is training data. A fraction takes a random share of the source's training pairs; test pairs
    are always taken whole.  splits: names of splits of this kind.  configs: {source: config name}.  workers: processes.
    decontaminate_with: drop the pairs that contain text of this benchmark.  max_samples: keep a random sample of at most
    this many pairs.  examples: read SFT examples; each is a pair with an empty second response and no label.
    Returns (Pairs, labels, truths). labels and truths, {pair id: +1 (y1 is better) or −1}, are for the oracle alone and
    leave out pairs without one.  Returns (None, {}, {}) if no source has such a split.
    Raises DataError.
    """
    parse, version = (parsed_examples, [CODE, "examples"]) if examples else (parsed_rows, [CODE])
    rows, whole = mix(mixer, splits, kind, parse, version, configs, max_samples, seed)
    if rows is None:
        return None, {}, {}
    counts = {"rows": len(rows)}
    if decontaminate_with:
        rows = decontaminate(rows, decontaminate_with, workers)
        counts["contaminated"] = counts["rows"] - len(rows)

    rendering = renderer.fingerprint()
    if len(rows):
        rows = rows.map(
            tokenize_rows, fn_kwargs={"renderer": renderer}, batched=True, batch_size=256,
            num_proc=processes(workers, len(rows)), desc=f"tokenising {kind} pairs",
            new_fingerprint=hash_of(rows._fingerprint, rendering))
        rows = _drop_unusable(rows, counts)
    if not len(rows):
        raise DataError(f"{', '.join(mixer)}: no {kind} pair is left ({_plain(counts)})")

    labels, truths, conflicts = _answers(rows, whole)
    pairs = Pairs(rows.select_columns(["id", "prompt_ids", "first_ids", "second_ids", "tokens"]),
                  hash_of(rendering, rows["id"][:], hash_of_tokens(rows)), counts,
                  rows.select_columns(["prompt", "first", "second", "place"]), kind)
    counts.update(repeated=len(pairs) - len(set(pairs.ids)), contradicting=conflicts)
    counts.update(Counter(note for notes in rows["notes"][:] for note in notes.splitlines()))
    say(f"{kind}: {_plain(counts)}")
    return pairs, labels, truths


def hash_of_tokens(rows):
    """Hash of the token ids of all rows, in order. A template may print today's date, so the rows and the template alone do
    not decide the tokens."""
    digest, columns = hashlib.blake2b(digest_size=16), ["prompt_ids", "first_ids", "second_ids"]
    for table in rows.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        for name in columns:
            column = table[name].combine_chunks()
            for values in (column.value_lengths(), column.flatten()):
                digest.update(values.to_numpy(zero_copy_only=False).astype(np.int64).tobytes())
    return digest.hexdigest()


def load_split(config, tokenizer, kind, limit):
    """(Pairs or None, labels, truths) of the run's "train" or "test" splits, as load_pairs returns them.

    All ranks call it together. Raises UsageError if they do not find the same pairs.
    """
    renderer = Renderer(tokenizer, config.max_prompt_length, config.max_length, config.auto_insert_empty_system_msg)
    if renderer.empty_system and kind == "train":
        say("conversations without a system message begin with an empty one (auto_insert_empty_system_msg)")
    names = dict(zip(config.dataset_mixer, config.dataset_configs or ()))
    splits = [split for split in config.dataset_splits if ("train" in split) == (kind == "train")]
    pairs, labels, truths = rank_0_first(lambda: load_pairs(
        config.dataset_mixer, splits, renderer, kind, names, config.preprocessing_num_workers,
        config.decontaminate_with if kind == "train" else None, limit, config.seed, say, config.objective == "sft"))
    if len(set(all_gather(pairs and pairs.fingerprint))) > 1:  # hosts may have files of their own
        raise UsageError(f"the {kind} pairs are not the same on all hosts: copy data set and tokenizer from one to the "
                         "others, or put them on a file system that all share")
    return pairs, labels, truths


def warn_of_overlap(train, test, what="pairs"):
    """Say how many of the test pairs (or examples: `what`) are training pairs too, and so are not held out."""
    held_out = set(test.ids)
    if shared := len(held_out.intersection(train.ids)):
        say(f"WARNING: {shared:,} of {len(held_out):,} test {what} are training {what} too, so held-out results look "
            "too good: take them out of one of the two splits")


def _drop_unusable(rows, counts):
    """Tokenised rows without those that have a reason to be dropped. Adds to counts."""
    drops = rows["drop"][:]
    for reason in ("empty response", "equal responses"):
        counts[reason] = drops.count(reason)
    keep = [i for i, drop in enumerate(drops) if not drop]
    counts["pairs"] = len(keep)
    return rows.select(keep) if len(keep) < len(rows) else rows


def _answers(rows, whole):
    """({id: label}, {id: truth}, number of rows whose label is not the pair's).

    Where the rows of a pair disagree, as those of several annotators do, the majority counts, and in a draw the first row:
    of `whole`, so that a pair has the same label in every random sample.
    """
    mine = rows["id"][:]  # whole columns: one by one is slow
    wanted = set(mine)
    votes = [vote for vote in zip(*(whole[name][:] for name in ("id", "label", "truth"))) if vote[0] in wanted]
    ids, labels, truths = zip(*votes)
    found = majority(ids, labels)
    outvoted = sum(label != 0 and label != found[id] for id, label in zip(mine, rows["label"][:]))
    return found, majority(ids, truths), outvoted


def majority(ids, votes):
    """{id: what most of its votes say, in a draw the first}.  votes: +1, −1, or 0 for none."""
    found, disputed = {}, {}  # disputed: {id: sum of its votes}, usually of few pairs
    for id, vote in zip(ids, votes):
        if vote and found.setdefault(id, vote) != vote:
            disputed[id] = 0
    for id, vote in zip(ids, votes) if disputed else ():
        if id in disputed:
            disputed[id] += vote
    return found | {id: 1 if total > 0 else -1 for id, total in disputed.items() if total}


def _plain(counts):
    """The counts in words. Zeros are left out, except those of rows and pairs."""
    words = {"rows": "rows read", "contaminated": "dropped as contaminated",
             "empty response": "dropped for an empty response", "equal responses": "dropped for equal responses",
             "pairs": "pairs", "repeated": "of them repeated",
             "contradicting": "outvoted (the label of most of a pair's rows counts, in a draw the first)"}
    return ", ".join(f"{n:,} {words.get(key, key)}" for key, n in counts.items() if n or key in ("rows", "pairs"))


# ----------------------------------------------------------------------------------------------------------------------
# Order and batches

def epoch_order(lengths, epoch, seed, step_pairs=1, group_by_length=False):
    """Order of the pairs in an epoch: a permutation drawn from (seed, epoch), which a resumed run can draw again.

    lengths: tokens of every pair.  group_by_length: take windows of about LENGTH_WINDOW pairs of that permutation, sort
    each by length, cut it into steps, and shuffle the steps, so that the pairs of a step are of similar length and need
    little padding. The pairs that do not fill the epoch's last step stay a random draw. The order does not depend on how
    a step is cut into micro-batches or ranks.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    if not group_by_length:
        return order
    whole = len(order) - len(order) % step_pairs
    order, rest = order[:whole], order[whole:]
    window_pairs = max(1, LENGTH_WINDOW // step_pairs) * step_pairs
    grouped = []
    for start in range(0, whole, window_pairs):
        window = sorted(order[start:start + window_pairs], key=lambda i: (lengths[i], i))
        for step in torch.randperm(len(window) // step_pairs, generator=generator).tolist():
            grouped += window[step * step_pairs:(step + 1) * step_pairs]
    return grouped + rest


def split_batch(rows, lengths, ranks, most_pairs, most_tokens):
    """Deal pairs out: [micro_step][rank] -> pairs, at most `most_pairs` per rank and `most_tokens` including padding.

    rows: indices of the pairs.  lengths: tokens of every pair; a pair longer than most_tokens gets a micro-batch alone.
    Pairs are sorted by length, so that a micro-step has little padding and no rank waits long for another. The longest
    come first, so that a run that does not fit into memory fails at once. How a step is cut does not change its gradient.
    If there are too few pairs for the last micro-step, its micro-batches are smaller, and some may be empty.
    """
    rows = sorted(rows, key=lambda i: (-lengths[i], i))
    micro_steps = []
    while rows:
        count = ranks * max(1, min(most_pairs, most_tokens // lengths[rows[0]]))
        taken, rows = rows[:count], rows[count:]
        bounds = [len(taken) * r // ranks for r in range(ranks + 1)]
        micro_steps.append([taken[a:b] for a, b in pairwise(bounds)])
    return micro_steps


@dataclass
class PairBatch:
    """B pairs as the model reads them: one row per pair, [prompt | y1 | y2], if `shared`; else two, [prompt | y].

    ids: B pair ids, None for a filler.  rows: (B,) indices into the Pairs.  weights: (B,) 1, or 0 for a filler.
    input_ids, segments (0 prompt, 1 y1, 2 y2, −1 padding), positions: (B, T), or (2B, T) with two rows per pair.
    sources: (N,) flat index of the state that predicts each response token.  targets: (N,) those tokens.
    lengths: (2B,) tokens of each response.  tokens: number of real tokens; the prompt counts once per response.
    prompt_tokens: of the prompts of all rows.  longest: tokens of the longest prompt with one response.
    ref_logps: (B, 2) log π_ref(y|x), labels: (B,) ±1.0, soft_labels: (B,), filled by Pairs.batch where they are known.
    """
    ids: list
    shared: bool
    tokens: int
    prompt_tokens: int
    longest: int
    rows: torch.Tensor
    weights: torch.Tensor
    input_ids: torch.Tensor
    segments: torch.Tensor
    positions: torch.Tensor
    sources: torch.Tensor
    targets: torch.Tensor
    lengths: torch.Tensor
    ref_logps: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    soft_labels: torch.Tensor | None = None

    def to(self, device):
        """The batch on `device`."""
        return PairBatch(**{k: to_device(v, device) if torch.is_tensor(v) else v for k, v in vars(self).items()})


def to_device(tensor, device):
    """A tensor of the host on `device`. For a GPU it is pinned first, so that the copy does not wait for the work queued."""
    pin = torch.device(device).type == "cuda" and tensor.device.type == "cpu"
    return (tensor.pin_memory() if pin else tensor).to(device, non_blocking=True)


def collate(pairs, rows, shared=True, pad=0):
    """The PairBatch of the pairs with these indices, on the CPU. SFT examples get one row [prompt | y] each, (B,) lengths.

    Without indices, the batch is one filler: pair 0 with weight 0, so that a rank that has no pairs still takes part in
    what all ranks do together.
    """
    filler = not rows
    rows = list(rows) or [0]
    layout = []  # one list of (segment, token ids) per row of the batch
    for prompt, *responses in pairs.token_ids(rows):
        spans = list(enumerate(filter(len, responses), 1))
        layout += [[(0, prompt), *spans]] if shared else [[(0, prompt), span] for span in spans]
    width = max(sum(len(ids) for _, ids in spans) for spans in layout)  # T
    input_ids = np.full((len(layout), width), pad, np.int64)  # (B or 2B, T)
    segments, positions = np.full_like(input_ids, -1), np.zeros_like(input_ids)
    sources, targets, tokens = [], [], 0
    for n, spans in enumerate(layout):
        prompt_length, start = len(spans[0][1]), 0
        for segment, ids in spans:
            end = start + len(ids)
            input_ids[n, start:end], segments[n, start:end] = ids, segment
            # Positions of both responses continue from the prompt.
            positions[n, start:end] = np.arange(len(ids)) + (prompt_length if segment else 0)
            if segment:
                # Each state predicts the next token; the prompt's last state predicts the first token of both responses.
                source = np.arange(start - 1, end - 1)
                source[0] = prompt_length - 1
                sources.append(n * width + source)
                targets.append(ids)
                tokens += prompt_length + len(ids)
            start = end
    return PairBatch(
        ids=[None] if filler else [pairs.ids[row] for row in rows], shared=shared, tokens=0 if filler else tokens,
        prompt_tokens=sum(len(spans[0][1]) for spans in layout), longest=int(positions.max()) + 1,
        rows=torch.tensor(rows), weights=torch.full((len(rows),), 0.0 if filler else 1.0),
        input_ids=torch.from_numpy(input_ids), segments=torch.from_numpy(segments), positions=torch.from_numpy(positions),
        sources=torch.from_numpy(np.concatenate(sources)), targets=torch.from_numpy(np.concatenate(targets, dtype=np.int64)),
        lengths=torch.tensor([len(ids) for ids in targets]))


if __name__ == "__main__":
    from runtime.launch import launch
    from runtime.preview import preview

    launch(preview)
