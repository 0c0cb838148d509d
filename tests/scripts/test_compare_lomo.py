"""The comparison with LOMO runs at toy size, and its statements about our side hold."""

import importlib.util

import pytest

from tests.hf.test_trainer import sequences
from tests.models import tiny_llama
from tests.scripts.commands import load

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lomo_optim") is None,
    reason="lomo-optim is not installed: pip install lomo-optim",
)


def test_all_contestants_are_measured_the_same_way(tmp_path):
    script = load("compare_lomo")

    figures = script.compare(lambda: tiny_llama(tied=True), sequences(8), tmp_path)

    rows = figures["contestants"]
    assert {"lomo", "qft_lion, stack", "qft_lion, release"} <= set(rows)
    for name in set(rows) - {"lomo"}:
        assert rows[name]["updates_per_window"] == 1
        assert rows[name]["max_grad_norm_has_an_effect"]
        assert rows[name]["resume_is_bit_exact"]
        assert rows[name]["logged_grad_norm"] == pytest.approx(figures["true_grad_norm"], rel=0.05)
    stack, release = (rows[f"qft_lion, {mode}"] for mode in ("stack", "release"))
    assert release["peak_gradient_bytes"] < stack["peak_gradient_bytes"]
    assert release["states_bytes"] == stack["states_bytes"]
    sgd = rows["qft_sgd, release"]
    assert "momentum" not in sgd["states_bytes"]
    assert sgd["peak_gradient_bytes"] <= release["peak_gradient_bytes"]
    table = script.table(figures)
    assert len({line.count("|") for line in table.splitlines()}) == 1
