"""Predicts what each of several processes holds for its own rows, and what they exchange.

The figures are those of the first process, which owns the most rows; `qft_hf/optim/processes.py`
describes the exchange.
"""

from dataclasses import dataclass

from ..config import QuantizationSpec
from ..layout import (
    FP32_BYTES,
    FP64_BYTES,
    OUTLIER_VALUE_BYTES,
    STATE_GROUP_SIZE,
    outliers_per_row,
    quantized_bytes,
    rows_of_process,
)
from ..optim.processes import HEADER_BYTES

Shape = tuple[int, int]  # rows and columns of a weight


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of weights that are divided among processes."""

    n_processes: int
    spec: QuantizationSpec  # format of the weights

    def own(self, shape: Shape) -> Shape:
        """Return the shape of the part of a weight that the first process owns."""
        rows, columns = shape
        return rows_of_process(rows, 0, self.n_processes).stop, columns

    def gradient_bytes(self, shape: Shape) -> int:
        """Return the bytes of a weight's gradient that each process sends to the first one."""
        return HEADER_BYTES + quantized_bytes(*self.own(shape), STATE_GROUP_SIZE)

    def updated_bytes(self, shape: Shape) -> int:
        """Return the bytes of an updated weight that each process sends to all others."""
        rows, columns = self.own(shape)
        outliers = outliers_per_row(columns, self.spec.outlier_fraction) * OUTLIER_VALUE_BYTES
        return quantized_bytes(rows, columns, self.spec.group_size) + rows * outliers

    def in_transit_bytes(self, shapes: list[Shape], *, gradient: str) -> int:
        """Return the most bytes of rows being sent and received that are alive in backward.

        These are the gradient of one weight, and in release the updated rows of the weight before.

        Args:
            shapes: Shapes of all weights, in the order of the forward pass.
            gradient: `"stack"` or `"release"`.
        """
        if self.n_processes == 1:
            return 0
        copies = self.n_processes + 1 if gradient == "release" else 0
        before, most = 0, 0
        for shape in reversed(shapes):
            sent = quantized_bytes(*shape, STATE_GROUP_SIZE)
            sent += self.n_processes * HEADER_BYTES
            received = self.n_processes * self.gradient_bytes(shape)
            updated = copies * self.updated_bytes(shape)
            most = max(most, before + sent + received, received + updated)
            before = updated
        return most

    def received_bytes(self, shapes: list[Shape], floats: list[int]) -> int:
        """Return the bytes that the first process receives from others in a step.

        Args:
            shapes: Shapes of all weights.
            floats: Elements of each float parameter.
        """
        of_rows = sum(self.gradient_bytes(shape) + self.updated_bytes(shape) for shape in shapes)
        # An FP32 flag and gradient of each float parameter, and an FP64 square of each weight.
        reduced = FP32_BYTES * (len(floats) + sum(floats)) + FP64_BYTES * len(shapes)
        others = self.n_processes - 1
        return others * of_rows + 2 * others * reduced // self.n_processes  # reduced in a ring
