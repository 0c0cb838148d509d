"""Charts of stacked horizontal bars."""

from collections.abc import Mapping
from pathlib import Path
from statistics import median

COLORS = ("#2e86ab", "#7f8fa6", "#c0392b")


def draw(
    bars: Mapping[str, Mapping[str, float]], path: Path, *, title: str, unit: str, dpi: int = 150
) -> None:
    """Draw a bar for each name, the first on top, labeled with the sum of its parts.

    Bars longer than four times the median are cut off there; their labels still show the sum.
    """
    from matplotlib.figure import Figure  # only used here, and may be missing on GPU machines

    figure = Figure(figsize=(8, 1.2 + 0.4 * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    names = list(bars)[::-1]
    left = [0.0] * len(names)
    for part, color in zip(bars[names[0]], COLORS, strict=True):
        widths = [bars[name][part] for name in names]
        axes.barh(names, widths, left=left, color=color, label=part, height=0.6)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    limit = min(max(left), 4 * median(left))
    for place, end in enumerate(left):
        at = (min(end, limit), place)
        axes.annotate(f"{end:.2f}", at, (4, 0), textcoords="offset points", va="center")
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if label.get_text().startswith("QFT") else "normal")
    axes.set(title=title, xlabel=unit)
    axes.set_xlim(0, 1.1 * limit)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=dpi)
