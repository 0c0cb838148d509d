"""Which implementation of the operators runs: one backend per device, chosen once.

`QFT_BACKEND=reference`, `cpu` or `triton` overrides the choice, and so does `use` in a program.
Another package adds a backend by an entry point of the group `qft_hf.backends` that refers to a
`Backend`.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, entry_points, version

import torch

logger = logging.getLogger(__name__)

REFERENCE = "reference"  # the operators' own bodies, in plain PyTorch; runs everywhere
ENTRY_POINTS = "qft_hf.backends"

MIN_TRITON = (3, 6)
MIN_CAPABILITY = (8, 0)  # has BF16 arithmetic; the kernels are compiled and checked for it


@dataclass(frozen=True)
class Backend:
    """Implementations of some operators for some kinds of devices.

    Attributes:
        name: The value of `QFT_BACKEND` that selects it.
        module: A module whose import registers the implementations, by `quantize.register(name)`.
        devices: Types of the devices that it is the default for, such as `"cuda"`.
        check: Raises if it cannot run on a device.
    """

    name: str
    module: str
    devices: tuple[str, ...]
    check: Callable[[torch.device], None]


def _check_cpu(device: torch.device) -> None:
    if device.type != "cpu":
        raise ValueError(
            f"QFT_BACKEND=cpu was asked for tensors on {device}. Unset QFT_BACKEND to let the "
            "device choose, or use QFT_BACKEND=reference, which runs everywhere."
        )


def _check_triton(device: torch.device) -> None:
    """Raise unless Triton kernels run on `device`: the slow reference is no silent fallback."""
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
            f"The Triton kernels are checked on NVIDIA GPUs only, and this PyTorch is not a CUDA "
            f"build: install a CUDA build of PyTorch, {instead}."
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        raise RuntimeError(
            f"The Triton kernels need a GPU of compute capability {MIN_CAPABILITY[0]}.0 or newer, "
            f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}: use a "
            f"newer GPU, {instead}."
        )


OWN = (
    Backend("cpu", f"{__package__}.cpu", ("cpu",), _check_cpu),
    Backend("triton", f"{__package__}.triton", ("cuda",), _check_triton),
)

_forced: list[str] = []  # names set by `use`; the last one is in force
_listeners: list[Callable[[], None]] = []  # called when a choice may have changed


@cache
def backends() -> dict[str, Backend]:
    """All backends by name, including those of other packages."""
    others = [entry.load() for entry in entry_points(group=ENTRY_POINTS)]
    return {backend.name: backend for backend in (*OWN, *others)}


@cache
def backend_for(device: torch.device) -> str:
    """Return the name of the backend for tensors on `device`, and register its implementations.

    Raises:
        ValueError: `QFT_BACKEND` names no backend, or one for another device.
        RuntimeError: The backend cannot run here: triton is missing or too old, the GPU is too old,
            or PyTorch is not a CUDA build.
    """
    asked = _forced[-1] if _forced else os.environ.get("QFT_BACKEND")
    name = asked or _default_for(device.type)
    if name == REFERENCE:
        return name
    if name not in backends():
        raise ValueError(
            f"QFT_BACKEND must be one of {', '.join([REFERENCE, *backends()])}, got {name!r}."
        )
    backend = backends()[name]
    backend.check(device)
    import_module(backend.module)
    logger.info("INT8 kernels on %s: %s backend", device, name)
    return name


def _default_for(device_type: str) -> str:
    for backend in reversed(backends().values()):  # those of other packages take precedence
        if device_type in backend.devices:
            return backend.name
    return REFERENCE


@contextmanager
def use(name: str) -> Iterator[None]:
    """Run the operators of a `with` block on the backend of this name, on every device."""
    _forced.append(name)
    forget()
    try:
        yield
    finally:
        _forced.pop()
        forget()


def forget() -> None:
    """Choose again at the next call; needed after a change of `QFT_BACKEND`."""
    backend_for.cache_clear()
    for listener in _listeners:
        listener()


def on_change(listener: Callable[[], None]) -> None:
    """Call `listener` whenever the choice of a backend may have changed."""
    _listeners.append(listener)
