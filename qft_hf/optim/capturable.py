"""Backward passes and steps of an optimizer in a form that CUDA graphs can replay.

A graph replays kernels with the numbers and addresses that they had when it was captured, and none
of the Python code between them. So numbers that differ from step to step are in device memory, no
pass waits for a value, and the host's part of the work is done again after each replay.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..kernels.values import N_LIVE
from ..quant import QFTWeight
from .base import QFTOptimizer
from .flow import PassResult, RunPart, run_directly


class CapturableSteps:
    """Makes the steps of an optimizer capturable, from now on until `end`.

    Kernels read the numbers of a step from `live`, so no graph replays those of another step.

    Args:
        optimizer: Modified. All its parameters are on one device.
        run_part: Runs the parts of a step that wait for no value, or replays a graph of them.
    """

    def __init__(self, optimizer: QFTOptimizer, run_part: RunPart) -> None:
        self.optimizer = optimizer
        self._numbers: Tensor | None = None
        parameters = list(optimizer.parameters())
        if optimizer.reads_live and parameters:
            # Rows of 64 bytes: each begins at an address that is aligned for kernels.
            shape = len(parameters), N_LIVE
            self._numbers = torch.zeros(shape, dtype=torch.float64, device=parameters[0].device)
        optimizer.write_numbers = self.write_numbers
        optimizer.flow.run_part = run_part

    def end(self) -> None:
        """Let the optimizer step without graphs again."""
        self.optimizer.write_numbers = self.optimizer.live = None
        self.optimizer.flow.run_part = run_directly

    def write_numbers(self) -> None:
        """Write the numbers of the next step where captured kernels read them, in one transfer.

        Must be called before each pass; a step calls it itself.

        Raises:
            TypeError: A float parameter has become neither fp32 nor bf16.
            ValueError: An option of a group is out of its range.
        """
        optimizer = self.optimizer
        optimizer.check_groups()
        if self._numbers is not None:
            rows = [
                optimizer.numbers(group, self._n_steps(parameter) + 1)
                for group in optimizer.param_groups
                for parameter in group["params"]
            ]
            pinned = self._numbers.is_cuda  # so the host does not wait for the previous step
            numbers = torch.tensor(rows, dtype=torch.float64, device="cpu", pin_memory=pinned)
            self._numbers[:, : len(rows[0])].copy_(numbers, non_blocking=True)
        optimizer.live = self._numbers

    def _n_steps(self, parameter: Parameter) -> int:
        state = self.optimizer.state.get(parameter)
        return int(state["step"]) if state else 0

    def repeated(self) -> list[Any]:
        """Return what a pass captured now would repeat: addresses and numbers.

        If one of them changes, the graph is invalid. Tensors that live only during a pass are
        not included.
        """
        optimizer = self.optimizer
        repeated: list[Any] = [
            (p.stored.codes if isinstance(p, QFTWeight) else p).data_ptr()
            for p in optimizer.parameters()
        ]
        repeated += [
            tensor.data_ptr()
            for state in optimizer.state.values()
            for name, tensor in state.items()
            if name != "step"
        ]
        norm = optimizer.flow.previous_norm
        repeated.append(None if norm is None else norm.data_ptr())
        changing = ("params", "lr", "weight_decay")
        for group in optimizer.param_groups:
            repeated += [value for name, value in group.items() if name not in changing]
        return repeated

    def after_replay(self, result: PassResult) -> None:
        """Bring the host to its state after that pass, which the device has replayed."""
        self.optimizer.flow.after_replay(result)
        self.optimizer.updated(result.updated)
