"""Checks that all processes of one model have the same settings, parameters and values."""

from math import prod
from typing import Any

import torch
from torch import Tensor

from ..quant import QFTWeight
from .processes import Processes, bytes_of


def agree_on_settings(optimizer: Any) -> None:
    """Raise, on all processes, unless their optimizers have the same settings and parameters.

    Args:
        optimizer: A `QFTOptimizer` on several processes; they `begin` if they have not yet.

    Raises:
        ValueError: They differ. The text names the first differences.
    """
    processes: Processes = optimizer.processes
    if not processes.has_begun:
        processes.begin(next(optimizer.parameters()).device)
    processes.agree(
        _facts(optimizer),
        "Give all of them the same settings, and the same parameters in the same order.",
    )


def agree_on_values(optimizer: Any) -> None:
    """Raise, on all processes, unless their parameters have the same values.

    Raises:
        ValueError: They differ. The text names the first differences.
    """
    optimizer.processes.agree(
        {
            f"the checksum of parameter {number} of shape {tuple(p.shape)}": _checksum(p)
            for number, p in enumerate(optimizer.parameters())
        },
        "They would train different models. Load the same model on all processes, or copy that of "
        "process 0 to the others before the first step: optimizer.broadcast().",
    )


def _facts(optimizer: Any) -> dict[str, Any]:
    """Return settings, options of groups and forms of parameters, by name."""
    facts: dict[str, Any] = {"the optimizer": optimizer.description}
    facts |= {
        name: getattr(optimizer, name) for name in optimizer.SETTINGS if name != "is_accumulating"
    }
    for number, group in enumerate(optimizer.param_groups):
        options = {key: value for key, value in group.items() if key != "params"}
        facts |= {f"{key} of group {number}": value for key, value in options.items()}
    for number, parameter in enumerate(optimizer.parameters()):
        facts[f"parameter {number}"] = (
            f"{type(parameter).__name__} {tuple(parameter.shape)} {parameter.dtype}"
            + ("" if parameter.requires_grad else ", frozen")
        )
    return facts


def _checksum(parameter: Tensor) -> int:
    """Return a number that differs between weights made or loaded differently, on any machine.

    It combines the byte sum of each row with the row's position. Bytes that swap places within a
    row go unnoticed.
    """
    total = 0
    stored = parameter.stored.tensors if isinstance(parameter, QFTWeight) else (parameter,)
    for tensor in stored:
        n_rows, *others = tensor.shape or (1,)
        of_rows = bytes_of(tensor.detach().reshape(n_rows, prod(others)))
        sums = of_rows.sum(dim=1, dtype=torch.int64)
        places = torch.arange(1, len(sums) + 1, device=sums.device)
        total = 31 * total + int((sums * places).sum())
    return total
