"""The optimizer's state of one parameter: its tensors and their forms."""

from typing import NamedTuple

import torch
from torch import Tensor


class StateTensor(NamedTuple):
    """The form of one tensor."""

    dtype: torch.dtype  # of the elements; int8 codes are in [-127, 127]
    shape: tuple[int, ...]
    # Value of all elements before the first step. With codes of 0 any scale is correct; 1 is easy
    # to read.
    fill: float = 0.0
    is_signed: bool = True  # whether values may be negative


StateFormat = dict[str, StateTensor]  # by name


def initial_state(wanted: StateFormat, device: torch.device) -> dict[str, Tensor]:
    """Return each tensor filled with its initial value, and a step number of 0."""
    tensors = {
        name: torch.full(form.shape, form.fill, dtype=form.dtype, device=device)
        for name, form in wanted.items()
    }
    # On the host, which counts steps: reading the number from a GPU would wait for the GPU.
    return {"step": torch.zeros((), dtype=torch.int64, device="cpu"), **tensors}
