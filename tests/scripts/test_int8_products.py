"""The scripts that measure INT8 products run at toy size; what they measure there means nothing."""

import json
import sys
from pathlib import Path

import pytest

from qft_hf.nn import int8

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run a script as its command line does, and return what it wrote into its output folder."""

    def main(name: str, *flags: str) -> dict[str, str]:
        monkeypatch.syspath_prepend(str(SCRIPTS))
        monkeypatch.setattr(sys, "argv", [name, *flags, "--output", str(tmp_path / "out")])
        __import__(name).main()
        assert "written to" in capsys.readouterr().out
        texts = tmp_path.glob("out/*.[jm]*")
        return {path.name: path.read_text() for path in texts}

    return main


def test_training_steps_are_timed_by_phase(run, tmp_path):
    written = run(
        "benchmark_training", "--config", "tiny", "--sequence", "20", "--steps", "1",
        "--only", "AdamW", "QFT",
    )  # fmt: skip

    figures = json.loads(written["figures.json"])
    assert list(figures["median_seconds"]) == [
        "FP32 AdamW", "bf16 autocast AdamW", "QFT, dequantize", "QFT, int8",
        "QFT, int8, no critical columns",
    ]  # fmt: skip
    for way in figures["median_seconds"].values():
        assert way["whole"] == pytest.approx(way["forward"] + way["backward"] + way["step"])
    assert "| FP32 AdamW |" in written["table.md"]
    assert (tmp_path / "out" / "steps.png").stat().st_size > 10_000


def test_too_few_tokens_for_int8_products_are_refused(run):
    with pytest.raises(SystemExit):
        run("benchmark_training", "--config", "tiny", "--batch", "1", "--sequence", "31")


def test_every_way_of_the_study_is_tuned(run):
    kernels = int8.kernels

    written = run(
        "study_matmul", "--seeds", "0", "--steps", "2", "--pretraining-steps", "1",
        "--hidden", "32", "--held-out", "8",
    )  # fmt: skip

    figures = json.loads(written["figures.json"])
    losses = {run["way"]: run["loss"] for run in figures["runs"]}
    assert len(losses) == 10
    # Each way computes in its own way, and all learn nearly the same in two steps.
    assert len(set(losses.values())) == 10
    assert max(losses.values()) < figures["loss_before"]
    assert "| FP32 Lion | " in written["table.md"]
    assert int8.kernels is kernels  # the ablation of stochastic rounding is over
