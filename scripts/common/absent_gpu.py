"""A stand-in for a GPU that lets Triton run without one: it accepts launches and does nothing.

Triton's own compiler, driver and launcher run as on an H100, on top of a library that replaces
NVIDIA's libcuda and whose functions return at once. Kernels are really compiled and launches are
counted; the parameters of one kernel's launches can be recorded. Tensors are on the CPU and are
never touched.

Needs a C compiler, as Triton does on any GPU.
"""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget

CAPABILITY = 90  # of an H100
MULTIPROCESSORS = 132
COMPILERS = ("cc", "gcc", "clang")

# Functions that Triton's driver links to or looks up, other than those below. 0 is CUDA_SUCCESS.
SILENT = """cuInit cuGetErrorString cuCtxGetCurrent cuCtxSetCurrent cuCtxGetDevice cuCtxGetLimit
cuCtxSetLimit cuDeviceGet cuDeviceGetCount cuDevicePrimaryCtxRetain cuDriverGetVersion
cuModuleLoadData cuFuncSetAttribute cuFuncSetCacheConfig cuLaunchKernel
cuOccupancyMaxActiveClusters cuStreamIsCapturing cuStreamGetDevice cuTensorMapEncodeTiled
cuTensorMapEncodeIm2col""".split()

LIBCUDA = """
#include <string.h>
long launches, unloads;
static long functions;
void *recorded;  // the function whose first n_parameters are recorded, with their sizes in bytes
int n_parameters, sizes[64];
struct { unsigned dimensions[7]; void *stream, *function; char parameters[512]; } seen;

int cuLaunchKernelEx(char *config, void *function, void **parameters) {
    ++launches;
    memcpy(seen.dimensions, config, sizeof seen.dimensions);  // grid, block, shared memory
    memcpy(&seen.stream, config + 32, sizeof seen.stream);
    seen.function = function;
    memset(seen.parameters, 0, sizeof seen.parameters);
    if (!function || function != recorded) return 0;
    char *end = seen.parameters;
    for (int i = 0; i < n_parameters; end += sizes[i++]) memcpy(end, parameters[i], sizes[i]);
    return 0;
}
int cuModuleGetFunction(void **function) { *function = (void *)++functions; return 0; }
int cuModuleUnload() { ++unloads; return 0; }
int cuDeviceGetAttribute(int *value) { *value = 232448; return 0; }  // bytes of shared memory
int cuFuncGetAttribute(int *value) { *value = 1024; return 0; }  // threads of a block
int cuPointerGetAttribute(void **value, int which, void *pointer) { *value = pointer; return 0; }
""" + "\n".join(f"int {name}() {{ return 0; }}" for name in SILENT)


@dataclass(frozen=True)
class Launch:
    """Arguments that a launch passed to the driver.

    Attributes:
        dimensions: Grid and block along three axes, and bytes of shared memory.
        stream: The driver's handle of the stream.
        function: The driver's handle of the kernel, different for each kernel.
        parameters: The recorded parameters, concatenated: empty before `record` was called, zeros
            if the launch was of another function.
    """

    dimensions: tuple[int, ...]
    stream: int
    function: int
    parameters: bytes


class _Seen(ctypes.Structure):
    _fields_ = (
        ("dimensions", ctypes.c_uint * 7),
        ("stream", ctypes.c_uint64),
        ("function", ctypes.c_uint64),
        ("parameters", ctypes.c_char * 512),
    )


# The stand-in of this process: code that is linked to one of this name gets the first one loaded.
_library: ctypes.CDLL | None = None


class AbsentGPU:
    """A device that Triton treats as an H100; changes `TRITON_CACHE_DIR` and the active driver.

    A second one in the same process is the same device.

    Attributes:
        driver: Triton's driver; its `get_current_device` and `get_current_stream` return 0.
    """

    def __init__(self, folder: Path) -> None:
        """Compile the stand-in into `folder`, which is also the cache of kernels.

        Raises:
            RuntimeError: There is no C compiler.
        """
        compiler = c_compiler()
        if compiler is None:
            raise RuntimeError(f"None of {', '.join(COMPILERS)} is installed. Install one of them.")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cuda.c").write_text(LIBCUDA)
        options = "-shared -fPIC -w -O1 -Wl,-soname,libcuda.so.1 cuda.c -o libcuda.so.1"
        subprocess.run([compiler, *options.split()], cwd=folder, check=True)
        # A cache of its own: code that is linked to the stand-in must never run on a GPU.
        os.environ["TRITON_LIBCUDA_PATH"] = os.environ["TRITON_CACHE_DIR"] = str(folder)
        global _library
        if _library is None:
            _library = ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
        self._library = _library
        self._launches = ctypes.c_long.in_dll(self._library, "launches")
        self._unloads = ctypes.c_long.in_dll(self._library, "unloads")
        self._seen = _Seen.in_dll(self._library, "seen")
        self._n_recorded = 0

        # The import loads the library. Not `CudaDriver()`: it asks PyTorch, which may lack CUDA.
        from triton.backends.nvidia import driver as nvidia

        self.driver = object.__new__(nvidia.CudaDriver)
        self.driver.utils, self.driver.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
        self.driver.get_current_device = lambda: 0
        self.driver.get_current_stream = lambda device: 0
        self.driver.get_current_target = lambda: GPUTarget("cuda", CAPABILITY, 32)
        triton.runtime.driver.set_active(self.driver)

    @property
    def launches(self) -> int:
        """Number of kernels launched so far."""
        return self._launches.value

    @property
    def unloads(self) -> int:
        """Number of kernels unloaded so far."""
        return self._unloads.value

    def record(self, function: int, sizes: Sequence[int]) -> None:
        """Record the first parameters of each launch of `function`; `sizes` are in bytes."""
        ctypes.c_void_p.in_dll(self._library, "recorded").value = function
        ctypes.c_int.in_dll(self._library, "n_parameters").value = len(sizes)
        (ctypes.c_int * 64).in_dll(self._library, "sizes")[: len(sizes)] = sizes
        self._n_recorded = sum(sizes)

    @property
    def last(self) -> Launch:
        """The last launch."""
        place = ctypes.addressof(self._seen) + _Seen.parameters.offset
        return Launch(
            tuple(self._seen.dimensions),
            self._seen.stream,
            self._seen.function,
            ctypes.string_at(place, self._n_recorded),
        )


def c_compiler() -> str | None:
    """Return the command of a C compiler, or None if there is none."""
    found = (shutil.which(name) for name in (os.environ.get("CC", ""), *COMPILERS) if name)
    return next(filter(None, found), None)
