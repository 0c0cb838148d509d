"""Output gradients as INT8 operands in plain PyTorch. This file is the specification."""

import torch
from torch import Tensor

from .philox import random_words, weight_uniform
from .quantize import QMAX, absmax_scale, quantize

ROWS, COLUMNS = 0, 1  # streams of the random numbers

CHUNK_ELEMENTS = 2**16  # rounded at a time: temporaries stay in the cache


def quantize_gradient(
    gradient: Tensor,
    row_factors: Tensor | None,
    column_factors: Tensor | None,
    *,
    stochastic: bool,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `qft_hf.kernels.quantize_gradient.quantize_gradient`; a form not made is empty."""
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


def _quantize_rows(
    values: Tensor, *, stochastic: bool, seed: int, stream: int
) -> tuple[Tensor, Tensor]:
    if not stochastic:
        return quantize(values, None)
    n_rows, columns = values.shape
    absmax = values.abs().amax(dim=1, keepdim=True)
    scales = absmax_scale(absmax)
    inverse = torch.ones_like(scales) / scales
    bits = absmax.view(torch.int32).flatten().long()
    codes = torch.empty_like(values, dtype=torch.int8)
    chunk = max(1, CHUNK_ELEMENTS // columns)
    for start in range(0, n_rows, chunk):
        rows = slice(start, min(start + chunk, n_rows))
        words = random_words(
            rows, columns, seed=seed, step=bits[rows], stream=stream, device=values.device
        )
        codes[rows] = stochastic_codes(values[rows] * inverse[rows], weight_uniform(words))
    return codes, scales


def stochastic_codes(values: Tensor, uniform: Tensor) -> Tensor:
    """Round `values`, in units of a code, up with the probability of their fraction.

    The fraction and the random number are added apart from the whole part: their FP32 sum has no
    rounding that could move a whole number.
    """
    whole = values.floor()
    up = (values - whole).add_(uniform) >= 1
    # A row that is not finite keeps its scale, which tells, and gets codes 0.
    return (whole + up).nan_to_num_(0.0).clamp_(-QMAX, QMAX).to(torch.int8)
