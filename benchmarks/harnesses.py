"""Do the paper's evaluation harnesses read what train.py leaves? lm-evaluation-harness, AlpacaEval and FastChat's MT-Bench,
installed from their package registry, load a trained folder with their own code.

    python benchmarks/harnesses.py                           makes their environment in outputs/harness-env on the first run
    python benchmarks/harnesses.py --harness-python PATH     uses a Python that already has them
    python benchmarks/harnesses.py --model DIR               also trains this model for 2 steps, for lm-evaluation-harness
    python benchmarks/harnesses.py --outputs DIR --results FILE    works in DIR and writes FILE

A few minutes on one CPU thread; nothing but packages is downloaded. It makes the built-in task (runtime/toy.py), trains its
model, and then:

- lm-evaluation-harness: runs `lm_eval --model hf --model_args pretrained=DIR` on a local task (benchmarks/harness_task:
  which of two reviews is better), and computes the same log-likelihoods and accuracy in a few lines of plain torch;
- AlpacaEval: writes the answers of the trained and the base model with tools/generate.py, and lets AlpacaEval's `evaluate`
  load, merge, annotate and count them. Only GPT-4's API is replaced, by a rule: the gold reward decides;
- MT-Bench: answers two-turn questions, lets FastChat's gen_judgment load, check and pair the files, and FastChat's common
  write the prompts for the judge. Only the call to the judge's API is replaced.

The paper evaluates with the same three harnesses, with their real questions and judges. Writes
benchmarks/results/harnesses.md. Exit code 0: the harnesses found what was expected; 1: they did not; 2: the benchmark could
not run.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import random
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import trl_parity  # noqa: E402

HARNESSES = {"lm_eval": "0.4.13", "alpaca_eval": "0.6.6", "fschat": "0.2.36"}
# torch comes first, so that nothing else chooses its version. fschat imports openai and anthropic without requiring them,
# and alpaca_eval imports pkg_resources, which newer versions of setuptools do not have.
PACKAGES = (["torch==2.13.0"], ["transformers==5.23.0", "accelerate", "openai", "anthropic", "setuptools<81",
                                *(f"{name}=={version}" for name, version in HARNESSES.items())])
TASK = ROOT / "benchmarks" / "harness_task"
TOLERANCE = 1e-3  # nats, between two log-likelihoods of a response: fp32 sums in another order differ by less
TRAINING = {"max_steps": 96, "max_train_samples": 6144, "do_eval": False, "logging_steps": 96}
# For AlpacaEval's own parser: the words that mean that output 1 is preferred, or output 2, or neither.
ANNOTATOR = """\
gold_reward:
  prompt_template: annotator/prompt.txt
  fn_completions: gold_reward
  fn_completion_parser: regex_parser
  completion_parser_kwargs:
    outputs_to_match: {1: first, 2: second, 1.5: neither}
"""
# For the two steps of --model.
TWO_STEPS = {"max_steps": 2, "dataset_splits": "train", "max_train_samples": 64, "do_eval": False, "max_length": 96,
             "max_prompt_length": 32, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "bf16": False,
             "num_threads": 1}
# Categories of the two-turn questions: MT-Bench's, which set the temperature, and one that FastChat does not know.
CATEGORIES = ("writing", "roleplay", "extraction", "math", "coding", "reasoning", "stem", "humanities", "gardening")
PEERS = (*HARNESSES, "torch", "transformers", "accelerate")  # packages whose versions the results list
Stop = trl_parity.Stop


# ----------------------------------------------------------------------------------------------------------------------
# The harnesses' side: these functions run in the harnesses' environment

def peer(job_path):
    """Let AlpacaEval and FastChat read the job's files, and write down what they found."""
    job = json.loads(Path(job_path).read_text(encoding="utf-8"))
    os.chdir(job["fastchat"])
    found = {"alpaca_eval": alpaca_eval(job), "fastchat": fastchat(job)}
    Path(job["result"]).write_text(json.dumps(found), encoding="utf-8")


def alpaca_eval(job):
    """What alpaca_eval.main.evaluate makes of the two models' answers."""
    import alpaca_eval.annotators.base
    import alpaca_eval.main

    from runtime import toy

    def judge(prompts, **_):
        """Which output is preferred for each prompt "OUTPUT 1|||OUTPUT 2", as text for AlpacaEval's parser."""
        gold = [[toy.gold_reward(output) for output in prompt.split("|||")] for prompt in prompts]
        return {"completions": ["neither" if a == b else "the first" if a > b else "the second" for a, b in gold],
                "price_per_example": [0] * len(prompts), "time_per_example": [0] * len(prompts)}
    alpaca_eval.annotators.base.get_fn_completions = lambda name: judge
    config = Path("annotator") / "configs.yaml"
    config.parent.mkdir(exist_ok=True)
    (config.parent / "prompt.txt").write_text("{output_1}|||{output_2}", encoding="utf-8")
    config.write_text(ANNOTATOR, encoding="utf-8")
    outputs = alpaca_eval.utils.load_or_convert_to_dataframe(job["outputs"])
    leaderboard, annotations = alpaca_eval.main.evaluate(
        model_outputs=job["outputs"], reference_outputs=job["reference"], annotators_config=config.absolute(),
        precomputed_leaderboard=None, fn_metric="get_winrate", sort_by="win_rate", output_path=None,
        is_return_instead_of_print=True, caching_path=None)
    (name,) = leaderboard.index
    return {"columns": list(outputs.columns), "rows": len(outputs), "name": name, "annotated": len(annotations),
            "win_rate": float(leaderboard.loc[name, "win_rate"]), "first": outputs.iloc[0].to_dict()}


def fastchat(job):
    """What fastchat.llm_judge makes of the answer files: the steps of gen_judgment's main, up to the judge's prompts."""
    from fastchat.llm_judge import common, gen_judgment
    questions = common.load_questions("data/mt_bench/question.jsonl", None, None)
    answers = common.load_model_answers("data/mt_bench/model_answer")
    models = common.get_model_list("data/mt_bench/model_answer")
    form = {"system_prompt": "Rate.", "output_format": "[[rating]]", "type": "single"}
    judges = gen_judgment.make_judge_single("gpt-4", {
        name: form | {"name": name, "prompt_template": template} for name, template in {
            "single-v1": "{question}|||{answer}", "single-math-v1": "{question}|||{answer}|||{ref_answer_1}",
            "single-v1-multi-turn": "{question_1}|||{answer_1}|||{question_2}|||{answer_2}",
            "single-math-v1-multi-turn": "{question_1}|||{answer_1}|||{question_2}|||{answer_2}|||{ref_answer_2}"}.items()})
    reference = {"gpt-4": answers[models[0]]}  # stands in for MT-Bench's reference answers to some categories
    common.check_data(questions, answers, reference, models, judges)
    groups = [[q for q in questions if (q["category"] in gen_judgment.NEED_REF_CATS) == wanted] for wanted in (False, True)]
    matches = []
    for turn, multi_turn in (("", False), ("-mt", True)):
        for group, judge, given in zip(groups, ("default", "math"), (None, reference)):
            matches += gen_judgment.make_match_single(group, models, answers, judges[judge + turn], None, given, multi_turn)
    pairs = gen_judgment.make_match_all_pairs(questions, models, answers, judges["default-mt"], multi_turn=True)
    prompts = []

    def rate(model, conversation, **_):
        prompts.append(conversation.messages[0][1].split("|||"))
        return "Rating: [[7]]"
    common.chat_completion_openai = rate
    for match in matches:
        common.play_a_match_single(match, output_file="model_judgment/single.jsonl")
    lines = Path("model_judgment/single.jsonl").read_text(encoding="utf-8").splitlines()
    scores = [json.loads(line)["score"] for line in lines]
    return {"questions": len(questions), "models": sorted(models), "matches": len(matches), "pairs": len(pairs),
            "prompts": prompts, "scores": scores, "temperatures": common.temperature_config}


# ----------------------------------------------------------------------------------------------------------------------
# Our side

def reviews():
    """The rows of the task: 100 prompts of the toy test split, each with two sentences of the grammar. better: 0 or 1, the
    index of the one with the higher gold reward."""
    from runtime import toy
    draw, rows = random.Random("harness task"), []
    for prompt in toy.split_prompts(0)[1][:100]:
        gold = [0, 0]
        while gold[0] == gold[1]:
            choices = [toy.write_response(draw).strip() for _ in range(2)]
            gold = [toy.gold_reward(choice) for choice in choices]
        rows.append({"prompt": prompt, "choices": choices, "better": int(gold[1] > gold[0])})
    return rows


def plain_torch(folder, rows):
    """[[log-likelihood of each choice] for each row], one forward pass per choice, without padding or a cache."""
    import torch
    import transformers
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = []
    for row in rows:
        start = len(tokenizer(row["prompt"]).input_ids)
        found.append([])
        for choice in row["choices"]:
            ids = torch.tensor(tokenizer(f"{row['prompt']} {choice}").input_ids)  # (T,)
            with torch.no_grad():
                logps = lm(ids[None]).logits[0, :-1].float().log_softmax(-1)  # (T - 1, V)
            found[-1].append(logps.gather(1, ids[1:, None])[start - 1:].sum().item())
    return found


def lm_eval(python, folder, work, rows):
    """One model in lm-evaluation-harness and in plain torch: {"harness", "plain"}, two accuracies, and {"gap"}, the largest
    difference between log-likelihoods, in nats."""
    name = folder.name
    print(f"lm-evaluation-harness: {folder}", flush=True)
    trl_parity.run([str(python), "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={folder}", "--include_path",
                    str(TASK), "--tasks", "toy_reviews", "--device", "cpu", "--log_samples", "--output_path",
                    str(work / f"lm_eval-{name}")], work / f"lm_eval-{name}.log")
    written = work / f"lm_eval-{name}"
    (results,), (samples,) = [*written.rglob("results_*.json")], [*written.rglob("samples_*.jsonl")]
    harness = json.loads(results.read_text(encoding="utf-8"))["results"]["toy_reviews"]["acc,none"]
    theirs = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    theirs = [[float(logp) for logp, _ in row["filtered_resps"]] for row in sorted(theirs, key=lambda row: row["doc_id"])]
    ours = plain_torch(folder, rows)
    right = [choices.index(max(choices)) == row["better"] for choices, row in zip(ours, rows, strict=True)]
    return {"harness": harness, "plain": sum(right) / len(right),
            "gap": max(abs(a - b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True))}


def train(work, name, *flags):
    """Train with train.py, whose output goes to a log file. Returns the trained folder."""
    print(f"train.py: {name}", flush=True)
    keys = [f"--{key}={value}" for key, value in {"output_dir": work / name, "save_strategy": "no"}.items()]
    trl_parity.run([sys.executable, "train.py", *flags, *keys], work / f"{name}.log")
    return work / name


def answer(folder, questions, format, output, name, *flags):
    """Answer the questions with tools/generate.py. Returns the rows of its file."""
    print(f"tools/generate.py: {format}, {name}", flush=True)
    trl_parity.run([sys.executable, "tools/generate.py", str(folder), "--questions", str(questions), "--format", format,
                    "--output", str(output), "--name", name, "--max_new_tokens", "48", *flags], output.with_suffix(".log"))
    text = output.read_text(encoding="utf-8")
    return json.loads(text) if format == "alpaca_eval" else [json.loads(line) for line in text.splitlines()]


def judged(python, work, models, prompts):
    """(what AlpacaEval and FastChat found, what they should have found).  models: {name: folder}."""
    from runtime import toy
    from tools import generate
    chat = work / "fastchat"
    (chat / "data" / "mt_bench" / "model_answer").mkdir(parents=True)
    instructions = [{"instruction": prompt, "dataset": "toy"} for prompt in prompts]
    questions = [{"question_id": n, "category": category, "turns": [prompts[n], prompts[-n]]}
                 for n, category in enumerate(CATEGORIES, 1)]
    (work / "instructions.json").write_text(json.dumps(instructions), encoding="utf-8")
    toy.write_jsonl(chat / "data" / "mt_bench" / "question.jsonl", questions)
    outputs, turns = {}, {}
    for name, folder in models.items():
        outputs[name] = answer(folder, work / "instructions.json", "alpaca_eval", work / name / "model_outputs.json", name,
                               "--temperature", "1")
        found = answer(folder, chat / "data" / "mt_bench" / "question.jsonl", "mt_bench",
                       chat / "data" / "mt_bench" / "model_answer" / f"{name}.jsonl", name)
        turns[name] = {row["question_id"]: row["choices"][0]["turns"] for row in found}
    job = {"outputs": str(work / "trained" / "model_outputs.json"), "reference": str(work / "base" / "model_outputs.json"),
           "fastchat": str(chat), "result": str(work / "found.json")}
    (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
    print("AlpacaEval and FastChat", flush=True)
    trl_parity.run([str(python), str(Path(__file__).resolve()), "--peer", str(work / "job.json")], work / "peer.log")
    gold = [[toy.gold_reward(row["output"]) for row in outputs[name]] for name in ("base", "trained")]
    wins = [0.5 if a == b else float(b > a) for a, b in zip(*gold)]
    one = [[q["turns"][0], turns[name][q["question_id"]][0]] for name in turns for q in questions]
    two = [[text for pair in zip(q["turns"], turns[name][q["question_id"]]) for text in pair] for name in turns
           for q in questions]
    expected = {
        "alpaca_eval": {"columns": ["dataset", "instruction", "output", "generator"], "rows": len(prompts),
                        "name": "trained", "annotated": len(prompts), "win_rate": 100 * sum(wins) / len(wins),
                        "first": outputs["trained"][0]},
        "fastchat": {"questions": len(questions), "models": ["base", "trained"], "matches": 4 * len(questions),
                     "pairs": len(questions), "prompts": one + two, "scores": [7] * 4 * len(questions),
                     "temperatures": generate.TEMPERATURES}}
    found = json.loads((work / "found.json").read_text(encoding="utf-8"))
    # FastChat chooses the order of the prompts, and appends a reference answer to some, which is not compared.
    found["fastchat"]["prompts"] = sorted(prompt[:4 if len(prompt) > 3 else 2] for prompt in found["fastchat"]["prompts"])
    expected["fastchat"]["prompts"].sort()
    return found, expected


def differences(found, expected):
    """What the harnesses found that was not expected, one line each."""
    return [f"{harness}, {name}: found {str(found[harness].get(name))[:200]}, expected {str(value)[:200]}"
            for harness in expected for name, value in expected[harness].items()
            if found[harness].get(name) != value
            and not (name == "win_rate" and abs(found[harness][name] - value) < 1e-6)]


def document(rows, found, wrong, versions, model):
    """The results page."""
    table = "\n".join(f"| {name} | {row['harness']:.2f} | {row['plain']:.2f} | {row['gap']:.1e} |"
                      for name, row in rows.items())
    ours = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "deepspeed"))
    alpaca, chat = found["alpaca_eval"], found["fastchat"]
    return f"""\
# The trained folder in evaluation harnesses

Made by

    python benchmarks/harnesses.py{" --model MODEL_DIR" if model else ""}

**Verdict: {"NOT as expected: " + "; ".join(wrong) if wrong else "as expected"}.**

- train.py: {ours}
- harnesses: {", ".join(f"{name} {version}" for name, version in versions.items())}
- {trl_parity.cpu_name()}, one thread, Python {platform.python_version()}

## lm-evaluation-harness

`lm_eval --model hf --model_args pretrained=DIR --include_path benchmarks/harness_task --tasks toy_reviews`: for what share
of {len(reviews())} prompts does the better of two reviews have the higher likelihood? The same is computed in plain torch,
one forward pass per response. The last column is the largest difference between two log-likelihoods (limit {TOLERANCE:.0e}).

| model | accuracy, harness | accuracy, plain torch | largest difference, nats |
| --- | --: | --: | --: |
{table}

`base` is the toy model that training started from; `trained` is train.py's output folder after {TRAINING["max_steps"]}
steps.

## AlpacaEval

`alpaca_eval.main.evaluate` reads `model_outputs.json` of the trained and of the base model (temperature 1); the gold reward
replaces the judge's API. It finds the columns {", ".join(f"`{name}`" for name in alpaca["columns"])} and pairs
{alpaca["annotated"]} of {alpaca["rows"]} instructions. The win rate of `{alpaca["name"]}` is {alpaca["win_rate"]:.1f} %, the
same as counted from the files.

## FastChat's MT-Bench

`load_questions`, `load_model_answers`, `check_data`, `make_match_single` (one turn and two) and `make_match_all_pairs` read
`data/mt_bench/model_answer/*.jsonl` and find {chat["questions"]} questions, the models {", ".join(chat["models"])},
{chat["matches"]} matches and {chat["pairs"]} pairs. `play_a_match_single` puts both turns of every answer into the judge's
prompts and reads {len(chat["scores"])} scores; the call to the judge's API is replaced. FastChat's `temperature_config`
equals the table in tools/generate.py.
"""


def main(options):
    from runtime import toy
    outputs = Path(options.outputs).resolve()
    outputs.mkdir(parents=True, exist_ok=True)
    python = trl_parity.environment(outputs / "harness-env", PACKAGES, HARNESSES, options.harness_python, "--harness-python")
    work = outputs / "harnesses"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    rows = reviews()
    toy.write_jsonl(TASK / "reviews.jsonl", rows)
    base, pairs = toy.build(outputs / "toy")
    models = {"base": shutil.copytree(base, work / "base")}
    models["trained"] = train(work, "trained", "--config=configs/quickstart.yaml", f"--toy_dir={outputs / 'toy'}",
                              *(f"--{key}={value}" for key, value in TRAINING.items()))
    accuracies = {name: lm_eval(python, folder, work, rows) for name, folder in models.items()}
    if options.model:
        name = f"{Path(options.model).resolve().name}, 2 steps"
        folder = train(work, "further", "--config=configs/smollm2-135m.yaml", f"--model_name_or_path={options.model}",
                       f"--dataset_mixer={{{pairs}: 1.0}}", *(f"--{key}={value}" for key, value in TWO_STEPS.items()))
        accuracies[name] = lm_eval(python, folder, work, rows)
    found, expected = judged(python, work, models, [row["prompt"] for row in toy.read_jsonl(pairs / "test.jsonl")][:100])
    wrong = differences(found, expected)
    wrong += [f"lm_eval, {name}: {row}" for name, row in accuracies.items()
              if row["harness"] != row["plain"] or row["gap"] > TOLERANCE]
    text = document(accuracies, found, wrong, trl_parity.versions_of(python, PEERS), options.model)
    results = Path(options.results)
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(text, encoding="utf-8")
    print(text)
    return 1 if wrong else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--harness-python", metavar="PATH",
                        help="a Python that has the harnesses; default: one made in outputs/harness-env")
    parser.add_argument("--model", metavar="DIR", help="another model for lm-evaluation-harness, trained for two steps")
    parser.add_argument("--outputs", metavar="DIR", default=ROOT / "outputs", help="folder to work in; default: outputs")
    parser.add_argument("--results", metavar="FILE", default=ROOT / "benchmarks" / "results" / "harnesses.md",
                        help="file to write; default: benchmarks/results/harnesses.md")
    parser.add_argument("--peer", metavar="JOB", help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        sys.exit(peer(options.peer) if options.peer else main(options))
    except Stop as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
