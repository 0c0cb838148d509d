"""Loss of a small Llama tuned by AdamW with 8-bit and FP32 moments, and by Lion.

    python scripts/studies/adamw_moments.py

The byte-level Llama of `byte_llama.py` is pretrained on source code and tuned on prose by AdamW and
by Lion, each with FP32 weights and in INT8, from the same start and on the same data; a seed is an
order of the data. The table has the loss reduction of each optimizer at each learning rate, also as
a share of FP32 AdamW's at its best rate.
"""

import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from byte_llama import Size, counter, held_out_loss, pretrained, prose, train
from torch import nn
from torch.optim import AdamW, Optimizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, where common/ is
from common import report
from common.command_line import command_line

from qft_hf import QFTAdamW, QFTConfig, QFTLion, quantize_model_

WEIGHT_DECAY = 0.1
N_HELD_OUT = 256  # sequences that are scored

# By name in the table: the optimizer, and whether weights are INT8. On float weights `QFTLion` is
# FP32 Lion.
KINDS: dict[str, tuple[Callable[..., Optimizer], bool]] = {
    "FP32 AdamW": (AdamW, False),
    "QFTAdamW": (QFTAdamW, True),
    "FP32 Lion": (QFTLion, False),
    "QFTLion": (QFTLion, True),
}


class Study:
    """Tunes copies of one pretrained model and returns their loss reductions.

    Args:
        size: Size of the model and of a batch.
        pretraining_steps: Steps on source code, taken once.
        steps: Steps on prose in every run.
    """

    def __init__(self, size: Size, *, pretraining_steps: int, steps: int) -> None:
        self.size, self.steps, self.prose = size, steps, prose()
        self.model = pretrained(size, n_steps=pretraining_steps)
        self.before = self.loss(self.model)

    def loss(self, model: nn.Module) -> float:
        """Return the loss on held-out prose."""
        return held_out_loss(model, self.prose, self.size, n=N_HELD_OUT)

    def run(self, kind: str, *, seed: int, lr: float) -> float:
        """Tune a copy of the model, and return its loss reduction."""
        make, is_quantized = KINDS[kind]
        model = copy.deepcopy(self.model)
        arguments: dict[str, Any] = {"lr": lr, "weight_decay": WEIGHT_DECAY}
        if is_quantized:
            quantize_model_(model, QFTConfig())
            arguments["seed"] = seed
        optimizer = make(model.parameters(), **arguments)
        train(
            model, optimizer, self.prose, self.size, n_steps=self.steps, seed=seed,
            after_step=counter(f"{kind}, seed {seed}"),
        )  # fmt: skip
        return self.before - self.loss(model)


def table(runs: list[dict[str, Any]]) -> str:
    """Return a table with a row for each kind and rate, seeds side by side."""
    reductions: dict[tuple[str, float], list[float]] = {}
    for run in runs:
        reductions.setdefault((run["kind"], run["lr"]), []).append(run["reduction"])
    best = max(mean(found) for (kind, _), found in reductions.items() if kind == "FP32 AdamW")
    rows = []
    for (kind, lr), found in reductions.items():
        seeds = ", ".join(f"{reduction:.4f}" for reduction in found)
        share = f"{100 * mean(found) / best:.1f} %"
        rows.append([kind, f"{lr:g}", f"{mean(found):.4f}", share, seeds])
    head = ["optimizer", "lr", "loss reduction", "of FP32 AdamW's best", "by seed"]
    return report.table(head, rows)


def main() -> None:
    """Run all kinds, rates and seeds, and write the report after each run."""
    parser = command_line(
        __doc__, seeds=[0, 1, 2], steps=250, pretraining_steps=500,
        learning_rate=[3e-4, 1e-3, 3e-3], hidden=Size().hidden, layers=Size().layers, threads=1,
    )  # fmt: skip
    parser.add_argument(
        "--adamw_learning_rate", type=float, nargs="+", default=[1e-3, 3e-3, 6e-3], help="AdamW's"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    study = Study(
        Size(hidden=options.hidden, layers=options.layers),
        pretraining_steps=options.pretraining_steps,
        steps=options.steps,
    )
    runs: list[dict[str, Any]] = []
    start = time.perf_counter()
    for kind in KINDS:
        for lr in options.adamw_learning_rate if "AdamW" in kind else options.learning_rate:
            for seed in options.seeds:
                reduction = study.run(kind, seed=seed, lr=lr)
                runs.append({"kind": kind, "lr": lr, "seed": seed, "reduction": reduction})
                print(f"{time.perf_counter() - start:6.0f} s  {runs[-1]}", flush=True)
                report.write(options, {"loss_before": study.before, "runs": runs}, table(runs))
    report.finish(options, f"Loss before: {study.before:.4f}\n\n{table(runs)}")


if __name__ == "__main__":
    main()
