"""The tables and the figure of benchmarks/query_efficiency.py, from the results of its runs."""

import math
import statistics

from benchmarks.query_efficiency import extended

TITLES = {"toy": "The built-in task", "movies": "Movie reviews",
          "noise-0.2": "20 % of the labels wrong", "noise-0.35": "35 % wrong", "noise-0.05": "5 % wrong",
          "flips-0.2": "20 % wrong at random"}
ABOUT = """\
Each method has its own learning rate and β, chosen on seeds that are not reported (tables at the end). Seeds are paired: all
methods of a seed see the same model, pairs, labels and order. AdamW, one epoch's steps of 64 pairs. Means ± 95 % intervals
(Student's t).

- **Labels**: bought, as a share of the {pairs:,} pairs. **Wrong**: the share of them that contradicts the
  gold reward.
- **Accuracy, log-loss**: of the implicit reward on {test:,} test pairs whose labels have no noise.
- **Reward**: gold reward of generations where KL(π ‖ reference) is {kl}: 256 responses from each of three
  mixtures π_λ ∝ π_ref^(1−λ) π^λ, interpolated over √KL. Seeds that do not reach it are left out and counted.
- **Equals**: how many random labels give the same accuracy (random subsets of 12.5, 25 and 50 %, and DPO on all),
  interpolated over the logarithm of the share, from the differences to DPO on all labels, seed by seed."""
# Nats at which generations are compared. On the tuning seeds, with what was chosen at 20 % noise, the headline methods have
# less at λ = 0.25 and more at λ = 0.5.
KL = {"toy": 3, "movies": 5}
ALL, SUBSET, CANDIDATE = "DPO, all labels", "random subset", "committee"
CURVE = ["random subset, 12.5 %", SUBSET, "random subset, 50 %", ALL]
COMMITTEES = [CANDIDATE, "committee, 50 %", "committee, all labels"]
AIMS = {"noise-0.2": (-0.005, 0.02), "noise-0.35": (-0.01, 0.03)}  # against DPO on all labels, and against a random subset
NOT_BELOW_RANDOM = -0.005
STUDENT = dict(enumerate([12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145,
                          2.131, 2.120, 2.110, 2.101, 2.093], 2))  # 95 %, by number of values
STYLES = {ALL: ("0.4", "s"), SUBSET: ("0.4", "o"), "committee": ("tab:green", "*"),
          "committee, 50 %": ("tab:green", "D"), "committee, all labels": ("tab:green", "s"),
          "committee that learns nothing": ("tab:green", "x"),
          "no pseudo-labels": ("tab:orange", "^"), "paper": ("tab:red", "v")}


def interval(values):
    """(mean, half the width of its 95 % interval by Student's t)."""
    if len(values) < 2:
        return values[0], math.nan
    return statistics.mean(values), STUDENT[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def text(values, form="{:.4f}"):
    mean, half = interval(values)
    return form.format(mean) + ("" if math.isnan(half) else f" ± {form.replace('+', '').format(half)}")


def differences(runs, method, other, key="accuracy"):
    """Seed by seed.  runs: {method: {seed: result}}."""
    return [result[key] - runs[other][seed][key] for seed, result in runs[method].items() if seed in runs.get(other, {})]


def reward_at(mixtures, kl):
    """Gold reward at this KL, interpolated over √KL; None if it is not between those of two mixtures.
    mixtures: [[λ, KL, reward]], by λ."""
    for (_, low, before), (_, high, after) in zip(mixtures, mixtures[1:]):
        if low <= kl <= high:
            part = (math.sqrt(kl) - math.sqrt(max(low, 0))) / (math.sqrt(high) - math.sqrt(max(low, 0)))
            return before + part * (after - before)
    return None


def equivalent(runs, method, pairs):
    """Share of random labels that gives a method's accuracy: a text, or None where the curve or the method is missing."""
    points = []
    for name in CURVE:
        if not runs.get(name) or not (found := differences(runs, name, ALL)):
            return None
        points.append((statistics.mean(r["queries"] for r in runs[name].values()) / pairs, statistics.mean(found)))
    if not (mine := differences(runs, method, ALL)):
        return None
    mine = statistics.mean(mine)
    for (few, low), (many, high) in zip(points, points[1:]):
        if low <= mine <= high and low < high:
            return f"{math.exp(math.log(few) + (mine - low) / (high - low) * math.log(many / few)):.1%}"
    return f"under {points[0][0]:.1%}" if mine < points[0][1] else "over 100%"


def table(runs, settings, task, pairs):
    lines = ["| method | learning rate | β | seeds | labels | wrong | accuracy | log-loss | reward | equals |",
             "| --- |" + " --: |" * 9]
    for name, found in runs.items():
        results = [*found.values()]
        rewards = [reward for r in results if (reward := reward_at(r["mixtures"], KL[task])) is not None]
        short = f" ({len(results) - len(rewards)} not reached)" if len(rewards) < len(results) else ""
        lines.append(
            f"| {name} | {settings[name][0]:g} | {settings[name][1]:g} | {len(results)} | "
            f"{statistics.mean(r['queries'] for r in results) / pairs:.1%} | "
            f"{statistics.mean(r['wrong'] for r in results):.1%} | {text([r['accuracy'] for r in results])} | "
            f"{text([r['log_loss'] for r in results], '{:.3f}')} | "
            f"{text(rewards, '{:.2f}') + short if rewards else 'not reached'} | {equivalent(runs, name, pairs) or ''} |")
    return lines


def paired(runs):
    others = [name for name in (ALL, SUBSET) if name in runs]
    lines = [f"| accuracy, seed by seed | {' | '.join(f'− {name}' for name in others)} |",
             "| --- |" + " --: |" * len(others)]
    for name in runs:
        cells = [text(found, "{:+.4f}") if name != other and (found := differences(runs, name, other)) else ""
                 for other in others]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def aims(results):
    """[(aim, whether it is reached, numbers)] of the primary comparisons, as far as their runs have finished."""
    found = []
    for task, by_noise in results.items():
        for noise, runs in by_noise.items():
            if CANDIDATE not in runs or SUBSET not in runs:
                continue
            gain = differences(runs, CANDIDATE, SUBSET)
            if len(gain) < 2:  # without an interval there is nothing to say
                continue
            mean, half = interval(gain)
            where = f"{TITLES[task]}, {TITLES[noise]}"
            if noise in AIMS and ALL in runs:
                most, least = AIMS[noise]
                loss = differences(runs, CANDIDATE, ALL)
                found.append((f"{where}: at most {-100 * most:g} points below DPO on all labels",
                              statistics.mean(loss) >= most, text(loss, "{:+.4f}")))
                found.append((f"{where}: at least {100 * least:g} points above a random subset, the interval above 0",
                              mean >= least and mean - half > 0, text(gain, "{:+.4f}")))
            found.append((f"{where}: at most {-100 * NOT_BELOW_RANDOM:g} points below a random subset",
                          mean >= NOT_BELOW_RANDOM, text(gain, "{:+.4f}")))
    return found


def tuning_tables(bench, task):
    """Held-out accuracy of the tuning runs by learning rate, and at the best of them by β, the best in bold; one row a
    method and noise."""
    lines = []
    for values, of_beta in ((extended(bench.plan.rates[task]), False), (extended(bench.plan.betas), True)):
        lines += ["", "| noise | method | seeds | " + " | ".join(f"{value:g}" for value in values) + " |",
                  "| --- | --- | --: |" + " --: |" * len(values)]
        runs = [bench.tuning(task, *cell, [(0, 0)])[0] for cell in bench.cells(task)]
        cells = dict.fromkeys((run.noise, run.method) for run in runs)
        for noise, method in cells:
            if best := bench.setting(task, noise, method)[0]:
                tried = bench.tried(task, noise, method, bench.settings(task, best[0] if of_beta else None))
                means = {value: statistics.mean(accuracies) for value, accuracies in tried.items()}
                scores = [f"{means[value]:.4f}" if value in means else "" for value in values]
                scores = [f"**{score}**" if means.get(value) == max(means.values()) else score
                          for value, score in zip(values, scores)]
                lines.append(f"| {TITLES[noise]} | {method} | {len(next(iter(tried.values())))} | {' | '.join(scores)} |")
    return lines


def progress(bench):
    """How much has been run, in words."""
    runs = [result["seconds"] for task in bench.roots for result in bench.finished(task).values()]
    planned = [bench.result(job) for task in bench.roots for job in bench.planned(task)]
    done = sum(result is not None for result in planned)
    more = f", and {extra} where the best setting was at the edge of a grid" if (extra := len(runs) - done) else ""
    return (f"**{done:,} of {len(planned):,} planned runs have finished**{more}. They took {sum(runs) / 3600:.1f} hours, "
            f"one thread each, {sum(runs) / max(1, len(runs)):.0f} s a run.")


def collect(bench):
    """({task: {noise: {method: {seed: result}}}}, {task: {noise: {method: (learning rate, β)}}}) of the reported runs."""
    results, settings = {}, {}
    for task in bench.roots:
        for block in bench.plan.blocks:
            for job in bench.reported(task, *block):
                if result := bench.result(job):
                    where = results.setdefault(task, {}).setdefault(job.noise, {}).setdefault(job.method, {})
                    where[str(job.seed)] = result
                    settings.setdefault(task, {}).setdefault(job.noise, {})[job.method] = job.rate, job.beta
    return results, settings


def write(bench, folder):
    """query_efficiency.md, .json and .png in a folder."""
    results, settings = collect(bench)
    pairs = bench.plan.sizes[0]
    kl = " and ".join(f"{KL[task]} nats ({TITLES[task].lower()})" for task in results)
    lines = ["# Query efficiency", "", "Made by `python benchmarks/query_efficiency.py`, whose docstring says how the "
             "comparison is kept fair, what was decided before the runs, and what was cut to save time.", "",
             progress(bench), "", "![Accuracy by labels bought](query_efficiency.png)", "",
             ABOUT.format(kl=kl, pairs=pairs, test=bench.plan.sizes[1])]
    rows = [f"| {what} | {'yes' if reached else '**no**'} | {numbers} |" for what, reached, numbers in aims(results)]
    rows = rows or ["| not yet: two seeds of each method have to finish | | |"]
    lines += ["", "## The primary comparisons", "", "| aim | reached | difference |", "| --- | --- | --: |", *rows]
    for task, by_noise in results.items():
        lines += ["", f"## {TITLES[task]}"]
        for noise, runs in by_noise.items():
            lines += ["", f"### {TITLES[noise]}", "", *table(runs, settings[task][noise], task, pairs), "", *paired(runs)]
    for task in results:
        lines += ["", f"## Learning rates and β: {TITLES[task].lower()}", "", "Held-out accuracy of the runs that chose "
                  "them, by learning rate with β = 0.1, then by β with the best of these. A method that is missing at a "
                  "noise has what it has at 20 %.", *tuning_tables(bench, task)]
    (folder / "query_efficiency.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
    (folder / "query_efficiency.json").write_text(bench.dump(), encoding="utf-8")
    draw(results, pairs, folder / "query_efficiency.png")
    print((folder / "query_efficiency.md").read_text(encoding="utf-8"))


def style(method):
    return next((look for name, look in STYLES.items() if name == method),
                next((look for name, look in STYLES.items() if name in method), ("0.7", ".")))


def draw(results, pairs, path):
    """Accuracy by labels bought: a column a task, a row for each noise of AIMS. Methods with fewer than three seeds, whose
    intervals would hide the others, are left out, and noises with fewer than three methods."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    results = {task: {noise: {name: found for name, found in runs.items() if len(found) > 2}
                      for noise, runs in by_noise.items()} for task, by_noise in results.items()}
    results = {task: {noise: runs for noise, runs in by_noise.items() if len(runs) > 2}
               for task, by_noise in results.items()}
    results = {task: by_noise for task, by_noise in results.items() if by_noise}
    noises = [noise for noise in AIMS if any(by_noise.get(noise) for by_noise in results.values())]
    rows, columns = max(1, len(noises)), max(1, len(results))
    figure, axes = pyplot.subplots(rows, columns, figsize=(6.4 * columns, 4.2 * rows + 0.8), squeeze=False,
                                    layout="constrained")
    for column, (task, by_noise) in enumerate(results.items()):
        for axis, noise in zip(axes[:, column], noises):
            runs = by_noise.get(noise, {})
            axis.set_visible(bool(runs))
            points = {name: (100 * statistics.mean(r["queries"] for r in found.values()) / pairs,
                             *interval([r["accuracy"] for r in found.values()])) for name, found in runs.items()}
            for label, names in (("random subsets", CURVE), ("committees", COMMITTEES)):
                curve = sorted(points[name] for name in names if name in points)
                if len(curve) > 1:
                    axis.plot([x for x, *_ in curve], [y for _, y, _ in curve], "--", color=style(names[1])[0], linewidth=1,
                              label=label)
            shown = [name for name in points if name not in (CURVE[0], CURVE[2])]
            floor = -math.inf  # lower points stand at the edge, with their number: a collapse would squeeze all others
            if ALL in points and SUBSET in points:
                floor = points[SUBSET][1] - 2 * max(0.005, points[ALL][1] - points[SUBSET][1])
            for n, name in enumerate(shown):
                (x, y, wide), (colour, marker) = points[name], style(name)
                # A little apart, where methods buy the same number.
                x += 0.8 * sum(abs(points[other][0] - x) < 0.5 for other in shown[:n])
                if y < floor:
                    axis.annotate(f" {y:.2f}", (x, floor), color=colour, fontsize=8)
                    y, wide = floor, math.nan
                axis.errorbar(x, y, 0 if math.isnan(wide) else wide, color=colour, marker=marker, linestyle="", capsize=2,
                              markersize=9 if marker == "*" else 5, label=name)
            axis.set_ylim(bottom=max(floor - 0.002, axis.get_ylim()[0]))
            axis.set_title(f"{TITLES[task]}: {TITLES[noise]}")
            axis.set_xlabel("labels bought, % of the pairs")
            axis.set_ylabel("held-out accuracy")
            axis.grid(alpha=0.3)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=130)
