"""The tables of docs/families.md are what `scripts/studies/families.py` measures."""

from pathlib import Path

import pytest

from tests.scripts.commands import load

families = load("families")
PAGE = (Path(__file__).parents[2] / "docs/families.md").read_text()
QUICK = ("Falcon", "Gemma 3", "BART", "Qwen3-VL", "Whisper")  # one of each kind
NAMES = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in families.TINY]


def line(cells):
    return "| " + " | ".join(cells) + " |"


@pytest.mark.parametrize("name", NAMES)
def test_a_family_does_what_the_page_says(name):
    family = families.measured(name)

    cells = families.row(name, family)
    assert "no" not in cells
    assert line(cells) in PAGE


@pytest.mark.parametrize("name", families.REAL)
def test_at_most_a_percent_of_a_real_model_stays_float(name):
    cells = families.real_row(name)

    assert line(cells) in PAGE
    assert families.float_share(families.real(name))[0] <= 1.0


def test_the_page_has_no_other_rows():
    rows = [text for text in PAGE.splitlines() if text.startswith("| ")]
    heads = (families.HEAD, families.REAL_HEAD)

    assert len(rows) == len(families.TINY) + len(families.REAL) + 3 * 2  # tables begin with a head
    assert all(line(head) in rows for head in heads)


def test_a_family_that_learns_nothing_would_show(monkeypatch):
    monkeypatch.setattr(families, "LR", 0.0)

    run = families.trained(families.TINY["Llama"])

    assert run.losses[-1] >= run.losses[0]
    assert not families.same(run.model, families.trained(families.TINY["Qwen2"]).model)
