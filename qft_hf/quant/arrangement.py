"""How a parameter of any shape is stored as a matrix whose rows are outputs."""

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

from torch import Tensor


class Arrangement(NamedTuple):
    """How the values of a parameter are placed in the stored matrix `[rows, columns]`.

    The experts of a layer, `[E, R, C]`, are stored as a matrix of E*R rows. Some modules hold their
    weights transposed, `[C, R]` or `[E, C, R]`; the rows of their stored matrices are outputs too,
    so that scales, outliers and products have the same meaning for all weights. Autograd and the
    module see the parameter in its own shape.

    Attributes:
        shape: Shape of the parameter in its module; two or more dimensions.
        transposed: Whether its last two dimensions are (inputs, outputs), not (outputs, inputs).
    """

    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def n_matrices(self) -> int:
        """Number of matrices below each other: the experts, or 1."""
        return prod(self.shape[:-2])

    @property
    def rows(self) -> int:
        """Number of rows of one matrix: its outputs."""
        return self.shape[-1 if self.transposed else -2]

    @property
    def columns(self) -> int:
        """Number of columns of one matrix: its inputs."""
        return self.shape[-2 if self.transposed else -1]

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Rows and columns of the stored matrix."""
        return self.n_matrices * self.rows, self.columns

    @property
    def is_plain(self) -> bool:
        """Whether the parameter has the shape and order of the stored matrix."""
        return len(self.shape) == 2 and not self.transposed

    def matrix(self, values: Tensor) -> Tensor:
        """Return values in the shape of the parameter as the stored matrix; a view if possible."""
        if self.is_plain:
            return values
        if self.transposed:
            values = values.transpose(-1, -2)
        return values.reshape(self.matrix_shape)

    def parameter(self, matrix: Tensor) -> Tensor:
        """Return the matrix in the shape of the parameter; contiguous, and a view if possible."""
        if self.is_plain:
            return matrix
        values = matrix.view(*self.shape[:-2], self.rows, self.columns)
        return values.transpose(-1, -2).contiguous() if self.transposed else values

    def part(self, number: int) -> slice:
        """Return the rows of the stored matrix that hold matrix `number`."""
        return slice(number * self.rows, (number + 1) * self.rows)

    def parts(self, values: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield the rows and values of one matrix at a time; no copy if values are transposed."""
        for number, values_of_one in enumerate(values.reshape(-1, *self.shape[-2:])):
            yield self.part(number), values_of_one.t() if self.transposed else values_of_one
