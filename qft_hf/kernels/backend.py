"""Which implementation of the operators runs: one per device, chosen once.

A backend is a package with the functions of `kernels.reference`: same names, same arguments, same
bits. `QFT_BACKEND=reference` or `QFT_BACKEND=cpu` overrides the choice.
"""

import logging
import os
from functools import cache
from importlib import import_module
from types import ModuleType

import torch

logger = logging.getLogger(__name__)

BACKENDS = ("reference", "cpu")
DEVICE_BACKENDS = {"cpu": "cpu"}  # any other device runs the reference


@cache
def backend_for(device: torch.device) -> ModuleType:
    """The backend package for tensors on `device`.

    Raises:
        ValueError: `QFT_BACKEND` names no backend, or one that cannot run on `device`.
    """
    name = os.environ.get("QFT_BACKEND") or DEVICE_BACKENDS.get(device.type, "reference")
    if name not in BACKENDS:
        raise ValueError(f"QFT_BACKEND must be one of {', '.join(BACKENDS)}, got {name!r}.")
    if name == "cpu" and device.type != "cpu":
        raise ValueError(
            f"QFT_BACKEND=cpu was asked for tensors on {device}. Unset QFT_BACKEND to let the "
            "device choose, or use QFT_BACKEND=reference, which runs everywhere."
        )
    logger.info("INT8 kernels on %s: %s backend", device, name)
    return import_module(f"{__package__}.{name}")
