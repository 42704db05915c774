"""People's labels: the methods of query_efficiency.py with a real model on pairs that people labelled, cross-validated.

    python benchmarks/humans.py MODEL PAIRS                a night on two cores with fast bf16 (avx512_bf16)
    python benchmarks/humans.py MODEL PAIRS --size gpu     more pairs and folds, on one GPU
    python benchmarks/humans.py MODEL PAIRS --report       run nothing; write the page of the runs that have finished

MODEL: a chat model, such as a folder with SmolLM2-135M-Instruct.  PAIRS: a file, folder or hub id of labelled pairs in any
form that train.py reads, such as a jsonl(.gz) of HH dialogues; its split `train` is used.

The prompts fall into six parts by a hash, all pairs of a prompt into the same part. Part 0 is held out to choose learning
rates: each method has its own, the best of the same grid. Then each of the other parts is held out in turn (a fold), and the
methods train on the rest with their rates, for the same steps. Differences are paired, fold by fold. Nobody knows here
what people prefer without noise: accuracy is the share of held-out pairs on which the policy agrees with them. Beside it
stands the rule that the longer response is preferred, which a policy has to beat.

A run that has finished is not run again, unless the model's files, the pairs or the settings in this file have changed; runs
go fold by fold, so that stopping leaves a balanced table. The pairs are copied into outputs/humans/ and, as by each run of
train.py, into $HF_HOME/datasets; no run keeps its model. Writes benchmarks/results/humans.md, or --page.
"""

import argparse
import contextlib
import hashlib
import json
import re
import shutil
import signal
import statistics
import sys
import time
from dataclasses import astuple, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from runtime.launch import command  # noqa: E402  first: it sets what DeepSpeed reads when it is imported

# isort: split
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import train  # noqa: E402
from benchmarks.query_efficiency import METHODS, choose, extended  # noqa: E402
from benchmarks.query_report import text  # noqa: E402
from data import canonical, majority  # noqa: E402
from runtime.errors import DataError, Stopped, UsageError, one_line  # noqa: E402
from runtime.files import replace_text, writing  # noqa: E402
from runtime.formats import parse_row  # noqa: E402
from runtime.model import folder_fingerprint  # noqa: E402
from runtime.sources import has_split, read_rows  # noqa: E402

PARTS = 6
SHARE = 1 / 3  # of the labels, for the methods that buy some
NAMES = ["DPO, all labels", "random subset", "committee", "paper, γ = 0.7"]
ALL, SUBSET, COMMITTEE = NAMES[:3]
STEP = 16  # pairs
BASE = {"bf16": True, "beta": 0.1, "max_length": 512, "max_prompt_length": 256, "per_device_train_batch_size": STEP,
        "per_device_eval_batch_size": STEP, "save_strategy": "no", "logging_steps": 10, "seed": 0}


@dataclass(frozen=True)
class Size:
    """How much is run.  pairs: at most that many to train on.  folds: of the five.  rates: the grid.  keys: of train.py."""
    pairs: int
    folds: int
    rates: tuple
    keys: dict


SIZES = {"cpu": Size(768, 3, (1.5e-5, 5e-5), {"max_eval_samples": 768}),
         "gpu": Size(10**6, 5, (1.5e-5, 5e-5), {"micro_batch_tokens": 32768})}


def read(source):
    """([(part, row as JSON)], the share in which the longer response is preferred) of the pairs in the split `train`.

    A pair that several rows hold, as those of several annotators do, counts once, with the label of most of them: or a
    random third of the rows would buy more than a third of the labels. Lengths are in characters; equally long responses
    count half. Raises DataError where a row has no label, or a part no pair.
    """
    source, found = str(source), []  # [(pair, ±1: whether its first response is better, row)]
    if not has_split(source, "train"):
        raise DataError(f"{source}: has no split train, which is the one that is read: name a file with the pairs, or a "
                        "folder that has it")
    for place, row in read_rows(source, "train"):
        parsed = parse_row(row, place)
        if parsed["label"] is None:
            raise DataError(f"{place}: no label; this benchmark needs one for each pair: leave out the pairs without one, "
                            "and those without a preference")
        prompt = json.dumps(parsed["prompt"], sort_keys=True)
        part = int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=4).digest(), "big") % PARTS
        chosen, rejected = (characters(parsed["responses"][k]) for k in (parsed["label"], 1 - parsed["label"]))
        id, (first, _) = canonical(parsed)
        found.append((id, 1 if parsed["label"] == first else -1, (
            part, json.dumps(row, default=str), (chosen > rejected) + 0.5 * (chosen == rejected))))  # default: a date
    labels, kept = majority([id for id, *_ in found], [vote for _, vote, _ in found]), {}
    for id, vote, row in found:
        if vote == labels[id]:
            kept.setdefault(id, row)
    rows, longer = [row[:2] for row in kept.values()], [row[2] for row in kept.values()]
    if repeated := len(found) - len(rows):
        print(f"{source}: {repeated:,} rows repeat a pair; the label of most of its rows counts, in a draw the first")
    if empty := sorted({*range(PARTS)} - {part for part, _ in rows}):
        raise DataError(f"{source}: {len(rows):,} pairs, whose prompts fall into {PARTS - len(empty)} of {PARTS} parts: "
                        "this benchmark needs more prompts")
    return rows, statistics.mean(longer)


def split(rows, folder):
    """Write rows as folder/part-N/{train,test}.jsonl: test holds that part of the prompts, train the others."""
    for held_out in range(PARTS):
        target = folder / f"part-{held_out}"
        target.mkdir(parents=True, exist_ok=True)
        for name, chosen in (("train", [row for part, row in rows if part != held_out]),
                             ("test", [row for part, row in rows if part == held_out])):
            (target / f"{name}.jsonl").write_text("".join(f"{row}\n" for row in chosen), encoding="utf-8")


def fewest(rows):
    """The number of training pairs where the largest part is held out."""
    return min(sum(part != held_out for part, _ in rows) for held_out in range(PARTS))


def model_files(folder):
    """Hash of all files in a model's folder that decide a run: weights, config, tokenizer, chat template."""
    digest = hashlib.blake2b(folder_fingerprint(folder).encode(), digest_size=16)
    for path in sorted(Path(folder).iterdir()):
        if path.suffix in (".json", ".jinja", ".model", ".txt"):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def characters(response):
    """Length of a response: a string, or a list of messages."""
    if isinstance(response, str):
        return len(response)
    return sum(len(message.get("content") or "") for message in response)


class Humans:
    """The runs.  model, size: of the command line.  folder: where they are.  pairs: to train on."""

    def __init__(self, model, size, folder, pairs):
        self.model, self.size, self.folder, self.pairs = model, size, folder, min(pairs, size.pairs)
        self.told = False

    def path(self, method, rate, part, ending=""):
        """The folder of a run, or with an ending a file beside it."""
        name = "".join(c if c.isalnum() else "-" for c in method)
        return self.folder / f"{name}-{rate:g}-part-{part}{ending}"

    def result(self, method, rate, part):
        """What a run measured, or None where it has not finished."""
        path = self.path(method, rate, part, ".json")
        return json.loads(path.read_text()) if path.exists() else None

    def run(self, method, rate, part, bar):
        """Train with part `part` held out, unless that has been done. Raises UsageError where the run fails, and Stopped."""
        if getattr(signal.getsignal(signal.SIGINT), "asked", False):  # by a signal that came while the last run was ending
            raise Stopped("the same command goes on with the next run")
        if self.result(method, rate, part):
            bar.total -= 1  # so that the bar counts only what is still to run
            return
        output, config, log, result = (self.path(method, rate, part, end) for end in ("", ".yaml", ".log", ".json"))
        keys = {name: SHARE if name == "label_budget" else value for name, value in METHODS[method].items()
                if not isinstance(value, dict)}  # what was chosen for each task has its default here
        if keys.pop("subset", None):
            keys["max_train_samples"] = round(SHARE * self.pairs)
        config.write_text(json.dumps(BASE | self.size.keys | {"max_train_samples": self.pairs} | keys | {
            "max_steps": -(-self.pairs // STEP), "learning_rate": rate, "model_name_or_path": str(self.model),
            "dataset_mixer": {str(self.folder / f"part-{part}"): 1.0}, "output_dir": str(output)}))  # JSON is YAML
        started = time.time()
        with open(log, "w", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            code = command(["--config", str(config)], train.main)
        said = log.read_text(encoding="utf-8").strip().splitlines() or [""]
        if code == 75:
            raise Stopped("the same command goes on with the run that was interrupted")
        if code == 1 and part == 0 and "lower learning_rate" in said[-1]:  # it diverged: this rate will not be the best
            replace_text(result, json.dumps({"accuracy": 0.0}))
            return bar.update()
        if code:
            raise UsageError(f"{config}: exit code {code}: {said[-1]}")
        if not self.told:  # what became of the pairs
            self.told = True
            bar.write("\n".join(line for line in said if re.match(r"(train|test): [\d,]+ rows", line)))
        summary = json.loads((output / "summary.json").read_text())
        found = {"accuracy": summary["eval_accuracy"], "log_loss": summary["eval_loss"], "queries": summary["queries"],
                 "pseudo_label_accuracy": summary["pseudo_label_accuracy"], "committee": summary.get("committee"),
                 "seconds": time.time() - started}
        replace_text(result, json.dumps(found))  # half a file would end each later start
        shutil.rmtree(output)  # with the model
        bar.update()

    def rate(self, method):
        """(the learning rate of a method or None, those that are to be tried next): see query_efficiency.choose."""
        tried = {rate: [found["accuracy"]] for rate in extended(self.size.rates) if (found := self.result(method, rate, 0))}
        return choose(tried, self.size.rates)

    def run_all(self):
        folds = range(1, 1 + self.size.folds)
        with tqdm(total=len(NAMES) * (len(self.size.rates) + len(folds)), desc="runs") as bar:
            for rate in self.size.rates:
                for method in NAMES:
                    self.run(method, rate, 0, bar)
            for method in NAMES:
                for rate in self.rate(method)[1]:
                    bar.total += 1
                    self.run(method, rate, 0, bar)
            for part in folds:
                for method in NAMES:
                    self.run(method, self.rate(method)[0], part, bar)

    def finished(self):
        """{method: (learning rate, {part: result})} of the reported runs."""
        found = {}
        for method in NAMES:
            if rate := self.rate(method)[0]:
                parts = {part: result for part in range(1, PARTS) if (result := self.result(method, rate, part))}
                found |= {method: (rate, parts)} if parts else {}
        return found


def page(humans, source, longer, where, size):
    """The results as Markdown.  where: the machine.  size: its name."""
    found, rates = humans.finished(), extended(humans.size.rates)
    lines = ["# People's labels", "", f"`python benchmarks/humans.py MODEL PAIRS --size {size}`, with "
             f"{Path(humans.model).name} and {Path(source).name}, on {where}: {humans.pairs:,} pairs to train on, "
             f"{-(-humans.pairs // STEP)} steps of {STEP}, and a fold's part of the prompts held out. Methods that buy a "
             f"share buy {SHARE:.0%}. Means ± 95 % intervals (Student's t) over the folds; the last two columns are "
             "differences of accuracy, fold by fold.", "",
             f"The longer response is preferred in {longer:.1%} of all pairs, so a rule that reads nothing but lengths is "
             f"right on {max(longer, 1 - longer):.1%}.", "",
             "| method | learning rate | folds | labels | pseudo-labels right | accuracy | log-loss | "
             f"− {ALL} | − {SUBSET} |", "| --- |" + " --: |" * 8]
    for method, (rate, parts) in found.items():
        values = [*parts.values()]
        right = [v["pseudo_label_accuracy"] for v in values if v["pseudo_label_accuracy"] is not None]
        cells = []
        for other in (ALL, SUBSET):
            theirs = found.get(other, (None, {}))[1]
            gaps = [value["accuracy"] - theirs[part]["accuracy"] for part, value in parts.items() if part in theirs]
            cells.append(text(gaps, "{:+.3f}") if gaps and method != other else "")
        accuracy, log_loss = (text([v[key] for v in values], "{:.3f}") for key in ("accuracy", "log_loss"))
        lines.append(f"| {method} | {rate:g} | {len(values)} | {statistics.mean(v['queries'] for v in values):,.0f} | "
                     f"{f'{statistics.mean(right):.1%}' if right else ''} | {accuracy} | {log_loss} | {' | '.join(cells)} |")
    _, parts = found.get(COMMITTEE, (None, {}))
    if alone := sum(result["committee"] is False for result in parts.values()):
        lines += ["", f"In {alone} of {len(parts)} folds a member of the committee did not beat guessing, so that run "
                  "trained only on the labels that it had bought, without a committee."]
    lines += ["", "Learning rates, by accuracy on part 0, which no row above has seen as test pairs:", "",
              "| method | " + " | ".join(f"{rate:g}" for rate in rates) + " |", "| --- |" + " --: |" * len(rates)]
    for method in NAMES:
        scores = [humans.result(method, rate, 0) for rate in rates]
        cells = ["" if s is None else f"{s['accuracy']:.3f}" if s["accuracy"] else "diverged" for s in scores]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("pairs", metavar="PAIRS")
    parser.add_argument("--size", choices=[*SIZES], default="cpu", help="default: cpu")
    parser.add_argument("--report", action="store_true", help="run nothing; write the page of the finished runs")
    parser.add_argument("--outputs", type=Path, default=ROOT / "outputs" / "humans", help="default: outputs/humans")
    parser.add_argument("--page", type=Path, default=ROOT / "benchmarks" / "results" / "humans.md",
                        help="default: benchmarks/results/humans.md")
    args = parser.parse_args()
    try:
        rows, longer = read(args.pairs)
        model, files = args.model, None
        if Path(model).is_dir():
            model, files = str(Path(model).resolve()), model_files(model)
        size, methods = SIZES[args.size], {name: METHODS[name] for name in NAMES}
        depends = json.dumps([model, files, rows, astuple(size), BASE, SHARE, methods])
        name = hashlib.blake2b(depends.encode(), digest_size=4).hexdigest()
        humans = Humans(model, size, args.outputs.resolve() / name, fewest(rows))
        with writing(args.page):  # a folder that cannot be made is refused now, before a night is spent
            args.page.parent.mkdir(parents=True, exist_ok=True)
        if not args.report:
            with writing(humans.folder):
                split(rows, humans.folder)
            humans.run_all()
        elif not humans.finished():
            raise UsageError(f"{humans.folder}: no fold with this model, these pairs and this --size has finished")
        where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"a CPU, {torch.get_num_threads()} threads"
        replace_text(args.page, page(humans, args.pairs, longer, where, args.size))
    except (Stopped, KeyboardInterrupt) as stopped:
        print(f"stopped: {one_line(stopped) or 'interrupted; the same command goes on'}", file=sys.stderr)
        sys.exit(75)
    except UsageError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    print(args.page.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show some letters shows ? instead
    main()
