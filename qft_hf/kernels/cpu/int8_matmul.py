"""INT8 products on a CPU. Twin: `kernels/reference/int8_matmul.py`."""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ..reference.int8_matmul import scaled

# A sum of 1024 products of codes stays below 2**24, where FP32 holds every integer: it is exact,
# whatever the order and however multiply and add are fused.
EXACT = 1024
TILE = 1024  # rows and columns of the result at a time: its operands are expanded to 4 MB each


@njit(nogil=True, cache=True)
def _accumulate(totals, sums):
    for i in range(totals.shape[0]):
        totals[i] += np.int32(sums[i])


def exact_sums(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of codes as FP32, rounded once, by FP32 products of at most 1024 codes."""
    summed = a.shape[1]
    sums = a[:, :EXACT].float() @ b[:EXACT].float()
    if summed <= EXACT:
        return sums
    totals = sums.int()
    for start in range(EXACT, summed, EXACT):
        part = slice(start, start + EXACT)
        torch.mm(a[:, part].float(), b[part].float(), out=sums)
        _accumulate(totals.view(-1).numpy(), sums.view(-1).numpy())
    return sums.copy_(totals)


def int8_matmul(
    a: Tensor,
    b: Tensor,
    a_scales: Tensor | None,
    b_scales: Tensor | None,
    *,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    # Where AVX512-VNNI lacks, PyTorch's own product is fifty times slower than one in FP32.
    if torch.cpu._is_vnni_supported():
        return scaled(torch._int_mm(a, b).float(), a_scales, b_scales, bias).to(dtype)
    out = torch.empty(a.shape[0], b.shape[1], dtype=dtype)
    for first_row in range(0, a.shape[0], TILE):
        rows = slice(first_row, first_row + TILE)
        for first_column in range(0, b.shape[1], TILE):
            columns = slice(first_column, first_column + TILE)
            out[rows, columns] = scaled(
                exact_sums(a[rows], b[:, columns]),
                None if a_scales is None else a_scales[rows],
                None if b_scales is None else b_scales[columns],
                None if bias is None else bias[columns],
            )
    return out
