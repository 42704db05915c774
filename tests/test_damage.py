"""Damaged files: weights, caches, metrics, a run's own files, ledgers. Checkpoints are in test_checkpoint.py.

    python -m pytest tests/test_damage.py -n 0
"""

import contextlib
import itertools
import shutil
import sqlite3
import subprocess
import sys

import pytest
from helpers import ROOT, assert_same_run, copy_without, cut, errors, flip_byte

from labels.annotators import DatasetAnnotator
from labels.ledger import Ledger

SAVING = dict(max_steps=6, save_strategy="steps", save_steps=2)


@pytest.fixture(scope="module")
def whole(train):
    """An undisturbed run with checkpoints 2, 4 and 6."""
    return train("whole", **SAVING)


@pytest.fixture
def stopped(whole, tmp_path):
    """A copy of it as it was after checkpoint 4."""
    return copy_without(whole, tmp_path / "stopped", "checkpoint-6", "summary.json", "model.safetensors")


@pytest.mark.parametrize("harm", [cut, lambda path: cut(path, 0), lambda path: cut(path, 100),
                                  lambda path: flip_byte(path, b"shape"), lambda path: path.write_text("git-lfs pointer")])
def test_a_model_whose_weights_are_damaged_is_refused(harm, train, tiny, tmp_path):
    shutil.copytree(tiny / "model", tmp_path / "model")
    harm(tmp_path / "model" / "model.safetensors")
    for key in ("model_name_or_path", "ref_model_name_or_path"):
        run = train("damaged-model", check=2, **{key: tmp_path / "model"})
        assert len(errors(run)) == 1 and f"model {tmp_path}/model: " in errors(run)[0]


@pytest.mark.parametrize("harm", [cut, lambda path: cut(path, 0), lambda path: flip_byte(path)])
def test_a_damaged_cache_of_the_reference_is_computed_again(harm, train, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    first = train("first")
    files = sorted((tmp_path / "adpo").glob("reference-*.safetensors"))
    content = [path.read_bytes() for path in files]
    assert len(files) == 2  # of the training and of the test pairs
    for path in files:
        harm(path)
    again = train("again")
    assert all(f"{path} is damaged (" in again.stdout for path in files) and again.stdout.count("are computed again") == 2
    assert_same_run(again, first)
    assert [path.read_bytes() for path in files] == content
    assert "damaged" not in train("third").stdout


def test_a_damaged_metrics_file_keeps_every_row_that_can_be_read(train, whole, stopped):
    """One line is not JSON, and the last one is cut off; its step comes after the checkpoint and is written again."""
    lines = (stopped / "metrics.jsonl").read_text().splitlines(keepends=True)
    (stopped / "metrics.jsonl").write_bytes("".join([lines[0], "\0\0\n", *lines[1:]])[:-9].encode() + b"\xff")
    run = train("metrics", output_dir=stopped, **SAVING)
    assert [line.split(": ")[0] for line in run.stdout.splitlines() if "dropped" in line and "metrics" in line] == [
        f"{stopped}/metrics.jsonl, line {n}" for n in (2, len(lines) + 1)]
    assert_same_run(run, whole)


@pytest.mark.parametrize("name", ["config.yaml", "summary.json"])
@pytest.mark.parametrize("harm", [
    lambda path: cut(path), lambda path: cut(path, 0), lambda path: path.write_bytes(b"\xff\xfe"),
    lambda path: path.write_text("a: [")], ids=["cut", "empty", "bytes", "text"])
def test_a_damaged_file_of_the_output_is_named_and_can_be_written_again(name, harm, train, whole, tmp_path):
    shutil.copytree(whole.output, tmp_path / "run")
    harm(tmp_path / "run" / name)
    run = train("damaged", output_dir=tmp_path / "run", check=2, **SAVING)
    assert len(errors(run)) == 1 and f"{tmp_path}/run/{name} is damaged (" in errors(run)[0]
    (tmp_path / "run" / name).unlink()
    assert_same_run(train("anew", output_dir=tmp_path / "run", **SAVING), whole)
    assert name == "config.yaml" or (tmp_path / "run" / name).is_file()


# ----------------------------------------------------------------------------------------------------------------------
# Ledgers

def test_a_ledger_that_another_process_holds_too_long_ends_the_run_resumable(train, whole, tmp_path, monkeypatch):
    """It is held from the third question on, for longer than the run waits."""
    monkeypatch.setattr(Ledger.__init__, "__defaults__", (0.2,))
    holder, calls, answer = [], itertools.count(1), DatasetAnnotator.answer

    def held(self, questions, ledger):
        if next(calls) == 3:
            holder.append(sqlite3.connect(ledger.path, isolation_level=None))
            holder[0].execute("BEGIN IMMEDIATE")
        return answer(self, questions, ledger)

    monkeypatch.setattr(DatasetAnnotator, "answer", held)
    run = train("held", output_dir=tmp_path / "run", check=2, **SAVING)
    again = train("held-still", output_dir=tmp_path / "run", check=2, **SAVING)
    for stopped in run, again:
        assert len(errors(stopped)) == 1 and f"{tmp_path}/run/labels.sqlite: cannot be used" in errors(stopped)[0]
        assert "(database is locked): another process holds it" in errors(stopped)[0]
    holder[0].close()
    done = train("let-go", output_dir=tmp_path / "run", **SAVING)
    assert "resumed from" in done.stdout
    assert_same_run(done, whole)


def other_data(tiny, folder):
    """As many pairs, of another data set."""
    folder.mkdir()
    for split in ("train", "test"):
        text = (tiny / "pairs" / f"{split}.jsonl").read_text().replace("review of", "praise of")
        (folder / f"{split}.jsonl").write_text(text)
    return folder


def test_the_ledger_of_another_data_set_is_refused_and_reused_answers_are_not(train, tiny, whole, tmp_path):
    mixer = f"{{{other_data(tiny, tmp_path / 'pairs')}: 1.0}}"
    (tmp_path / "run").mkdir()
    shutil.copy(whole.output / "labels.sqlite", tmp_path / "run")
    before = whole.ledger()
    run = train("other-data", output_dir=tmp_path / "run", dataset_mixer=mixer, check=2)
    assert len(errors(run)) == 1 and f"/run/labels.sqlite: {len(before)} of its {len(before)} answers are" in errors(run)[0]
    assert run.ledger() == before and "--reuse" in errors(run)[0]
    reuse = [sys.executable, "tools/ledger.py", str(tmp_path / "new"), "--reuse", str(whole.output)]
    subprocess.run(reuse, cwd=ROOT, check=True, capture_output=True)
    run = train("reused", output_dir=tmp_path / "new", dataset_mixer=mixer)
    assert f"{len(before)} answers of other runs are in the ledger, 0 of them of pairs of this run" in run.stdout
    assert run.summary()["queries"] == len(run.ledger()) - len(before)


def other_version(path):
    with contextlib.closing(sqlite3.connect(path)) as ledger:
        ledger.execute("PRAGMA user_version = 9")


@pytest.mark.parametrize("harm, problem", [
    (lambda path: path.write_text("pair,label\n" * 1000), "(file is not a database): move it away"),
    (other_version, "not a ledger of this version (9, not 3): move it away"),
    (lambda path: path.write_bytes(path.read_bytes()[:4096] + b"\xff" * (path.stat().st_size - 4096)),
     "(database disk image is malformed): it is damaged"),
])
def test_what_is_not_a_ledger_of_this_version_is_refused_and_left_alone(harm, problem, train, whole, tmp_path):
    shutil.copytree(whole.output, tmp_path / "run", ignore=shutil.ignore_patterns("summary.json"))
    harm(tmp_path / "run" / "labels.sqlite")
    content = (tmp_path / "run" / "labels.sqlite").read_bytes()
    run = train("no-ledger", output_dir=tmp_path / "run", check=2, **SAVING)
    assert len(errors(run)) == 1 and f"{tmp_path}/run/labels.sqlite: " in errors(run)[0] and problem in errors(run)[0]
    assert (tmp_path / "run" / "labels.sqlite").read_bytes() == content


@pytest.mark.parametrize("keys", [{}, {"label_budget": 16, "committee_size": 2, "committee_epochs": 0.1}])
def test_a_run_whose_ledger_has_lost_answers_does_not_pay_for_them_again(keys, train, tmp_path):
    """Nobody copied it with the rest, or it is an older copy, or its labels.sqlite-wal was left behind."""
    keys = SAVING | keys
    whole = train("ledger", **keys)
    stopped = copy_without(whole, tmp_path / "stopped", "checkpoint-6", "summary.json", "model.safetensors", "labels.sqlite")
    ledger = stopped / "labels.sqlite"
    bought = sum(step < 4 for *_, step in whole.ledger())
    for there in 0, bought - 1:
        if there:  # what the run refused is still empty
            shutil.copy(whole.output / "labels.sqlite", ledger)
            with contextlib.closing(sqlite3.connect(ledger, isolation_level=None)) as db:
                db.execute("DELETE FROM answers WHERE pair = (SELECT MIN(pair) FROM answers WHERE step < 4)")
        run = train("lost", output_dir=stopped, check=2, **keys)
        error, = errors(run)
        assert f"{ledger}: holds {there} of the {bought} answers that {stopped}/checkpoint-4 was trained on: bring" in error
        with contextlib.closing(sqlite3.connect(ledger)) as db:
            assert db.execute("SELECT COUNT(*) FROM answers WHERE step < 4").fetchone() == (there,)
        assert [path.name for path in stopped.glob("labels.sqlite*")] == ["labels.sqlite"]
    shutil.copy(whole.output / "labels.sqlite", ledger)
    assert_same_run(train("brought-back", output_dir=stopped, **keys), whole)
