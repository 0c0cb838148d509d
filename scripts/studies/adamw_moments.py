"""What do 8-bit moments cost AdamW, and what does AdamW bring? Loss of a small Llama.

    python scripts/studies/adamw_moments.py --output adamw.json

The byte-level Llama of `byte_llama.py` knows source code and is tuned on prose by AdamW and by
Lion, each on FP32 weights and in INT8, from the same start and with the same data; a seed is an
order of the data. The table has the loss reduction of each at each rate, and its best as a share of
what FP32 AdamW gains at its best.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from byte_llama import Size, held_out_loss, pretrained, prose, train
from torch import nn
from torch.optim import AdamW, Optimizer

from qft_hf import QFTAdamW, QFTConfig, QFTLion, quantize_model_

WEIGHT_DECAY = 0.1
N_HELD_OUT = 256  # sequences that are scored

# By its name in the table: the optimizer, and whether weights are INT8. On float weights `QFTLion`
# is FP32 Lion.
KINDS: dict[str, tuple[Callable[..., Optimizer], bool]] = {
    "FP32 AdamW": (AdamW, False),
    "QFTAdamW": (QFTAdamW, True),
    "FP32 Lion": (QFTLion, False),
    "QFTLion": (QFTLion, True),
}


class Study:
    """Runs from one start; each gives a loss reduction.

    Args:
        size: Of the model and a batch.
        pretrain_steps: On source code, once.
        steps: On prose, in every run.
    """

    def __init__(self, size: Size, *, pretrain_steps: int, steps: int) -> None:
        self.size, self.steps, self.prose = size, steps, prose()
        self.model = pretrained(size, n_steps=pretrain_steps)
        self.before = self.loss(self.model)

    def loss(self, model: nn.Module) -> float:
        """On held-out prose."""
        return held_out_loss(model, self.prose, self.size, n=N_HELD_OUT)

    def run(self, kind: str, *, seed: int, lr: float) -> float:
        """Tune a copy; the loss reduction."""
        make, is_quantized = KINDS[kind]
        model = copy.deepcopy(self.model)
        arguments: dict[str, Any] = {"lr": lr, "weight_decay": WEIGHT_DECAY}
        if is_quantized:
            quantize_model_(model, QFTConfig())
            arguments["seed"] = seed
        optimizer = make(model.parameters(), **arguments)
        train(model, optimizer, self.prose, self.size, n_steps=self.steps, seed=seed)
        return self.before - self.loss(model)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default 0 1 2")
    parser.add_argument(
        "--adamw_lrs",
        type=float,
        nargs="+",
        default=[1e-3, 3e-3, 6e-3],
        help="default 1e-3 3e-3 6e-3",
    )
    parser.add_argument(
        "--lion_lrs",
        type=float,
        nargs="+",
        default=[3e-4, 1e-3, 3e-3],
        help="default 3e-4 1e-3 3e-3",
    )
    parser.add_argument("--hidden", type=int, default=Size().hidden, help="width of the model")
    parser.add_argument("--layers", type=int, default=Size().layers, help="of the model")
    parser.add_argument("--steps", type=int, default=250, help="of tuning (default 250)")
    parser.add_argument("--pretrain_steps", type=int, default=500, help="default 500")
    parser.add_argument("--threads", type=int, default=1, help="threads (default 1)")
    parser.add_argument("--output", type=Path, help="JSON file for the figures, kept up to date")
    return parser.parse_args()


def table(rows: list[dict[str, Any]]) -> str:
    """The figures as Markdown: one line for each kind and rate, seeds side by side."""
    reductions: dict[tuple[str, float], list[float]] = {}
    for row in rows:
        reductions.setdefault((row["kind"], row["lr"]), []).append(row["reduction"])
    best = max(mean(found) for (kind, _), found in reductions.items() if kind == "FP32 AdamW")
    lines = [
        "| optimizer | lr | loss reduction | of FP32 AdamW's best | by seed |",
        "| --- " * 5 + "|",
    ]
    for (kind, lr), found in reductions.items():
        share = 100 * mean(found) / best
        seeds = ", ".join(f"{reduction:.4f}" for reduction in found)
        lines.append(f"| {kind} | {lr:g} | {mean(found):.4f} | {share:.1f} % | {seeds} |")
    return "\n".join(lines)


def main() -> None:
    """Run everything, print progress, then the table."""
    options = parse()
    torch.set_num_threads(options.threads)
    study = Study(
        Size(hidden=options.hidden, layers=options.layers),
        pretrain_steps=options.pretrain_steps,
        steps=options.steps,
    )
    rows: list[dict[str, Any]] = []
    start = time.perf_counter()
    for kind in KINDS:
        for lr in options.adamw_lrs if "AdamW" in kind else options.lion_lrs:
            for seed in options.seeds:
                reduction = study.run(kind, seed=seed, lr=lr)
                rows.append({"kind": kind, "lr": lr, "seed": seed, "reduction": reduction})
                print(f"{time.perf_counter() - start:6.0f} s  {rows[-1]}", flush=True)
                if options.output:
                    settings = {name: str(value) for name, value in vars(options).items()}
                    text = json.dumps({"settings": settings, "rows": rows}, indent=1)
                    options.output.write_text(text)
    print(f"Loss before: {study.before:.4f}\n{table(rows)}")


if __name__ == "__main__":
    main()
