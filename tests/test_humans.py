"""benchmarks/humans.py on a tiny model: `python -m pytest tests/test_humans.py -n 0`."""

import json

import pytest

from benchmarks import humans, query_efficiency
from runtime.sources import read_rows


def test_each_prompt_is_held_out_once_with_all_its_pairs(tmp_path):
    rows = [{"prompt": f"question {n // 2}", "response_a": "x" * (n % 3 + 1), "response_b": "yy", "label": "a"}
            for n in range(60)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    smallest, longer = humans.split(tmp_path / "pairs.jsonl", tmp_path / "parts")
    parts = [{name: [row for _, row in read_rows(tmp_path / "parts" / f"part-{part}", name)] for name in ("train", "test")}
             for part in range(humans.PARTS)]
    assert sorted(json.dumps(row) for part in parts for row in part["test"]) == sorted(map(json.dumps, rows))
    for part in parts:
        prompts = {name: {row["prompt"] for row in part[name]} for name in part}
        assert part["test"] and not prompts["train"] & prompts["test"] and len(part["train"] + part["test"]) == 60
    assert smallest == min(len(part["train"]) for part in parts)
    assert longer == pytest.approx((0 + 0.5 + 1) / 3)  # 1, 2 and 3 characters are preferred to 2


def test_a_pair_without_a_label_is_named(tmp_path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "a", "response_a": "b", "response_b": "c"}) + "\n")
    with pytest.raises(ValueError, match="row 1: no label"):
        humans.split(tmp_path / "pairs.jsonl", tmp_path / "parts")


def test_the_methods_run_and_what_has_finished_is_not_run_again(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(humans, "NAMES", ["DPO, all labels", "random subset", "committee"])
    size = humans.Size(48, 1, (1e-3, 2e-3), {"num_threads": 1, "max_length": 64, "max_prompt_length": 16})
    pairs, longer = humans.split(tiny / "pairs", tmp_path)
    runs = humans.Humans(tiny / "model", size, tmp_path, pairs)
    runs.run_all()
    found = runs.finished()
    assert [(rate in (5e-4, 1e-3, 2e-3, 4e-3), [*parts]) for rate, parts in found.values()] == [(True, [1])] * 3
    queries = [parts[1]["queries"] for _, parts in found.values()]
    assert queries == [runs.pairs, *[round(runs.pairs / 3)] * 2] and runs.pairs <= 48
    written = {path: path.read_bytes() for path in tmp_path.glob("*-part-*.json")}
    monkeypatch.setattr(humans, "command", None)  # would fail
    runs.run_all()
    assert {path: path.read_bytes() for path in tmp_path.glob("*-part-*.json")} == written
    text = humans.page(runs, tiny / "pairs", longer, "a CPU")
    assert f"| DPO, all labels | {found['DPO, all labels'][0]:g} | 1 | {runs.pairs} |" in text
    chosen_for_a_task = {*query_efficiency.COMMITTEE}
    for path in tmp_path.glob("committee-*.yaml"):
        assert not chosen_for_a_task & json.loads(path.read_text()).keys()  # a real model has train.py's defaults
    assert len(written) >= 9 and not [*tmp_path.rglob("model.safetensors")]  # three methods, two rates or more and a fold
