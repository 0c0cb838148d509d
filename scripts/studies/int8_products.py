"""What INT8 products cost in quality: a small byte-level Llama tuned in each way, on the same data.

    python scripts/study_matmul.py                      # the table; minutes on one core
    python scripts/study_matmul.py --seeds 0 --only int8 float

Each way starts from the same weights (pretrained on source code in FP32) and tunes them on prose.
The table has the held-out loss and the share of FP32 Lion's loss reduction that a way recovers,
its mean over seeds; a seed is an order of the data. Figures are written after each run.
"""

import argparse
import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from time import perf_counter

import torch
from byte_llama import Size, counter, held_out_loss, pretrained, prose, train

from qft_hf import QFTConfig, QFTLion, quantize_model_
from qft_hf.kernels import quantize_gradient
from qft_hf.nn import int8 as int8_nn

ALL = ["forward", "input_gradient", "weight_gradient"]
BASELINE = "FP32 Lion"


@dataclass(frozen=True, slots=True)
class Way:
    """How weights and products are computed; no configuration: FP32."""

    name: str
    config: QFTConfig | None = None
    nearest: bool = False  # gradients rounded to nearest, which the package does not offer


def int8(name: str, everywhere: list[str], head: list[str], **options) -> Way:
    """A way with these INT8 products in all modules and in the head."""
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
    int8("int8 all, head out, no critical columns", ALL, [], outlier_fraction=0.0),
)


@contextmanager
def nearest_gradients() -> Iterator[None]:
    """Let gradients be rounded to nearest: an ablation."""

    class Kernels:
        def __getattr__(self, name: str) -> Callable[..., object]:
            return getattr(int8_kernels, name)

        @staticmethod
        def quantize_gradient(*arguments, **options):
            return quantize_gradient(*arguments, **options, stochastic=False)

    int8_kernels = int8_nn.kernels
    int8_nn.kernels = Kernels()
    try:
        yield
    finally:
        int8_nn.kernels = int8_kernels


def tune(way: Way, start: torch.nn.Module, size: Size, options: argparse.Namespace, seed: int):
    """Tune a copy of `start` in one way; returns its figures."""
    model = copy.deepcopy(start)
    if way.config is not None:
        quantize_model_(model, way.config)
    optimizer = QFTLion(model.parameters(), lr=options.lr, weight_decay=0.1, seed=seed)
    text = prose()
    began = perf_counter()
    with nearest_gradients() if way.nearest else nullcontext():
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
    """The runs so far as a Markdown table."""
    baseline = {run["seed"]: run["loss"] for run in runs if run["way"] == BASELINE}
    lines = [
        f"Held-out loss before: {before:.4f}.\n",
        f"| way | final loss, by seed | share of {BASELINE}'s reduction | spread of seeds |",
        "| --- | --- | --- | --- |",
    ]
    for name in dict.fromkeys(run["way"] for run in runs):
        own = [run for run in runs if run["way"] == name]
        shares = [
            100 * (before - run["loss"]) / (before - baseline[run["seed"]])
            for run in own
            if run["seed"] in baseline
        ]
        losses = ", ".join(f"{run['loss']:.4f}" for run in own)
        share = f"{mean(shares):.2f} %" if shares else ""
        spread = f"{stdev(shares):.2f}" if len(shares) > 1 else ""
        lines.append(f"| {name} | {losses} | {share} | {spread} |")
    return "\n".join(lines)


def main() -> None:
    """Tune in every way and write figures and table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="orders of data")
    parser.add_argument("--steps", type=int, default=250, help="of tuning")
    parser.add_argument("--pretraining-steps", type=int, default=500, help="before that")
    parser.add_argument("--lr", type=float, default=3e-4, help="learning rate of Lion")
    parser.add_argument("--hidden", type=int, default=Size().hidden, help="width of the model")
    parser.add_argument("--held-out", type=int, default=256, help="sequences that are scored")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="ways whose name has one of them")
    parser.add_argument("--threads", type=int, default=1, help="threads (default 1)")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/study_matmul"), help="folder of the figures"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size = Size(hidden=options.hidden)
    ways = [
        way
        for way in WAYS
        if not options.only or way.name == BASELINE or any(w in way.name for w in options.only)
    ]

    start = pretrained(size, n_steps=options.pretraining_steps)
    before = held_out_loss(start, prose(), size, n=options.held_out)
    options.output.mkdir(parents=True, exist_ok=True)
    settings = {name: str(value) for name, value in vars(options).items()}
    runs: list[dict] = []
    for seed in options.seeds:
        for way in ways:
            runs.append(tune(way, start, size, options, seed))
            print(f"\r{way.name:<45}seed {seed}  loss {runs[-1]['loss']:.4f}", flush=True)
            figures = {"settings": settings, "loss_before": before, "runs": runs}
            (options.output / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
            (options.output / "table.md").write_text(table(before, runs) + "\n")
    print(f"\n{table(before, runs)}\n\nwritten to {options.output}")


if __name__ == "__main__":
    main()
