"""Plots the training and evaluation loss of a run against the optimizer step."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..atomic_writes import atomic_path

TRAIN_COLOR, EVAL_COLOR = "#7f8fa6", "#c0392b"


def loss_points(log_history: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Return the steps and the values at which `key` ("loss", "eval_loss") was logged."""
    entries = [entry for entry in log_history if key in entry]
    return [entry["step"] for entry in entries], [entry[key] for entry in entries]


def draw_loss_curve(
    log_history: list[dict[str, Any]], path: Path, *, title: str, unit: str
) -> None:
    """Write the curve as a PNG.

    Args:
        log_history: `trainer.state.log_history`; either loss may be absent. Without training
            losses their mean is drawn if it was logged. Without any loss the plot says so.
        path: The PNG file; replaced when the new one is complete.
        title: Title above the curve.
        unit: Unit of the loss.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    steps, losses = loss_points(log_history, "loss")
    # A line through a single point is invisible.
    style = "o" if len(steps) == 1 else "-"
    if steps:
        axes.plot(steps, losses, style, color=TRAIN_COLOR, label="training")
    elif means := loss_points(log_history, "train_loss")[1]:
        axes.axhline(means[-1], color=TRAIN_COLOR, linestyle="--", label="training, mean")

    steps, losses = loss_points(log_history, "eval_loss")
    if steps:
        axes.plot(steps, losses, "o-", color=EVAL_COLOR, markersize=5, label="evaluation")
    for step, loss in {(steps[i], losses[i]) for i in (0, -1) if steps}:
        axes.annotate(
            f"{loss:.3f}",
            (step, loss),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            color=EVAL_COLOR,
        )
    axes.set(title=title, xlabel="optimizer step", ylabel=f"loss ({unit})")
    axes.margins(x=0.04, y=0.15)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False)
    else:
        axes.text(0.5, 0.5, "no loss was logged", transform=axes.transAxes, ha="center")
    with atomic_path(path) as draft:
        figure.savefig(draft, format="png", dpi=150)
