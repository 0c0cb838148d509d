"""An output gradient as INT8 operands: by rows for `grad_x`, by columns for `grad_w`."""

import torch
from torch import Tensor

from .checks import check_matrix, check_row_scales
from .operators import declare
from .quantize import FLOATS

QuantizedRows = tuple[Tensor, Tensor]  # codes [rows, columns], scales [rows, 1]


def _fake_quantize_gradient(
    gradient: Tensor, row_factors: Tensor | None, column_factors: Tensor | None, **_: object
) -> tuple[Tensor, ...]:
    tokens, outputs = gradient.shape
    forms = []
    for factors, rows, columns in (
        (row_factors, tokens, outputs),
        (column_factors, outputs, tokens),
    ):
        shape = (rows, columns) if factors is not None else (0, 0)
        forms.append(gradient.new_empty(shape, dtype=torch.int8))
        forms.append(gradient.new_empty((shape[0], 1), dtype=torch.float32))
    return tuple(forms)


_quantize_gradient = declare(
    "quantize_gradient",
    "(Tensor gradient, Tensor? row_factors, Tensor? column_factors, *, bool stochastic, int seed) "
    "-> (Tensor row_codes, Tensor row_scales, Tensor column_codes, Tensor column_scales)",
    fake=_fake_quantize_gradient,
)


def quantize_gradient(
    gradient: Tensor,
    row_factors: Tensor | None,
    column_factors: Tensor | None,
    *,
    stochastic: bool = True,
    seed: int,
) -> tuple[QuantizedRows | None, QuantizedRows | None]:
    """Quantize the gradient `g[N, R]` of `y = x W^T` to INT8 along its rows and along its columns.

        rows:    g[n, r] * row_factors[r]     ~ row_codes[n, r] * row_scales[n]
        columns: g[n, r] * column_factors[n]  ~ column_codes[r, n] * column_scales[r]

    With the scales of the INT8 weight as row factors, `grad_x` is the product of the row codes with
    the weight's codes; with those of the INT8 input as column factors, `grad_w` is the product of
    the column codes with the input's codes: see `int8_matmul`. The column form is made transposed,
    `[R, N]`, contiguous along what that product sums over.

    Rounding is stochastic against the scale that is returned: the expectation of `code * scale` is
    the value, and a value that is a multiple of the scale stays. The random numbers are those of
    `lion_step_`, Philox counted by the element's position in its codes, with the bits of the row's
    largest magnitude for the step and 0 (rows) or 1 (columns) for the stream. They are a function
    of the data, so that recomputing repeats them and nothing has to be saved.

    Args:
        gradient: `[N, R]`, contiguous; fp32, bf16 or fp16. Arithmetic is fp32.
        row_factors: fp32 `[R, 1]`; None: no row form.
        column_factors: fp32 `[N, 1]`; None: no column form.
        stochastic: False rounds to nearest, as `quantize` does.
        seed: Key of the random numbers, in [0, 2**63).

    Returns:
        rows: `(codes, scales)`, int8 `[N, R]` in [-127, 127] and fp32 `[N, 1]`, or None.
        columns: `(codes, scales)`, int8 `[R, N]` and fp32 `[R, 1]`, or None.
            A scale is the largest magnitude over 127, and at least 1e-30. Where a value is NaN or
            infinite the scale is not finite and codes are 0.

    Raises:
        TypeError: `gradient` is not one of the three float dtypes.
        ValueError: `gradient` is not a contiguous, non-empty matrix, factors do not fit it, or
            neither form was asked for.

    Source:
        Chen et al. 2020, "A Statistical Framework for Low-bitwidth Training of Deep Neural
        Networks" (arXiv:2010.14298): stochastic rounding with one scale per sample.
    """
    check_matrix("gradient", gradient, FLOATS)
    tokens, outputs = gradient.shape
    if row_factors is None and column_factors is None:
        raise ValueError("quantize_gradient needs row factors, column factors, or both; got none.")
    if row_factors is not None:
        check_row_scales("row_factors", row_factors, outputs, gradient.device)
    if column_factors is not None:
        check_row_scales("column_factors", column_factors, tokens, gradient.device)
    row_codes, row_scales, column_codes, column_scales = _quantize_gradient(
        gradient, row_factors, column_factors, stochastic=stochastic, seed=seed
    )
    return (
        None if row_factors is None else (row_codes, row_scales),
        None if column_factors is None else (column_codes, column_scales),
    )
