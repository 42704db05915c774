"""benchmarks/humans.py on a tiny model: `python -m pytest tests/test_humans.py -n 0`."""

import datetime
import json
import os
import signal

import datasets
import pytest

from benchmarks import humans, query_efficiency
from runtime.errors import DataError, Stopped, UsageError
from runtime.model import save_model
from runtime.sources import read_rows


def test_each_prompt_is_held_out_once_with_all_its_pairs(tmp_path):
    rows = [{"prompt": f"question {n // 2}", "response_a": "x" * (n % 3 + 2), "response_b": "yy", "label": "a"}
            for n in range(60)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read, longer = humans.read(tmp_path / "pairs.jsonl")
    humans.split(read, tmp_path / "parts")
    parts = [{name: [row for _, row in read_rows(tmp_path / "parts" / f"part-{part}", name)] for name in ("train", "test")}
             for part in range(humans.PARTS)]
    assert sorted(json.dumps(row) for part in parts for row in part["test"]) == sorted(map(json.dumps, rows))
    for part in parts:
        prompts = {name: {row["prompt"] for row in part[name]} for name in part}
        assert part["test"] and not prompts["train"] & prompts["test"] and len(part["train"] + part["test"]) == 60
    assert humans.fewest(read) == min(len(part["train"]) for part in parts)
    assert longer == pytest.approx((0.5 + 1 + 1) / 3)  # 2, 3 and 4 characters are preferred to 2


def test_a_pair_without_a_label_is_named(tmp_path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "a", "response_a": "b", "response_b": "c"}) + "\n")
    with pytest.raises(DataError, match="row 1: no label.*leave out"):
        humans.read(tmp_path / "pairs.jsonl")


def command(monkeypatch, capsys, *arguments):
    """(exit code, what was written to stderr) of the command line."""
    monkeypatch.setattr("sys.argv", ["humans.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        humans.main()
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize("rows, said", [
    ([{"prompt": "p"}], "pairs.jsonl, row 1: needs chosen and rejected"),
    ([{"prompt": "p", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(90)],
     "90 pairs, whose prompts fall into 1 of 6 parts: this benchmark needs more prompts"),
    (None, "has no split train")])
def test_pairs_that_cannot_be_used_are_refused_in_one_line(tmp_path, monkeypatch, capsys, rows, said):
    (tmp_path / "pairs").mkdir()
    if rows:
        (tmp_path / "pairs" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "pairs" / "train.jsonl").rename(tmp_path / "pairs.jsonl")
    source = tmp_path / ("pairs.jsonl" if rows else "pairs")
    code, error = command(monkeypatch, capsys, tmp_path, source, "--outputs", tmp_path / "out", "--page", tmp_path / "page")
    assert code == 2 and said in error and error.count("\n") == 1 and not (tmp_path / "page").exists()


def test_runs_belong_to_what_they_depend_on(tmp_path, monkeypatch, capsys):
    model, pairs, seen = tmp_path / "m", tmp_path / "pairs.jsonl", []
    model.mkdir()
    monkeypatch.setattr(humans.Humans, "run_all", lambda self: seen.append(self.folder))
    monkeypatch.setattr(humans.Humans, "finished", lambda self: {})

    def run(label="a", **files):
        rows = [{"prompt": f"question {n}", "response_a": "x", "response_b": "y", "label": label} for n in range(60)]
        pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for name, text in {"model.safetensors": "1", "chat_template.jinja": "{{1}}", "README.md": "", **files}.items():
            (model / name).write_text(text)
        monkeypatch.setattr("sys.argv", ["humans.py", str(model), str(pairs), "--outputs", str(tmp_path), "--page",
                                         str(tmp_path / "new" / "p")])
        humans.main()
        return seen[-1]

    first = run()
    assert run(**{"README.md": "what it is"}) == first
    others = [run("b"), run(**{"model.safetensors": "2"}), run(**{"chat_template.jinja": "{{2}}"})]
    monkeypatch.setitem(humans.BASE, "beta", 0.5)
    others.append(run())
    monkeypatch.setitem(humans.SIZES, "cpu", humans.SIZES["gpu"])
    others.append(run())
    assert len({first, *others}) == 6
    assert (tmp_path / "new" / "p").read_text().startswith("# People's labels")
    code, error = command(monkeypatch, capsys, model, pairs, "--outputs", tmp_path / "none", "--page", pairs / "q")
    assert code == 2 and "cannot be written" in error and len(seen) == 7
    code, error = command(monkeypatch, capsys, model, pairs, "--outputs", pairs, "--page", tmp_path / "q")
    assert code == 2 and f"{pairs}/" in error and "cannot be written" in error and len(seen) == 7
    code, error = command(monkeypatch, capsys, model, pairs, "--outputs", tmp_path / "none", "--page", tmp_path / "q",
                          "--report")
    assert code == 2 and "has finished" in error and not (tmp_path / "none").exists() and not (tmp_path / "q").exists()


def test_a_pair_counts_once_with_the_label_of_most_of_its_rows(tmp_path, capsys):
    rows = [{"prompt": f"question {n}", "response_a": "x", "response_b": "y", "label": label} for n in range(60)
            for label in "abb"]
    rows += [{"prompt": "question 0", "response_a": "y", "response_b": "x", "label": "a"}]  # the other way round
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read, _ = humans.read(tmp_path / "pairs.jsonl")
    assert len(read) == 60 and {json.loads(row)["label"] for _, row in read} == {"b"}
    assert "121 rows repeat a pair" in capsys.readouterr().out


def test_a_date_beside_a_pair_does_no_harm(tmp_path):
    at = datetime.datetime(2024, 1, 1)
    rows = [{"prompt": f"question {n}", "chosen": "x", "rejected": "y", "at": at} for n in range(60)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "pairs.parquet")
    read, _ = humans.read(tmp_path / "pairs.parquet")
    assert len(read) == 60


def test_the_page_holds_differences_and_says_where_there_was_no_committee(tmp_path):
    runs = humans.Humans("m", humans.Size(48, 3, (1e-3, 2e-3), {}), tmp_path, 48)
    for part, right in enumerate([None, None, 0.75, 0.0]):
        for rate in (5e-4, 1e-3, 2e-3):
            found = {"accuracy": 0.5 + rate, "log_loss": 0.7, "queries": 16, "pseudo_label_accuracy": right,
                     "committee": right is not None, "seconds": 1}
            runs.path("committee", rate, part, ".json").write_text(json.dumps(found))
            found |= {"accuracy": 0.6 + rate, "queries": 48, "pseudo_label_accuracy": None, "committee": None}
            runs.path("DPO, all labels", rate, part, ".json").write_text(json.dumps(found))
    text = humans.page(runs, "pairs", 0.4, "a CPU", "cpu")
    for line in ("| DPO, all labels | 0.002 | 3 | 48 |  | 0.602 ± 0.000 | 0.700 ± 0.000 |  |  |",
                 "| committee | 0.002 | 3 | 16 | 37.5% | 0.502 ± 0.000 | 0.700 ± 0.000 | -0.100 ± 0.000 |  |"):
        assert f"\n{line}\n" in text
    assert "In 1 of 3 folds a member of the committee" in text and "40.0% of all pairs" in text and "right on 60.0%" in text


def test_a_rate_at_which_a_run_diverges_is_not_chosen(tmp_path, monkeypatch):
    """Only while rates are chosen: in a fold it ends the command."""
    def diverges(argv, main):
        print("error: the margin of pair p is nan, not a finite number: lower learning_rate, or look at the model's weights")
        return 1

    monkeypatch.setattr(humans, "command", diverges)
    monkeypatch.setattr(humans, "NAMES", ["DPO, all labels"])
    runs = humans.Humans("m", humans.Size(48, 3, (1e-3, 2e-3), {}), tmp_path, 48)
    for rate, accuracy in ((5e-4, 0.5), (1e-3, 0.6)):
        runs.path("DPO, all labels", rate, 0, ".json").write_text(json.dumps({"accuracy": accuracy}))
    with humans.tqdm(total=9, disable=True) as bar:
        runs.run("DPO, all labels", 2e-3, 0, bar)
        assert runs.rate("DPO, all labels") == (1e-3, [])
        assert "| 0.500 | 0.600 | diverged |" in humans.page(runs, "pairs", 0.5, "a CPU", "cpu")
        with pytest.raises(UsageError, match="exit code 1: error: the margin"):
            runs.run("DPO, all labels", 1e-3, 1, bar)


def test_the_methods_run_and_what_has_finished_is_not_run_again(tiny, tmp_path, monkeypatch, capsys, handlers):
    monkeypatch.setattr(humans, "NAMES", ["DPO, all labels", "random subset", "committee"])
    size = humans.Size(48, 1, (1e-3, 2e-3), {"num_threads": 1, "max_length": 64, "max_prompt_length": 16})
    rows, longer = humans.read(tiny / "pairs")
    humans.split(rows, tmp_path)
    runs = humans.Humans(tiny / "model", size, tmp_path, humans.fewest(rows))
    with monkeypatch.context() as patch:  # Ctrl-C while a model is saved: the run ends, and no other begins
        patch.setattr("runtime.run.save_model", lambda *args: os.kill(os.getpid(), signal.SIGINT) or save_model(*args))
        with pytest.raises(Stopped, match="goes on with the next run"):
            runs.run_all()
    assert len([*tmp_path.glob("*-part-*.json")]) == 1
    signal.signal(signal.SIGINT, signal.default_int_handler)
    runs.run_all()
    found = runs.finished()
    assert [(rate in (5e-4, 1e-3, 2e-3, 4e-3), [*parts]) for rate, parts in found.values()] == [(True, [1])] * 3
    queries = [parts[1]["queries"] for _, parts in found.values()]
    assert queries == [runs.pairs, *[round(runs.pairs / 3)] * 2] and runs.pairs <= 48
    written = {path: path.read_bytes() for path in tmp_path.glob("*-part-*.json")}
    monkeypatch.setattr(humans, "command", None)  # would fail
    capsys.readouterr()
    runs.run_all()
    assert "%" not in capsys.readouterr().err.split("runs:")[-1]  # no run is left to count
    assert {path: path.read_bytes() for path in tmp_path.glob("*-part-*.json")} == written
    text = humans.page(runs, tiny / "pairs", longer, "a CPU", "gpu")
    assert "`python benchmarks/humans.py MODEL PAIRS --size gpu`" in text
    assert f"| DPO, all labels | {found['DPO, all labels'][0]:g} | 1 | {runs.pairs} |" in text
    chosen_for_a_task = {*query_efficiency.COMMITTEE}
    for path in tmp_path.glob("committee-*.yaml"):
        assert not chosen_for_a_task & json.loads(path.read_text()).keys()  # a real model has train.py's defaults
    assert len(written) >= 9 and not [*tmp_path.rglob("model.safetensors")]  # three methods, two rates or more and a fold


def test_ctrl_c_while_the_pairs_are_read_is_no_traceback(monkeypatch, capsys):
    def pressed(source):
        raise KeyboardInterrupt
    monkeypatch.setattr(humans, "read", pressed)
    assert command(monkeypatch, capsys, "m", "p") == (75, "stopped: interrupted; the same command goes on\n")
