"""Inputs for the operators: the state of one quantized weight, and matrices that tell faults."""

from dataclasses import dataclass, fields
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qft_hf import kernels
from qft_hf.kernels.reference.nibbles import round_to_nibbles

GUARD = 64  # elements before and after a tensor that no operator may write


def random(shape: tuple[int, int], group_size: int | None) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0] * 1009 + shape[1]))


def ramp(shape: tuple[int, int], group_size: int | None) -> Tensor:
    """Grow all the way, so that reading past the end of a group always changes its scale."""
    return torch.arange(1.0, torch.Size(shape).numel() + 1).view(shape)


def ties(shape: tuple[int, int], group_size: int | None) -> Tensor:
    """Every value half-way between two codes, so that any change of rounding shows."""
    x = (torch.arange(torch.Size(shape).numel()) % 126 + 0.5).view(shape)
    x[:, 1::2] *= -1
    x[:, :: group_size or shape[1]] = 127.0  # one per group: the scale is then exactly 1
    return x


@dataclass
class LionState:
    """The tensors of `lion_step_`, in the order of its arguments."""

    codes: Tensor
    scales: Tensor
    outlier_values: Tensor
    outlier_columns: Tensor
    momentum_codes: Tensor
    momentum_scales: Tensor
    gradient_codes: Tensor
    gradient_scales: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def clone(self) -> "LionState":
        return LionState(**{name: tensor.clone() for name, tensor in self.tensors().items()})

    def arguments(self) -> tuple[Tensor, ...]:
        return tuple(self.tensors().values())

    def outlier_mask(self) -> np.ndarray:
        mask = torch.zeros(self.codes.shape, dtype=torch.bool)
        return mask.scatter_(1, self.outlier_columns.long(), True).numpy()

    def set_gradient(self, gradient: Tensor, state_group_size: int) -> None:
        self.gradient_codes, self.gradient_scales = kernels.quantize(
            gradient, group_size=state_group_size
        )


def make_state(
    shape: tuple[int, int],
    *,
    group_size: int | None,
    state_group_size: int = 256,
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
        stored_momentum = round_to_nibbles(momentum, None)
    else:
        stored_momentum = kernels.quantize(momentum, group_size=state_group_size)
    gradient = torch.randn(shape, generator=generator) * 3e-3
    return LionState(
        codes,
        scales,
        values,
        columns.to(index_dtype),
        *stored_momentum,
        *kernels.quantize(gradient, group_size=state_group_size),
    )


@dataclass
class Product:
    """The arguments of `dequantized_matmul`."""

    x: Tensor
    codes: Tensor
    scales: Tensor
    group_size: int | None
    outlier_values: Tensor | None
    outlier_columns: Tensor | None
    bias: Tensor | None

    def run(self, package: Any) -> Tensor:
        """The product by a backend."""
        return package.dequantized_matmul(
            self.x, self.codes, self.scales, self.group_size,
            outlier_values=self.outlier_values, outlier_columns=self.outlier_columns,
            bias=self.bias,
        )  # fmt: skip

    def weight(self, package: Any, dtype: torch.dtype) -> Tensor:
        """The weight that the product is with."""
        return package.dequantize(
            self.codes, self.scales, self.group_size, dtype=dtype,
            outlier_values=self.outlier_values, outlier_columns=self.outlier_columns,
        )  # fmt: skip

    def to(self, device: torch.device) -> "Product":
        """The same on another device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Product(**{
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in values.items()
        })  # fmt: skip


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
    """Some tokens and a weight; with `exact` FP32 holds all sums, in any order, and `dtype` theirs.

    With `exact`, tokens, codes and critical values are small integers and scales powers of two, and
    each token has at most 16 elements that are not 0.
    """
    state = make_state(
        shape,
        group_size=group_size,
        outlier_fraction=outlier_fraction,
        index_dtype=index_dtype,
    )
    generator = torch.Generator().manual_seed(n_tokens)
    rows, columns = shape
    x = torch.randn(n_tokens, columns, generator=generator)
    bias = torch.randn(rows, generator=generator)
    if exact:
        few = torch.rand(n_tokens, columns, generator=generator).argsort(dim=1) < 16
        x = few * torch.randint(-2, 3, x.shape, generator=generator).float()
        state.codes.div_(32, rounding_mode="trunc")  # -3 to 3
        powers = torch.randint(-1, 1, state.scales.shape, generator=generator)
        state.scales = 2.0**powers
        state.outlier_values = state.outlier_values.sign() * 2.5
        bias = torch.randint(-4, 5, (rows,), generator=generator) / 2.0
    has_outliers = state.outlier_values.numel() > 0
    return Product(
        x.to(dtype),
        state.codes,
        state.scales,
        group_size,
        state.outlier_values if has_outliers else None,
        state.outlier_columns if has_outliers else None,
        bias,
    )


def spread(scales: Tensor, columns: int, group_size: int | None) -> np.ndarray:
    """The scale of each element, float64 `[rows, columns]`: an independent spelling in numpy."""
    group = np.arange(columns) // (group_size or columns)
    return scales.numpy().astype(np.float64)[:, group]


def values64(codes: Tensor, scales: Tensor, group_size: int | None) -> np.ndarray:
    """`codes * scale` in float64."""
    return codes.numpy().astype(np.float64) * spread(scales, codes.shape[1], group_size)


# What a 4-bit code stands for, in the order of its four bits, written out.
NIBBLE_UNITS = np.array([0, 4, 10, 18, 28, 40, 54, 70, 0, -70, -54, -40, -28, -18, -10, -4.0])


def momentum64(state: LionState, state_group_size: int = 256) -> np.ndarray:
    """The exact momentum, of 8 or 4 bits."""
    codes, scales = state.momentum_codes, state.momentum_scales
    if codes.dtype == torch.int8:
        return values64(codes, scales, state_group_size)
    packed, columns = codes.numpy(), state.codes.shape[1]
    units = np.empty((packed.shape[0], 2 * packed.shape[1]))
    units[:, ::2], units[:, 1::2] = NIBBLE_UNITS[packed % 16], NIBBLE_UNITS[packed // 16]
    return units[:, :columns] * spread(scales, columns, 64)


def guarded(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of `tensor` inside a larger buffer, and that buffer."""
    buffer = torch.full((tensor.numel() + 2 * GUARD,), 77, dtype=tensor.dtype, device=tensor.device)
    inner = buffer[GUARD : GUARD + tensor.numel()].view(tensor.shape)
    inner.copy_(tensor)
    return inner, buffer


def guards_are_intact(buffer: Tensor) -> bool:
    return bool((buffer[:GUARD] == 77).all() and (buffer[-GUARD:] == 77).all())


# Never neutral: decay, odd seed above 32 bits, a stream and a step other than 0.
ARGUMENTS: dict[str, Any] = {
    "lr": 3e-4,
    "beta1": 0.9,
    "beta2": 0.99,
    "weight_decay": 0.1,
    "maximize": False,
    "stochastic": True,
    "seed": 0x1234_5678_9ABC_DEF1,
    "step": 7,
    "stream": 3,
}


def float_arguments(n: int = 1, **changes: Any) -> dict[str, Any]:
    """`ARGUMENTS` for `lion_step_floats_` on `n` parameters, each at a step and stream of its own.

    The first has those of `ARGUMENTS`, so that one parameter alone is stepped as by `ARGUMENTS`.
    """
    arguments = {**ARGUMENTS, **changes}
    step, stream = arguments.pop("step"), arguments.pop("stream")
    return {
        **arguments,
        "steps": [step + 2 * i for i in range(n)],
        "streams": [stream + 5 * i for i in range(n)],
    }
