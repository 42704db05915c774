"""Accuracy and reward for the labels bought, compared fairly: DPO, random labels, the paper's ADPO, and what labels/ adds.

    python benchmarks/query_efficiency.py                  both tasks; a night on two cores
    python benchmarks/query_efficiency.py --task toy       one of them: toy or movies
    python benchmarks/query_efficiency.py --short          a few runs of a smaller task, under five minutes; only to outputs/
    python benchmarks/query_efficiency.py --report         run nothing; write the results of the runs that have finished

The tasks are the built-in one (runtime/toy.py) and one of real text (benchmarks/movies.py), each with 16,384 training pairs
and 4,096 test pairs, whose labels have no noise. What makes the comparison fair:

- Each method has its own learning rate and its own β at each noise (Plan.tuning says where): the ones with the best mean
  accuracy on seeds that are not reported (from 100 on), first the rate with the usual β, then β with that rate. The grids
  are the same for all; if the best is at an edge, the next one is tried too.
- Seeds are paired: all methods of a seed see the same model, pairs, labels and order, for the same 256 steps of 64 pairs.
- All labels that a run buys count, those of audits too.

Primary comparisons, written down before any of the candidate's reported runs, as paired differences with 95 % intervals
(Student's t). The candidate is the recommended way to spend a number of labels: at first "budget, replay", and since that
missed its aims "committee":

1. 20 % of the labels wrong, a quarter of them bought: accuracy at most 0.5 points below that of DPO on all labels, and at
   least 2 points above that of a random subset, with the lower end of the interval above 0; on both tasks.
2. 35 % wrong, a third bought: at most 1 point below DPO on all labels, and at least 3 points above a random subset, again
   with the lower end above 0.
3. At each noise of each task: not more than 0.5 points below a random subset.

"random, replay" and "committee, random pairs" tell what the choice of pairs adds to the way labels are spent and used. All
else is secondary.

Cut to save time: only the headline methods at 20 % noise of the built-in task have 20 seeds (Plan.seeds); the
other methods are tuned at 20 % noise alone, with one seed, and are left out at some noises.

A run that has finished is not run again, nor is one that finished elsewhere: results/query_efficiency.json holds what each
run measured. (Delete it to begin anew. If the keys of a method have changed, its runs are done again.) Each of Plan.blocks
leaves a balanced table. Writes query_efficiency.md, .json and .png into benchmarks/results. One run is in query_runs.py, the
tables are in query_report.py.
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
PLAIN, REPLAY, SHARE = {"data_selection": False}, {"pseudo_labels": "replay"}, "the noise's share"
# Learning rate and passes of a committee's members, chosen on the first tuning seed of each task.
COMMITTEE = {"pseudo_labels": "committee", "committee_learning_rate": {"toy": 1e-3, "movies": 3e-3},
             "committee_epochs": {"toy": 8, "movies": 2}}
BUDGET, RANDOM = REPLAY | {"target_query_fraction": SHARE}, REPLAY | {"budget_selection": "random"}

# method: keys of train.py, a value for all tasks or {task: value}; `subset` stands for training on a random share of the
# pairs for as many steps.
HEADLINE = {
    "DPO, all labels": PLAIN,
    "random subset": PLAIN | {"subset": SHARE},
    "random, replay": RANDOM | {"target_query_fraction": SHARE},
    "budget, replay": BUDGET,
    "committee": COMMITTEE | {"target_query_fraction": SHARE},
    "committee, random pairs": COMMITTEE | {"target_query_fraction": SHARE, "budget_selection": "random"},
}
OTHERS = {
    "committee, all labels": COMMITTEE | {"target_query_fraction": 1.0},
    "random 12.5 %, replay": RANDOM | {"target_query_fraction": 0.125},
    "random 50 %, replay": RANDOM | {"target_query_fraction": 0.5},
    "calibrated gate, replay": REPLAY | {"gate": "calibrated", "audit_fraction": 0.05, "gamma": 1.0},
    **{f"paper, γ = {gamma:g}": {"gamma": gamma} for gamma in (0.7, 1.3, 3.0)},
    **{f"paper, γ = {gamma:g}, no pseudo-labels": {"gamma": gamma, "pseudo_labels": "false"} for gamma in (0.7, 1.3, 3.0)},
}
METHODS = HEADLINE | OTHERS
QUICK = [*HEADLINE][:4]


@dataclass(frozen=True)
class Plan:
    """What is run.  Seeds are counted from 0, tuning seeds from FIRST_TUNING_SEED.

    sizes: training and test pairs.  rates: {task: the grid of learning rates}.  betas: that of β.
    tuning: {task: {noise: tuning seeds of the headline methods}}. At a noise without any, rate and β are those of noise-0.2,
    and so are those of the other methods everywhere.
    seeds: {task: {noise: (seeds of the headline methods, of the others)}}.
    blocks: (methods, noises, most seeds), in the order of the work.
    """
    sizes: tuple
    rates: dict
    betas: tuple
    tuning: dict
    seeds: dict
    blocks: tuple


FULL = Plan(
    sizes=(16384, 4096),
    rates={"toy": (1e-3, 2e-3, 4e-3), "movies": (2e-3, 4e-3, 8e-3)}, betas=(0.05, 0.1, 0.2),
    tuning={"toy": {"noise-0.2": 2, "noise-0.35": 2, "noise-0.05": 1, "flips-0.2": 1},
            "movies": {"noise-0.2": 1, "noise-0.35": 1}},
    seeds={"toy": {"noise-0.2": (20, 5), "noise-0.35": (10, 3), "noise-0.05": (5, 0), "flips-0.2": (5, 0)},
           "movies": {"noise-0.2": (5, 2), "noise-0.35": (5, 0), "noise-0.05": (2, 0), "flips-0.2": (2, 0)}},
    blocks=((HEADLINE, ["noise-0.2"], 5), (HEADLINE, ["noise-0.35"], 5), (HEADLINE, ["noise-0.05", "flips-0.2"], 5),
            (OTHERS, [*SHARES], 5), (HEADLINE, [*SHARES], 10), (HEADLINE, [*SHARES], 20)))
SHORT = Plan(
    sizes=(4096, 1024), rates={"toy": (2e-3, 4e-3)}, betas=(BETA,), tuning={"toy": {"noise-0.2": 1}},
    seeds={"toy": {"noise-0.2": (2, 0)}}, blocks=((QUICK, ["noise-0.2"], 2),))
FIRST_TUNING_SEED = 100
SECONDS = {"toy": (35, 70), "movies": (110, 250)}  # about what a run takes while none has finished, and building a seed


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
        seeds = self.plan.tuning[task]
        noise = noise if noise in seeds and method in HEADLINE else "noise-0.2"
        return [Job(task, noise, method, *setting, FIRST_TUNING_SEED + n)
                for n in range(seeds[noise] if method in HEADLINE else 1) for setting in settings]

    def tried(self, task, noise, method, settings):
        """{setting: accuracies of its tuning runs}, without the settings whose runs have not all finished."""
        found = {}
        for setting in settings:
            results = [self.result(job) for job in self.tuning(task, noise, method, [setting])]
            if all(results):
                found[setting] = [result["accuracy"] for result in results]
        return found

    def grids(self, task, rate=None):
        """Two lists of settings: the learning rates to try and, with that of these which is the best, the values of β."""
        return [(r, BETA) for r in self.plan.rates[task]], [(rate, beta) for beta in self.plan.betas]

    def setting(self, task, noise, method):
        """((learning rate, β) of a method as far as it is known, or None; the settings that are to be tried next)."""
        best = None
        for axis in range(2):
            grid = self.grids(task, best and best[0])[axis]
            tried = self.tried(task, noise, method, extended(grid, axis))
            chosen, next_ones = choose(tried, grid, axis)
            best = chosen or best
            if next_ones:
                return best, next_ones
        return best, []

    def seeds(self, task, noise, method):
        return range(self.plan.seeds[task][noise][0 if method in HEADLINE else 1])

    def reported(self, task, methods, noises, most):
        """The runs that are reported, seed by seed; none of a method whose learning rate is not known yet."""
        settings = {(noise, method): self.setting(task, noise, method)[0] for noise in noises for method in methods}
        return [Job(task, noise, method, *setting, seed) for seed in range(most)
                for (noise, method), setting in settings.items() if setting and seed in self.seeds(task, noise, method)]

    def cells(self):
        """(noise, method) of all blocks."""
        return dict.fromkeys((noise, method) for methods, noises, _ in self.plan.blocks for noise in noises
                             for method in methods)

    def finished(self, task):
        """{job: result} of all runs of a task that have finished, without those of settings that turned out not to be the
        best."""
        jobs = []
        for cell in self.cells():
            best = self.setting(task, *cell)[0]
            for axis, grid in enumerate(self.grids(task, best and best[0])):
                jobs += self.tuning(task, *cell, extended(grid, axis)) if best or axis == 0 else []
        for methods, noises, most in self.plan.blocks:
            jobs += self.reported(task, methods, noises, most)
        return {job: result for job in dict.fromkeys(jobs) if (result := self.result(job))}

    def dump(self):
        """All results, as the JSON that read_kept reads; a line for each run."""
        runs = [{"job": astuple(job), "result": result} for task in self.roots for job, result in (
            self.finished(task) | {job: result for job, result in self.kept.items() if job.task == task}).items()]
        methods = {name: METHODS[name] for name in dict.fromkeys(row["job"][2] for row in runs)}
        rows = ",\n".join(map(json.dumps, runs))
        return f'{{"methods": {json.dumps(methods)},\n"runs": [\n{rows}\n]}}\n'

    def planned(self, task):
        """(runs, seeds to build); without the runs that follow where the best setting is at the edge of a grid."""
        cells, (rates, betas) = self.cells(), self.grids(task)
        tuning = {job for cell in cells for job in self.tuning(task, *cell, rates + betas[1:])}  # a rate's β is one of them
        seeds = {job.seed for job in tuning}.union(*(self.seeds(task, *cell) for cell in cells))
        return len(tuning) + sum(len(self.seeds(task, *cell)) for cell in cells), len(seeds)

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
        for methods, noises, most in self.plan.blocks:
            for task in self.roots:
                cells = [(task, noise, method) for noise in noises for method in methods if self.seeds(task, noise, method)]
                while wanted := {cell: more for cell in cells if (more := self.setting(*cell)[1])}:
                    self.run(dict.fromkeys(job for cell, more in wanted.items() for job in self.tuning(*cell, more)), bar)
                self.run(self.reported(task, methods, noises, most), bar)


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


def extended(grid, axis):
    """Settings that differ in one axis, and the next one at either end."""
    def next_to(setting, factor):
        return tuple(factor * value if n == axis else value for n, value in enumerate(setting))
    return [next_to(min(grid), 0.5), *grid, next_to(max(grid), 2)]


def choose(tried, grid, axis):
    """(the best setting as far as it is known, or None; those that are to be tried next).  tried: {setting: accuracies}.

    None until the grid has been tried. Where the best is at its edge, the next one is to be tried, one in all.
    """
    if missing := [setting for setting in grid if setting not in tried]:
        return None, missing
    best = max(tried, key=lambda setting: statistics.mean(tried[setting]))
    if len(grid) == 1 or len(tried) > len(grid) or min(grid) < best < max(grid):
        return best, []
    low, *_, high = extended(grid, axis)
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
            runs, seeds = bench.planned(task)
            finished = [result["seconds"] for result in bench.finished(task).values()]
            to_build = seeds - len([*root.glob("seed-*/responses")])
            done, left = done + len(finished), left + max(0, runs - len(finished))
            seconds += max(0, runs - len(finished)) * (statistics.mean(finished) if finished else SECONDS[task][0])
            seconds += max(0, to_build) * SECONDS[task][1]
        print(f"{left} runs to do: about {seconds / args.jobs / 3600:.1f} hours with {args.jobs} workers", flush=True)
        with tqdm(total=done + left, initial=done, desc="runs", smoothing=0) as bar:
            bench.run_all(bar)
    from benchmarks import query_report
    bench.roots = {task: roots[task] for task in plan.rates}  # the page is about all that has finished
    query_report.write(bench, outputs if args.short else RESULTS)


if __name__ == "__main__":
    main()
