"""An output gradient as INT8 operands: by rows for `grad_x`, by columns for `grad_w`."""

import torch
from torch import Tensor

from .checks import FLOATS, check_matrix, check_scales
from .groups import absmax_scale, empty_quantized, inverse, quantized, stochastic_codes
from .operators import operator
from .philox import random_words, weight_uniform
from .weight import row_chunks

ROWS, COLUMNS = 0, 1  # streams of the random numbers


@operator(fake=lambda *arguments, **_: empty_forms(*arguments))
def quantize_gradient(
    gradient: Tensor,
    row_factors: Tensor | None,
    column_factors: Tensor | None,
    *,
    stochastic: bool = True,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantize the gradient `g[N, R]` of `y = x W^T` to INT8 along its rows and along its columns.

        rows:    g[n, r] * row_factors[r]     ~ row_codes[n, r] * row_scales[n]
        columns: g[n, r] * column_factors[n]  ~ column_codes[r, n] * column_scales[r]

    With the scales of the INT8 weight as row factors, `grad_x` is the product of the row codes with
    the weight's codes. With the scales of the INT8 input as column factors, `grad_w` is the product
    of the column codes with the input's codes; see `int8_matmul`. The column form is returned
    transposed, `[R, N]`, so that it is contiguous along the dimension which that product sums over.

    Rounding is stochastic against the returned scale: the expectation of `code * scale` is the
    value, and a value that is a multiple of the scale does not change. The random numbers are those
    of `random_words`: Philox counts them by the element's position in its codes, with the bits of
    the row's largest magnitude as the step, and 0 (rows) or 1 (columns) as the stream. They are a
    function of the data, so that recomputation repeats them and nothing has to be saved.

    Args:
        gradient: `[N, R]`, contiguous; fp32, bf16 or fp16. Arithmetic is fp32.
        row_factors: fp32 `[R, 1]`, or None to leave out the row form.
        column_factors: fp32 `[N, 1]`, or None to leave out the column form.
        stochastic: False rounds to nearest, as `quantize` does.
        seed: Key of the random numbers, in [0, 2**63).

    Returns:
        row_codes: int8 `[N, R]` in [-127, 127].
        row_scales: fp32 `[N, 1]`: the largest magnitude over 127, but at least 1e-30. If a value of
            a row is NaN or infinite, its scale is not finite and its codes are 0.
        column_codes: int8 `[R, N]`.
        column_scales: fp32 `[R, 1]`. The codes and scales of a form that is left out are empty.

    Raises:
        TypeError: `gradient` is not one of the three float dtypes.
        ValueError: `gradient` is not a contiguous, non-empty matrix, factors do not fit it, or
            both are None.

    Source:
        Chen et al. 2020, "A Statistical Framework for Low-bitwidth Training of Deep Neural
        Networks" (arXiv:2010.14298): stochastic rounding with one scale per sample.
    """
    gradient = gradient.float()
    empty = (gradient.new_empty((0, 0), dtype=torch.int8), gradient.new_empty((0, 1)))
    rows = columns = empty
    if row_factors is not None:
        rows = _quantize_rows(
            gradient * row_factors.t(), stochastic=stochastic, seed=seed, stream=ROWS
        )
    if column_factors is not None:
        values = (gradient * column_factors).t().contiguous()
        columns = _quantize_rows(values, stochastic=stochastic, seed=seed, stream=COLUMNS)
    return (*rows, *columns)


@quantize_gradient.checks
def _(
    gradient: Tensor, row_factors: Tensor | None, column_factors: Tensor | None, **_: object
) -> None:
    check_matrix("gradient", gradient, FLOATS)
    tokens, outputs = gradient.shape
    if row_factors is None and column_factors is None:
        raise ValueError("quantize_gradient needs row factors, column factors, or both; got none.")
    if row_factors is not None:
        check_scales("row_factors", row_factors, (outputs, 1), gradient.device)
    if column_factors is not None:
        check_scales("column_factors", column_factors, (tokens, 1), gradient.device)


def empty_forms(
    gradient: Tensor, row_factors: Tensor | None, column_factors: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes and scales of both forms, undefined; empty if a form is left out."""
    tokens, outputs = gradient.shape
    of_rows = (tokens, outputs) if row_factors is not None else (0, 0)
    of_columns = (outputs, tokens) if column_factors is not None else (0, 0)
    device = gradient.device
    return (*empty_quantized(*of_rows, None, device), *empty_quantized(*of_columns, None, device))


def _quantize_rows(
    values: Tensor, *, stochastic: bool, seed: int, stream: int
) -> tuple[Tensor, Tensor]:
    if not stochastic:
        return quantized(values, None)
    columns = values.shape[1]
    absmax = values.abs().amax(dim=1, keepdim=True)
    scales = absmax_scale(absmax)
    per_scale = inverse(scales)
    bits = absmax.view(torch.int32).flatten().long()
    codes = torch.empty_like(values, dtype=torch.int8)
    for rows in row_chunks(codes):
        words = random_words(
            rows, columns, seed=seed, step=bits[rows], stream=stream, device=values.device
        )
        codes[rows] = stochastic_codes(values[rows] * per_scale[rows], weight_uniform(words))
    return codes, scales
