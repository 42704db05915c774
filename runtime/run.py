"""One run: its folder, where it stands, when it logs, evaluates and saves, how it stops and resumes. Training and SFT alike.

    run = Run.open(config, command_line)          refuses another run's folder; run.finished: nothing is left to do
    run.resume(engine, schedule, columns=…, …)    from the newest whole checkpoint, if there is one
    with run.stoppable(engine):                   Ctrl-C or a missing answer writes a checkpoint; the same command goes on
        for step in run.steps():
            …  run.add(sums)                      metric sums of a micro-batch
            run.end_step(engine, norm, ids)
            if run.is_due("logging"): …           and "eval", "save"
    run.finish(engine, tokenizer, summary)        model, card, summary, hub
"""

import contextlib
import json
import os
import signal
import time
from pathlib import Path

import torch

import data
from runtime import checkpoint, report, toy
from runtime.engine import engine_config, plain_logps, settings_that_count, skipped_in_a_row
from runtime.errors import Stopped, UsageError
from runtime.model import NotSaved, save_model, why_not_saved, why_tokenizer_not_saved
from runtime.ranks import all_gather, bar, from_rank_0, is_shared, on_any_rank, rank, reduced, say, world_size
from runtime.schedule import pairs_a_step


class Interrupt:
    """Ctrl-C and SIGTERM (which schedulers send) ask the run to stop where it can be resumed; a second Ctrl-C kills it.

    asked: set by the signal; the loop looks at it between steps.  inside: whether the run is in `at_once`.
    """

    def __init__(self):
        self.asked = self.inside = self.pressed = False

    def install(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self)

    def remove(self):
        """Undo `install`, unless a stop is under way: the launcher sends SIGTERM next, which would cut the stop short."""
        if not self.asked:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    @contextlib.contextmanager
    def at_once(self):
        """Around a wait that may take hours: a signal, even one that came earlier, raises KeyboardInterrupt at once."""
        self.inside = True
        try:
            if self.asked:
                raise KeyboardInterrupt
            yield
        finally:
            self.inside = False

    def __call__(self, number, frame):
        if number == signal.SIGINT and self.pressed:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.pressed |= number == signal.SIGINT  # the launcher sends SIGTERM after a Ctrl-C, which is not a second Ctrl-C
        self.asked = True
        if self.inside:
            self.inside = False  # raise only once: under the launcher a second signal follows at once
            raise KeyboardInterrupt


class Run:
    """Where a run stands. All ranks make one and call its methods together.

    step: optimiser steps done.  evaluation: the last one's result.  finished: whether there is nothing left to do.
    checkpoint, before: the folder that it goes on from, and the state in there; None: from the beginning.
    start: what a checkpoint and the run that resumes it must have in common; `resume` completes it.
    From `resume` on: sums: (columns,) fp64, metric sums since the last log.  seconds: that its steps took.
    parts: objects whose state checkpoints keep.
    """

    def __init__(self, config, command_line=None):
        self.config, self.command_line, self.started = config, command_line, time.monotonic()
        self.output, self.interrupt, self.finished = Path(config.output_dir), Interrupt(), False
        self.step, self.skipped, self.seconds_before, self.evaluation = 0, 0, 0.0, None
        self.step_start = 0.0  # a committee asks before the first step
        self.start = {}
        self.toy_prompts = toy.put_in_place(config)
        self.engine_config = engine_config(config)

    @classmethod
    def open(cls, config, command_line=None):
        """The run in output_dir, before anything is loaded. Raises UsageError if that folder cannot be used."""
        run = cls(config, command_line)
        output, shared_output = run.output, is_shared(run.output)
        checkpoint.lock(output)  # first: what waits for another run's end must then find it finished
        checkpoint.check_same_run(config, output, pairs_a_step(config))
        if all_gather((output / "summary.json").is_file())[0]:
            if rank() == 0:
                say(f"{output} is finished: {report.closing_line(report.read_summary(output / 'summary.json'))}")
            say("to train again, choose another --output_dir or move that one away")
            run.finished = True
            return run
        checkpoint.check_writable(config, output)
        if not shared_output and config.save_strategy != "no":
            raise UsageError(f"output_dir {output}: is not the same folder on all hosts, and each rank writes its part of a "
                             "checkpoint there: put it on a file system that all share, or say --save_strategy=no")
        run.can_save = shared_output
        run.checkpoint = checkpoint.find(config, output) if shared_output else None
        run.before = checkpoint.read_state(run.checkpoint) if run.checkpoint else None
        return run

    def write_config(self):
        """Make the folder and its config.yaml. All ranks call it together."""
        checkpoint.write_config(self.config, self.output, pairs_a_step(self.config))

    def resume(self, engine, schedule, columns, unit="pairs", **parts):
        """Open the log and, if there is a checkpoint, put it into the engine and the parts.

        columns: how many metric sums there are.  unit: what a step is counted in.  parts: objects with a `state`, a dict,
        that checkpoints keep.
        """
        self.pairs = schedule.pairs
        self.total_steps, self.epoch_steps, self.parts = schedule.total_steps, schedule.epoch_steps, parts
        self.start |= {f"{unit} a step": schedule.step_pairs, unit: schedule.pairs.fingerprint,
                       "model": engine.module.fingerprint, "engine settings": settings_that_count(self.engine_config)}
        sums, self.seconds = [0.0] * columns, 0.0
        if self.checkpoint:
            state = self.before
            checkpoint.restore(engine, self.checkpoint, state["start"], self.start)
            self.step, self.skipped, self.seconds_before, self.evaluation, sums = (
                state[name] for name in ("step", "skipped", "wall_seconds", "evaluation", "sums"))
            self.seconds = state.get("seconds", 0.0)  # checkpoints of earlier versions have none
            for name, part in parts.items():
                part.state = state[name]
            if not schedule.test:  # the last evaluation would be taken for one of the model at the end
                self.evaluation = None
            checkpoint.set_aside_later(self.output, self.step)
            say(f"resumed from {self.checkpoint} at step {self.step:,} of {self.total_steps:,}")
        self.sums = torch.tensor(sums, dtype=torch.float64, device=engine.device) * (rank() == 0)
        self.metrics = report.Log(self.output, engine, self.step if self.checkpoint else -1)
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
        say(f"{len(schedule.pairs):,} {unit}, {self.total_steps:,} steps of {schedule.step_pairs} {unit}, {parameters:,} "
            f"parameters, {world_size()} process{'es' if world_size() > 1 else ''} on {engine.device.type}, "
            f"ZeRO {self.engine_config['zero_optimization'].get('stage', 0)}")

    @contextlib.contextmanager
    def interruptible(self, total, what, done=0):
        """Around work in which Ctrl-C and SIGTERM ask for a stop, and `progress` shows how far it is."""
        self.progress, self.doing = bar(total, what, initial=done), what
        self.interrupt.install()
        try:
            yield
        except (Stopped, FloatingPointError):  # benchmarks/humans.py goes on to another run after a divergence
            self.interrupt.remove()
            raise
        finally:
            self.progress.close()
        self.interrupt.remove()

    @contextlib.contextmanager
    def stoppable(self, engine):
        """Around the loop: where it is Stopped, a checkpoint is written first, so that the same command resumes it."""
        with self.interruptible(self.total_steps, "train", self.step):
            try:
                yield
            except Stopped:
                if self.step and self.can_save and not self.in_step and self.step not in checkpoint.complete(self.output):
                    self.save(engine)
                raise

    def stop_if_asked(self):
        """Raise Stopped after Ctrl-C or SIGTERM on any rank."""
        if on_any_rank(self.interrupt.asked):
            raise Stopped("interrupted")

    def steps(self):
        """Yield each optimiser step that is still to do, from 0; stop_if_asked before each."""
        self.in_step = False
        while self.step < self.total_steps:
            self.stop_if_asked()
            self.step_start = time.monotonic()
            yield self.step
            self.progress.update()

    def show_missing(self, missing, how=""):
        """Show in the progress bar how many answers are missing and, if people give them, with which command."""
        answer = f" (answer with `{how}`)" if how else ""
        self.progress.set_description_str(f"waiting for {missing} labels{answer}" if missing else self.doing)

    def add(self, sums):
        """Add the metric sums of a micro-batch.  sums: (columns,) fp64."""
        self.sums += sums
        self.in_step = True  # a checkpoint written now would count part of a step

    def end_step(self, engine, norm, ids):
        """End a step.  norm: what `backward` returned.  ids: the step's pairs, over all ranks, to name them if the gradient
        was not finite. Raises FloatingPointError at the third such step in a row."""
        self.skipped = skipped_in_a_row(self.skipped, engine, norm, self.step, ids)
        self.step += 1
        self.step_end = time.monotonic()
        self.seconds += self.step_end - self.step_start
        self.in_step = False

    def is_due(self, what):
        """Whether "logging", "eval" or "save" is due after the step that has just ended."""
        last = self.step == self.total_steps
        if what == "logging":
            first = self.step == 1 and self.config.logging_first_step
            return first or last or self.step % self.config.logging_steps == 0
        strategy, every = getattr(self.config, f"{what}_strategy"), getattr(self.config, f"{what}_steps")
        due = strategy == "steps" and self.step % every == 0 or strategy == "epoch" and self.step % self.epoch_steps == 0
        return due or last and what == "eval"

    def take_sums(self):
        """(the metric sums since the last log, over all ranks, as a list; the seconds that its steps took, without
        evaluations, checkpoints and, on rank 0, waiting for answers). Both begin at 0 again."""
        sums = reduced(self.sums)  # waits for what a GPU has still to do of the last step
        seconds = self.seconds + time.monotonic() - self.step_end
        self.sums.zero_()
        self.seconds = 0.0
        return sums, seconds

    @contextlib.contextmanager
    def untimed(self):
        """Around what is not training, such as waiting for answers, whose seconds `take_sums` does not count."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self.step_start += time.monotonic() - begun

    def log(self, split, row):
        """Write a row of metrics.jsonl.  split: "train" or "eval"."""
        self.metrics.write({"step": self.step, "epoch": self.step / self.epoch_steps, "split": split, **row})

    def save(self, engine):
        """Write a checkpoint."""
        state = {"step": self.step, "start": self.start, "skipped": self.skipped, "evaluation": self.evaluation,
                 "wall_seconds": self.seconds_before + time.monotonic() - self.started, "sums": reduced(self.sums),
                 "seconds": self.seconds, **{name: part.state for name, part in self.parts.items()}}
        checkpoint.save(engine, self.output, state, self.config.save_total_limit)

    @torch.no_grad()
    def check_saved(self, engine, tokenizer):
        """Warn if the saved model is not what was trained, and keep a checkpoint then, or if the saved tokenizer is another
        one. One pair is compared, on the CPU."""
        row = min(range(len(self.pairs)), key=lambda row: self.pairs.lengths[row])
        batch = data.collate(self.pairs, [row], shared=False)
        logps = plain_logps(engine, batch).cpu()  # (N,)
        why = None
        if rank() == 0:
            texts = self.pairs.texts[row]
            prompt, *responses = (json.loads(texts[name]) for name in ("prompt", "first", "second") if texts[name])
            if differs := why_tokenizer_not_saved(self.config, tokenizer, self.output, (prompt, responses)):
                say(f"WARNING: the tokenizer in {self.output} is not that of the run: {differs}. Copy its files from "
                    f"{self.config.tokenizer_name_or_path or self.config.model_name_or_path}")
            if not self.config.load_in_4bit:  # loaded again, an adapter's model is not in 4 bits
                why = why_not_saved(self.config, self.output, batch, logps)
        if why := from_rank_0(why):
            if self.can_save:
                self.save(engine)
            say(f"WARNING: the model in {self.output} is not what was trained: {why}. "
                + (f"checkpoint-{self.step} holds the trained weights" if self.can_save else "Its weights were not kept"))

    def finish(self, engine, tokenizer, summary):
        """After the last step: the model, its card, the summary, and the hub if asked for."""
        self.interrupt.install()  # a signal must not cost the steps since the last checkpoint: the model is saved first
        try:
            names = save_model(engine, tokenizer, self.output, self.config)
        except NotSaved as error:
            if self.can_save:
                self.save(engine)
            raise UsageError(f"{self.output}: the model cannot be saved ({error}). " + (
                f"checkpoint-{self.step} holds the trained weights, and the same command goes on from there"
                if self.can_save else "Its weights were not kept"))
        self.check_saved(engine, tokenizer)
        engine.destroy()
        if rank() == 0 and self.toy_prompts:
            for when, folder in (("before", self.config.model_name_or_path), ("after", self.output)):
                summary[f"gold_reward_{when}"] = toy.mean_gold_reward(folder, self.toy_prompts)
        seconds = self.seconds_before + time.monotonic() - self.started
        self.interrupt.remove()
        report.finish(self.config, summary, self.output, names, self.command_line, seconds)
