"""What a run reports: metrics.jsonl and the monitors, the training bar, summary.json."""

import importlib.util
import json
import math
from pathlib import Path

from labels.judge import judge_text
from labels.ledger import EVER
from labels.oracle import wilson
from runtime import card, curves
from runtime.errors import UsageError, one_line
from runtime.files import replace_text, writing
from runtime.model import leaves_adapter
from runtime.ranks import barrier, peak_memory, rank, say


class Log:
    """metrics.jsonl and DeepSpeed's monitor, from rank 0.  step: keep earlier rows up to this step; −1 discards all."""

    def __init__(self, output, engine, step):
        self.path, self.monitor = output / "metrics.jsonl", engine.monitor if engine.monitor.enabled else None
        engine.monitor.enabled = False  # the engine would log against samples, and wandb drop our smaller steps
        if rank() == 0:  # a resumed run writes the steps after its checkpoint again
            lines = self.path.read_text(errors="replace").splitlines() if self.path.is_file() else []
            lines = [line for n, line in enumerate(lines, 1) if self.keeps(n, line, step)]
            replace_text(self.path, "".join(line + "\n" for line in lines))
            if self.monitor:
                self.catch_up([json.loads(line) for line in lines], step)

    def keeps(self, n, line, step):
        """Whether a line is a row of an optimiser step up to `step`. Reports a line that is not a row at all."""
        try:
            return json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            say(f"{self.path}, line {n}: cut off or damaged, dropped")
            return False

    def catch_up(self, rows, step):
        """Make the services hold the kept rows and nothing later: TensorBoard is told what to forget, the CSV files are
        rewritten, and wandb, which cannot forget, gets a new run that begins with these rows."""
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
        """row: {metric: value}. A number that is not finite becomes null, since JSON cannot express it."""
        if rank() == 0:
            row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            with writing(self.path), open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
            if self.monitor:
                self.monitor.write_events(self.events(row))


def cost(oracle):
    """(money spent on labels, whether some of it is unknown), on rank 0; the money is None if no price is known."""
    if not oracle.ledger:
        return None, False
    (known, unpriced), price = oracle.ledger.cost(), oracle.config.price_per_label
    if price is None:
        return (known, unpriced > 0) if known else (None, False)
    return known + unpriced * price, False


def pseudo_label_accuracy(state):
    """Share of the pseudo-labels so far that are right, or None if no true label is known.  state: the oracle's."""
    return state["pseudo_right"] / state["pseudo_known"] if state["pseudo_known"] else None


def label_metrics(oracle, schedule, step):
    """What a row of metrics says about labels after `step` optimiser steps. Only on rank 0 are its counts right."""
    last = EVER if oracle.config.label_budget else step - 1  # a committee has bought all before the first step
    return {"pairs_seen": schedule.pairs_seen(step), "queries": oracle.queries(last),
            "queries_without_preference": oracle.without_preference(last),
            "pseudo_labels": oracle.state["pseudo_labels"], "pseudo_label_accuracy": pseudo_label_accuracy(oracle.state),
            **oracle.judge_metrics(last), **audit_metrics(oracle, step - 1)}


def audit_metrics(oracle, step):
    """What the audit says so far, for a row of metrics; empty without an audit."""
    if not oracle.config.audit_fraction:
        return {}
    audit = oracle.audit(step) or {"audited": 0, "accuracy": None, "interval": (0.0, 1.0)}
    return {"audited": audit["audited"], "audit_accuracy": audit["accuracy"], "audit_low": audit["interval"][0],
            "audit_high": audit["interval"][1]}


def warn_of_wrong_pseudo_labels(oracle, step):
    """Warn once if audited pseudo-labels are wrong more often than the policy predicts, beyond the 95 % interval."""
    if not oracle.config.audit_fraction or oracle.state["warned_of_audit"]:
        return
    audit = oracle.audit(step)
    if audit and audit["interval"][1] < audit["predicted"]:
        oracle.state["warned_of_audit"] = True
        say(f"WARNING: of {audit['audited']} audited pseudo-labels {audit['accuracy']:.1%} agree with the annotator, where "
            f"the policy's own confidence predicts {audit['predicted']:.1%}: it is overconfident. Raise gamma, or "
            "lower learning_rate.")


FEWEST_JUDGED = 20  # with fewer pairs than this, a judge is not warned of
AGREEMENT, FIRST_POSITION = 0.5, (0.3, 0.7)  # a judge outside of these is warned of


def warn_of_judge(oracle, row):
    """Warn once of a judge whose labels are mostly noise.  row: of the metrics."""
    answers = row["queries"]
    if "judge_agreement" not in row or answers < FEWEST_JUDGED or oracle.state.get("warned_of_judge"):
        return
    agreement, first = row["judge_agreement"], row["judge_first_position"]
    undecided = (row["judge_coins"] + row["judge_ties"] + row["judge_unanswerable"]) / answers
    if (undecided > 1 - AGREEMENT or agreement is not None and agreement < AGREEMENT
            or first is not None and not FIRST_POSITION[0] <= first <= FIRST_POSITION[1]):
        oracle.state["warned_of_judge"] = True
        say(f"WARNING: the judge is hardly of use: of {answers:,} pairs {undecided:.0%} have no verdict that it stands by "
            f"({judge_text(row)}). Take another judge_model or another judge_prompt")


def bar_text(row, evaluation, cost):
    """The text after the training bar.  row: of the metrics.  evaluation: the last, or None.  cost: what `cost` returns."""
    held_out = f", held-out {evaluation['rewards/accuracies']:.3f}" if evaluation else ""
    price = f", {card.money(*cost)} spent" if cost[0] is not None else ""
    neither = row["queries_without_preference"]
    neither = f", {neither:,} without a preference" if neither else ""
    judge = f", judge: {text}" if (text := judge_text(row)) else ""
    return (f"loss {row['loss']:.3f}, acc {row['rewards/accuracies']:.3f}, {row['queries']:,} queries "
            f"({row['queries'] / row['pairs_seen']:.0%} of pairs){neither}{judge}{price}{held_out}")


def summarise(schedule, oracle, run, engine):
    """summary.json without its times. All ranks call it together; only rank 0 knows the ledger."""
    config, evaluation = run.config, run.evaluation
    pairs = schedule.considered or len(schedule.ids_seen())
    # In another epoch a pair is not another draw: as often as it comes up, the interval counts it once.
    often = max(1, sum(len(schedule.rows(step)) for step in range(run.step)) / pairs)
    queries, state, audit = oracle.queries(), oracle.state, oracle.audit()
    spent, incomplete = cost(oracle)
    return {"pairs": pairs, "queries": queries, "query_fraction": queries / pairs,
            "queries_without_preference": oracle.without_preference(), "pseudo_labels": state["pseudo_labels"],
            "pseudo_label_accuracy": pseudo_label_accuracy(state),
            "pseudo_label_interval": (list(wilson(state["pseudo_right"] / often, state["pseudo_known"] / often))
                                      if state["pseudo_known"] else None),
            "audited": audit["audited"] if audit else 0, "audit_accuracy": audit and audit["accuracy"],
            "audit_interval": audit and list(audit["interval"]), "cost": spent, "cost_incomplete": incomplete,
            "budget_spent_at_step": state["budget_spent_at_step"],
            **({"committee": schedule.pairs.soft_labels is not None} if config.label_budget else {}),
            **oracle.about, **oracle.judge_metrics(),
            "eval_loss": evaluation and evaluation["loss"],
            "eval_accuracy": evaluation and evaluation["rewards/accuracies"],
            "peak_memory_bytes": peak_memory(engine.device), **adapter_summary(config, engine.module.lm)}


def closing_line(summary):
    """The run in one line."""
    if "examples" in summary:  # SFT
        held_out = [] if summary["eval_loss"] is None else [f"held-out loss {summary['eval_loss']:.4f}"]
        return " · ".join([f"{summary['examples']:,} examples", *held_out, f"{summary['wall_seconds']:.0f} s"])
    share = summary["query_fraction"]
    parts = [f"{summary['queries']:,} of {summary['pairs']:,} labels bought ({share:.0%})".replace("%", " %")]
    if summary.get("queries_without_preference"):
        parts.append(f"{summary['queries_without_preference']:,} of them without a preference")
    if text := judge_text(summary):
        parts.append(f"judge: {text}".replace("%", " %"))
    if summary["pseudo_label_accuracy"] is not None:
        parts.append(f"pseudo-labels right: {100 * summary['pseudo_label_accuracy']:.1f} %")
    if summary["audited"]:
        low, high = summary["audit_interval"]
        parts.append(f"{summary['audited']:,} audited: {100 * summary['audit_accuracy']:.1f} % right ({100 * low:.1f}–"
                     f"{100 * high:.1f} %)")
    if summary["budget_spent_at_step"] is not None:
        parts.append(f"the budget was spent at step {summary['budget_spent_at_step'] + 1:,}")
    if summary["cost"] is not None:
        parts.append(f"{card.money(summary['cost'], summary.get('cost_incomplete'))} spent on labels")
    if summary["eval_accuracy"] is not None:
        parts.append(f"held-out accuracy {summary['eval_accuracy']:.3f}")
    if "gold_reward_after" in summary:
        parts.append("gold reward of generations "
                     f"{summary['gold_reward_before']:+.2f} → {summary['gold_reward_after']:+.2f}")
    return " · ".join([*parts, f"{summary['wall_seconds']:.0f} s"])


def read_summary(path):
    """The summary.json of a finished run. Raises UsageError if it is damaged."""
    try:
        closing_line(summary := json.loads(path.read_text(encoding="utf-8")))
        return summary
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UsageError(f"{path} is damaged ({one_line(error)}): restore it, or delete it, and the same command goes on "
                         "from the last checkpoint and writes it again")


def finish(config, summary, output, names, command_line, seconds):
    """After the model is saved: card, summary, the last lines, the hub.  names: of the model's files."""
    failure = None
    if rank() == 0:
        pictures = [] if config.objective == "sft" else draw_curves(output)
        replace_text(output / "README.md", card.model_card(config, summary, command_line, pictures))
        summary["wall_seconds"] = seconds
        replace_text(output / "summary.json", json.dumps(summary, indent=2) + "\n")
        say(closing_line(summary))
        what = "adapter" if leaves_adapter(config) else "model"
        rest = " and its metrics" if config.objective == "sft" else ", its metrics and its ledger"
        say(f"the {what}{rest} are in {output}")
        if config.push_to_hub:
            failure = card.push(config, output, names + pictures)
    barrier()
    if failure:
        raise UsageError(failure)


def draw_curves(output):
    """Write curves.png if matplotlib is installed. Returns the names of the pictures written."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    try:
        figure = curves.draw({output.name: curves.read_metrics(output)})
        with writing(output / "curves.png"):
            curves.save(figure, output / "curves.png")
        return ["curves.png"]
    except curves.PlotError as error:
        say(f"no curves: {error}")
    except UsageError:  # a full disk
        raise
    except Exception as error:  # matplotlib's: a run that has trained must not end without its summary for want of a picture
        say(f"no curves: matplotlib fails ({type(error).__name__}: {one_line(error, 200)})")
    return []


def adapter_summary(config, lm):
    """For summary.json: which adapter was trained, if one was."""
    if not config.use_peft:
        return {}
    settings = lm.peft_config["default"]
    return {"adapter": f"LoRA of rank {settings.r}, alpha {settings.lora_alpha}"}
