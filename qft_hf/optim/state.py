"""The optimizer's state of one parameter: which tensors, of which form."""

from typing import NamedTuple

import torch
from torch import Tensor


class StateTensor(NamedTuple):
    """The form of one tensor.

    Attributes:
        dtype: That of its elements; int8 has codes in [-127, 127].
        shape: That of the tensor.
        fill: What it is full of before the first step. Beside codes of 0 any scale does; 1 is easy
            to read.
        is_signed: Whether values may be negative.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    fill: float = 0.0
    is_signed: bool = True


StateFormat = dict[str, StateTensor]  # by name


def initial_state(wanted: StateFormat, device: torch.device) -> dict[str, Tensor]:
    """What each tensor is full of, and no step yet."""
    tensors = {
        name: torch.full(form.shape, form.fill, dtype=form.dtype, device=device)
        for name, form in wanted.items()
    }
    # On the host, which counts: asking a GPU for its number would mean to wait.
    return {"step": torch.zeros((), dtype=torch.int64), **tensors}


class StepCounter:
    """Counts the steps of one parameter in its state: the tensor `step`, int64, on the host.

    Through numpy, which shares the tensor's memory: that takes a tenth of an operator's time.
    """

    __slots__ = ("_array", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._array = tensor.numpy()

    def next(self) -> int:
        """Count a step and return its number."""
        number: int = self._array.item() + 1
        self._array.fill(number)
        return number
