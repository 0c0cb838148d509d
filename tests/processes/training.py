"""The small model, trained by several processes, and by one with the gradients of all."""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qft_hf.config import QuantizationSpec
from qft_hf.kernels import quantize
from qft_hf.layout import STATE_GROUP_SIZE
from qft_hf.nn import quantize_modules_
from qft_hf.optim import QFTSGD, QFTAdamW, QFTLion
from qft_hf.quant import Int8Gradient, QFTWeight
from tests.nn.small import WIDTH, SmallModel, batch
from tests.optim.common import make_optimizer, model_tensors

KINDS = {"lion": QFTLion, "adamw": QFTAdamW, "sgd": QFTSGD}

# Differences from Lion on the stack, an untied model, one micro-batch each, and no clipping.
SCENARIOS: dict[str, dict[str, Any]] = {
    "stack": {},
    "release": {"gradient": "release"},
    "tied": {"tied": True},
    "tied-release": {"tied": True, "gradient": "release"},
    "accumulated": {"n_parts": 2},
    "accumulated-release": {"n_parts": 2, "gradient": "release"},
    "clipped": {"clip": 0.4},
    "clipped-accumulated": {"clip": 0.4, "n_parts": 2},
    "exact": {"gradient": "release", "clipping": "exact", "max_grad_norm": 0.4},
    "exact-accumulated": {
        "gradient": "release", "clipping": "exact", "max_grad_norm": 0.4, "n_parts": 2, "clip": 0.4,
    },
    "previous": {"gradient": "release", "clipping": "previous", "max_grad_norm": 0.4},
    "tensor": {"gradient": "release", "clipping": "tensor", "max_grad_norm": 0.1},
    "int8": {"matmul": "int8"},
    "int8-release": {"matmul": "int8", "gradient": "release"},
    "bf16": {"dtype": torch.bfloat16},
    "momentum-4": {"momentum_bits": 4},
    "momentum-4-release": {"momentum_bits": 4, "gradient": "release"},
    "adamw": {"kind": "adamw"},
    "adamw-release": {"kind": "adamw", "gradient": "release"},
    "sgd": {"kind": "sgd", "lr": 0.05},
    "sgd-release": {"kind": "sgd", "lr": 0.05, "gradient": "release"},
    "checkpointing": {"reentrant": False},
    "frozen": {"frozen": ("blocks.0.up.weight", "norm.weight")},
    "no-outliers": {"outlier_fraction": 0.0},
    "uneven": {"uneven": True},
    "uneven-release": {"uneven": True, "gradient": "release"},
}  # fmt: skip
LONG = ("stack", "release", "clipped", "accumulated", "int8")  # of 10 steps
# The same without float parameters, whose sum over three processes may have any order.
NO_FLOATS = ("norm.weight", "norm.bias", "up.bias", "down.bias")
SCENARIOS |= {f"{name}-no-floats": {**SCENARIOS[name], "frozen": NO_FLOATS} for name in LONG}
MODEL = ("uneven", "tied", "reentrant", "dtype", "matmul", "outlier_fraction", "frozen")
LOOP = ("clip", "n_parts")


def n_steps(name: str) -> int:
    return 10 if name.removesuffix("-no-floats") in LONG else 4


class Uneven(SmallModel):
    """Has a head of three rows, an empty parameter, and layers that one process or all skip."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.never = nn.Linear(WIDTH, WIDTH)
            self.head = nn.Linear(WIDTH, 3)
        self.empty = nn.Parameter(torch.zeros(0, WIDTH))
        self.rank = 0

    def loss(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for number, block in enumerate(self.blocks):
            if (number, self.rank) != (1, 1):
                x = block(x)
        return F.cross_entropy(self.head(self.norm(x))[:, -1], ids[:, 0] % 3) + self.empty.sum()


def make(name: str) -> tuple[SmallModel, Any, dict[str, Any]]:
    """Return model, optimizer and loop settings of a scenario."""
    settings = dict(SCENARIOS[name])
    of_model = {key: settings.pop(key) for key in MODEL if key in settings}
    of_loop = {key: settings.pop(key) for key in LOOP if key in settings}
    frozen, dtype = of_model.pop("frozen", ()), of_model.pop("dtype", torch.float32)
    matmul, outliers = of_model.pop("matmul", "dequantize"), of_model.pop("outlier_fraction", 0.02)
    model_class = Uneven if of_model.pop("uneven", False) else SmallModel
    model = model_class(**{"tied": False, **of_model}).to(dtype)
    group_size = None if matmul == "int8" else 40
    spec = QuantizationSpec(group_size=group_size, outlier_fraction=outliers, matmul=matmul)
    quantize_modules_(model, spec)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(frozen or ("none",)):
            parameter.requires_grad_(False)
    kind = KINDS[settings.pop("kind", "lion")]
    return model, make_optimizer(model, kind, **settings), of_loop


def train(
    model: SmallModel,
    optimizer: Any,
    steps: range,
    *,
    rank: int,
    n: int,
    n_parts: int = 1,
    clip: float | None = None,
) -> list[float]:
    """Train on this process's share of each batch; return the norms."""
    norms = []
    model.rank = rank
    for step in steps:
        own = shares(step, n)[rank]
        for number, part in enumerate(own.chunk(n_parts)):
            is_last = number == n_parts - 1
            with nullcontext() if is_last else optimizer.accumulate():
                if is_last and optimizer.clipping == "exact" and n_parts == 1:
                    with optimizer.measure_norm():
                        (model.loss(part) / n_parts).backward()
                (model.loss(part) / n_parts).backward()
        norm = torch.zeros(())
        if clip is not None:
            norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        released = optimizer.released_norm
        norms.append(float(norm if released is None else released))
    return norms


def shares(step: int, n: int) -> tuple[Tensor, ...]:
    """Divide a batch into the shares of `n` processes, with the same number of rows in each."""
    return batch(step, (12, 12)).chunk(n)


def train_alone(
    model: SmallModel,
    optimizer: Any,
    steps: range,
    *,
    n: int,
    clipping: str | None,
    logs_norm: bool,
    n_parts: int = 1,
    clip: float | None = None,
) -> list[float]:
    """Train on one process, which adds up the gradients of all shares in FP32 itself."""
    norms: list[float] = []
    parameters = [p for p in model.parameters() if p.requires_grad]
    for step in steps:
        of_all: list[list[Tensor]] = []
        for model.rank, own in enumerate(shares(step, n)):
            for part in own.chunk(n_parts):
                (model.loss(part) / n_parts).backward()
            of_all.append([p.grad for p in parameters])
            for p in parameters:
                p.grad = None
        for parameter, gradients in zip(parameters, zip(*of_all, strict=True), strict=True):
            parameter.grad = mean(parameter, gradients)
        norm = (
            torch.stack([square(p.grad) for p in parameters if p.grad is not None])
            .sum()
            .sqrt()
            .float()
        )
        previous = torch.tensor(norms[-1]) if norms else None
        if clip is None:
            norm = norm if logs_norm else torch.zeros(())
        elif clipping is None or n_parts > 1:
            norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
        else:
            for p in parameters:
                of_this = square(p.grad).sqrt().float()
                by = {"exact": norm, "previous": previous, "tensor": of_this}[clipping]
                if by is not None:
                    p.grad.mul_((clip / (by + 1e-6)).clamp(max=1.0))
        optimizer.step()
        norms.append(float(norm))
    return norms


def square(gradient: Tensor) -> Tensor:
    """Return the sum of squares in FP64; for float gradients by torch's formula."""
    if isinstance(gradient, Int8Gradient):
        return gradient.squared_norm()
    return torch.linalg.vector_norm(gradient, dtype=torch.float32).double().square()


def mean(parameter: Tensor, gradients: tuple[Any, ...]) -> Tensor | None:
    """Add in FP32 in the order of processes, and divide by their number; INT8 stays INT8."""
    if all(gradient is None for gradient in gradients):
        return None
    if not isinstance(parameter, QFTWeight):
        total = sum(gradient.float() for gradient in gradients if gradient is not None)
        return (total / len(gradients)).to(parameter.dtype)
    total = sum(values(gradient) for gradient in gradients if gradient is not None)
    total = total / torch.tensor([len(gradients)])
    codes, scales = quantize(total, group_size=STATE_GROUP_SIZE)
    return Int8Gradient(codes, scales, dtype=parameter.dtype, arrangement=parameter.arrangement)


def values(gradient: Int8Gradient) -> Tensor:
    columns = gradient.codes.shape[1]
    scales = gradient.scales.repeat_interleave(STATE_GROUP_SIZE, dim=1)[:, :columns]
    return gradient.codes.float() * scales


def run(name: str, rank: int, n: int) -> dict[str, Any]:
    """Run a scenario on this process."""
    model, optimizer, loop = make(name)
    norms = train(model, optimizer, range(n_steps(name)), rank=rank, n=n, **loop)
    return found(model, optimizer, norms, is_first=rank == 0)


def run_alone(name: str, n: int) -> dict[str, Any]:
    """Run it on one process, always on the stack, because release has the same bits."""
    model, given, loop = make(name)
    bits = {"momentum_bits": given.momentum_bits} if isinstance(given, QFTLion) else {}
    optimizer = make_optimizer(model, type(given), lr=given.param_groups[0]["lr"], **bits)
    norms = train_alone(
        model, optimizer, range(n_steps(name)), n=n, clipping=given.clipping,
        logs_norm=given.gradient == "release", **{"clip": given.max_grad_norm, **loop},
    )  # fmt: skip
    return found(model, optimizer, norms)


def found(
    model: nn.Module, optimizer: Any, norms: list[float], *, is_first: bool = True
) -> dict[str, Any]:
    """Return everything that is stored, in the form of a checkpoint."""
    optimizer.consolidate()
    state = optimizer.state_dict()["state"] if is_first else None
    return {"weights": model_tensors(model), "state": state, "norms": norms}
