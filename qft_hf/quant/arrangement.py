"""How a parameter of any shape is a matrix whose rows are outputs: the one place that knows."""

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

from torch import Tensor


class Arrangement(NamedTuple):
    """How the values of a parameter lie in the matrix `[rows, columns]` that is stored.

    The experts of a layer, `[E, R, C]`, are a matrix of E*R rows. Some modules hold their weights
    transposed, `[C, R]` or `[E, C, R]`; their rows are stored as outputs too, so that scales,
    outliers and products mean the same for all. To autograd and to the module the parameter has its
    own shape.

    Attributes:
        shape: Of the parameter as its module has it; two dimensions or more.
        transposed: Whether its last two dimensions are inputs and outputs, not outputs and inputs.
    """

    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def n_matrices(self) -> int:
        """Matrices below each other: the experts, or 1."""
        return prod(self.shape[:-2])

    @property
    def rows(self) -> int:
        """Rows of one matrix: its outputs."""
        return self.shape[-1 if self.transposed else -2]

    @property
    def columns(self) -> int:
        """Columns of one matrix: its inputs."""
        return self.shape[-2 if self.transposed else -1]

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Rows and columns of what is stored."""
        return self.n_matrices * self.rows, self.columns

    @property
    def is_plain(self) -> bool:
        """Whether the parameter is that matrix."""
        return len(self.shape) == 2 and not self.transposed

    def matrix(self, values: Tensor) -> Tensor:
        """Values in the shape of the parameter as the matrix; a view if it can be."""
        if self.is_plain:
            return values
        if self.transposed:
            values = values.transpose(-1, -2)
        return values.reshape(self.matrix_shape)

    def parameter(self, matrix: Tensor) -> Tensor:
        """The matrix in the shape of the parameter; contiguous, a view if it can be."""
        if self.is_plain:
            return matrix
        values = matrix.view(*self.shape[:-2], self.rows, self.columns)
        return values.transpose(-1, -2).contiguous() if self.transposed else values

    def part(self, number: int) -> slice:
        """Rows of one of the matrices below each other."""
        return slice(number * self.rows, (number + 1) * self.rows)

    def parts(self, values: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """`matrix` one of them at a time: its rows, and it; for values that are not contiguous."""
        for number, values_of_one in enumerate(values.reshape(-1, *self.shape[-2:])):
            yield self.part(number), values_of_one.t() if self.transposed else values_of_one
