"""How a matrix is cut into quantization groups, and what that costs. Arithmetic: no torch."""

from collections.abc import Iterator
from math import ceil, prod
from typing import NamedTuple

CODE_BYTES = 1  # one INT8 code per element
FP32_BYTES = 4
FP64_BYTES = 8
SCALE_BYTES = FP32_BYTES  # of a group
OUTLIER_VALUE_BYTES = 4  # outliers are FP32, so that they train like float

# Gradients and momentum: columns per scale. Not configurable: 256 costs 1.6 % more than the codes,
# and finer groups changed no measured loss.
STATE_GROUP_SIZE = 256

# 4-bit momentum: columns per scale, and codes in a byte. Its few levels need finer groups.
NIBBLE_GROUP_SIZE = 64
NIBBLES = 2

# NF4 as bitsandbytes stores it, with double quantization (Dettmers et al. 2023, "QLoRA", section
# 3): a scale per 64 elements of the flattened matrix, a byte each; an FP32 scale per 256 of those,
# their FP32 offset, and two FP32 tables that say what codes and scales of a byte mean.
NF4_GROUP_SIZE = 64
NF4_SCALE_GROUP_SIZE = 256
NF4_TABLES = 16 + 256

MOMENTUM_BITS = (8, 4, 0)  # of one value; 0: none, as SGD has it

# Elements of a weight that are expanded to float at a time: 64 MB in FP32.
TILE_ELEMENTS = 2**24
# Rows of a tile are a multiple of this: products of slices that begin anywhere take up to half as
# long again.
TILE_ROWS = 64

INT16_COLUMNS = 2**15  # columns 0 .. 32767 fit a signed 16-bit index


class GroupLayout(NamedTuple):
    """Each row of a `[rows, columns]` matrix in groups of `group_size` columns.

    The last group of a row may be short; a group never crosses into the next row. `group_size`
    None means one group per row.
    """

    rows: int
    columns: int
    group_size: int | None

    @property
    def n_groups(self) -> int:
        """Groups, and so scales, in one row."""
        return 1 if self.group_size is None else ceil(self.columns / self.group_size)

    @property
    def stored_bytes(self) -> int:
        """Bytes at rest: codes plus scales."""
        return self.rows * (self.columns * CODE_BYTES + self.n_groups * SCALE_BYTES)


def row_tiles(rows: int, columns: int, *, at_most: int | None = None) -> Iterator[slice]:
    """Row ranges of like size that cover a matrix in order.

    Args:
        rows: Of the matrix.
        columns: Of the matrix.
        at_most: Rows of one range, beside the limit of `TILE_ELEMENTS` elements.
    """
    step = max(1, min(TILE_ELEMENTS // columns, at_most or rows))
    if step < rows:
        multiple = TILE_ROWS if step >= TILE_ROWS else 1
        n_tiles = -(-rows // (step - step % multiple))
        step = -(-rows // (n_tiles * multiple)) * multiple
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def matrices_of_a_tile(rows: int, columns: int) -> int:
    """How many matrices of this shape are expanded to float together: one at least."""
    return max(1, TILE_ELEMENTS // (rows * columns))


def matrix_tiles(n_matrices: int, rows: int, columns: int) -> Iterator[slice]:
    """Row ranges that cover matrices below each other: of several whole ones, or parts of one."""
    step = matrices_of_a_tile(rows, columns)
    for number in range(0, n_matrices, step):
        first = number * rows
        if step > 1:
            yield slice(first, min(number + step, n_matrices) * rows)
        else:
            for part in row_tiles(rows, columns):
                yield slice(first + part.start, first + part.stop)


def rows_of_process(n_rows: int, rank: int, n_processes: int) -> slice:
    """Rows of a matrix that a process owns: blocks of one size, the last ones short or empty."""
    block = ceil(n_rows / n_processes)
    return slice(min(rank * block, n_rows), min((rank + 1) * block, n_rows))


def nf4_bytes(n_elements: int) -> tuple[int, int]:
    """Bytes of the codes of a matrix in NF4, and of what they are read by: scales and tables."""
    n_scales = ceil(n_elements / NF4_GROUP_SIZE)
    floats = ceil(n_scales / NF4_SCALE_GROUP_SIZE) + 1 + NF4_TABLES
    return ceil(n_elements / NIBBLES), n_scales * CODE_BYTES + floats * SCALE_BYTES


def momentum_shapes(rows: int, columns: int, bits: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of the codes, a byte each, and of the FP32 scales of a momentum of 8 or 4 bits."""
    if bits == 4:
        layout = GroupLayout(rows, columns, NIBBLE_GROUP_SIZE)
        return (rows, ceil(columns / NIBBLES)), (rows, layout.n_groups)
    return (rows, columns), (rows, GroupLayout(rows, columns, STATE_GROUP_SIZE).n_groups)


def momentum_bytes(rows: int, columns: int, bits: int) -> int:
    """Bytes of the momentum of a matrix; none for 0 bits."""
    if bits == 0:
        return 0
    codes, scales = momentum_shapes(rows, columns, bits)
    return prod(codes) * CODE_BYTES + prod(scales) * SCALE_BYTES


def state_bits(optimizer: str, momentum_bits: int) -> tuple[int, ...]:
    """Bits of each value that an optimizer keeps for a quantized weight, by its name.

    Args:
        optimizer: As `TrainingArguments(optim=...)` names it.
        momentum_bits: As `momentum_bytes` takes it; of Lion, the others have no choice.
    """
    of_lion = (momentum_bits,) if momentum_bits else ()
    return {"qft_lion": of_lion, "qft_sgd": (), "qft_adamw": (8, 8)}[optimizer]


def outliers_per_row(columns: int, outlier_fraction: float) -> int:
    """Outliers kept in float in each row; any positive fraction keeps at least one."""
    return ceil(outlier_fraction * columns)


def outlier_index_bytes(columns: int) -> int:
    """Bytes of one column index: int16 where every column fits, else int32."""
    return 2 if columns <= INT16_COLUMNS else 4


def outlier_bytes(rows: int, columns: int, outlier_fraction: float) -> int:
    """Bytes of the outliers of a matrix: FP32 values and their column indices."""
    per_value = OUTLIER_VALUE_BYTES + outlier_index_bytes(columns)
    return rows * outliers_per_row(columns, outlier_fraction) * per_value
