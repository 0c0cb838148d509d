"""Decoupled weight decay on quantized weights: exact in expectation, step after step."""

from math import sqrt

import pytest
import torch
from torch import nn

from qft_hf.config import QuantizationSpec
from qft_hf.optim import QFTLion
from qft_hf.quant import QFTWeight
from tests.optim.common import zero_gradient
from tests.tolerances import FP32_EPS
from tests.values import scales64, values64

SPECS = [
    QuantizationSpec(outlier_fraction=0.0),
    QuantizationSpec(group_size=48, outlier_fraction=0.02),
]


@pytest.mark.parametrize(("lr", "n_steps"), [(1e-3, 300), (0.05, 200)])  # to 97 % and 37 %
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decay_alone_shrinks_the_norm_by_the_exact_factor(dtype, spec, lr, n_steps):
    """(1 - lr wd)^n within five standard errors; BF16 scales would lose all of the decay.

    Rounding code k after it shrinks by k * shrink < 1 has a variance of at most k * shrink, and a
    new scale adds at most 1/4. Dense values are independent, so the variance of their part of
    `<w_n, w_0>` is the sum over elements of `w_0^2 scale^2 (n k shrink + 1/4 changes)`.
    """
    weight_decay = 0.1
    shrink = lr * weight_decay
    x = torch.randn(96, 200, generator=torch.Generator().manual_seed(0)) * 0.02
    parameter = nn.Parameter(QFTWeight.from_float(x.to(dtype), spec))
    start = values64(parameter).numpy()
    scale = scales64(parameter).numpy()
    codes = parameter.codes.double().abs().numpy()
    outliers, scales = parameter.outlier_values.clone(), parameter.scales.clone()
    optimizer = QFTLion([parameter], lr=lr, weight_decay=weight_decay, seed=3)

    for _ in range(n_steps):
        parameter.grad = zero_gradient(parameter)
        optimizer.step()

    factor = (1 - shrink) ** n_steps
    end = values64(parameter).numpy()
    scale_has_changed = bool((parameter.scales != scales).any())
    assert scale_has_changed == (factor < 0.5)
    variance = scale**2 * (n_steps * codes * shrink + (0.25 if scale_has_changed else 0.0))
    square = (start**2).sum()
    error = sqrt((start**2 * variance).sum()) / square
    assert 50 * error < 1 - factor  # five errors are less than a tenth of the decay
    assert abs((start * end).sum() / square - factor) <= 5 * error
    # In the norm itself, rounding noise adds its variance to the square.
    norm = sqrt((end**2).sum() / square)
    assert factor - 5 * error <= norm <= sqrt(factor**2 + variance.sum() / square) + 5 * error
    # Outliers decay in FP32, one rounding of two operations a step.
    torch.testing.assert_close(
        parameter.outlier_values, outliers * factor, rtol=2 * n_steps * FP32_EPS, atol=0
    )


def test_without_decay_zero_gradients_change_nothing_in_1000_steps():
    x = torch.randn(7, 90, generator=torch.Generator().manual_seed(0))
    parameter = nn.Parameter(QFTWeight.from_float(x, SPECS[1]))
    start = values64(parameter).numpy()
    optimizer = QFTLion([parameter], lr=1e-3, weight_decay=0.0)

    for _ in range(1000):
        parameter.grad = zero_gradient(parameter)
        optimizer.step()

    assert (values64(parameter).numpy() == start).all()


def test_decay_is_decoupled_from_the_gradient_and_the_momentum():
    """The direction is a sign, so coupled decay would change it and the momentum, not the size."""
    x = torch.full((5, 60), 3.0)
    x[:, 0] = 3.2  # the largest value of the row
    parameter = nn.Parameter(QFTWeight.from_float(x, SPECS[0]))
    start = values64(parameter).numpy()
    optimizer = QFTLion([parameter], lr=0.01, weight_decay=10.0)
    parameter.grad = zero_gradient(parameter)
    parameter.grad.codes.fill_(-1)  # ascent: decay and gradient pull in opposite directions
    parameter.grad.scales.fill_(1e-3)

    optimizer.step()

    state = optimizer.state[parameter]
    momentum = state["momentum_codes"] * state["momentum_scales"]
    torch.testing.assert_close(momentum, torch.full((5, 60), -1e-5), rtol=1e-6, atol=0)
    moved = (values64(parameter).numpy() - start).mean()
    assert moved == pytest.approx(0.01 - 0.1 * start.mean(), abs=5 * 3.2 / 127 / 2 / sqrt(300))
