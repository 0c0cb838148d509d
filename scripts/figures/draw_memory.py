"""Draw the bytes per parameter of several ways to train as stacked bars, by arithmetic.

    python scripts/figures/draw_memory.py    # writes docs/memory.png

QFT's figures are those of `estimate_memory` for LLaMA-2-7B; the others follow from dtypes. Nothing
is measured.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, where common/ is
from common import bars
from common.report import ROOT, figures_table
from common.shapes import model_config

from qft_hf import estimate_memory

PARTS = ("weights", "gradients", "optimizer state")
BNB_STATE = 2 * (1 + 4 / 256)  # two moments of one byte, with an FP32 scale per 256 values
OTHERS = {
    "FP32 Adam": (4, 4, 8),
    "bf16 AdamW": (2, 2, 4),
    "8-bit Adam, bf16 weights": (2, 2, BNB_STATE),
    "LoRA's frozen bf16 weights": (2, 0, 0),
}


def bytes_per_parameter() -> dict[str, dict[str, float]]:
    """Return the bytes of weights, gradients and states of each way, the largest sum first."""
    ways = {name: dict(zip(PARTS, parts, strict=True)) for name, parts in OTHERS.items()}
    for mode in ("stack", "release"):
        figures = estimate_memory(model_config("llama-2-7b"), gradient=mode)
        way = ways[f"QFT, {mode}"] = dict.fromkeys(PARTS, 0.0)
        for row in figures.rows:  # scales, outliers and float parameters belong to the weights
            part = {"gradients": "gradients", "momentum": "optimizer state"}.get(row.state)
            way[part or "weights"] += row.bytes / figures.n_parameters
    return dict(sorted(ways.items(), key=lambda way: -sum(way[1].values())))


def main() -> None:
    """Draw the picture and print its numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="folder of the picture")
    options = parser.parse_args()
    ways = bytes_per_parameter()
    title = "Training state by arithmetic: bytes per parameter, without activations"
    bars.draw(ways, options.output / "memory.png", title=title, unit="bytes", dpi=110)
    print(figures_table("bytes per parameter", ways))


if __name__ == "__main__":
    main()
