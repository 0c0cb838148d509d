"""Which implementation of the operators runs: one per device, chosen once.

A backend is a package with the functions of `kernels.reference`: same names, same arguments, same
bits; `kernels.dequantized_matmul` says what holds for it. `QFT_BACKEND=reference`, `cpu` or
`triton` overrides the choice.
"""

import logging
import os
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

import torch

logger = logging.getLogger(__name__)

BACKENDS = ("reference", "cpu", "triton")
DEVICE_BACKENDS = {"cpu": "cpu", "cuda": "triton"}  # any other device runs the reference

MIN_TRITON = (3, 6)
MIN_CAPABILITY = (8, 0)  # BF16 arithmetic; what the kernels are compiled and checked for


@cache
def backend_for(device: torch.device) -> ModuleType:
    """The backend package for tensors on `device`.

    Raises:
        ValueError: `QFT_BACKEND` names no backend, or one for another device.
        RuntimeError: The backend cannot run here: triton is missing or too old, or the GPU is.
    """
    name = os.environ.get("QFT_BACKEND") or DEVICE_BACKENDS.get(device.type, "reference")
    if name not in BACKENDS:
        raise ValueError(f"QFT_BACKEND must be one of {', '.join(BACKENDS)}, got {name!r}.")
    if name == "cpu" and device.type != "cpu":
        raise ValueError(
            f"QFT_BACKEND=cpu was asked for tensors on {device}. Unset QFT_BACKEND to let the "
            "device choose, or use QFT_BACKEND=reference, which runs everywhere."
        )
    if name == "triton":
        _check_triton(device)
    logger.info("INT8 kernels on %s: %s backend", device, name)
    return import_module(f"{__package__}.{name}")


def _check_triton(device: torch.device) -> None:
    """Raise unless Triton kernels run on `device`; the slow reference is never a silent resort."""
    instead = "or set QFT_BACKEND=reference, which is many times slower and gives the same bits"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        raise ValueError(
            f"QFT_BACKEND=triton was asked for tensors on {device}; Triton kernels need a CUDA "
            "device. Unset QFT_BACKEND to let the device choose."
        )
    try:
        found = version("triton")
    except PackageNotFoundError:
        found = "none"
    if found == "none" or tuple(int(part) for part in found.split(".")[:2]) < MIN_TRITON:
        wanted = ".".join(map(str, MIN_TRITON))
        raise RuntimeError(
            f"The INT8 kernels on {device} need triton {wanted} or newer, found {found}: "
            f"pip install 'triton>={wanted}', {instead}."
        )
    if interpreted:
        return
    if torch.version.cuda is None:
        raise RuntimeError(
            f"The Triton kernels are checked on NVIDIA GPUs only, and this PyTorch is built for "
            f"another kind: install a CUDA build of PyTorch, {instead}."
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        raise RuntimeError(
            f"The Triton kernels need a GPU of compute capability {MIN_CAPABILITY[0]}.0 or newer, "
            f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}: use a "
            f"newer GPU, {instead}."
        )
