"""How a matrix is divided into quantization groups and tiles, and the bytes it takes. No torch."""

from collections.abc import Iterator
from math import ceil

CODE_BYTES = 1  # one INT8 code per element
FP32_BYTES = 4
FP64_BYTES = 8
SCALE_BYTES = FP32_BYTES  # per group
OUTLIER_VALUE_BYTES = 4  # outliers are FP32, so that they train like float

# Columns per scale of gradients and momentum. Not configurable: with 256 the scales add 1.6 % to
# the codes, and finer groups changed no measured loss.
STATE_GROUP_SIZE = 256

# Columns per scale and codes per byte of a 4-bit momentum. Its few levels need finer groups.
NIBBLE_GROUP_SIZE = 64
NIBBLES = 2

# NF4 as bitsandbytes stores it, with double quantization (Dettmers et al. 2023, "QLoRA", section
# 3): a one-byte scale per 64 elements of the flattened matrix; an FP32 scale per 256 of those
# scales, their FP32 offset, and two FP32 tables of the values of codes and of one-byte scales.
NF4_GROUP_SIZE = 64
NF4_SCALE_GROUP_SIZE = 256
NF4_TABLES = 16 + 256

# Elements of a weight that are expanded to float at a time, 64 MB in FP32.
TILE_ELEMENTS = 2**24
# The number of rows of a tile is a multiple of this: products of slices that start at any other row
# take up to 1.5 times as long.
TILE_ROWS = 64

INT16_COLUMNS = 2**15  # columns 0 .. 32767 fit a signed 16-bit index


def n_groups(columns: int, group_size: int | None) -> int:
    """Return the number of groups, and so of scales, in a row; None means one group per row.

    The last group of a row may be short; a group never crosses into the next row.
    """
    return 1 if group_size is None else ceil(columns / group_size)


def quantized_bytes(rows: int, columns: int, group_size: int | None) -> int:
    """Return the bytes of the codes and scales of a matrix."""
    return rows * (columns * CODE_BYTES + n_groups(columns, group_size) * SCALE_BYTES)


def row_tiles(rows: int, columns: int, *, at_most: int | None = None) -> Iterator[slice]:
    """Yield row ranges of similar size that cover a matrix in order.

    Args:
        rows: Rows of the matrix.
        columns: Columns of the matrix.
        at_most: Largest number of rows per range, in addition to the limit of `TILE_ELEMENTS`.
    """
    step = max(1, min(TILE_ELEMENTS // columns, at_most or rows))
    if step < rows:
        multiple = TILE_ROWS if step >= TILE_ROWS else 1
        n_tiles = -(-rows // (step - step % multiple))
        step = -(-rows // (n_tiles * multiple)) * multiple
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def matrices_of_a_tile(rows: int, columns: int) -> int:
    """Return how many matrices of this shape are expanded to float together, at least one."""
    return max(1, TILE_ELEMENTS // (rows * columns))


def matrix_tiles(n_matrices: int, rows: int, columns: int) -> Iterator[slice]:
    """Yield row ranges that cover matrices below each other: whole matrices, or parts of one."""
    step = matrices_of_a_tile(rows, columns)
    for number in range(0, n_matrices, step):
        first = number * rows
        if step > 1:
            yield slice(first, min(number + step, n_matrices) * rows)
        else:
            for part in row_tiles(rows, columns):
                yield slice(first + part.start, first + part.stop)


def rows_of_process(n_rows: int, rank: int, n_processes: int) -> slice:
    """Return the rows that a process owns: blocks of equal size, the last ones short or empty."""
    block = ceil(n_rows / n_processes)
    return slice(min(rank * block, n_rows), min((rank + 1) * block, n_rows))


def nf4_bytes(n_elements: int) -> tuple[int, int]:
    """Return the bytes of a matrix in NF4: those of its codes, and those of scales and tables."""
    n_scales = ceil(n_elements / NF4_GROUP_SIZE)
    floats = ceil(n_scales / NF4_SCALE_GROUP_SIZE) + 1 + NF4_TABLES
    return ceil(n_elements / NIBBLES), n_scales * CODE_BYTES + floats * SCALE_BYTES


def momentum_shapes(rows: int, columns: int, bits: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the shapes of the stored bytes and of the FP32 scales of an 8- or 4-bit momentum."""
    if bits == 4:
        return (rows, ceil(columns / NIBBLES)), (rows, n_groups(columns, NIBBLE_GROUP_SIZE))
    return (rows, columns), (rows, n_groups(columns, STATE_GROUP_SIZE))


def outliers_per_row(columns: int, outlier_fraction: float) -> int:
    """Return the number of outliers in each row; any positive fraction keeps at least one."""
    return ceil(outlier_fraction * columns)
