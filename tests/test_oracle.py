"""oracle.py: the ledger, the annotator, and answers over several ranks: `python -m pytest tests/test_oracle.py`."""

import os
import sqlite3
import subprocess
import sys
import textwrap

import pytest

from oracle import DatasetAnnotator, Ledger, Oracle

LABELS = {"a": 1, "b": -1, "c": 1, "d": -1}


@pytest.fixture
def asker(tmp_path):
    oracle = Oracle(DatasetAnnotator(LABELS), tmp_path / "labels.sqlite")
    yield oracle
    oracle.close()


def test_only_asked_pairs_get_a_label(asker):
    assert asker.answer(["a", "b", "c"], [0.1, 2.0, -0.2], [True, False, True], step=0) == [1, 0, 1]
    assert asker.queries() == asker.annotator.calls == 2


def test_a_label_is_paid_for_once_and_then_used_whatever_the_gate_says(asker):
    asker.answer(["a", "b"], [0.1, 0.1], [True, True], step=0)
    assert asker.answer(["a", "b"], [0.1, 5.0], [True, False], step=1) == [1, -1]
    assert asker.queries() == asker.annotator.calls == 2


def test_a_pair_that_stands_twice_in_a_batch_is_asked_once(asker):
    assert asker.answer(["a", "a"], [0.1, 0.1], [True, True], step=0) == [1, 1]
    assert asker.annotator.calls == 1


def test_a_filler_is_never_asked(asker):
    assert asker.answer([None], [0.0], [True], step=0) == [0]
    assert asker.queries() == 0


def test_queries_are_counted_up_to_a_step(asker):
    asker.answer(["a", "b"], [0, 0], [True, True], step=0)
    asker.answer(["c"], [0], [True], step=3)
    assert [asker.queries(step) for step in (0, 2, 3)] == [2, 2, 3]


def test_the_ledger_outlives_the_process_and_is_used_for_free(tmp_path):
    first = Oracle(DatasetAnnotator(LABELS), tmp_path / "labels.sqlite")
    first.answer(["a", "b"], [0, 0], [True, True], step=0)
    first.close()
    second = Oracle(DatasetAnnotator({}), tmp_path / "labels.sqlite")  # it has no label of its own
    assert second.answer(["b", "a"], [9.0, 0], [False, True], step=0) == [-1, 1]


def test_an_answer_is_committed_before_it_is_used(tmp_path):
    """Another connection sees the row as soon as `answer` returns, with what it was asked for."""
    oracle = Oracle(DatasetAnnotator(LABELS), tmp_path / "labels.sqlite")
    oracle.answer(["d"], [0.25], [True], step=7)
    rows = sqlite3.connect(tmp_path / "labels.sqlite").execute(
        "SELECT pair, label, source, margin, step FROM answers").fetchall()
    assert rows == [("d", -1, "dataset", 0.25, 7)]


def test_the_ledger_itself_refuses_a_second_answer_and_a_label_that_is_none(tmp_path):
    ledger = Ledger(tmp_path / "labels.sqlite")
    ledger.add([("a", 1, "x", 0.0, 0)])
    with pytest.raises(sqlite3.IntegrityError):
        ledger.add([("b", 1, "x", 0.0, 1), ("a", -1, "x", 0.0, 1)])
    with pytest.raises(sqlite3.IntegrityError):
        ledger.add([("c", 0, "x", 0.0, 1)])
    assert ledger.lookup(["a", "b", "c"]) == {"a": 1}  # all or none


def test_lookup_of_many_ids(tmp_path):
    ledger = Ledger(tmp_path / "labels.sqlite")
    ids = [str(n) for n in range(40_000)]
    ledger.add([(id, 1, "x", 0.0, 0) for id in ids[::2]])
    assert set(ledger.lookup(ids)) == set(ids[::2])


def test_a_pair_without_a_label_is_named(asker):
    with pytest.raises(LookupError, match="pair e has no label"):
        asker.answer(["a", "e"], [0, 0], [True, True], step=0)
    assert asker.queries() == 0


def test_pseudo_labels_are_graded_by_the_truth_and_nothing_comes_back(tmp_path):
    oracle = Oracle(DatasetAnnotator(LABELS, truths={"a": 1, "b": 1}), tmp_path / "labels.sqlite")
    assert oracle.report_pseudo([("a", 1), ("b", -1), ("c", 1)]) is None
    assert oracle.pseudo == {"labels": 3, "right": 1, "known": 2}


def test_several_ranks_ask_at_once(tmp_path):
    """Three processes: one ledger, rank 0's; a pair that two ranks ask for is asked once; each gets its own answers."""
    script = tmp_path / "ranks.py"
    script.write_text(textwrap.dedent("""
        import sys
        import torch.distributed as dist, torch.multiprocessing as mp
        from oracle import DatasetAnnotator, Oracle

        def work(rank, folder):
            dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3)
            annotator = DatasetAnnotator({"a": 1, "b": -1, "c": 1, "d": -1}) if rank == 0 else None
            oracle = Oracle(annotator, f"{folder}/labels.sqlite")
            ids = [["a", "b"], ["b", "c", "d"], [None]][rank]
            ask = [[True, True], [True, False, True], [True]][rank]
            assert oracle.answer(ids, [0.0] * len(ids), ask, 0) == [[1, -1], [-1, 0, -1], [0]][rank]
            oracle.report_pseudo([[("a", 1)], [("c", -1)], []][rank])
            if rank == 0:
                assert oracle.queries() == annotator.calls == 3
                assert oracle.pseudo["labels"] == 2
            else:
                assert oracle.ledger is None and oracle.queries() is None
            oracle.close()
            dist.barrier()
            dist.destroy_process_group()

        if __name__ == "__main__":
            mp.spawn(work, (sys.argv[1],), nprocs=3)
        """))
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": "."})
    assert done.returncode == 0, done.stderr[-2000:]
