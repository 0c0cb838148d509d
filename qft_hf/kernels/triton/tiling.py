"""The tiles in which programs iterate over rows: arithmetic, and its twin inside the kernels.

Most kernels that use these tiles give a whole row to one program: groups lie inside rows, so
programs share nothing. A row is cut into tiles of whole groups or, if groups are long, into tiles
of a part of one. A tile is `[GROUPS * UNITS, UNIT]`: a unit is a run of columns in one weight group
and in one momentum group, so a scale is loaded once per unit and not once per element.
"""

from functools import cache
from math import gcd
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .launch import Constants

MIN_UNIT = 2  # if a group is the whole row: 4-bit codes of two columns share a byte
MAX_UNIT = 256
MAX_TILE = 8192  # elements; more would spill registers
TILE_SIZES = (4096, 2048, 1024)
WARP = 32
# 16 INT8 codes are one 16-byte load, the widest there is. Shorter units load less at once and need
# more registers for scales, so they have small tiles on many threads.
WIDE_UNIT = 16


class Tiling(NamedTuple):
    """Sizes that a kernel is compiled for: one of its constexpr arguments."""

    COLUMNS: int  # of the matrix
    GROUP: int  # columns of a group, rounded up to whole units if one group is the row
    N_GROUPS: int  # in a row
    UNIT: int  # columns of a unit: a power of two that divides `GROUP`
    UNITS: int  # units of one group in a tile, a power of two; the last may be empty
    GROUPS: int  # groups in one tile, a power of two; the last may be empty
    GROUP_TILES: int  # tiles that cover all groups
    UNIT_TILES: int  # tiles that cover one group

    @property
    def n_warps(self) -> int:
        """Warps of one program."""
        elements = self.GROUPS * self.UNITS * self.UNIT
        per_thread = 16 if self.UNIT >= WIDE_UNIT else min(8, self.UNIT)
        return min(16, max(1, elements // (per_thread * WARP)))


@cache
def tiling(columns: int, group_size: int | None, other_group_size: int = 0) -> Tiling:
    """Cut rows of `columns` columns into groups; no unit crosses a group edge of either size."""
    if group_size is None or group_size >= columns:
        divisor = other_group_size or MAX_UNIT
        unit = min(divisor & -divisor, MAX_UNIT, max(MIN_UNIT, _power_of_two(columns)))
        group = triton.cdiv(columns, unit) * unit
    else:
        divisor = gcd(group_size, other_group_size)
        unit = min(divisor & -divisor, MAX_UNIT)
        group = group_size
    n_units, n_groups = group // unit, triton.cdiv(columns, group)

    sizes = TILE_SIZES if unit >= WIDE_UNIT else TILE_SIZES[-1:]
    padded = _power_of_two(n_units)
    elements = padded * unit
    # A group that would fill little of its tile is cheaper in two passes over smaller tiles.
    if elements <= TILE_SIZES[-1] or (
        unit >= WIDE_UNIT and elements <= MAX_TILE and 4 * group >= 3 * elements
    ):
        groups = _least_waste(n_groups, [max(1, size // elements) for size in sizes])
        return Tiling(
            columns, group, n_groups, unit, padded, groups, triton.cdiv(n_groups, groups), 1
        )
    units = _least_waste(n_units, [size // unit for size in sizes])
    return Tiling(columns, group, n_groups, unit, units, 1, n_groups, triton.cdiv(n_units, units))


@cache
def row_constants(columns: int, group_size: int | None, **others: Any) -> Constants:
    """Constants of a kernel that iterates over rows in this tiling; `others` are added to them."""
    cut = tiling(columns, group_size)
    return Constants(**others, TILING=cut, num_warps=cut.n_warps)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _least_waste(n: int, sizes: list[int]) -> int:
    """Limit `sizes` to what `n` needs, and return the one whose multiple exceeds `n` least."""
    sizes = [min(size, _power_of_two(n)) for size in sizes]
    return min(sizes, key=lambda size: (triton.cdiv(n, size) * size, -size))


@triton.jit
def tile_columns(first_group, first_unit, TILING: tl.constexpr):
    """Return the first column of each unit and whether it exists, then the same of all columns."""
    unit = tl.arange(0, TILING.GROUPS * TILING.UNITS)
    place = (first_unit + unit % TILING.UNITS) * TILING.UNIT
    start = (first_group + unit // TILING.UNITS) * TILING.GROUP + place
    exists = (place < TILING.GROUP) & (start < TILING.COLUMNS)
    column = start[:, None] + tl.arange(0, TILING.UNIT)[None, :]
    return start, exists, column, exists[:, None] & (column < TILING.COLUMNS)


@triton.jit
def group_max(x, TILING: tl.constexpr):
    """Maximum of each group: `[GROUPS * UNITS, UNIT]` to `[GROUPS]`."""
    return tl.max(tl.reshape(tl.max(x, axis=1), TILING.GROUPS, TILING.UNITS), axis=1)


@triton.jit
def group_sum_of_squares(codes, TILING: tl.constexpr):
    """Sum of squared int32 codes of each group: `[GROUPS * UNITS, UNIT]` to int64 `[GROUPS]`."""
    of_units = tl.reshape(tl.sum(codes * codes, axis=1), TILING.GROUPS, TILING.UNITS)
    return tl.sum(of_units.to(tl.int64), axis=1)


@triton.jit
def over_units(x, TILING: tl.constexpr):
    """Repeat the entry of each group for its units: `[GROUPS]` to `[GROUPS * UNITS, 1]`."""
    units = tl.broadcast_to(x[:, None], TILING.GROUPS, TILING.UNITS)
    return tl.reshape(units, TILING.GROUPS * TILING.UNITS)[:, None]
