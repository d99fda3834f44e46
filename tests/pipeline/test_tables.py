"""Details become tables by their shape alone."""

from formary.pipeline.tables import tables_of


def test_each_shape_of_detail_has_its_table():
    details = {
        "length_ratio": 1.5,
        "rows": 1200,
        "confusion": {"labels": ["a", "b"], "counts": [[5, 1], [0, 7]]},
        "per_class": [{"label": "a", "f1": 0.91234, "support": 6}, {"label": "b", "f1": None}],
        "slices": {"short": {"accuracy": {"value": 0.5, "low": 0.25, "high": 0.75}}},
        "empty": [],
    }
    found = {table.title: table for table in tables_of(details)}
    assert list(found) == ["in numbers", "confusion", "per class", "slices"]
    assert found["in numbers"].rows == (("length ratio", "1.5"), ("rows", "1,200"))
    assert found["confusion"].rows == (("a", "5", "1"), ("b", "0", "7"))
    assert found["per class"].columns == ("label", "f1", "support")
    assert found["per class"].rows == (("a", "0.912", "6"), ("b", "–", "–"))
    assert found["slices"].rows == (("short", "0.5 [0.25, 0.75]"),)


def test_long_tables_are_folded_and_cut_and_long_cells_shortened():
    (table,) = tables_of({"worst": [{"text": "x" * 1000, "n": n} for n in range(50)]})
    assert table.folded and len(table.rows) == 20 and len(table.rows[0][0]) == 240
