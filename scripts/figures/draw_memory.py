"""Draw the bytes per parameter of several ways to train as stacked bars, by arithmetic.

    python scripts/figures/draw_memory.py    # writes docs/memory.png

QFT's figures are those of `estimate_memory` for LLaMA-2-7B; the others follow from dtypes. Nothing
is measured.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, where common/ is
from common import bars
from common.command_line import command_line
from common.report import ROOT, figures_table
from common.shapes import model_config

from qft_hf import estimate_memory
from qft_hf.hf.report import KINDS, OTHERS

SHOWN = ("FP32 Adam", "8-bit Adam, bf16 weights", "LoRA's frozen bf16 weights")
WAYS = {"bf16 AdamW": (2, 2, 4)} | {name: OTHERS[name] for name in SHOWN}


def bytes_per_parameter() -> dict[str, dict[str, float]]:
    """Return the bytes of weights, gradients and states of each way, the largest sum first."""
    ways = {name: dict(zip(KINDS, parts, strict=True)) for name, parts in WAYS.items()}
    for mode in ("stack", "release"):
        figures = estimate_memory(model_config("llama-2-7b"), gradient=mode)
        way = ways[f"QFT, {mode}"] = dict.fromkeys(KINDS, 0.0)
        for row in figures.rows:  # scales, outliers and float parameters belong to the weights
            part = {"gradients": "gradients", "momentum": "optimizer state"}.get(row.state)
            way[part or "weights"] += row.bytes / figures.n_parameters
    return dict(sorted(ways.items(), key=lambda way: -sum(way[1].values())))


def main() -> None:
    """Draw the picture and print its numbers."""
    options = command_line(__doc__, output=ROOT / "docs").parse_args()
    ways = bytes_per_parameter()
    title = "Training state by arithmetic: bytes per parameter, without activations"
    bars.draw(ways, options.output / "memory.png", title=title, unit="bytes", dpi=110)
    print(figures_table("bytes per parameter", ways))


if __name__ == "__main__":
    main()
