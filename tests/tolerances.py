"""Every tolerance of the tests. A tolerance is derived here, or it is zero."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

FP32_EPS = 2.0**-24  # unit roundoff: the largest relative error of one FP32 operation
FP64_EPS = 2.0**-53
BF16_EPS = 2.0**-8
FP16_EPS = 2.0**-11
EPS = {torch.float32: FP32_EPS, torch.bfloat16: BF16_EPS, torch.float16: FP16_EPS}


def rounding_bound(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Error of rounding to the nearest `codes * scale`: half a scale.

    FP32 noise is added by the scale, its inverse and three products, each relative to the value;
    the code of the largest value can therefore reach 127 (1 + 4 eps) before it is clamped.
    """
    return 0.5 * scale + 8 * FP32_EPS * np.abs(x)


def stochastic_bound(scale: np.ndarray) -> np.ndarray:
    """Error of stochastic rounding: less than one stored scale.

    FP32 noise is added by four operations on values of up to 128 codes.
    """
    return scale * (1 + 4 * 128 * FP32_EPS)


def float_update_bound(value: np.ndarray, lr: float, weight_decay: float) -> np.ndarray:
    """FP32 noise of `w - (w * shrink + direction * lr)`: four products and sums."""
    return 4 * FP32_EPS * (np.abs(value) * (1 + lr * weight_decay) + lr)


def sum_bound(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """FP32 noise of `a + b` when each term is itself a product of two rounded factors."""
    return 4 * FP32_EPS * (np.abs(a) + np.abs(b))


def sign_is_decided(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """True where FP32 rounding of the terms cannot flip the sign of `a + b`, or make it zero."""
    return (np.abs(a + b) > sum_bound(a, b)) | ((a == 0) & (b == 0))


def matmul_bound(a: Tensor, b: Tensor, eps: float = FP32_EPS) -> Tensor:
    """Elementwise error of `a @ b` accumulated in any order: `K eps (|a| @ |b|)`."""
    return a.shape[-1] * eps * (a.double().abs() @ b.double().abs())


def dequantized_matmul_bound(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, cut: bool = False
) -> Tensor:
    """Elementwise error of FP32 sums of `x W^T + bias`, in any order, rounded once to x's dtype.

    A sum of n terms has n - 1 roundings, plus one for each product. Outliers are summed in addition
    to the zeros in their places, so there are at most twice as many terms as columns. Rounding the
    result adds half its spacing, 2**-25 below FP16's normal numbers, or a whole spacing if `cut`.
    """
    size = x.double().abs() @ weight.double().abs().t()
    if bias is not None:
        size = size + bias.double().abs()
    sums = (2 * x.shape[1] + 2) * FP32_EPS * size
    if x.dtype == torch.float32:
        return sums
    exact = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    rounding = EPS[x.dtype] * (exact.abs() + sums)
    if x.dtype == torch.float16:
        rounding = rounding + 2.0**-25
    return sums + (2 if cut else 1) * rounding


def mean_error(probability: float, n_draws: int) -> float:
    """Standard error of the mean of `n_draws` independent events of the given probability."""
    return math.sqrt(probability * (1 - probability) / n_draws)


def snr_db(exact: Tensor, approximate: Tensor) -> float:
    """Signal-to-noise ratio: power of `exact` over power of the difference, in decibels."""
    noise = (exact.double() - approximate.double()).square().sum()
    return 10 * math.log10((exact.double().square().sum() / noise).item())


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Assert equal dtype, shape and bits, including the sign of zeros; NaN equals NaN."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    if actual.is_floating_point():
        differ = (actual.signbit() != expected.signbit()) & ~actual.isnan()
        assert not differ.any(), f"{int(differ.sum())} zeros have another sign"


def assert_same_norms(actual: Tensor, expected: Tensor, n_terms: int) -> None:
    """Assert equal dtype, shape and sums: FP64, of `n_terms` terms >= 0, added in any order.

    In both tensors each term has up to two roundings, and each sum one for each further term.
    """
    rtol = 2 * (n_terms + 1) * FP64_EPS
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=0, equal_nan=True)


Tensors = Mapping[str, Tensor] | Sequence[Tensor]


def assert_same_tensors(actual: Tensors, expected: Tensors) -> None:
    """Assert the same names, or the same number of tensors, and the same bits of each tensor."""
    actual, expected = (
        dict(x if isinstance(x, Mapping) else enumerate(x)) for x in (actual, expected)
    )
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        try:
            assert_same_bits(actual[name], tensor)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def int8_linear_bound(terms: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Tensor:
    """Error of `int8_linear`, as its docstring derives it.

    Args:
        terms: Pairs of factors whose products are added: codes first, then floats.
        dtype: Dtype of the result.
    """
    size = sum(left.double().abs() @ right.double().abs() for left, right in terms)
    n_products = sum(left.shape[1] for left, _ in terms[1:])
    # Below the smallest normal number, the spacing of floats no longer shrinks.
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return ((n_products + 3) * FP32_EPS + torch.finfo(dtype).eps) * size + least
