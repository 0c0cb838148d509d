"""What do fewer momentum bits cost? Loss of a small Llama, fine-tuned with each kind of momentum.

    python scripts/study_momentum.py --output study.json

A byte-level Llama (0.9 M parameters by default) is trained on the source code of the standard
library in FP32, then fine-tuned on the prose of Python's manual: real text, all of it there
wherever Python is. The table shows how much of FP32 Lion's loss reduction each kind recovers.
`--variants` adds formats of 4-bit momentum that were tried, simulated on the same INT8 weights, for
the first seed and rate, with the error of the momentum against an exact one of the same gradients.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from qft_hf import QFTConfig, QFTLion, QFTWeight, kernels, quantize_model_
from qft_hf.layout import STATE_GROUP_SIZE

CONTEXT = 64
BATCH = 8
WEIGHT_DECAY = 0.1
MAX_GRAD_NORM = 1.0  # of the rows without momentum, which diverge otherwise
CODE = "argparse ast tarfile typing inspect mailbox zipfile optparse ipaddress subprocess smtplib"
CODE += " pickle doctest logging/__init__ threading socket shutil statistics fractions pydoc"


def bytes_of(text: str) -> Tensor:
    """Text as byte values."""
    return torch.tensor(list(text.encode()))


def texts() -> tuple[Tensor, Tensor, Tensor]:
    """Source code to pretrain on, prose to fine-tune on, prose held out."""
    library = Path(argparse.__file__).parent
    code = "".join((library / f"{name}.py").read_text() for name in CODE.split())
    prose = bytes_of("\n".join(topics.topics.values()))
    cut = len(prose) * 9 // 10
    return bytes_of(code), prose[:cut], prose[cut:]


def batch(text: Tensor, generator: torch.Generator, n: int = BATCH) -> Tensor:
    """Windows of a text at random places."""
    start = torch.randint(len(text) - CONTEXT, (n, 1), generator=generator)
    return text[start + torch.arange(CONTEXT)]


def pretrain_(model: nn.Module, code: Tensor, seed: int, n_steps: int) -> None:
    """FP32 AdamW on source code."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=n_steps)
    generator = torch.Generator().manual_seed(1000 + seed)
    for _ in range(n_steps):
        ids = batch(code, generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


class FloatLion:
    """Chen et al. 2023, algorithm 2, on FP32 tensors."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, beta1: float = 0.9) -> None:
        self.parameters = list(parameters)
        self.momenta = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.lr = lr
        self.beta1 = beta1

    @torch.no_grad()
    def step(self) -> None:
        """Update all parameters."""
        for parameter, momentum in zip(self.parameters, self.momenta, strict=True):
            gradient = parameter.grad
            direction = (self.beta1 * momentum + (1 - self.beta1) * gradient).sign()
            parameter -= self.lr * (direction + WEIGHT_DECAY * parameter)
            momentum.lerp_(gradient, 0.01)
            parameter.grad = None


@dataclass(frozen=True)
class Format:
    """A format of momentum: `n_levels` positive levels, `n * (n + slope)` apart, in groups.

    Attributes:
        n_levels: 7 for 4 bits, 15 for 5.
        slope: The larger, the more even; None: even levels.
        group_size: Columns per scale.
        rounding: 1: stochastic. 0: to nearest. Between them, sharper than stochastic.
        clip: The scale is this many root mean squares of the group, at most its largest value.
        keep: The scale stays until the largest value is outside this share of it and 1.
    """

    n_levels: int = 7
    slope: float | None = 3
    group_size: int = 64
    rounding: float = 1.0
    clip: float | None = None
    keep: float | None = None

    @property
    def levels(self) -> Tensor:
        """Levels from 0 to 1."""
        n = torch.arange(self.n_levels + 1.0)
        levels = n if self.slope is None else n * (n + self.slope)
        return levels / levels[-1]

    def rounded(self, momentum: Tensor, state: dict[str, Any]) -> Tensor:
        """Momentum as it would be stored."""
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
    """`QFTLion` whose momentum is rounded by a `Format` and kept in FP32 beside an exact one."""

    def __init__(self, *arguments: Any, form: Format, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.form = form
        self.errors: list[float] = []

    def _update(self, parameter: nn.Parameter, gradient: Any) -> None:
        if not isinstance(parameter, QFTWeight):
            super()._update(parameter, gradient)
            return
        stream, number = self._places[id(parameter)]
        group, state = self.param_groups[number], self.state[parameter]
        if not state:
            generator = torch.Generator().manual_seed(stream + 1000 * group["seed"])
            zeros = torch.zeros(parameter.shape)
            state.update(step=0, m=zeros, exact=zeros, form={"generator": generator})
        state["step"] += 1
        beta1, beta2 = group["betas"]
        values = gradient.dequantize()
        direction = (beta1 * state["m"] + (1 - beta1) * values).sign()
        # The shipped kernel takes the direction for the gradient of a Lion without momentum.
        ones = torch.ones_like(gradient.scales)
        codes = direction.to(torch.int8)
        kernels.lion_step_(
            *parameter.fields().values(), torch.zeros_like(codes), ones.clone(), codes, ones,
            group_size=parameter.group_size, state_group_size=STATE_GROUP_SIZE,
            lr=group["lr"], beta1=0.0, beta2=0.0, weight_decay=group["weight_decay"],
            seed=group["seed"], step=state["step"], stream=stream,
        )  # fmt: skip
        exact = state["exact"] = beta2 * state["exact"] + (1 - beta2) * values
        stored = self.form.rounded(beta2 * state["m"] + (1 - beta2) * values, state["form"])
        state["m"] = stored
        self.errors.append(float((stored - exact).norm() / exact.norm()))


class Study:
    """Runs of the model; each is a loss before and after fine-tuning."""

    def __init__(self, *, width: int, layers: int, pretrain_steps: int, steps: int) -> None:
        self.code, self.prose, held_out = texts()
        self.held_out = batch(held_out, torch.Generator().manual_seed(99), 256)
        self.pretrain_steps, self.steps = pretrain_steps, steps
        self.config = LlamaConfig(
            vocab_size=256,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
        )
        self.starts: dict[int, dict[str, Tensor]] = {}

    def start(self, seed: int) -> LlamaForCausalLM:
        """The model to fine-tune; the seed decides its weights and what it was trained on."""
        torch.manual_seed(seed)
        model = LlamaForCausalLM(self.config)
        if seed not in self.starts:
            pretrain_(model, self.code, seed, self.pretrain_steps)
            self.starts[seed] = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(self.starts[seed])
        return model

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> float:
        """Held-out loss."""
        return mean(float(model(input_ids=x, labels=x).loss) for x in self.held_out.split(64))

    def run(
        self, seed: int, make: Callable[[nn.Module], Any], *, quantize: bool, clip: bool = False
    ) -> tuple[float, Any]:
        """Fine-tune with the optimizer that `make` makes; the loss reduction and the optimizer."""
        model = self.start(seed)
        before = self.evaluate(model)
        if quantize:
            quantize_model_(model, QFTConfig())
        optimizer = make(model)
        generator = torch.Generator().manual_seed(seed)
        model.train()
        for _ in range(self.steps):
            ids = batch(self.prose, generator)
            model(input_ids=ids, labels=ids).loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
        return before - self.evaluate(model), optimizer

    def qft(self, seed: int, lr: float, momentum_bits: int) -> float:
        """Loss reduction of `QFTLion`."""
        arguments = {"lr": lr, "weight_decay": WEIGHT_DECAY, "seed": seed}
        reduction, _ = self.run(
            seed,
            lambda model: QFTLion(model.parameters(), momentum_bits=momentum_bits, **arguments),
            quantize=True,
            clip=momentum_bits == 0,
        )
        return reduction

    def float_lion(self, seed: int, lr: float) -> float:
        """Loss reduction of FP32 Lion."""
        return self.run(seed, lambda model: FloatLion(model.parameters(), lr), quantize=False)[0]

    def float_sgd(self, seed: int, lr: float) -> float:
        """Loss reduction of FP32 SGD, with the clipping of the rows without momentum."""

        def make(model: nn.Module) -> torch.optim.Optimizer:
            optimizer = torch.optim.SGD(model.parameters(), lr=lr, weight_decay=WEIGHT_DECAY)
            optimizer.register_step_post_hook(lambda *_: optimizer.zero_grad())
            return optimizer

        return self.run(seed, make, quantize=False, clip=True)[0]

    def simulated(self, seed: int, lr: float, form: Format) -> tuple[float, float]:
        """Loss reduction and mean relative error of the momentum in the second half."""
        arguments = {"lr": lr, "weight_decay": WEIGHT_DECAY, "seed": seed}
        reduction, optimizer = self.run(
            seed,
            lambda model: SimulatedLion(model.parameters(), form=form, **arguments),
            quantize=True,
        )
        errors = optimizer.errors
        return reduction, mean(errors[len(errors) // 2 :])


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default 0 1 2")
    parser.add_argument(
        "--lrs", type=float, nargs="+", default=[1e-4, 3e-4], help="of Lion (default 1e-4 3e-4)"
    )
    parser.add_argument(
        "--sgd_lrs", type=float, nargs="+", default=[3e-3], help="without momentum (default 3e-3)"
    )
    parser.add_argument("--width", type=int, default=128, help="of the model (default 128)")
    parser.add_argument("--layers", type=int, default=4, help="of the model (default 4)")
    parser.add_argument("--steps", type=int, default=300, help="of fine-tuning (default 300)")
    parser.add_argument("--pretrain_steps", type=int, default=500, help="default 500")
    parser.add_argument("--variants", action="store_true", help="also the formats that were tried")
    parser.add_argument("--output", type=Path, help="JSON file for the figures, kept up to date")
    return parser.parse_args()


def table(rows: list[dict[str, Any]]) -> str:
    """The figures as Markdown: one line for each kind and rate, seeds side by side."""
    floats = {(row["lr"], row["seed"]): row["reduction"] for row in rows if row["kind"] == "float"}
    best = {seed: max(floats[key] for key in floats if key[1] == seed) for _, seed in floats}
    lines = ["| momentum | lr | recovered | by seed | relative error |", "| --- " * 5 + "|"]
    for kind, lr in dict.fromkeys((row["kind"], row["lr"]) for row in rows):
        group = [row for row in rows if (row["kind"], row["lr"]) == (kind, lr)]
        shares = [
            100 * row["reduction"] / floats.get((lr, row["seed"]), best[row["seed"]])
            for row in group
        ]
        error = group[0].get("error")
        lines.append(
            f"| {kind} | {lr:g} | {mean(shares):.1f} % | "
            f"{', '.join(f'{share:.1f}' for share in shares)} | "
            f"{'' if error is None else f'{error:.2f}'} |"
        )
    lines.append("Rates that FP32 Lion did not run are compared with its best.")
    return "\n".join(lines)


def main() -> None:
    """Run everything, print progress, then the table."""
    options = parse()
    study = Study(
        width=options.width,
        layers=options.layers,
        pretrain_steps=options.pretrain_steps,
        steps=options.steps,
    )
    rows: list[dict[str, Any]] = []
    start = time.perf_counter()

    def note(**row: Any) -> None:
        rows.append(row)
        print(f"{time.perf_counter() - start:6.0f} s  {row}", flush=True)
        if options.output:
            settings = {name: str(value) for name, value in vars(options).items()}
            text = json.dumps({"settings": settings, "rows": rows}, indent=1)
            options.output.write_text(text)

    for seed in options.seeds:
        for lr in options.lrs:
            note(kind="float", lr=lr, seed=seed, reduction=study.float_lion(seed, lr))
            for bits in (8, 4):
                note(kind=f"{bits} bits", lr=lr, seed=seed, reduction=study.qft(seed, lr, bits))
        for lr in options.sgd_lrs:
            note(kind="float SGD", lr=lr, seed=seed, reduction=study.float_sgd(seed, lr))
            note(kind="0 bits (SGD)", lr=lr, seed=seed, reduction=study.qft(seed, lr, 0))
    if options.variants:
        seed, lr = options.seeds[0], options.lrs[0]
        for name, form in VARIANTS.items():
            reduction, error = study.simulated(seed, lr, form)
            note(kind=name, lr=lr, seed=seed, reduction=reduction, error=error)
    print(table(rows))


if __name__ == "__main__":
    main()
