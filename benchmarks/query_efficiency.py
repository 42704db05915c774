"""Accuracy and reward for the labels bought, compared fairly: DPO, random labels, the paper's ADPO, and what labels/ adds.

    python benchmarks/query_efficiency.py                  both tasks; about 19 hours on two cores
    python benchmarks/query_efficiency.py --task toy       one of them: toy or movies
    python benchmarks/query_efficiency.py --short          a few runs of a smaller task, under five minutes; only to outputs/
    python benchmarks/query_efficiency.py --report         run nothing; write the results of the runs that have finished

The tasks are the built-in one (runtime/toy.py) and one of real text (benchmarks/movies.py), each with 16,384 training pairs
and 4,096 test pairs, whose labels have no noise. What makes the comparison fair:

- Each method has its own learning rate and its own β at each noise (Plan.tuning says where): the ones with the best mean
  accuracy on seeds that are not reported (from 100 on), first the rate with the usual β, then β with that rate. The grids
  are the same for all; if the best is at an edge, the next one is tried too.
- Seeds are paired: all methods of a seed see the same model, pairs, labels and order, for the same 256 steps of 64 pairs.
- All labels that a run buys count.

Primary comparisons, written down before the first reported run, as paired differences with 95 % intervals (Student's t).
The candidate is the recommended way to spend a number of labels. It was "budget, replay" at first, which missed its aims,
then a committee that bought half of its labels where its members disagreed, which gained nothing on real text (both are in
results/query_efficiency_3.md). Now it is a committee that buys the labels of random pairs, "committee". Both kinds had run
when it was chosen, so it is not blind. After its first full round its members were improved on a tuning seed, and it ran
again (results/tried.md). Seeds 5 to 7 of movie reviews, 10 to 19 of the built-in task, 8 to 19 of movie reviews, and, at
the other noises, those from 5 on were added after those before them had been seen.

1. 20 % of the labels wrong, a quarter of them bought: accuracy at most 0.5 points below that of DPO on all labels, and at
   least 2 points above that of a random subset, with the lower end of the interval above 0; on both tasks.
2. 35 % wrong, a third bought: at most 1 point below DPO on all labels, and at least 3 points above a random subset, again
   with the lower end above 0.
3. At each noise of each task: not more than 0.5 points below a random subset.

All else is secondary.

Cut to save time: there are few seeds (Plan.blocks). Only the headline methods are tuned at two noises (Plan.tuning); at the
others they have the rate and the β of 20 % noise. The other methods run at 20 % noise alone, and are tuned on one seed;
committees on half and on all of the labels (an upper bound) have the settings of that on a quarter. The row of half of the
labels was added after all others had run.

A run that has finished is not run again, nor is one that finished elsewhere: results/query_efficiency.json holds what each
run measured. (Delete it to begin anew. If the keys of a method have changed, its runs are done again.) Processors round
differently, so a task that another one has built is another sample: do all runs of a seed and noise on the same machine.
Those in the results are from two, both AMD EPYC.

Each of Plan.blocks leaves a balanced table. Writes query_efficiency.md, .json and .png into benchmarks/results. One run is
in query_runs.py, the tables are in query_report.py.
"""

import argparse
import json
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import astuple, dataclass, field
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

RESULTS = ROOT / "benchmarks" / "results"
# Share of the labels to buy at each noise: Bradley-Terry's at three levels, and an annotator who errs at random.
SHARES = {"noise-0.2": 1 / 4, "noise-0.35": 1 / 3, "noise-0.05": 1 / 4, "flips-0.2": 1 / 4}
BETA = 0.1  # with which learning rates are chosen
BASE = {"max_length": 96, "max_prompt_length": 32, "per_device_train_batch_size": 64,
        "per_device_eval_batch_size": 256, "num_threads": 1, "save_strategy": "no", "logging_steps": 64,
        "preprocessing_num_workers": 1}
PLAIN, SHARE = {"data_selection": False}, "the noise's share"
# How many members a committee has, and how they learn: chosen on the first tuning seed of each task.
COMMITTEE = {"committee_size": {"toy": 8, "movies": 4}, "committee_learning_rate": {"toy": 1e-3, "movies": 1e-3},
             "committee_epochs": {"toy": 4, "movies": 2}}

# method: keys of train.py, a value for all tasks or {task: value}. `subset` stands for training on a random share of the
# pairs for as many steps.
HEADLINE = {
    "DPO, all labels": PLAIN,
    "random subset": PLAIN | {"subset": SHARE},
    "committee": COMMITTEE | {"label_budget": SHARE},
}
NOTHING = {
    "committee that learns nothing": {"label_budget": SHARE, "committee_learning_rate": 0, "committee_epochs": 0.01},
}
OTHERS = {
    "random subset, 12.5 %": PLAIN | {"subset": 0.125},
    "random subset, 50 %": PLAIN | {"subset": 0.5},
    **{f"paper, γ = {gamma:g}": {"gamma": gamma} for gamma in (0.7, 1.3, 3.0)},
    **{f"paper, γ = {gamma:g}, no pseudo-labels": {"gamma": gamma, "pseudo_labels": False} for gamma in (0.7, 1.3, 3.0)},
}
LARGER = {
    "committee, 50 %": COMMITTEE | {"label_budget": 0.5},
    "committee, all labels": COMMITTEE | {"label_budget": 1.0},
}
METHODS = HEADLINE | NOTHING | OTHERS | LARGER
TUNED_AS = dict.fromkeys(LARGER, "committee")  # their members take up to half an hour a run


@dataclass(frozen=True)
class Plan:
    """What is run.  Tuning seeds are counted from FIRST_TUNING_SEED.

    sizes: training and test pairs.  rates: {task: the grid of learning rates}.  betas: that of β.
    tuning: {task: {noise: tuning seeds of the headline methods}}.
    blocks: [(methods, noises, {task: seeds})], in the order of the work.
    """
    sizes: tuple
    rates: dict
    betas: tuple
    tuning: dict
    blocks: list


FULL = Plan(
    sizes=(16384, 4096),
    rates={"toy": (1e-3, 2e-3, 4e-3), "movies": (2e-3, 4e-3, 8e-3)}, betas=(0.05, 0.1, 0.2),
    tuning={"toy": {"noise-0.2": 2, "noise-0.35": 2}, "movies": {"noise-0.2": 1, "noise-0.35": 1}},
    blocks=[(HEADLINE, ["noise-0.2"], {"toy": range(5), "movies": range(5)}),
            (HEADLINE, ["noise-0.35"], {"toy": range(5), "movies": range(3)}),
            (HEADLINE, ["flips-0.2", "noise-0.05"], {"toy": range(3), "movies": range(2)}),
            (HEADLINE | NOTHING, ["noise-0.2"], {"toy": range(10), "movies": range(5, 8)}),
            (OTHERS, ["noise-0.2"], {"toy": range(3), "movies": range(3)}),
            (["random subset, 50 %", "committee, 50 %"], ["noise-0.2"], {"toy": range(5, 10), "movies": range(5, 8)}),
            (HEADLINE, ["noise-0.2"], {"toy": range(10, 20), "movies": range(8, 20)}),
            (["committee, all labels"], ["noise-0.2"], {"toy": range(5, 8), "movies": range(5, 8)}),
            (HEADLINE, ["noise-0.35"], {"toy": range(5, 10), "movies": range(5, 12)}),
            (HEADLINE, ["flips-0.2", "noise-0.05"], {"toy": range(5, 12), "movies": range(5, 13)})])
SHORT = Plan(
    sizes=(4096, 1024), rates={"toy": (2e-3, 4e-3)}, betas=(BETA,), tuning={"toy": {"noise-0.2": 1}},
    blocks=[([*HEADLINE][:2] + ["paper, γ = 1.3"], ["noise-0.2"], {"toy": range(2)})])
FIRST_TUNING_SEED = 100
SECONDS = {"toy": (60, 70), "movies": (150, 250)}  # about what a run takes while none has finished, and building a seed


@dataclass(frozen=True)
class Job:
    """One run."""
    task: str
    noise: str
    method: str
    rate: float
    beta: float
    seed: int


@dataclass
class Bench:
    """The runs of a plan.  outputs: their folder.  roots: {task: the folder it is built in}.  workers: processes.
    kept: {job: result} of runs that finished elsewhere."""
    plan: Plan
    outputs: Path
    roots: dict[str, Path]
    workers: int = 1
    kept: dict = field(default_factory=dict)

    def folder(self, job):
        method = "".join(c if c.isalnum() or c in ".-" else "_" for c in job.method)
        return self.outputs / job.task / job.noise / method / f"rate-{job.rate:g}-beta-{job.beta:g}" / f"seed-{job.seed}"

    def result(self, job):
        """What a run measured, or None where it has not finished."""
        path = self.folder(job) / "result.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else self.kept.get(job)

    def keys(self, job):
        """The keys of train.py for a run."""
        keys = {name: value[job.task] if isinstance(value, dict) else SHARES[job.noise] if value == SHARE else value
                for name, value in METHODS[job.method].items()}
        pairs, root = self.plan.sizes[0], self.roots[job.task] / f"seed-{job.seed}"
        if subset := keys.pop("subset", None):
            keys["max_train_samples"] = round(subset * pairs)
        return BASE | keys | {"max_steps": -(-pairs // BASE["per_device_train_batch_size"]), "learning_rate": job.rate,
                              "beta": job.beta, "seed": job.seed, "model_name_or_path": str(root / "model"),
                              "dataset_mixer": {str(root / f"pairs-{job.noise}"): 1.0}, "output_dir": str(self.folder(job))}

    # Which runs

    def tuning(self, task, noise, method, settings):
        """The runs that tell how good these settings, (learning rate, β), are for a method."""
        seeds, method = self.plan.tuning[task], TUNED_AS.get(method, method)
        noise = noise if noise in seeds and method in HEADLINE else "noise-0.2"
        return [Job(task, noise, method, *setting, FIRST_TUNING_SEED + n)
                for n in range(seeds[noise] if method in HEADLINE else 1) for setting in settings]

    def tried(self, task, noise, method, settings):
        """{value: accuracies of its tuning runs}, without the values whose runs have not all finished.
        settings: {value: (learning rate, β)}."""
        found = {value: [self.result(job) for job in self.tuning(task, noise, method, [setting])]
                 for value, setting in settings.items()}
        return {value: [result["accuracy"] for result in results] for value, results in found.items() if all(results)}

    def settings(self, task, rate=None):
        """{learning rate: its setting with the usual β} or, with a learning rate, {β: its setting}; for all values that may
        be tried."""
        if rate is None:
            return {value: (value, BETA) for value in extended(self.plan.rates[task])}
        return {beta: (rate, beta) for beta in extended(self.plan.betas)}

    def setting(self, task, noise, method):
        """((learning rate, β) of a method as far as it is known, or None; the settings that are to be tried next)."""
        settings = self.settings(task)
        rate, more = choose(self.tried(task, noise, method, settings), self.plan.rates[task])
        beta = BETA
        if not more:
            settings = self.settings(task, rate)
            beta, more = choose(self.tried(task, noise, method, settings), self.plan.betas)
        return rate and (rate, beta or BETA), [settings[value] for value in more]

    def reported(self, task, methods, noises, seeds):
        """The runs of a block that are reported, seed by seed; none of a method whose learning rate is not known yet."""
        settings = {(noise, method): self.setting(task, noise, method)[0] for noise in noises for method in methods}
        return [Job(task, noise, method, *setting, seed) for seed in seeds.get(task, ())
                for (noise, method), setting in settings.items() if setting]

    def cells(self, task):
        """(noise, method) of all blocks."""
        return dict.fromkeys((noise, method) for methods, noises, seeds in self.plan.blocks if task in seeds
                             for noise in noises for method in methods)

    def finished(self, task):
        """{job: result} of all runs of a task that have finished, without those of settings that turned out not to be the
        best."""
        jobs = []
        for cell in self.cells(task):
            best = self.setting(task, *cell)[0]
            for rate in (None, best[0]) if best else (None,):
                jobs += self.tuning(task, *cell, self.settings(task, rate).values())
        for block in self.plan.blocks:
            jobs += self.reported(task, *block)
        return {job: result for job in dict.fromkeys(jobs) if (result := self.result(job))}

    def dump(self):
        """All results, as the JSON that read_kept reads; a line for each run."""
        runs = [{"job": astuple(job), "result": result} for task in self.roots for job, result in (
            self.finished(task) | {job: result for job, result in self.kept.items() if job.task == task}).items()]
        methods = {name: METHODS[name] for name in dict.fromkeys(row["job"][2] for row in runs)}
        rows = ",\n".join(map(json.dumps, runs))
        return f'{{"methods": {json.dumps(methods)},\n"runs": [\n{rows}\n]}}\n'

    def planned(self, task):
        """All runs, as far as they are known; without those that follow where the best setting is at the edge of a grid."""
        best = {cell: self.setting(task, *cell)[0] or (self.plan.rates[task][0], BETA) for cell in self.cells(task)}
        jobs = []
        for cell, (rate, _) in best.items():
            grid = [(value, BETA) for value in self.plan.rates[task]] + [(rate, b) for b in self.plan.betas if b != BETA]
            jobs += self.tuning(task, *cell, grid)
        for methods, noises, seeds in self.plan.blocks:
            jobs += [Job(task, *cell, *best[cell], seed) for seed in seeds.get(task, ())
                     for cell in best if cell[0] in noises and cell[1] in methods]
        return dict.fromkeys(jobs)

    # Doing them

    def work(self, calls, bar=None):
        """Call functions of query_runs.py, (name, arguments), side by side. A worker that dies loses only what it was at;
        what did not finish is tried again, three times in all."""
        for _ in range(3):
            failed, pool = [], ProcessPoolExecutor(self.workers, mp_context=get_context("spawn"))
            try:
                futures = {pool.submit(call, *parts): parts for parts in calls}
                for future in as_completed(futures):
                    if isinstance(future.exception(), BrokenProcessPool):
                        failed.append(futures[future])
                        continue
                    future.result()
                    if bar is not None:
                        bar.update()
            finally:  # where a run failed, and at Ctrl-C, the others do not begin
                pool.shutdown(cancel_futures=True)
            if not (calls := failed):
                return
        raise RuntimeError(f"{len(calls)} calls ended their worker three times, the first of them {calls[0]}")

    def build(self, jobs):
        """Build what these runs are trained on, where it is not there."""
        for task, root in self.roots.items():
            wanted = sorted({(job.seed, job.noise) for job in jobs if job.task == task})
            calls = [("build", task, root, noise, seed, *self.plan.sizes) for seed, noise in wanted
                     if not (root / f"seed-{seed}" / f"pairs-{noise}").exists()]
            if calls and task == "movies" and not (root / "sft" / "summary.json").exists():
                self.work(calls[:1])  # alone: it makes what all seeds share
            self.work([*{parts[4]: parts for parts in calls}.values()])  # one a seed: it makes the model and the responses
            self.work(calls)

    def run(self, jobs, bar):
        """Do those of these runs that have not finished."""
        jobs = [job for job in jobs if not self.result(job)]
        self.build(jobs)
        self.work([("run", job.task, self.keys(job), self.roots[job.task]) for job in jobs], bar)

    def run_all(self, bar):
        """Everything, block by block: first the settings that a block needs, then its reported runs."""
        for methods, noises, seeds in self.plan.blocks:
            for task in self.roots:
                cells = [(task, noise, method) for noise in noises for method in methods if task in seeds]
                while wanted := {cell: more for cell in cells if (more := self.setting(*cell)[1])}:
                    self.run(dict.fromkeys(job for cell, more in wanted.items() for job in self.tuning(*cell, more)), bar)
                self.run(self.reported(task, methods, noises, seeds), bar)


def read_kept(path):
    """{job: result} of the runs in a results file, without those of methods whose keys have changed since."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    same = {name for name, keys in found["methods"].items() if keys == METHODS.get(name)}
    return {Job(*row["job"]): row["result"] for row in found["runs"] if row["job"][2] in same}


def call(name, *arguments):
    """In a worker: call a function of query_runs.py, whose imports take seconds, once in each worker."""
    from benchmarks import query_runs
    getattr(query_runs, name)(*arguments)


def extended(grid):
    """The values of a grid, and the next one at either end."""
    return [min(grid) / 2, *grid, max(grid) * 2]


def choose(tried, grid):
    """(the best value as far as it is known, or None; those that are to be tried next).  tried: {value: accuracies}.

    None until the grid has been tried. Where the best is at its edge, the next one is to be tried, one in all.
    """
    if missing := [value for value in grid if value not in tried]:
        return None, missing
    best = max(tried, key=lambda value: statistics.mean(tried[value]))
    if len(grid) == 1 or len(tried) > len(grid) or min(grid) < best < max(grid):
        return best, []
    low, *_, high = extended(grid)
    return best, [low if best == min(grid) else high]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a few runs of a smaller built-in task; only to outputs/")
    parser.add_argument("--report", action="store_true", help="run nothing; write the results of the finished runs")
    parser.add_argument("--task", choices=[*SECONDS], help="only this task; default: both")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes, one thread each; default: the cores")
    parser.add_argument("--outputs", type=Path, default=ROOT / "outputs", help="folder to work in; default: outputs")
    parser.add_argument("--movies", type=Path, help="folder of benchmarks/movies.py; default: outputs/movies")
    args = parser.parse_args()
    plan, name = (SHORT, "query_efficiency_short") if args.short else (FULL, "query_efficiency")
    outputs, movies = args.outputs.resolve() / name, (args.movies or args.outputs / "movies").resolve()
    roots = {"toy": outputs / "tasks" / "toy", "movies": movies}
    bench = Bench(plan, outputs, {task: roots[task] for task in plan.rates if args.task in (None, task)}, args.jobs,
                  {} if args.short else read_kept(RESULTS / "query_efficiency.json"))
    outputs.mkdir(parents=True, exist_ok=True)
    os.environ.update(HF_HOME=str(outputs / "cache"), OMP_NUM_THREADS="1")  # of the workers
    if not args.report:
        done, left, seconds = 0, 0, 0.0
        for task, root in bench.roots.items():
            found = {job: bench.result(job) for job in bench.planned(task)}
            finished = [result["seconds"] for result in found.values() if result]
            to_build = {job.seed for job in found if not (root / f"seed-{job.seed}" / "responses").exists()}
            done, left = done + len(finished), left + len(found) - len(finished)
            seconds += (len(found) - len(finished)) * (statistics.mean(finished) if finished else SECONDS[task][0])
            seconds += len(to_build) * SECONDS[task][1]
        print(f"{left} runs to do: about {seconds / args.jobs / 3600:.1f} hours with {args.jobs} workers", flush=True)
        with tqdm(total=done + left, initial=done, desc="runs", smoothing=0) as bar:
            bench.run_all(bar)
    from benchmarks import query_report
    bench.roots = {task: roots[task] for task in plan.rates}  # the page is about all that has finished
    query_report.write(bench, outputs if args.short else RESULTS)


if __name__ == "__main__":
    main()
