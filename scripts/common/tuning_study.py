"""A study: copies of one pretrained byte-level model, each tuned on prose in another way."""

import copy
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from qft_hf import QFTConfig, QFTLion, quantize_model_

from . import report
from .byte_llama import Size, build, held_out_loss, pretrain_, prose, train
from .command_line import command_line

WEIGHT_DECAY = 0.1
Run = dict[str, Any]  # way, lr and seed, followed by the figures


@dataclass(frozen=True)
class Way:
    """One way to tune.

    Attributes:
        config: Configuration of INT8 weights; None for FP32.
        optimizer: Makes the optimizer; `QFTLion` is FP32 Lion on float weights.
        max_grad_norm: Norm to which gradients are clipped; None for no clipping.
    """

    config: QFTConfig | None = None
    optimizer: Callable[..., Optimizer] = QFTLion
    max_grad_norm: float | None = None

    def model(self, start: nn.Module) -> nn.Module:
        """Return a copy of `start` to be tuned."""
        model = copy.deepcopy(start)
        return quantize_model_(model, self.config) if self.config else model

    def train(self, *arguments: Any, **options: Any) -> None:
        """Tune the model: `byte_llama.train`."""
        train(*arguments, **options)

    def figures(self, optimizer: Any) -> dict[str, float]:
        """Return what a run reports in addition to the loss."""
        return {}


class Study:
    """Tunes copies of one pretrained model on prose; a seed is an order of the data.

    Args:
        options: The command line, by `study_line`.
        untrained: Returns the model before pretraining.
    """

    def __init__(self, options: Namespace, untrained: Callable[[Size], nn.Module] = build) -> None:
        torch.set_num_threads(options.threads)
        self.options, self.text = options, prose()
        self.size = Size(hidden=options.hidden, layers=options.layers)
        self.start = untrained(self.size)
        pretrain_(self.start, self.size, n_steps=options.pretraining_steps)
        self.loss_before = self.loss(self.start)

    def loss(self, model: nn.Module) -> float:
        """Return the loss on held-out prose."""
        return held_out_loss(model, self.text, self.size, n=self.options.held_out)

    def tune(self, name: str, way: Way, *, lr: float, seed: int) -> Run:
        """Tune a copy of the model, and return its figures."""
        began = perf_counter()
        model = way.model(self.start)
        seeded = {"seed": seed} if way.config else {}  # rounding of INT8 weights is random
        optimizer = way.optimizer(model.parameters(), lr=lr, weight_decay=WEIGHT_DECAY, **seeded)
        way.train(
            model, optimizer, self.text, self.size, n_steps=self.options.steps, seed=seed,
            max_grad_norm=way.max_grad_norm, name=f"{name}, seed {seed}",
        )  # fmt: skip
        loss = self.loss(model)
        figures = {"loss": loss, "reduction": self.loss_before - loss} | way.figures(optimizer)
        seconds = perf_counter() - began
        return {"way": name, "lr": lr, "seed": seed, **figures, "seconds": seconds}

    def run(
        self,
        ways: Mapping[str, Way],
        order: Iterable[tuple[str, float, int]],
        table: Callable[[list[Run]], str],
    ) -> None:
        """Tune in each way, rate and seed of `order`, and write the report after each run."""
        runs: list[Run] = []
        for name, lr, seed in order:
            runs.append(self.tune(name, ways[name], lr=lr, seed=seed))
            print(f"\r{runs[-1]}", flush=True)
            text = f"Held-out loss before: {self.loss_before:.4f}.\n\n{table(runs)}"
            report.write(self.options, {"loss_before": self.loss_before, "runs": runs}, text)
        report.finish(self.options, text)


def study_line(description: str, **defaults: Any) -> ArgumentParser:
    """Return a parser with the flags of every study and those of `command_line`."""
    common = {
        "seeds": [0, 1, 2], "steps": 250, "pretraining_steps": 500, "hidden": Size().hidden,
        "layers": Size().layers, "held_out": 256, "threads": 1,
    }  # fmt: skip
    return command_line(description, **common | defaults)


def grouped(runs: Iterable[Run]) -> dict[tuple[str, float], list[Run]]:
    """Return the runs of each way and rate, in the order in which they began."""
    groups: dict[tuple[str, float], list[Run]] = {}
    for run in runs:
        groups.setdefault((run["way"], run["lr"]), []).append(run)
    return groups
