"""Steps of float parameters in numba. Twin: `kernels/floats.py`."""

from collections.abc import Sequence
from itertools import repeat

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .. import floats as operators
from ..philox import WEIGHT
from ..values import Lion, Roundings, read_live
from .philox import rounding_words

_f32, _i32 = np.float32, np.int32
_WEIGHT = np.uint64(WEIGHT)
_ZERO, _INFINITY = _f32(0.0), _f32(np.inf)
_HIGH_HALF = _i32(-65536)  # masks the bits of FP32 that BF16 keeps


@njit(inline="always")
def _rounded(bits, word):
    return (bits + _i32(word >> np.uint32(16))) & _HIGH_HALF


@njit(nogil=True, error_model="numpy", cache=True)
def _step_elements(
    values, momentum, gradient, is_rounded, lr, shrink, beta1, one_minus_beta1, beta2,
    one_minus_beta2, gradient_sign,
):  # fmt: skip
    """Without momentum, which is empty then, the gradient is the direction."""
    for i in range(values.shape[0]):
        g = gradient[i] * gradient_sign
        if not abs(g) < _INFINITY:
            continue
        direction = g
        if momentum.shape[0] > 0:
            c = momentum[i] * beta1 + g * one_minus_beta1
            direction = _f32(c > _ZERO) - _f32(c < _ZERO)
            momentum[i] = momentum[i] * beta2 + g * one_minus_beta2
        change = values[i] * shrink + direction * lr
        # Where BF16 is rounded, -0 stays -0. A choice between values can be vectorized, a jump not.
        values[i] -= change if change != _ZERO or not is_rounded else _ZERO


@njit(nogil=True, cache=True)
def _round_to_bfloat16(bits, seed, step, stream):
    """Round FP32, given by its bits, to a BF16 neighbor; BF16 values keep their bits."""
    n = bits.shape[0]
    for first in range(0, n, 4):
        w0, w1, w2, w3 = rounding_words(np.uint64(first // 4), seed, step, stream, _WEIGHT)
        bits[first] = _rounded(bits[first], w0)
        if first + 1 < n:
            bits[first + 1] = _rounded(bits[first + 1], w1)
        if first + 2 < n:
            bits[first + 2] = _rounded(bits[first + 2], w2)
        if first + 3 < n:
            bits[first + 3] = _rounded(bits[first + 3], w3)


@operators.lion_step_floats_.register("cpu")
def lion_step_floats_(
    parameters: Sequence[Tensor],
    momenta: Sequence[Tensor] | None,
    gradients: Sequence[Tensor],
    *,
    rule: Lion,
    roundings: Roundings,
) -> None:
    none = torch.empty(0, dtype=torch.float32, device="cpu")
    for parameter, momentum, gradient, given in zip(
        parameters, momenta or repeat(none), gradients, roundings.of_each(), strict=False
    ):
        own, rounding = read_live(rule, given)
        # Contiguous FP32 tensors are written in place; otherwise these are copies.
        values, moments = parameter.detach().float().flatten(), momentum.flatten()
        arrays = [tensor.numpy() for tensor in (values, moments, gradient.float().flatten())]
        is_rounded = rounding.stochastic and parameter.dtype == torch.bfloat16
        _step_elements(*arrays, is_rounded, *map(_f32, own.numbers))
        if is_rounded:
            words = map(np.uint64, (rounding.seed, rounding.step, rounding.stream))
            _round_to_bfloat16(arrays[0].view(np.int32), *words)
        for tensor, result in ((parameter, values), (momentum, moments)):
            if result.data_ptr() != tensor.data_ptr():
                tensor.copy_(result.view(tensor.shape))
    torch.autograd.graph.increment_version([*parameters, *(momenta or [])])


@operators.step_floats_.register("cpu")
def step_floats_(
    parameters: Sequence[Tensor],
    directions: Sequence[Tensor],
    *,
    lr: float,
    weight_decay: float,
    roundings: Roundings,
) -> None:
    rule = Lion.without_momentum(lr, weight_decay)
    lion_step_floats_(parameters, None, directions, rule=rule, roundings=roundings)
