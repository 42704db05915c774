"""What a run says of itself: metrics.jsonl and the monitors, the training bar, summary.json, the model card, the hub.
"""

import dataclasses
import importlib.util
import json
import math
import re
import shlex
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import torch.distributed as dist
import yaml

from labels import oracle
from runtime.checkpoint import versions
from runtime.config import UsageError, hub_name, is_repo_id
from runtime.model import leaves_adapter
from runtime.ranks import one_line, peak_memory, rank, replace_text, say, writing


class Log:
    """metrics.jsonl and DeepSpeed's monitor, from rank 0.  step: the last that is kept of what was there; −1: nothing is."""

    def __init__(self, output, engine, step):
        self.path, self.monitor = output / "metrics.jsonl", engine.monitor if engine.monitor.enabled else None
        engine.monitor.enabled = False  # for the engine, which logs against samples: wandb would drop our steps behind those
        if rank() == 0:  # a resumed run writes the steps behind its checkpoint again
            lines = self.path.read_text(errors="replace").splitlines() if self.path.is_file() else []
            lines = [line for n, line in enumerate(lines, 1) if self.stands(n, line, step)]
            replace_text(self.path, "".join(line + "\n" for line in lines))
            if self.monitor:
                self.catch_up([json.loads(line) for line in lines], step)

    def stands(self, n, line, step):
        """Whether a line is a row of an optimiser step up to `step`. One that is no row is dropped, and said so."""
        try:
            return json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            say(f"{self.path}, line {n}: cut off or damaged, dropped")
            return False

    def catch_up(self, rows, step):
        """Let the services hold the rows that stand and nothing behind them: TensorBoard is told what to forget, the CSV
        files are written anew, and a run of wandb, which cannot forget, is a new one that begins with these rows."""
        if writer := getattr(self.monitor.tb_monitor, "summary_writer", None):
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
            writer.file_writer.add_event(Event(session_log=SessionLog(status=SessionLog.START)), step + 1)
        if self.monitor.csv_monitor:
            for path in Path(self.monitor.csv_monitor.log_dir).glob("*.csv"):
                path.unlink()
        for service in filter(None, (self.monitor.csv_monitor, self.monitor.wandb_monitor)):
            for row in rows:
                service.write_events(self.events(row))

    def events(self, row):
        return [(f"{row['split']}/{name}", value, row["step"]) for name, value in row.items()
                if isinstance(value, (int, float)) and name != "step"]

    def write(self, row):
        """row: {metric: value}. A number that is not finite becomes null: JSON has no word for it."""
        if rank() == 0:
            row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            with writing(self.path), open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
            if self.monitor:
                self.monitor.write_events(self.events(row))


def cost(asker, config):
    """Money spent on labels (rank 0), or None where no price is known."""
    if not asker.ledger:
        return None
    known, unpriced = asker.ledger.cost()
    if config.price_per_label is None:
        return known or None
    return known + unpriced * config.price_per_label


def pseudo_label_accuracy(state):
    """Share of the pseudo-labels so far that are right, or None where no truth is known.  state: the oracle's."""
    return state["pseudo_right"] / state["pseudo_known"] if state["pseudo_known"] else None


def audit_metrics(asker, step, config):
    """What the audit says so far, for a row of metrics; nothing without one."""
    if not config.audit_fraction:
        return {}
    audit = asker.audit(step) or {"audited": 0, "accuracy": None, "interval": (0.0, 1.0)}
    return {"audited": audit["audited"], "audit_accuracy": audit["accuracy"], "audit_low": audit["interval"][0],
            "audit_high": audit["interval"][1]}


def warn_of_wrong_pseudo_labels(asker, step, config):
    """Once, loudly: the audited error is above what the policy's own confidence predicts, beyond the 95 % interval."""
    if not config.audit_fraction or asker.state["warned"]:
        return
    audit = asker.audit(step)
    if audit and audit["interval"][1] < audit["predicted"]:
        asker.state["warned"] = True
        say(f"WARNING: of {audit['audited']} audited pseudo-labels {audit['accuracy']:.1%} agree with the annotator, where "
            f"the policy's own confidence predicts {audit['predicted']:.1%}: it is surer than it has a right to be. Raise "
            "gamma, or lower learning_rate.")


def bar_text(row, evaluation, cost):
    """What stands behind the training bar."""
    held_out = f", held-out {evaluation['rewards/accuracies']:.3f}" if evaluation else ""
    price = f", {cost:,.2f} spent" if cost is not None else ""
    return (f"loss {row['loss']:.3f}, acc {row['rewards/accuracies']:.3f}, {row['queries']:,} queries "
            f"({row['queries'] / row['pairs_seen']:.0%} of pairs){price}{held_out}")


def summarise(train, schedule, asker, evaluation, device, config, lm):
    """summary.json without its times. All ranks call it together; what the ledger knows is known to rank 0 alone."""
    epoch = range(min(schedule.total_steps, schedule.epoch_steps))
    pairs = len({train.ids[row] for step in epoch for row in schedule.rows(step)})
    queries, state, audit = asker.queries(), asker.state, asker.audit()
    return {"pairs": pairs, "queries": queries, "query_fraction": queries / pairs, "pseudo_labels": state["pseudo_labels"],
            "pseudo_label_accuracy": pseudo_label_accuracy(state),
            "pseudo_label_interval": (list(oracle.wilson(state["pseudo_right"], state["pseudo_known"]))
                                      if state["pseudo_known"] else None),
            "audited": audit["audited"] if audit else 0, "audit_accuracy": audit and audit["accuracy"],
            "audit_interval": audit and list(audit["interval"]), "cost": cost(asker, config),
            "budget_spent_at_step": state["budget_spent_at_step"],
            "eval_loss": evaluation and evaluation["loss"],
            "eval_accuracy": evaluation and evaluation["rewards/accuracies"], "peak_memory_bytes": peak_memory(device),
            **adapter_summary(config, lm)}


def closing_line(summary):
    """The run in one line of plain words."""
    if "examples" in summary:  # SFT
        held_out = [] if summary["eval_loss"] is None else [f"held-out loss {summary['eval_loss']:.4f}"]
        return " · ".join([f"{summary['examples']:,} examples", *held_out, f"{summary['wall_seconds']:.0f} s"])
    share = summary["query_fraction"]
    parts = [f"{summary['queries']:,} of {summary['pairs']:,} labels bought ({share:.0%})".replace("%", " %")]
    if summary["pseudo_label_accuracy"] is not None:
        parts.append(f"pseudo-labels right: {100 * summary['pseudo_label_accuracy']:.1f} %")
    if summary["audited"]:
        low, high = summary["audit_interval"]
        parts.append(f"{summary['audited']:,} audited: {100 * summary['audit_accuracy']:.1f} % right ({100 * low:.1f}–"
                     f"{100 * high:.1f} %)")
    if summary["budget_spent_at_step"] is not None:
        parts.append(f"the budget was spent at step {summary['budget_spent_at_step'] + 1:,}")
    if summary["cost"] is not None:
        parts.append(f"{summary['cost']:,.2f} spent on labels")
    if summary["eval_accuracy"] is not None:
        parts.append(f"held-out accuracy {summary['eval_accuracy']:.3f}")
    if "gold_reward_after" in summary:
        parts.append("gold reward of generations "
                     f"{summary['gold_reward_before']:+.2f} → {summary['gold_reward_after']:+.2f}")
    return " · ".join([*parts, f"{summary['wall_seconds']:.0f} s"])


def read_summary(path):
    """summary.json of a run that has ended. Raises UsageError where it is damaged."""
    try:
        closing_line(summary := json.loads(path.read_text(encoding="utf-8")))
        return summary
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UsageError(f"{path} is damaged ({one_line(error)}): restore it, or delete it, and the same command goes on "
                         "from the last checkpoint and writes it anew")


def finish(config, summary, output, names, command_line, seconds):
    """What comes behind the model: card, summary, the last lines, the hub.  names: of the model's files."""
    failure = None
    if rank() == 0:
        curves = [] if config.objective == "sft" else draw_curves(output)
        replace_text(output / "README.md", model_card(config, summary, command_line, curves))
        summary["wall_seconds"] = seconds
        replace_text(output / "summary.json", json.dumps(summary, indent=2) + "\n")
        say(closing_line(summary))
        what = "adapter" if leaves_adapter(config) else "model"
        rest = " and its metrics" if config.objective == "sft" else ", its metrics and its ledger"
        say(f"the {what}{rest} are in {output}")
        if config.push_to_hub:
            failure = push(config, output, names + curves)
    dist.barrier()
    if failure:
        raise UsageError(failure)


def draw_curves(output):
    """Write curves.png, what tools/plot.py draws, where matplotlib is installed. Returns the names of what it wrote."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    from tools import plot
    try:
        figure = plot.draw({output.name: plot.read_metrics(output)})
    except plot.PlotError as error:
        say(f"no curves: {error}")
        return []
    with writing(output / "curves.png"):
        plot.save(figure, output / "curves.png")
    return ["curves.png"]


def model_card(config, summary, command_line, curves):
    """README.md of the trained model.  command_line: what started the run, or None.  curves: names of pictures."""
    how = ("by supervised fine-tuning." if config.objective == "sft" else
           "with Active Direct Preference Optimization ([arXiv 2402.09401](https://arxiv.org/abs/2402.09401)), which asks "
           "for a label only where the policy is unsure.")
    settings = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True).rstrip()
    parts = [
        f"---\n{front_matter(config, summary)}---",
        f"# {code(Path(config.output_dir).resolve().name)}",
        f"Trained from {code(config.model_name_or_path)} {how}",
        "| | |\n| --- | --- |\n" + "\n".join("| {} | {} |".format(name, value.replace("|", "\\|"))
                                            for name, value in card_rows(config, summary).items() if value),
        *(f"![Accuracy, margin, labels and pseudo-labels, against labels bought and steps]({name})" for name in curves),
        "The command:\n\n" + fenced(command_line, "sh") if command_line else "",
        "The config, with " + ", ".join(f"{name} {version}" for name, version in versions().items()) + ":",
        fenced(settings, "yaml")]
    text = "\n\n".join(filter(None, parts)) + "\n"
    if config.judge_url:  # a key may stand in it
        url = urlsplit(config.judge_url)
        text = text.replace(config.judge_url, urlunsplit(url._replace(netloc=url.netloc.rpartition("@")[2], query="")))
    return text.encode("utf-8", "replace").decode()  # a path may hold bytes that are no text


def card_rows(config, summary):
    """{name: value} of a model card's table; None for what there is not."""
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

    pseudo, audited = f"{summary['pseudo_labels']:,}", f"{summary['audited']:,}"
    return {"data": data_row, "pairs": f"{summary['pairs']:,}",
            "labels bought": f"{summary['queries']:,} ({summary['query_fraction']:.1%})",
            "annotator": "judge, " + code(config.judge_model) if config.oracle == "judge" else config.oracle,
            "pseudo-labels": pseudo if summary["pseudo_label_accuracy"] is None else f"{pseudo}, {right('pseudo_label')}",
            "audited pseudo-labels": f"{audited}, {right('audit')}" if summary["audited"] else None,
            "spent on labels": None if summary["cost"] is None else f"{summary['cost']:,.2f}",
            "held-out accuracy of the implicit reward": ("not measured" if summary["eval_accuracy"] is None
                                                         else f"{summary['eval_accuracy']:.3f}"),
            "β, γ": f"{config.beta}, {config.gamma if config.data_selection else 'every pair asked'}", "adapter": adapter}


def front_matter(config, summary):
    """What the hub reads of a model card, as YAML."""
    front = {"library_name": "peft" if leaves_adapter(config) else "transformers",
             "pipeline_tag": "text-generation",
             "tags": ["sft"] if config.objective == "sft" else ["adpo", "dpo", "preference-learning"]}
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


def adapter_summary(config, lm):
    """What is trained, where it is not all weights."""
    if not config.use_peft:
        return {}
    settings = lm.peft_config["default"]
    return {"adapter": f"LoRA of rank {settings.r}, alpha {settings.lora_alpha}"}


def on_hub(name):
    """Whether a model or a data set is one of the hub's: what is a path here means nothing there."""
    return is_repo_id(name) and not Path(name).exists()


def code(text):
    """A text as a code span of Markdown: nothing in it is markup."""
    text = one_line(text)
    space = " " * ("`" in text)
    return f"{ticks(text, 1)}{space}{text}{space}{ticks(text, 1)}"


def fenced(text, language):
    """A text as a code block of Markdown, whatever is in it."""
    return f"{ticks(text, 3)}{language}\n{text}\n{ticks(text, 3)}"


def ticks(text, least):
    """As many backticks as no run of them in the text has."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def push(config, output, names):
    """Upload the trained model and what describes it. Checkpoints, the ledger and whatever else lies in the folder stay
    here, and so does config.yaml, in whose judge_url a key may stand. All is saved by now: where it does not arrive, returns
    a line that says why and has the command that sends it.

    names: of the files of the model, and of the pictures of its card.
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
    except Exception as error:  # of the network, of the hub, of a disk that its client fills
        error = (type(error) is RuntimeError and error.__cause__) or error  # "Error while uploading …" has its reason there
        why = one_line(getattr(error, "server_message", None) or error)[:400]
        return (f"{output} is complete, but not uploaded to {name} at {api.endpoint} ({type(error).__name__}: {why}); "
                f"to upload it: {by_hand}")
    say(f"uploaded to {api.endpoint}/{name}, branch {branch}")
