"""Loss of a small Llama tuned by AdamW with 8-bit and FP32 moments, and by Lion.

    python scripts/studies/adamw_moments.py

The byte-level Llama of `common/byte_llama.py` is pretrained on source code and tuned on prose by
AdamW and by Lion, each with FP32 weights and in INT8, from the same start and on the same data; a
seed is an order of the data. The table has the loss reduction of each optimizer at each learning
rate, also as a share of FP32 AdamW's at its best rate.
"""

import sys
from pathlib import Path
from statistics import mean

from torch.optim import AdamW

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, where common/ is
from common import report
from common.tuning_study import Run, Study, Way, grouped, study_line

from qft_hf import QFTAdamW, QFTConfig

WAYS = {
    "FP32 AdamW": Way(optimizer=AdamW),
    "QFTAdamW": Way(QFTConfig(), QFTAdamW),
    "FP32 Lion": Way(),
    "QFTLion": Way(QFTConfig()),
}


def table(runs: list[Run]) -> str:
    """Return a table with a row for each way and rate, seeds side by side."""
    reductions = {key: [run["reduction"] for run in found] for key, found in grouped(runs).items()}
    best = max(mean(found) for (way, _), found in reductions.items() if way == "FP32 AdamW")
    rows = []
    for (way, lr), found in reductions.items():
        seeds = ", ".join(f"{reduction:.4f}" for reduction in found)
        share = f"{100 * mean(found) / best:.1f} %"
        rows.append([way, f"{lr:g}", f"{mean(found):.4f}", share, seeds])
    head = ["optimizer", "lr", "loss reduction", "of FP32 AdamW's best", "by seed"]
    return report.table(head, rows)


def main() -> None:
    """Tune by every optimizer at every rate and seed."""
    rates = {"learning_rate": [3e-4, 1e-3, 3e-3], "adamw_learning_rate": [1e-3, 3e-3, 6e-3]}
    options = study_line(__doc__, **rates).parse_args()
    order = [
        (way, lr, seed)
        for way in WAYS
        for lr in (options.adamw_learning_rate if "AdamW" in way else options.learning_rate)
        for seed in options.seeds
    ]
    Study(options).run(WAYS, order, table)


if __name__ == "__main__":
    main()
