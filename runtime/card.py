"""The model card, and the upload of the trained model to the hub."""

import dataclasses
import re
import shlex
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import yaml

from runtime.checkpoint import versions
from runtime.config import hub_name, is_repo_id
from runtime.errors import one_line
from runtime.model import leaves_adapter
from runtime.ranks import say


def model_card(config, summary, command_line, curves):
    """README.md of the trained model.  command_line: what started the run, or None.  curves: names of pictures."""
    settings = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True).rstrip()
    parts = [
        f"---\n{front_matter(config, summary)}---",
        f"# {code(Path(config.output_dir).resolve().name)}",
        f"Trained from {code(config.model_name_or_path)} {method(config)}.",
        "| | |\n| --- | --- |\n" + "\n".join("| {} | {} |".format(name, value.replace("|", "\\|"))
                                            for name, value in card_rows(config, summary).items() if value),
        *(f"![Accuracy, margin, labels and pseudo-labels, against labels bought and steps]({name})" for name in curves),
        "The command:\n\n" + fenced(command_line, "sh") if command_line else "",
        "The config, with " + ", ".join(f"{name} {version}" for name, version in versions().items()) + ":",
        fenced(settings, "yaml")]
    text = "\n\n".join(filter(None, parts)) + "\n"
    if config.judge_url:  # it may contain a key
        url = urlsplit(config.judge_url)
        text = text.replace(config.judge_url, urlunsplit(url._replace(netloc=url.netloc.rpartition("@")[2], query="")))
    return text.encode("utf-8", "replace").decode()  # a path may hold bytes that are not text


def method(config):
    """How the model was trained, in words."""
    if config.objective == "sft":
        return "by supervised fine-tuning"
    if gates(config):
        return ("with Active Direct Preference Optimization ([arXiv 2402.09401](https://arxiv.org/abs/2402.09401)), which "
                "asks for a label only where the policy is unsure")
    return ("with Direct Preference Optimization ([arXiv 2305.18290](https://arxiv.org/abs/2305.18290))"
            + (", from a budget of labels" if config.label_budget else ""))


def gates(config):
    """Whether the run asked only about pairs that the policy was unsure of."""
    return config.objective == "adpo" and config.data_selection and not config.label_budget


def card_rows(config, summary):
    """{name: value} of the model card's table; rows whose value is None are left out."""
    adapter = summary.get("adapter")
    if adapter:
        adapter += ", merged into the weights" if config.merge_adapter else f", on {code(config.model_name_or_path)}"
    data_row = ", ".join(f"{100 * part:.4g} % of {code(name)}" for name, part in config.dataset_mixer.items())
    if config.objective == "sft":
        held_out = "not measured" if summary["eval_loss"] is None else f"{summary['eval_loss']:.4f}"
        return {"data": data_row, "examples": f"{summary['examples']:,}", "held-out loss, nats a token": held_out,
                "adapter": adapter}

    def right(kind):
        return "{:.1%} of them right (95 % interval {:.1%} to {:.1%})".format(summary[f"{kind}_accuracy"],
                                                                             *summary[f"{kind}_interval"])

    pseudo, audited, neither = (f"{summary[name]:,}" for name in ("pseudo_labels", "audited", "queries_without_preference"))
    return {"data": data_row, "pairs": f"{summary['pairs']:,}",
            "labels bought": f"{summary['queries']:,} ({summary['query_fraction']:.1%})",
            "of them without a preference": neither if summary["queries_without_preference"] else None,
            "annotator": "judge, " + code(config.judge_model) if config.oracle == "judge" else config.oracle,
            **judge_rows(summary),
            "pseudo-labels": pseudo if summary["pseudo_label_accuracy"] is None else f"{pseudo}, {right('pseudo_label')}",
            "audited pseudo-labels": f"{audited}, {right('audit')}" if summary["audited"] else None,
            "spent on labels": None if summary["cost"] is None else money(summary["cost"], summary.get("cost_incomplete")),
            "held-out accuracy of the implicit reward": ("not measured" if summary["eval_accuracy"] is None
                                                         else f"{summary['eval_accuracy']:.3f}"),
            "β, γ": f"{config.beta}, {gate(config, summary)}", "adapter": adapter}


def money(spent, incomplete):
    """An amount in words, with more digits where it is only a few cents. incomplete: some labels have no known cost."""
    return f"{'at least ' if incomplete else ''}{spent:,.{4 if 0 < spent < 0.1 else 2}f}"


def gate(config, summary):
    """γ, or what there was in its place."""
    if config.label_budget:
        alone = "" if summary["committee"] else ", without a committee, because a member did not beat guessing"
        return f"no gate: label_budget {config.label_budget:g}{alone}"
    return config.gamma if config.data_selection else "every pair asked"


def judge_rows(summary):
    """What the card says about a judge: its rubric, and how far its verdicts can be trusted."""
    def share(name):
        return None if summary.get(name) is None else f"{summary[name]:.1%}"

    rubric = f"{code(summary['judge_rubric_file'])}, {summary['judge_rubric']}" if "judge_rubric" in summary else None
    return {"rubric": rubric, "pairs on which both orders agree": share("judge_agreement"),
            "verdicts for the first position": share("judge_first_position"),
            **{name: f"{summary[key]:,}" if summary.get(key) else None for key, name in (
                ("judge_coins", "labels by coin"), ("judge_ties", "ties"),
                ("judge_unanswerable", "pairs that the judge could not answer"))}}


def front_matter(config, summary):
    """The part of a model card that the hub parses, as YAML."""
    front = {"library_name": "peft" if leaves_adapter(config) else "transformers",
             "pipeline_tag": "text-generation",
             "tags": ["sft"] if config.objective == "sft" else ["adpo"] * gates(config) + ["dpo", "preference-learning"]}
    sources = [name for name in config.dataset_mixer if on_hub(name)]
    if on_hub(config.model_name_or_path):
        front["base_model"] = config.model_name_or_path
    if sources:
        front["datasets"] = sources
    if len(sources) == len(config.dataset_mixer) == 1 and summary.get("eval_accuracy") is not None:
        front["model-index"] = [{"name": Path(config.output_dir).resolve().name, "results": [{
            "task": {"type": "text-generation", "name": "preference"},
            "dataset": {"type": sources[0], "name": sources[0]},
            "metrics": [{"type": "accuracy", "name": "held-out accuracy of the implicit reward",
                         "value": round(summary["eval_accuracy"], 4)}]}]}]
    return yaml.safe_dump(front, sort_keys=False)


def on_hub(name):
    """Whether a model or data set is on the hub: a local path means nothing there."""
    return is_repo_id(name) and not Path(name).exists()


def code(text):
    """A text as a Markdown code span, in which nothing is markup."""
    text = one_line(text)
    space = " " * ("`" in text)
    return f"{ticks(text, 1)}{space}{text}{space}{ticks(text, 1)}"


def fenced(text, language):
    """A text as a Markdown code block, whatever is in it."""
    return f"{ticks(text, 3)}{language}\n{text}\n{ticks(text, 3)}"


def ticks(text, least):
    """More backticks in a row than the text itself has."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def push(config, output, names):
    """Upload the trained model and what describes it. Checkpoints, the ledger and everything else in the folder stay here,
    and so does config.yaml, whose judge_url may contain a key. All is saved by now: if the upload fails, this returns a line
    that says why, with the command that uploads it later.

    names: of the model's files and of the card's pictures.
    """
    from huggingface_hub import HfApi
    names = [*names, "README.md", "metrics.jsonl", "summary.json"]
    api, name, branch = HfApi(), hub_name(config), config.hub_model_revision
    by_hand = shlex.join(["hf", "upload", name, str(output), ".", f"--revision={branch}",
                          *(f"--include={file}" for file in names)])
    try:
        name = api.create_repo(name, exist_ok=True).repo_id
        if branch != "main":
            api.create_branch(name, branch=branch, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=str(output), revision=branch, allow_patterns=names)
    except (Exception, KeyboardInterrupt) as error:  # the network's, the hub's, a full disk's, or Ctrl-C
        error = (type(error) is RuntimeError and error.__cause__) or error  # "Error while uploading …" hides it there
        why = one_line(getattr(error, "server_message", None) or error)[:400]
        return (f"{output} is complete, but not uploaded to {name} at {api.endpoint} ({type(error).__name__}: {why}); "
                f"to upload it: {by_hand}")
    say(f"uploaded to {api.endpoint}/{name}, branch {branch}")
