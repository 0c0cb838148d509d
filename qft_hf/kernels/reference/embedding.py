"""The gradient of an embedding table in plain PyTorch. This file is the specification."""

import torch
from torch import Tensor

from .quantize import quantize


def tokens_by_row(ids: Tensor, n_rows: int, padding_idx: int | None) -> tuple[Tensor, ...]:
    """Tokens in the order of their rows, and of their positions within a row.

    Returns:
        order: int64: positions in `ids` of all tokens that count.
        used: The rows that they looked up, ascending.
        counts: int64: how many looked up each; its tokens are neighbours in `order`.
    """
    counted = (ids >= 0) & (ids < n_rows)
    if padding_idx is not None:
        counted &= ids != padding_idx
    order = ids.argsort(stable=True)
    order = order[counted[order]]
    used, counts = ids[order].unique_consecutive(return_counts=True)
    return order, used, counts


def embedding_gradient_(
    codes: Tensor,
    scales: Tensor,
    ids: Tensor,
    gradient: Tensor,
    *,
    group_size: int,
    padding_idx: int | None,
) -> None:
    """See `qft_hf.kernels.embedding.embedding_gradient_`."""
    order, used, counts = tokens_by_row(ids, codes.shape[0], padding_idx)
    if not len(used):
        return
    first = counts.cumsum(0) - counts
    sums = torch.zeros(len(used), codes.shape[1], dtype=torch.float32, device=codes.device)
    for rank in range(int(counts.max())):  # the first token of each row, then the second, ...
        has = (counts > rank).nonzero().flatten()
        sums[has] += gradient[order[first[has] + rank]].float()
    codes[used], scales[used] = quantize(sums, group_size)
