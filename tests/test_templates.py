"""Chat templates of today's models by kinds of conversations: benchmarks/templates.py says which cells are right."""

from helpers import ROOT

from benchmarks import templates


def test_no_cell_is_wrong():
    """The trained prompt is the one of inference, token for token, and a response has one end, or the row is refused."""
    table = templates.table()
    assert "WRONG:" not in table
    assert table == (ROOT / "benchmarks" / "results" / "templates.md").read_text(encoding="utf-8")
