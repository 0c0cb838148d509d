"""4-bit codes on uneven levels, two in a byte, in plain PyTorch. This file is the specification.

Code n in [-7, 7] stands for `n * (|n| + 3)` units of its group's scale: 0, 4, 10, 18, 28, 40, 54
and 70, closest together where most values are. Byte k of a row holds column 2k in its low half and
column 2k + 1 in its high half; the last of an odd number of columns has a byte of its own.
"""

import torch
from torch import Tensor

from ..layout import NIBBLE_GROUP_SIZE
from .groups import absmax_scale, group_absmax, inverse, scale_groups_

NIBBLE_MAX = 7  # the largest code
SLOPE = 3  # code n stands for n * (|n| + SLOPE) units
TOP = NIBBLE_MAX * (NIBBLE_MAX + SLOPE)  # units of the largest code


def load_nibbles(packed: Tensor, scales: Tensor, columns: int) -> Tensor:
    """Expand `packed` uint8 `[rows, ceil(columns / 2)]` to fp32 `[rows, columns]`."""
    halves = torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)[:, :columns]
    codes = (halves.to(torch.int32) ^ 8) - 8  # the sign of four bits
    units = codes * (codes.abs() + SLOPE)
    return scale_groups_(units.float(), scales, NIBBLE_GROUP_SIZE)


def round_to_nibbles(values: Tensor, words: Tensor | None) -> tuple[Tensor, Tensor]:
    """Round to one of the two neighboring levels, the nearer with the higher probability.

    Args:
        values: fp32 `[rows, columns]`, finite.
        words: Random words as int64 `[rows, ceil(columns / 2)]`, one for both values of a byte.
            None rounds to the nearest level.

    Returns:
        packed: uint8 `[rows, ceil(columns / 2)]`.
        scales: fp32 `[rows, n_groups]`; the largest magnitude of a group has the largest code. At
            least `TINY`, the scale of a group of zeros.
    """
    columns = values.shape[1]
    scales = absmax_scale(group_absmax(values, NIBBLE_GROUP_SIZE), TOP)
    units = scale_groups_(values.abs(), inverse(scales), NIBBLE_GROUP_SIZE)
    # The level below, from n * (n + 3) = units. If rounding moves the square root across a level,
    # the result does not change: `uniform` is further from 0 and 1 than that error.
    lower = (units + SLOPE**2 / 4).sqrt_().sub_(SLOPE / 2).floor_()
    width = 2 * lower + (1 + SLOPE)
    uniform = 0.5 if words is None else _uniforms(words)[:, :columns]
    codes = lower + (uniform * width < units - lower * (lower + SLOPE))
    codes = torch.where(values < 0, -codes, codes).clamp_(-NIBBLE_MAX, NIBBLE_MAX)
    codes = torch.nn.functional.pad(codes, (0, columns % 2)).to(torch.int32) & 15
    return (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8), scales


def _uniforms(words: Tensor) -> Tensor:
    """Uniforms in (0, 1): a word's low 16 bits for an even column, its high ones for the next."""
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=2).flatten(1)
    return (halves.float() + 0.5) * 2.0**-16
