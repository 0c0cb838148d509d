"""The gradient of an embedding table in numba. Twin: `kernels/embedding.py`."""

import numpy as np
from numba import njit
from torch import Tensor

from .. import embedding as operators
from ..values import Quantized
from .quantization import quantize_row
from .threads import for_each_row_range, run


@njit(nogil=True, error_model="numpy", cache=True)
def _sum_rows(codes, scales, gradient, order, used, ends, group_size, start, stop):
    columns = codes.shape[1]
    sums = np.empty(columns, np.float32)
    for i in range(start, stop):
        row = used[i]
        sums[:] = np.float32(0.0)
        for position in range(ends[i - 1] if i else 0, ends[i]):
            values = gradient[order[position]]
            for j in range(columns):
                sums[j] += values[j]
        quantize_row(sums, codes[row], scales[row], group_size)


@njit(nogil=True, cache=True)
def _sum(arguments, n_rows, n_ranges):
    for_each_row_range(_sum_rows, arguments, n_rows, n_ranges)


@operators.embedding_gradient_.register("cpu")
def embedding_gradient_(
    table: Quantized, ids: Tensor, gradient: Tensor, *, padding_idx: int | None
) -> None:
    n_rows, columns = table.codes.shape
    order, used, counts = operators.tokens_by_row(ids.long(), n_rows, padding_idx)
    tensors = (*table.tensors, gradient.float(), order, used, counts.cumsum(0))
    run(_sum, (*tensors, table.group_size or columns), len(used), columns)
