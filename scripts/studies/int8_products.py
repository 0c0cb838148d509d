"""Cost of INT8 products in quality: a small byte-level Llama tuned in each way on the same data.

    python scripts/studies/int8_products.py                 # the table; minutes on one core
    python scripts/studies/int8_products.py --seeds 0 --only int8 float

Each way starts from the same weights (pretrained on source code in FP32) and tunes them on prose.
The table has the held-out loss of each way, and the share of FP32 Lion's loss reduction that it
recovers, as a mean over seeds. A seed is an order of the data. Figures are written after each run.
"""

import sys
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, where common/ is
from common import report
from common.command_line import chosen
from common.tuning_study import Run, Study, Way, grouped, study_line

from qft_hf import QFTConfig, kernels

ALL = ["forward", "input_gradient", "weight_gradient"]
BASELINE = "FP32 Lion"


class Nearest(Way):
    """Gradients are rounded to nearest, which the package does not offer."""

    def train(self, *arguments: Any, **options: Any) -> None:
        """Tune the model."""
        nearest = partial(kernels.quantize_gradient, stochastic=False)
        with mock.patch.object(kernels, "quantize_gradient", nearest):
            super().train(*arguments, **options)


def int8(everywhere: list[str], head: list[str], fraction: float = 0.01) -> QFTConfig:
    """Return the format whose INT8 products are `head` in the head, and `everywhere` elsewhere."""
    places = {"*": everywhere, "lm_head": head}
    return QFTConfig(matmul="int8", int8_products=places, outlier_fraction=fraction)


WAYS = {
    BASELINE: Way(),
    "QFT, dequantize": Way(QFTConfig()),
    "int8 forward": Way(int8(ALL[:1], ALL[:1])),
    "int8 forward, input gradient": Way(int8(ALL[:2], ALL[:2])),
    "int8 all, nearest": Nearest(int8(ALL, ALL)),
    "int8 all": Way(int8(ALL, ALL)),
    "int8 all, nearest, head out": Nearest(int8(ALL, [])),
    "int8 all, head forward only": Way(int8(ALL, ALL[:1])),
    "int8 all, head out (default)": Way(QFTConfig(matmul="int8")),
    "int8 all, head out, no outlier columns": Way(int8(ALL, [], fraction=0.0)),
}


def table(runs: list[Run]) -> str:
    """Return a table with a row for each way, seeds side by side."""
    baseline = {run["seed"]: run["reduction"] for run in runs if run["way"] == BASELINE}
    rows = []
    for (way, _), found in grouped(runs).items():
        shares = [100 * run["reduction"] / baseline[run["seed"]] for run in found]
        losses = ", ".join(f"{run['loss']:.4f}" for run in found)
        spread = f"{stdev(shares):.2f}" if len(shares) > 1 else None
        rows.append([way, losses, f"{mean(shares):.2f} %", spread])
    head = ["way", "final loss, by seed", f"share of {BASELINE}'s reduction", "spread of seeds"]
    return report.table(head, rows)


def main() -> None:
    """Tune in every way that `--only` selects, and in FP32."""
    options = study_line(__doc__, learning_rate=3e-4, only=None).parse_args()
    ways = {BASELINE: WAYS[BASELINE]} | chosen(WAYS, options.only)
    order = [(way, options.learning_rate, seed) for seed in options.seeds for way in ways]
    Study(options).run(ways, order, table)


if __name__ == "__main__":
    main()
