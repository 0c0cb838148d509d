"""Triton's driver of an emulated GPU: kernels are compiled for it, and their PTX is executed.

Triton's own path to a launch runs as on a device: specialization for arguments, constants, keys of
its caches. Only the last step, machine code and its launch, is replaced.
"""

import os
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import CUDABackend

from qft_hf.kernels import backend
from tests.ptx import emulator

SHARED_BYTES = {86: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}  # of one program
MAX_GRID = (2**31 - 1, 65_535, 65_535)

launched: dict[str, int] = {}  # launches by the name of the kernel
_kernels: dict[str, emulator.Kernel] = {}  # by their PTX


class Launcher:
    """Launches a kernel in place of Triton's C function."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.source = source
        self.types = list(source.signature.values())

    def __call__(self, *arguments: Any) -> None:
        grid, (ptx, shared) = arguments[:3], arguments[4]
        given = arguments[9:]  # after the stream, the function, metadata and hooks
        if any(not 1 <= size <= most for size, most in zip(grid, MAX_GRID, strict=True)):
            raise emulator.Fault(f"A grid of {grid} is more than a device launches.")
        kernel = _kernels.get(ptx)
        if kernel is None:
            kernel = _kernels[ptx] = emulator.Kernel(ptx, shared)
        launched[kernel.name] = launched.get(kernel.name, 0) + 1
        values, regions = {}, []
        parameters = (name for name, _ in kernel.params)
        names = self.source.fn.arg_names
        for name, type, argument in zip(names, self.types, given, strict=True):
            if type == "constexpr":
                continue
            parameter = next(parameters)
            if type.startswith("*"):
                values[parameter] = argument.data_ptr()
                regions.append((argument.data_ptr(), extent(argument), name))
                if name == "table_ptr":
                    regions += self.addressed(argument)
            elif type == "fp32":
                values[parameter] = int(np.array([argument], np.float32).view(np.uint32)[0])
            else:
                values[parameter] = int(argument)
        values |= dict.fromkeys(parameters, 0)  # Triton's scratch memory
        kernel.launch(grid, values, emulator.Memory(regions))

    def addressed(self, table: Tensor) -> Iterator[tuple[int, int, str]]:
        """Yield the memory whose addresses are in the table of `lion_step_floats_`."""
        names = self.source.fn.arg_names
        constants = {names[key[0]]: value for key, value in self.source.constants.items()}
        sizes = {"fp32": 4, "bf16": 2, "fp16": 2}
        of_parameter, of_gradient = (sizes[str(constants[x])] for x in ("PARAMETER", "GRADIENT"))
        for parameter, momentum, gradient, n, *_ in table.view(-1, 7).tolist():
            yield parameter, n * of_parameter, "parameter"
            yield gradient, n * of_gradient, "gradient"
            if constants["HAS_MOMENTUM"]:
                yield momentum, n * 4, "momentum"


def extent(tensor: Tensor) -> int:
    """Return the bytes from the first element to the end of the last."""
    if tensor.numel() == 0:
        return 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (sum((size - 1) * stride for size, stride in steps) + 1) * tensor.element_size()


class Utils:
    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": SHARED_BYTES[self.capability],
            "multiprocessor_count": 84,
            "warpSize": 32,
        }

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return None, (kernel.decode(), shared), 0, 0, 1024


class Driver(DriverBase):
    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.utils, self.launcher_cls = Utils(capability), Launcher

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self.capability, 10)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def map_python_to_cpp_type(self, type: str) -> str:
        return type

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


def install(capability: int) -> None:
    """Make Triton compile for this GPU, and let tensors on the CPU use its kernels."""
    os.environ["TRITON_CACHE_DIR"] = os.path.join(tempfile.gettempdir(), "qft_hf-ptx")
    CUDABackend.make_cubin = lambda self, source, *_: source.encode()
    triton.runtime.driver.set_active(Driver(capability))
    backend.OWN = tuple(
        backend.Backend(own.name, own.module, own.devices, lambda device: None)
        for own in backend.OWN
    )
    backend.backends.cache_clear()
    from qft_hf.kernels.triton import int8_product

    # The smallest tile is the fastest here.
    tiles = int8_product.OTHER_TILES = int8_product.TILES[divmod(capability, 10)]
    int8_product.choose_tile = lambda rows, columns, device, width=None: [
        tile for tile in tiles if width in (None, tile.columns)
    ][-1]
