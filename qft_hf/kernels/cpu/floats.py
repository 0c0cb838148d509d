"""The Lion step on float parameters in numba. Twin: `kernels/floats.py`."""

from collections.abc import Sequence

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .. import floats as operators
from ..philox import WEIGHT
from ..values import Lion, Roundings, read_live
from .philox import philox

_f32, _i32 = np.float32, np.int32
_WEIGHT = np.uint64(WEIGHT)
_ZERO, _INFINITY = _f32(0.0), _f32(np.inf)
_HIGH_HALF = _i32(-65536)  # masks the bits of FP32 that BF16 keeps


@njit(inline="always")
def _rounded(bits, word):
    return (bits + _i32(word >> np.uint32(16))) & _HIGH_HALF


@njit(nogil=True, error_model="numpy", cache=True)
def _lion_elements(
    values, momentum, gradient, lr, shrink, beta1, one_minus_beta1, beta2, one_minus_beta2,
    gradient_sign,
):  # fmt: skip
    for i in range(values.shape[0]):
        g = gradient[i] * gradient_sign
        if not abs(g) < _INFINITY:
            continue
        c = momentum[i] * beta1 + g * one_minus_beta1
        direction = _f32(c > _ZERO) - _f32(c < _ZERO)
        momentum[i] = momentum[i] * beta2 + g * one_minus_beta2
        values[i] -= values[i] * shrink + direction * lr


@njit(nogil=True, cache=True)
def _round_to_bfloat16(bits, seed, step, stream):
    """Round FP32, given by its bits, to a BF16 neighbor; BF16 values keep their bits."""
    n = bits.shape[0]
    for first in range(0, n, 4):
        w0, w1, w2, w3 = philox(np.uint64(first // 4), seed, step, stream, _WEIGHT)
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
    momenta: Sequence[Tensor],
    gradients: Sequence[Tensor],
    *,
    rule: Lion,
    roundings: Roundings,
) -> None:
    for parameter, momentum, gradient, given in zip(
        parameters, momenta, gradients, roundings.of_each(), strict=True
    ):
        own, rounding = read_live(rule, given)
        # Contiguous FP32 tensors are written in place; otherwise these are copies.
        values, moments = parameter.detach().float().flatten(), momentum.flatten()
        arrays = [tensor.numpy() for tensor in (values, moments, gradient.float().flatten())]
        _lion_elements(*arrays, *map(_f32, own.numbers))
        if rounding.stochastic and parameter.dtype == torch.bfloat16:
            words = map(np.uint64, (rounding.seed, rounding.step, rounding.stream))
            _round_to_bfloat16(arrays[0].view(np.int32), *words)
        for tensor, result in ((parameter, values), (momentum, moments)):
            if result.data_ptr() != tensor.data_ptr():
                tensor.copy_(result.view(tensor.shape))
    torch.autograd.graph.increment_version([*parameters, *momenta])


# Float parameters have few elements: plain PyTorch is as fast.
operators.step_floats_.register("cpu")(operators.step_floats_.reference)
