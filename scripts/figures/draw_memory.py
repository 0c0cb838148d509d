"""Draw bytes per parameter of ways to train as stacked bars: arithmetic, no measurement.

    python scripts/figures/draw_memory.py    # writes docs/memory.png

QFT's are those of LLaMA-2-7B, as `estimate_memory` has them; the others follow from their dtypes.
"""

import argparse
import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, where common/ is
from common.report import ROOT
from common.shapes import model_config

from qft_hf import estimate_memory

PARTS = {"weights": "#2e86ab", "gradients": "#7f8fa6", "optimizer states": "#c0392b"}
BNB_STATE = 2 * (1 + 4 / 256)  # two moments of a byte, an FP32 scale per 256 values
OTHERS = {
    "FP32 Adam": (4, 4, 8),
    "bf16 AdamW": (2, 2, 4),
    "8-bit Adam, bf16 weights": (2, 2, BNB_STATE),
    "LoRA's frozen bf16 weights": (2, 0, 0),
}


def bytes_per_parameter() -> dict[str, tuple[float, ...]]:
    """Weights, gradients and states of each way, the largest sum first."""
    config = model_config("llama-2-7b")
    bars: dict[str, tuple[float, ...]] = dict(OTHERS)
    for mode in ("stack", "release"):
        figures = estimate_memory(config, gradient=mode)
        rows = {"weights": 0, "gradients": 0, "momentum": 0}
        for row in figures.rows:
            kind = next((kind for kind in rows if kind.rstrip("s") in row.state), "weights")
            rows[kind] += row.bytes
        bars[f"QFT, {mode}"] = tuple(n / figures.n_parameters for n in rows.values())
    return dict(sorted(bars.items(), key=lambda bar: -sum(bar[1])))


def draw(path: Path) -> None:
    """The bars with their sums."""
    bars = bytes_per_parameter()
    names = list(bars)[::-1]
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.add_subplot()
    left = [0.0] * len(names)
    for number, (part, color) in enumerate(PARTS.items()):
        widths = [bars[name][number] for name in names]
        axes.barh(names, widths, left=left, color=color, label=part, height=0.6)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for place, end in enumerate(left):
        axes.annotate(f"{end:.2f}", (end, place), (4, 0), textcoords="offset points", va="center")
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if label.get_text().startswith("QFT") else "normal")
    axes.set(title="Training state by arithmetic: bytes per parameter, without activations")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Draw and print the numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="folder of the picture")
    options = parser.parse_args()
    draw(options.output / "memory.png")
    for name, parts in bytes_per_parameter().items():
        print(f"{name:<28}{sum(parts):6.2f} = {' + '.join(f'{part:.3f}' for part in parts)}")


if __name__ == "__main__":
    main()
