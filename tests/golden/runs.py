"""Short training runs with known bits, which a rewrite of the code must not change.

There are two models. The layers of `integers` see small integers only, so the float products of its
gradients are exact in any order, and its bits are the same on every machine. `llama` is a real
model; its float sums depend on the CPU and on PyTorch, so its bits belong to one environment.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qft_hf.config import QuantizationSpec
from qft_hf.nn import quantize_modules_
from qft_hf.optim import QFTSGD, QFTAdamW, QFTLion
from tests.models import VOCAB_SIZE, tiny_llama
from tests.optim.common import model_tensors, state_tensors

N_STEPS = 12
N_TOKENS, WIDTH, VOCABULARY = 40, 300, 37

FORMATS = {
    "rows": QuantizationSpec(outlier_fraction=0.02, seed=5),
    "groups": QuantizationSpec(group_size=40, outlier_fraction=0.02, seed=5),
    "int8": QuantizationSpec(matmul="int8", outlier_fraction=0.02, seed=5),
}
# Settings of the optimizer; `parts`: micro-batches of a step; `clip`: limit of `clip_grad_norm_`.
MODES: dict[str, dict[str, Any]] = {
    "stack": {},
    "release": {"gradient": "release"},
    "stack, 2 parts": {"parts": 2},
    "release, 2 parts": {"gradient": "release", "parts": 2},
    "stack, clipped": {"clip": 0.3},
    "release, exact": {"gradient": "release", "clipping": "exact", "max_grad_norm": 0.3},
    "release, previous": {"gradient": "release", "clipping": "previous", "max_grad_norm": 0.3},
    "release, tensor": {"gradient": "release", "clipping": "tensor", "max_grad_norm": 0.3},
    "4 bits": {"momentum_bits": 4},
    "release, 4 bits": {"gradient": "release", "momentum_bits": 4},
    "sgd": {"optimizer": QFTSGD, "clip": 0.3},
    "release, sgd": {"gradient": "release", "optimizer": QFTSGD},
    "adamw": {"optimizer": QFTAdamW, "clip": 0.3},
    "release, adamw": {"gradient": "release", "optimizer": QFTAdamW},
    "maximize": {"maximize": True},
    "nearest": {"stochastic_rounding": False},
}

Batch = Callable[[int], Iterator[Callable[[], Tensor]]]


class Integers(nn.Module):
    """Linear layers, a table that may be tied to a head, and a norm-like vector, side by side."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.embed = nn.Embedding(VOCABULARY, WIDTH, padding_idx=3)
            self.up = nn.Linear(WIDTH, 131)
            self.down = nn.Linear(75, WIDTH, bias=False)
            self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
            self.norm = nn.Parameter(torch.rand(WIDTH) + 0.5)
        if tied:
            self.head.weight = self.embed.weight


def _integers(generator: torch.Generator, *shape: int) -> Tensor:
    x = torch.randint(-3, 4, shape, generator=generator).float()
    # Columns differ in their largest magnitudes, so the choice of outliers depends on no sort.
    x[0] = 4.0 + torch.randperm(shape[1], generator=generator)
    return x


def integers_model(spec: QuantizationSpec, *, tied: bool) -> tuple[nn.Module, Batch]:
    """Return the model of integers, and a function that yields the micro-batches of a step."""
    model = Integers(tied=tied)
    quantize_modules_(model, spec)
    model.train()

    def parts(step: int, n_parts: int) -> Iterator[Callable[[], Tensor]]:
        for part in range(n_parts):
            generator = torch.Generator().manual_seed(100 * step + part)
            ids = torch.randint(0, VOCABULARY, (N_TOKENS,), generator=generator)
            inputs = [(layer, _integers(generator, N_TOKENS, layer.in_features))
                      for layer in (model.up, model.down, model.head)]  # fmt: skip
            grads = [
                torch.randint(-3, 4, (N_TOKENS, size), generator=generator).float()
                for size in (131, WIDTH, VOCABULARY, WIDTH)
            ]
            factor = _integers(generator, 1, WIDTH)[0]

            def backward() -> Tensor:
                outputs = [layer(x) for layer, x in inputs]  # noqa: B023 called before the next
                outputs.append(model.embed(ids))  # noqa: B023
                outputs.append(model.norm * factor)  # noqa: B023
                torch.autograd.backward(outputs, [*grads, torch.ones(WIDTH)])  # noqa: B023
                return torch.zeros(())

            yield backward

    return model, parts


def llama_model(
    spec: QuantizationSpec, *, tied: bool, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, Batch]:
    """Return a Llama of two layers, with biases if it is tied, and its micro-batches."""
    model = tiny_llama(tied=tied, attention_bias=tied, mlp_bias=tied, dtype=dtype)
    quantize_modules_(model, spec)
    model.train()

    def parts(step: int, n_parts: int) -> Iterator[Callable[[], Tensor]]:
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(1, VOCAB_SIZE, (4 * n_parts, 12), generator=generator)
        for part in ids.chunk(n_parts):

            def backward() -> Tensor:
                loss = model(input_ids=part, labels=part).loss / n_parts  # noqa: B023
                loss.backward()
                return loss.detach()

            yield backward

    return model, parts


def run(model: nn.Module, parts: Any, mode: str) -> str:
    """Train for `N_STEPS` steps; return the SHA-256 of losses, weights and optimizer state."""
    settings = dict(MODES[mode])
    n_parts, clip = settings.pop("parts", 1), settings.pop("clip", None)
    optimizer = settings.pop("optimizer", QFTLion)(
        [
            {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.ndim < 2], "lr": 2e-3},
        ],
        lr=1e-3, seed=11, **settings,
    )  # fmt: skip
    losses = []
    for step in range(N_STEPS):
        for group in optimizer.param_groups:  # a schedule; large steps change scales
            group["lr"] = [1e-3, 2e-2, 3e-4][step % 3]
        backwards = list(parts(step, n_parts))
        for backward in backwards[:-1]:
            with optimizer.accumulate():
                losses.append(backward())
        if settings.get("clipping") == "exact":
            with optimizer.measure_norm():
                backwards[-1]()
        losses.append(backwards[-1]())
        if clip is not None:
            losses.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip))
        optimizer.step()
        optimizer.zero_grad()
    digest = hashlib.sha256()
    tensors = {**model_tensors(model), **state_tensors(optimizer)}
    for name in sorted(name for name in tensors if not name.endswith(".step")):
        digest.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    digest.update(torch.stack([loss.float() for loss in losses]).numpy().tobytes())
    return digest.hexdigest()[:16]


def cases() -> Iterator[tuple[str, Callable[[], str]]]:
    """Yield the name of each run, and a function that runs it."""
    for format_name, spec in FORMATS.items():
        for tied in (True, False):
            for mode in MODES:
                if mode.endswith("exact") and tied and format_name != "rows":
                    continue
                name = f"integers, {format_name}, {'tied' if tied else 'untied'}, {mode}"
                yield name, lambda s=spec, t=tied, m=mode: run(*integers_model(s, tied=t), m)
    llamas = [
        ("rows", True, torch.float32, MODES),
        ("int8", False, torch.float32, MODES),
        ("groups", False, torch.bfloat16, ["stack", "release", "release, 2 parts"]),
        ("int8", True, torch.bfloat16, ["stack", "release", "stack, clipped"]),
    ]
    for format_name, tied, dtype, modes in llamas:
        for mode in modes:
            kind = f"{format_name}, {'tied' if tied else 'untied'}, {str(dtype)[6:]}"
            yield (
                f"llama, {kind}, {mode}",
                lambda s=FORMATS[format_name], t=tied, d=dtype, m=mode: run(
                    *llama_model(s, tied=t, dtype=d), m
                ),
            )


def environment() -> str:
    """Return what the bits of `llama` depend on."""
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}" + (
        ", native bf16" if torch.cpu._is_avx512_bf16_supported() else ""
    )
