"""Inputs for the operators: the state of one quantized weight, and matrices that reveal faults."""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qft_hf import kernels
from qft_hf.kernels import Lion, Quantized, Rounding, Roundings, Weight
from qft_hf.kernels.nibbles import round_to_nibbles
from tests.kernels.backends import Backend
from tests.tolerances import assert_same_tensors

GUARD = 64  # elements before and after a tensor that no operator may write


def random(shape: tuple[int, int], group_size: int | None) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0] * 1009 + shape[1]))


def ramp(shape: tuple[int, int], group_size: int | None) -> Tensor:
    """Grow from start to end, so that reading past the end of a group always changes its scale."""
    return torch.arange(1.0, torch.Size(shape).numel() + 1).view(shape)


def ties(shape: tuple[int, int], group_size: int | None) -> Tensor:
    """Return values half-way between two codes, so that any change of rounding shows."""
    x = (torch.arange(torch.Size(shape).numel()) % 126 + 0.5).view(shape)
    x[:, 1::2] *= -1
    x[:, :: group_size or shape[1]] = 127.0  # one per group: the scale is then exactly 1
    return x


def coded(x: Tensor, group_size: int | None) -> Quantized:
    """Return `x` quantized to INT8."""
    return Quantized(*kernels.quantize(x, group_size=group_size), group_size)


@dataclass
class LionState:
    """The first three arguments of `lion_step_`."""

    weight: Weight
    momentum: Quantized
    gradient: Quantized

    def arguments(self) -> tuple[Weight, Quantized, Quantized]:
        return self.weight, self.momentum, self.gradient

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by the names that `operator(writes=...)` uses."""
        weight, momentum, gradient = self.arguments()
        return {
            "weight.codes": weight.codes,
            "weight.scales": weight.scales,
            "weight.outlier_values": weight.outlier_values,
            "weight.outlier_columns": weight.outlier_columns,
            "momentum.codes": momentum.codes,
            "momentum.scales": momentum.scales,
            "gradient.codes": gradient.codes,
            "gradient.scales": gradient.scales,
        }

    def of(self, tensors: dict[str, Tensor]) -> "LionState":
        """Return a state of the same form with other tensors, which the constructors check."""
        momentum, gradient = self.momentum, self.gradient
        parts = iter(tensors.values())
        return LionState(
            Weight(next(parts), next(parts), next(parts), next(parts), self.weight.group_size),
            Quantized(next(parts), next(parts), momentum.group_size, momentum.bits),
            Quantized(next(parts), next(parts), gradient.group_size, gradient.bits),
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> "LionState":
        return self.of({name: function(tensor) for name, tensor in self.tensors().items()})

    def clone(self) -> "LionState":
        return self.map(torch.clone)

    def to(self, device: torch.device) -> "LionState":
        return self.map(lambda tensor: tensor.to(device))

    def guarded(self) -> tuple["LionState", dict[str, Tensor]]:
        """A copy of each tensor inside a larger buffer, and those buffers by name."""
        pairs = {name: guarded(tensor) for name, tensor in self.tensors().items()}
        inside = self.of({name: inner for name, (inner, _) in pairs.items()})
        return inside, {name: buffer for name, (_, buffer) in pairs.items()}

    def outlier_mask(self) -> np.ndarray:
        mask = torch.zeros(self.weight.codes.shape, dtype=torch.bool)
        return mask.scatter_(1, self.weight.outlier_columns.long(), True).numpy()

    def set_gradient(self, gradient: Tensor) -> None:
        """Replace the gradient, keeping its group size."""
        self.gradient = coded(gradient, self.gradient.group_size)


def assert_same_state(actual: LionState, expected: LionState) -> None:
    """Assert that all tensors have the same bits."""
    assert_same_tensors(actual.tensors(), expected.tensors())


def make_state(
    shape: tuple[int, int],
    *,
    group_size: int | None,
    state_group_size: int | None = 256,
    momentum_bits: int = 8,
    outlier_fraction: float = 0.0,
    index_dtype: torch.dtype = torch.int16,
    weight_scale: float = 0.02,
    seed: int = 0,
) -> LionState:
    """Gaussian weight, momentum and gradient; the momentum is about as large as the gradient."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * weight_scale
    n_outliers = ceil(outlier_fraction * shape[1])
    columns = weight.abs().topk(n_outliers, dim=1).indices.sort(dim=1).values
    values = weight.gather(1, columns) * 3
    codes, scales = kernels.quantize(weight.scatter(1, columns, 0.0), group_size=group_size)
    momentum = torch.randn(shape, generator=generator) * 1e-3
    if momentum_bits == 4:
        stored_momentum = Quantized(*round_to_nibbles(momentum, None), 64, bits=4)
    else:
        stored_momentum = coded(momentum, state_group_size)
    gradient = torch.randn(shape, generator=generator) * 3e-3
    return LionState(
        Weight(codes, scales, values, columns.to(index_dtype), group_size),
        stored_momentum,
        coded(gradient, state_group_size),
    )


@dataclass
class Product:
    """The arguments of `dequantized_matmul`."""

    x: Tensor
    weight: Weight
    bias: Tensor | None

    def run(self, backend: Backend) -> Tensor:
        """Compute the product on a backend."""
        return backend.dequantized_matmul(self.x, self.weight, bias=self.bias)

    def expanded(self, backend: Backend, dtype: torch.dtype) -> Tensor:
        """Return the dequantized weight that `x` is multiplied with."""
        return backend.dequantize(self.weight, dtype=dtype)

    def to(self, device: torch.device) -> "Product":
        """Return the same product on another device."""
        tensors = (tensor.to(device) for tensor in self.weight.tensors)
        bias = None if self.bias is None else self.bias.to(device)
        return Product(self.x.to(device), Weight(*tensors, self.weight.group_size), bias)


def make_product(
    n_tokens: int,
    shape: tuple[int, int],
    group_size: int | None,
    *,
    dtype: torch.dtype,
    outlier_fraction: float = 0.0,
    index_dtype: torch.dtype = torch.int16,
    exact: bool = False,
) -> Product:
    """Some tokens and a weight; with `exact`, sums fit FP32 in any order, and results fit `dtype`.

    With `exact`, tokens, codes and outliers are small integers and scales powers of two, and
    each token has at most 16 elements that are not 0.
    """
    weight = make_state(
        shape,
        group_size=group_size,
        outlier_fraction=outlier_fraction,
        index_dtype=index_dtype,
    ).weight
    generator = torch.Generator().manual_seed(n_tokens)
    rows, columns = shape
    x = torch.randn(n_tokens, columns, generator=generator)
    bias = torch.randn(rows, generator=generator)
    if exact:
        few = torch.rand(n_tokens, columns, generator=generator).argsort(dim=1) < 16
        x = few * torch.randint(-2, 3, x.shape, generator=generator).float()
        weight.codes.div_(32, rounding_mode="trunc")  # -3 to 3
        powers = torch.randint(-1, 1, weight.scales.shape, generator=generator)
        weight.scales.copy_(2.0**powers)
        weight.outlier_values.sign_().mul_(2.5)
        bias = torch.randint(-4, 5, (rows,), generator=generator) / 2.0
    return Product(x.to(dtype), weight, bias)


def spread(scales: Tensor, columns: int, group_size: int | None) -> np.ndarray:
    """Return the scale of each element, float64 `[rows, columns]`, from a tensor of scales."""
    group = np.arange(columns) // (group_size or columns)
    return scales.numpy().astype(np.float64)[:, group]


def values64(codes: Tensor, scales: Tensor, group_size: int | None) -> np.ndarray:
    """`codes * scale` in float64."""
    return codes.numpy().astype(np.float64) * spread(scales, codes.shape[1], group_size)


def stored64(matrix: Quantized | Weight) -> np.ndarray:
    """Return the float64 values of 8-bit codes, without outliers."""
    return values64(matrix.codes, matrix.scales, matrix.group_size)


# Values of the 16 4-bit codes, in the order of their bits, written out.
NIBBLE_UNITS = np.array([0, 4, 10, 18, 28, 40, 54, 70, 0, -70, -54, -40, -28, -18, -10, -4.0])


def momentum64(state: LionState) -> np.ndarray:
    """Return the exact values of the momentum, of 8 or 4 bits."""
    if state.momentum.bits == 8:
        return stored64(state.momentum)
    packed, columns = state.momentum.codes.numpy(), state.weight.codes.shape[1]
    units = np.empty((packed.shape[0], 2 * packed.shape[1]))
    units[:, ::2], units[:, 1::2] = NIBBLE_UNITS[packed % 16], NIBBLE_UNITS[packed // 16]
    return units[:, :columns] * spread(state.momentum.scales, columns, 64)


def guarded(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of `tensor` inside a larger buffer, and that buffer."""
    buffer = torch.full((tensor.numel() + 2 * GUARD,), 77, dtype=tensor.dtype, device=tensor.device)
    inner = buffer[GUARD : GUARD + tensor.numel()].view(tensor.shape)
    inner.copy_(tensor)
    return inner, buffer


def guards_are_intact(buffer: Tensor) -> bool:
    return bool((buffer[:GUARD] == 77).all() and (buffer[-GUARD:] == 77).all())


# No neutral values: nonzero decay, stream, step and first row, and an odd seed above 32 bits.
RULE = Lion(lr=3e-4, beta1=0.9, beta2=0.99, weight_decay=0.1)
ROUNDING = Rounding(seed=0x1234_5678_9ABC_DEF1, step=7, stream=3, first_row=11)


def arguments(**changes: Any) -> dict[str, Any]:
    """`RULE` and `ROUNDING` with changes of their fields, for `lion_step_`."""
    rule = {name: changes.pop(name) for name in Lion._fields if name in changes}
    return {"rule": RULE._replace(**rule), "rounding": ROUNDING._replace(**changes)}


def lion_step_(backend: Any, state: LionState, **changes: Any) -> None:
    """Run one step on a backend, with the usual arguments except for `changes`."""
    backend.lion_step_(*state.arguments(), **arguments(**changes))


def step_arguments(**changes: Any) -> dict[str, Any]:
    """Return `arguments` for `step_weight_`, which has no betas."""
    given = arguments(**changes)
    rule = given.pop("rule")
    return {"lr": rule.lr, "weight_decay": rule.weight_decay, **given}


def float_arguments(n: int = 1, **changes: Any) -> dict[str, Any]:
    """Return `arguments` for `lion_step_floats_` on `n` parameters, each with its step and stream.

    The first parameter has those of `ROUNDING`.
    """
    rule, rounding = arguments(**changes).values()
    steps = [rounding.step + 2 * i for i in range(n)]
    streams = [rounding.stream + 5 * i for i in range(n)]
    roundings = Roundings(rounding.seed, steps, streams, rounding.stochastic, rounding.live)
    return {"rule": rule, "roundings": roundings}


def of_one(given: dict[str, Any], i: int) -> dict[str, Any]:
    """Return those of `float_arguments` for parameter `i` alone."""
    every = given["roundings"]
    steps, streams = every.steps[i : i + 1], every.streams[i : i + 1]
    return {**given, "roundings": every._replace(steps=steps, streams=streams)}


def step_float_arguments(n: int = 1, **changes: Any) -> dict[str, Any]:
    """Return `float_arguments` for `step_floats_`, which has no betas."""
    given = float_arguments(n, **changes)
    rule = given.pop("rule")
    return {"lr": rule.lr, "weight_decay": rule.weight_decay, **given}
