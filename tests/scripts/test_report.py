"""The report of every measuring command."""

import json
from argparse import Namespace

from tests.scripts.commands import load

report = load("benchmark_step").report


def test_a_cell_that_was_not_measured_is_empty():
    text = report.table(["way", "s"], [["a", 1.5], ["b", None]])
    assert text == "| way | s |\n| --- | --- |\n| a | 1.5 |\n| b |  |"


def test_figures_are_shown_with_three_digits_and_whole_numbers_in_full():
    figures = {"a": {"times_faster": 0.012345, "n": 1234.5}, "b": {"times_faster": 0.0}}
    assert report.figures_table("way", figures).splitlines() == [
        "| way | times faster | n |",
        "| --- | --- | --- |",
        "| a | 0.0123 | 1234 |",
        "| b | 0 |  |",
    ]


def test_figures_keep_the_machine_and_the_settings(tmp_path):
    options = Namespace(output=tmp_path / "new", steps=3)

    report.write(options, {"seconds": 1.0}, "the table")

    written = json.loads((tmp_path / "new" / "figures.json").read_text())
    assert written["seconds"] == 1.0
    assert written["settings"]["steps"] == "3"
    assert len(written["machine"]["commit"]) >= 7
    text = (tmp_path / "new" / "table.md").read_text()
    assert text.endswith("\n\nthe table\n")
    assert f"commit {written['machine']['commit']}" in text
