"""Cost of INT8 products in quality: a small byte-level Llama tuned in each way on the same data.

    python scripts/studies/int8_products.py                 # the table; minutes on one core
    python scripts/studies/int8_products.py --seeds 0 --only int8 float

Each way starts from the same weights (pretrained on source code in FP32) and tunes them on prose.
The table has the held-out loss of each way, and the share of FP32 Lion's loss reduction that it
recovers, as a mean over seeds. A seed is an order of the data. Figures are written after each run.
"""

import argparse
import copy
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from time import perf_counter
from unittest import mock

import torch
from byte_llama import Size, counter, held_out_loss, pretrained, prose, train

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, where common/ is
from common import report
from common.command_line import chosen, command_line

from qft_hf import QFTConfig, QFTLion, kernels, quantize_model_

ALL = ["forward", "input_gradient", "weight_gradient"]
BASELINE = "FP32 Lion"


@dataclass(frozen=True, slots=True)
class Way:
    """How weights are stored and products computed; without a configuration, in FP32."""

    name: str
    config: QFTConfig | None = None
    nearest: bool = False  # gradients rounded to nearest, which the package does not offer


def int8(name: str, everywhere: list[str], head: list[str], **options) -> Way:
    """Return a way whose INT8 products are `everywhere` in all modules, and `head` in the head."""
    fraction = options.pop("outlier_fraction", 0.01)
    config = QFTConfig(
        matmul="int8",
        outlier_fraction=fraction,
        int8_products={"*": everywhere, "lm_head": head},
    )
    return Way(name, config, **options)


WAYS = (
    Way(BASELINE),
    Way("QFT, dequantize", QFTConfig()),
    int8("int8 forward", ALL[:1], ALL[:1]),
    int8("int8 forward, input gradient", ALL[:2], ALL[:2]),
    int8("int8 all, nearest", ALL, ALL, nearest=True),
    int8("int8 all", ALL, ALL),
    int8("int8 all, nearest, head out", ALL, [], nearest=True),
    int8("int8 all, head forward only", ALL, ALL[:1]),
    Way("int8 all, head out (default)", QFTConfig(matmul="int8")),
    int8("int8 all, head out, no outlier columns", ALL, [], outlier_fraction=0.0),
)


def tune(way: Way, start: torch.nn.Module, size: Size, options: argparse.Namespace, seed: int):
    """Tune a copy of `start` in one way, and return its figures."""
    model = copy.deepcopy(start)
    if way.config is not None:
        quantize_model_(model, way.config)
    optimizer = QFTLion(model.parameters(), lr=options.learning_rate, weight_decay=0.1, seed=seed)
    text = prose()
    nearest = partial(kernels.quantize_gradient, stochastic=False)
    rounding = mock.patch.object(kernels, "quantize_gradient", nearest)
    began = perf_counter()
    with rounding if way.nearest else nullcontext():
        train(
            model, optimizer, text, size,
            n_steps=options.steps, seed=seed, after_step=counter(f"{way.name}, seed {seed}"),
        )  # fmt: skip
    return {
        "way": way.name,
        "seed": seed,
        "loss": held_out_loss(model, text, size, n=options.held_out),
        "seconds": perf_counter() - began,
    }


def table(before: float, runs: list[dict]) -> str:
    """Return a table of the runs so far."""
    baseline = {run["seed"]: run["loss"] for run in runs if run["way"] == BASELINE}
    rows = []
    for name in dict.fromkeys(run["way"] for run in runs):
        own = [run for run in runs if run["way"] == name]
        shares = [
            100 * (before - run["loss"]) / (before - baseline[run["seed"]])
            for run in own
            if run["seed"] in baseline
        ]
        losses = ", ".join(f"{run['loss']:.4f}" for run in own)
        share = f"{mean(shares):.2f} %" if shares else None
        spread = f"{stdev(shares):.2f}" if len(shares) > 1 else None
        rows.append([name, losses, share, spread])
    head = ["way", "final loss, by seed", f"share of {BASELINE}'s reduction", "spread of seeds"]
    return f"Held-out loss before: {before:.4f}.\n\n{report.table(head, rows)}"


def main() -> None:
    """Tune in every way, and write the report after each run."""
    parser = command_line(
        __doc__, seeds=[0, 1, 2], steps=250, pretraining_steps=500, learning_rate=3e-4,
        hidden=Size().hidden, threads=1, only=None,
    )  # fmt: skip
    parser.add_argument("--held_out", type=int, default=256, help="held-out sequences to score")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size = Size(hidden=options.hidden)
    ways = {way.name: way for way in WAYS}
    ways = {BASELINE: ways[BASELINE]} | chosen(ways, options.only)

    start = pretrained(size, n_steps=options.pretraining_steps)
    before = held_out_loss(start, prose(), size, n=options.held_out)
    runs: list[dict] = []
    for seed in options.seeds:
        for way in ways.values():
            runs.append(tune(way, start, size, options, seed))
            print(f"\r{way.name:<45}seed {seed}  loss {runs[-1]['loss']:.4f}", flush=True)
            report.write(options, {"loss_before": before, "runs": runs}, table(before, runs))
    report.finish(options, table(before, runs))


if __name__ == "__main__":
    main()
