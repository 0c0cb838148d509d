"""The main claim: INT8 weights with stochastic rounding train like float, with nearest they do not.

The same holds for SGD without momentum; a momentum of 4 bits costs a little.
"""

import argparse
import tarfile
import typing
from statistics import mean

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qft_hf.config import QuantizationSpec
from qft_hf.nn import quantize_modules_
from qft_hf.optim import QFTSGD, QFTLion

CONTEXT = 8
N_STEPS = 250
WEIGHT_DECAY = 0.1
SEEDS = (0, 1, 2)


class NextByte(nn.Module):
    """Predicts a byte from the eight before it: embedding, two hidden layers, norm, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, 16)
        self.up = nn.Linear(16 * CONTEXT, 96)
        self.mix = nn.Linear(96, 96)
        self.norm = nn.LayerNorm(96)
        self.head = nn.Linear(96, 128, bias=False)

    def forward(self, context: Tensor) -> Tensor:
        x = F.gelu(self.up(self.embed(context).flatten(1)))
        return self.head(self.norm(x + F.gelu(self.mix(x))))


class FloatLion:
    """Chen et al. 2023, algorithm 2, on FP32 tensors: independent of the package."""

    def __init__(self, parameters: typing.Iterable[nn.Parameter], lr: float) -> None:
        self.parameters = list(parameters)
        self.momenta = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.lr = lr

    @torch.no_grad()
    def step(self) -> None:
        for parameter, momentum in zip(self.parameters, self.momenta, strict=True):
            gradient = parameter.grad
            direction = (0.9 * momentum + 0.1 * gradient).sign()
            parameter -= self.lr * (direction + WEIGHT_DECAY * parameter)
            momentum.lerp_(gradient, 0.01)

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


@pytest.fixture(scope="module")
def text() -> Tensor:
    """Source of three modules of the standard library: real text that comes with Python."""
    source = "".join(open(module.__file__).read() for module in (argparse, tarfile, typing))
    return torch.tensor(list(source.encode("ascii", "replace")))


def windows(text: Tensor, generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
    start = torch.randint(len(text) - CONTEXT, (count, 1), generator=generator)
    window = text[start + torch.arange(CONTEXT + 1)]
    return window[:, :-1], window[:, -1]


def loss_reduction(kind: str, text: Tensor, *, seed: int, lr: float) -> float:
    """Return held-out loss before training minus after; data and start depend on the seed only."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = NextByte()
    cut = len(text) * 9 // 10
    held_out, targets = windows(text[cut:], torch.Generator().manual_seed(99), 8192)

    @torch.no_grad()
    def evaluate() -> float:
        return F.cross_entropy(model(held_out), targets).item()

    before = evaluate()
    optimizer: typing.Any
    if kind == "float":
        optimizer = FloatLion(model.parameters(), lr)
    elif kind == "float sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, weight_decay=WEIGHT_DECAY)
    else:
        quantize_modules_(model, QuantizationSpec())
        settings = {"lr": lr, "weight_decay": WEIGHT_DECAY, "seed": seed}
        if kind == "sgd":
            optimizer = QFTSGD(model.parameters(), **settings)
        else:
            optimizer = QFTLion(
                model.parameters(),
                momentum_bits=4 if kind == "4 bits" else 8,
                stochastic_rounding=kind != "nearest",
                **settings,
            )
    batches = torch.Generator().manual_seed(seed)
    for _ in range(N_STEPS):
        contexts, next_bytes = windows(text[:cut], batches, 128)
        F.cross_entropy(model(contexts), next_bytes).backward()
        optimizer.step()
        optimizer.zero_grad()
    return before - evaluate()


def test_int8_recovers_what_float_learns_and_nearest_rounding_does_not(text):
    """Half a quantum of these weights is at least 3.5e-4, which is more than a step."""
    reductions = {
        kind: [loss_reduction(kind, text, seed=seed, lr=3e-4) for seed in SEEDS]
        for kind in ("float", "qft", "4 bits", "nearest")
    }
    learned = reductions["float"]
    recovered = {
        kind: mean(a / b for a, b in zip(reductions[kind], learned, strict=True))
        for kind in ("qft", "4 bits", "nearest")
    }

    # The float run learns enough to compare with: from 5 nats to about 3, not to 0.
    assert all(1.5 < reduction < 3 for reduction in learned)
    assert recovered["qft"] >= 0.995, reductions
    assert recovered["4 bits"] >= 0.97, reductions
    assert recovered["nearest"] < 0.9, reductions


def test_sgd_without_state_recovers_what_float_sgd_learns(text):
    """The learning rate is 100 times Lion's; from 0.3 on, float SGD is unstable here."""
    learned, recovered = (
        [loss_reduction(kind, text, seed=seed, lr=0.03) for seed in SEEDS]
        for kind in ("float sgd", "sgd")
    )
    assert all(1.5 < reduction < 3 for reduction in learned)
    share = mean(a / b for a, b in zip(recovered, learned, strict=True))
    assert share >= 0.99, (recovered, learned)
