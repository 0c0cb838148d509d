"""Cost of fewer momentum bits: loss of a small Llama tuned with each kind of momentum.

    python scripts/studies/momentum_bits.py

The byte-level Llama of `common/byte_llama.py` is pretrained on source code and tuned on prose. The
table shows how much of FP32 Lion's loss reduction each kind of momentum recovers; a seed is an
order of the data. `--variants` adds formats of 4-bit and 5-bit momentum that were tried, simulated
on INT8 weights with the first seed and learning rate, and the relative error of their momentum
against one that is not rounded.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, where common/ is
from common import report
from common.tuning_study import Run, Study, Way, grouped, study_line

from qft_hf import QFTSGD, QFTConfig, QFTLion, kernels
from qft_hf.optim.state import StateTensor

MAX_GRAD_NORM = 1.0  # for SGD, which diverges otherwise


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


class Simulated(Way):
    """Lion with a simulated format of momentum."""

    def figures(self, optimizer: SimulatedLion) -> dict[str, float]:
        """Return the momentum's mean relative error in the second half of the run."""
        return {"error": mean(optimizer.errors[len(optimizer.errors) // 2 :])}


INT8 = QFTConfig()
LION = {
    "float": Way(),
    "8 bits": Way(INT8, partial(QFTLion, momentum_bits=8)),
    "4 bits": Way(INT8, partial(QFTLion, momentum_bits=4)),
}
SGD = {
    "float SGD": Way(None, torch.optim.SGD, MAX_GRAD_NORM),
    "0 bits (SGD)": Way(INT8, QFTSGD, MAX_GRAD_NORM),
}
TRIED = {
    name: Simulated(INT8, partial(SimulatedLion, form=form)) for name, form in VARIANTS.items()
}


def table(runs: list[Run]) -> str:
    """Return a table with a row for each way and rate, seeds side by side."""
    floats = {(run["lr"], run["seed"]): run["reduction"] for run in runs if run["way"] == "float"}
    best = {seed: max(floats[key] for key in floats if key[1] == seed) for _, seed in floats}
    rows = []
    for (way, lr), group in grouped(runs).items():
        shares = [
            100 * run["reduction"] / floats.get((lr, run["seed"]), best[run["seed"]])
            for run in group
        ]
        by_seed = ", ".join(f"{share:.1f}" for share in shares)
        error = report.number(group[0].get("error"), 2)
        rows.append([way, f"{lr:g}", f"{mean(shares):.1f} %", by_seed, error])
    head = ["momentum", "lr", "recovered", "by seed", "relative error"]
    about = "Learning rates without a run of FP32 Lion are compared with its best."
    return f"{report.table(head, rows)}\n\n{about}"


def main() -> None:
    """Tune with every kind of momentum at every rate and seed."""
    parser = study_line(__doc__, learning_rate=[1e-4, 3e-4])
    parser.add_argument(
        "--sgd_learning_rate", type=float, nargs="+", default=[3e-3], help="learning rates of SGD"
    )
    parser.add_argument("--variants", action="store_true", help="also run formats that were tried")
    options = parser.parse_args()
    order = []
    for seed in options.seeds:
        order += [(way, lr, seed) for lr in options.learning_rate for way in LION]
        order += [(way, lr, seed) for lr in options.sgd_learning_rate for way in SGD]
    if options.variants:
        order += [(way, options.learning_rate[0], options.seeds[0]) for way in TRIED]
    Study(options).run(LION | SGD | TRIED, order, table)


if __name__ == "__main__":
    main()
