"""Per-group maxima and products on `[rows, columns]`; the last group of a row may be short."""

import torch
from torch import Tensor


def group_parts(x: Tensor, group_size: int | None) -> list[Tensor]:
    """Views `[rows, groups, columns of a group]` of `x`: the full groups, then the short one."""
    columns = x.shape[1]
    size = min(group_size or columns, columns)
    full = columns - columns % size
    parts = [x[:, :full].unflatten(1, (-1, size))]
    if full < columns:
        parts.append(x[:, full:].unsqueeze(1))
    return parts


def group_absmax(x: Tensor, group_size: int | None) -> Tensor:
    """Largest magnitude in each group: `[rows, columns]` to `[rows, n_groups]`; NaN wins."""
    return torch.cat([part.abs().amax(dim=2) for part in group_parts(x, group_size)], dim=1)


def scale_groups_(x: Tensor, factors: Tensor, group_size: int | None) -> Tensor:
    """Multiply each group of `x` `[rows, columns]` by its entry of `factors` `[rows, n_groups]`."""
    start = 0
    for part in group_parts(x, group_size):
        stop = start + part.shape[1]
        part.mul_(factors[:, start:stop, None])
        start = stop
    return x


def spread_groups(values: Tensor, columns: int, group_size: int | None) -> Tensor:
    """Repeat each group's entry over its columns: `[rows, n_groups]` to `[rows, columns]`."""
    size = min(group_size or columns, columns)
    return values.repeat_interleave(size, dim=1)[:, :columns]
