"""Cost of fewer momentum bits: loss of a small Llama tuned with each kind of momentum.

    python scripts/studies/momentum_bits.py

The byte-level Llama of `byte_llama.py` is pretrained on source code and tuned on prose. The table
shows how much of FP32 Lion's loss reduction each kind of momentum recovers; a seed is an order of
the data. `--variants` adds formats of 4-bit and 5-bit momentum that were tried, simulated on INT8
weights with the first seed and learning rate, and the relative error of their momentum against one
that is not rounded.
"""

import copy
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from byte_llama import Size, counter, held_out_loss, pretrained, prose, train
from torch import Tensor, nn
from torch.optim import Optimizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, where common/ is
from common import report
from common.command_line import command_line

from qft_hf import QFTSGD, QFTConfig, QFTLion, kernels, quantize_model_
from qft_hf.optim.state import StateTensor

WEIGHT_DECAY = 0.1
MAX_GRAD_NORM = 1.0  # for SGD, which diverges otherwise
N_HELD_OUT = 256  # sequences that are scored


@dataclass(frozen=True)
class Format:
    """A format of momentum: positive levels proportional to `n * (n + slope)`, scaled by group.

    Attributes:
        n_levels: Number of positive levels: 7 for 4 bits, 15 for 5.
        slope: Larger values make the levels more even; None for even levels.
        group_size: Columns per scale.
        rounding: 1 is stochastic, 0 is to nearest; values between them are less random than 1.
        clip: The scale is this many root mean squares of the group, at most its largest value.
        keep: The old scale is kept if the new one is in `[keep * old, old]`; None: never.
    """

    n_levels: int = 7
    slope: float | None = 3
    group_size: int = 64
    rounding: float = 1.0
    clip: float | None = None
    keep: float | None = None

    @property
    def levels(self) -> Tensor:
        """Return the levels, from 0 to 1."""
        n = torch.arange(self.n_levels + 1.0)
        levels = n if self.slope is None else n * (n + self.slope)
        return levels / levels[-1]

    def rounded(self, momentum: Tensor, state: dict[str, Any]) -> Tensor:
        """Return the momentum after rounding to this format; `state` keeps scale and generator."""
        rows, columns = momentum.shape
        size = min(self.group_size, columns)
        values = nn.functional.pad(momentum, (0, -columns % size)).view(rows, -1, size)
        scale = values.abs().amax(-1, keepdim=True)
        if self.clip:
            rms = values.square().mean(-1, keepdim=True).sqrt()
            scale = torch.minimum(scale, self.clip * rms)
        if self.keep and "scale" in state:
            old = state["scale"]
            scale = torch.where((scale <= old) & (scale >= self.keep * old), old, scale)
        state["scale"] = scale
        shares = (values.abs() / scale.clamp_min(1e-30)).clamp(max=1)
        levels = self.levels
        below = (torch.bucketize(shares, levels, right=True) - 1).clamp(0, self.n_levels - 1)
        part = (shares - levels[below]) / (levels[below + 1] - levels[below])
        part = ((part - 0.5) / max(self.rounding, 1e-6) + 0.5).clamp(0, 1)
        uniform = torch.rand(part.shape, generator=state["generator"])
        stored = levels[below + (uniform < part)] * scale * values.sign()
        return stored.view(rows, -1)[:, :columns]


VARIANTS = {
    "as shipped: slope 3, groups of 64": Format(),
    "even levels, groups of 256": Format(slope=None, group_size=256),
    "even levels, groups of 64": Format(slope=None),
    "squares, groups of 64": Format(slope=0),
    "groups of 32": Format(group_size=32),
    "groups of 16": Format(group_size=16),
    "to nearest": Format(rounding=0.0),
    "sharpened rounding": Format(rounding=0.5),
    "sticky scale": Format(keep=0.6),
    "clipped at 2.2 root mean squares": Format(clip=2.2),
    "5 bits": Format(n_levels=15),
}


class SimulatedLion(QFTLion):
    """`QFTLion` with FP32 momentum rounded by a `Format`, next to an exact one for comparison."""

    def __init__(self, *arguments: Any, form: Format, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.form = form
        self.errors: list[float] = []
        self._own: dict[int, dict[str, Any]] = {}  # state of the format by stream

    def state_format(self, parameter: Tensor) -> dict[str, Any]:
        """Return FP32 states for every parameter, INT8 weights included."""
        form = StateTensor(torch.float32, tuple(parameter.shape))
        return {"momentum": form, "exact": form}

    def step_weight(
        self,
        weight: kernels.Weight,
        gradient: kernels.Quantized,
        state: dict[str, Tensor],
        group: dict[str, Any],
        rounding: kernels.Rounding,
    ) -> None:
        """Take Lion's step by `step_weight_`, which accepts any direction."""
        generator = torch.Generator().manual_seed(rounding.stream + 1000 * rounding.seed)
        own = self._own.setdefault(rounding.stream, {"generator": generator})
        beta1, beta2 = group["betas"]
        momentum, exact = state["momentum"], state["exact"]
        values = kernels.dequantize(kernels.Weight.dense(gradient))
        direction = (beta1 * momentum + (1 - beta1) * values).sign()
        rate = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
        kernels.step_weight_(weight, direction, **rate, rounding=rounding)
        exact.mul_(beta2).add_((1 - beta2) * values)
        momentum.copy_(self.form.rounded(beta2 * momentum + (1 - beta2) * values, own))
        self.errors.append(float((momentum - exact).norm() / exact.norm()))


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

    def run(
        self,
        seed: int,
        make: Callable[[nn.Module], Optimizer],
        *,
        quantize: bool,
        max_grad_norm: float | None = None,
    ) -> tuple[float, Any]:
        """Tune a copy by the optimizer of `make`; return the loss reduction and the optimizer."""
        model = copy.deepcopy(self.model)
        if quantize:
            quantize_model_(model, QFTConfig())
        optimizer = make(model)
        train(
            model, optimizer, self.prose, self.size, n_steps=self.steps, seed=seed,
            max_grad_norm=max_grad_norm, after_step=counter(f"seed {seed}"),
        )  # fmt: skip
        return self.before - self.loss(model), optimizer

    def lion(self, seed: int, lr: float, momentum_bits: int | None) -> float:
        """Return the loss reduction of `QFTLion`; with None bits, of FP32 Lion on float weights."""
        bits = {} if momentum_bits is None else {"momentum_bits": momentum_bits}
        arguments = {"lr": lr, "weight_decay": WEIGHT_DECAY, "seed": seed, **bits}
        return self.run(
            seed,
            lambda model: QFTLion(model.parameters(), **arguments),
            quantize=momentum_bits is not None,
        )[0]

    def sgd(self, seed: int, lr: float, *, quantize: bool) -> float:
        """Return the loss reduction of SGD with clipping; on float weights it is PyTorch's SGD."""
        arguments = {"lr": lr, "weight_decay": WEIGHT_DECAY}
        return self.run(
            seed,
            lambda model: (
                QFTSGD(model.parameters(), seed=seed, **arguments)
                if quantize
                else torch.optim.SGD(model.parameters(), **arguments)
            ),
            quantize=quantize,
            max_grad_norm=MAX_GRAD_NORM,
        )[0]

    def simulated(self, seed: int, lr: float, form: Format) -> tuple[float, float]:
        """Return the loss reduction, and the momentum's mean relative error in the second half."""
        arguments = {"lr": lr, "weight_decay": WEIGHT_DECAY, "seed": seed}
        reduction, optimizer = self.run(
            seed,
            lambda model: SimulatedLion(model.parameters(), form=form, **arguments),
            quantize=True,
        )
        errors = optimizer.errors
        return reduction, mean(errors[len(errors) // 2 :])


def table(runs: list[dict[str, Any]]) -> str:
    """Return a table with a row for each kind and rate, seeds side by side."""
    floats = {(run["lr"], run["seed"]): run["reduction"] for run in runs if run["kind"] == "float"}
    best = {seed: max(floats[key] for key in floats if key[1] == seed) for _, seed in floats}
    rows = []
    for kind, lr in dict.fromkeys((run["kind"], run["lr"]) for run in runs):
        group = [run for run in runs if (run["kind"], run["lr"]) == (kind, lr)]
        shares = [
            100 * run["reduction"] / floats.get((lr, run["seed"]), best[run["seed"]])
            for run in group
        ]
        by_seed = ", ".join(f"{share:.1f}" for share in shares)
        error = report.number(group[0].get("error"), 2)
        rows.append([kind, f"{lr:g}", f"{mean(shares):.1f} %", by_seed, error])
    head = ["momentum", "lr", "recovered", "by seed", "relative error"]
    about = "Learning rates without a run of FP32 Lion are compared with its best."
    return f"{report.table(head, rows)}\n\n{about}"


def main() -> None:
    """Run all kinds, rates and seeds, and write the report after each run."""
    parser = command_line(
        __doc__, seeds=[0, 1, 2], steps=250, pretraining_steps=500, learning_rate=[1e-4, 3e-4],
        hidden=Size().hidden, layers=Size().layers, threads=1,
    )  # fmt: skip
    parser.add_argument(
        "--sgd_learning_rate", type=float, nargs="+", default=[3e-3], help="learning rates of SGD"
    )
    parser.add_argument("--variants", action="store_true", help="also run formats that were tried")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    study = Study(
        Size(hidden=options.hidden, layers=options.layers),
        pretraining_steps=options.pretraining_steps,
        steps=options.steps,
    )
    runs: list[dict[str, Any]] = []
    start = time.perf_counter()

    def note(**run: Any) -> None:
        runs.append(run)
        print(f"{time.perf_counter() - start:6.0f} s  {run}", flush=True)
        report.write(options, {"runs": runs}, table(runs))

    for seed in options.seeds:
        for lr in options.learning_rate:
            note(kind="float", lr=lr, seed=seed, reduction=study.lion(seed, lr, None))
            for bits in (8, 4):
                note(kind=f"{bits} bits", lr=lr, seed=seed, reduction=study.lion(seed, lr, bits))
        for lr in options.sgd_learning_rate:
            for kind, quantize in (("float SGD", False), ("0 bits (SGD)", True)):
                reduction = study.sgd(seed, lr, quantize=quantize)
                note(kind=kind, lr=lr, seed=seed, reduction=reduction)
    if options.variants:
        seed, lr = options.seeds[0], options.learning_rate[0]
        for name, form in VARIANTS.items():
            reduction, error = study.simulated(seed, lr, form)
            note(kind=name, lr=lr, seed=seed, reduction=reduction, error=error)
    report.finish(options, table(runs))


if __name__ == "__main__":
    main()
