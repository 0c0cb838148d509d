"""A launch from our own table passes the driver exactly what Triton's JIT would, without a GPU.

Needs a process without Triton's interpreter, which is the ordinary test run.
"""

import copy
import gc
import importlib
import os
import pickle
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: Linux only")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled under TRITON_INTERPRET=1", allow_module_level=True)

import triton
from triton import knobs

from qft_hf.kernels.triton.launch import Constants, Launcher, Plan, needs_triton_launch
from qft_hf.kernels.triton.tiling import tiling

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
from common import absent_gpu

if absent_gpu.c_compiler() is None:
    pytest.skip("no C compiler, of which Triton needs one", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("NVIDIA's libcuda is loaded and records nothing", allow_module_level=True)

int8_product, lion, floats, quantization = (
    importlib.import_module(f"qft_hf.kernels.triton.{name}")
    for name in ("int8_product", "lion", "floats", "quantization")
)

ROWS, COLUMNS, N_OUTLIERS = 6, 100, 3  # with 100 columns, rows of codes differ in alignment
FORMATS = {"i32": "i", "i64": "q", "u64": "Q", "fp32": "f"}  # as Python's struct names them


@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TRITON_CACHE_DIR", "TRITON_LIBCUDA_PATH"):
            patch.setenv(name, "restored at the end")
        yield absent_gpu.AbsentGPU(tmp_path_factory.mktemp("triton"))
        # Kernels are unloaded by the driver that loaded them.
        for kernel in (*KERNELS.values(), _small_kernel):
            kernel.device_caches.clear()
        gc.collect()
        triton.runtime.driver.set_active(None)


def dequantize_case(first_row=0, dtype=torch.bfloat16, outliers=True):
    """Expand all rows from `first_row` on."""
    tiles = tiling(COLUMNS, None)
    rows = slice(first_row, None)
    codes, scales = torch.ones(ROWS, COLUMNS, dtype=torch.int8)[rows], torch.ones(ROWS, 1)[rows]
    values = torch.ones(ROWS, N_OUTLIERS)[rows] if outliers else scales
    columns = torch.ones(ROWS, N_OUTLIERS, dtype=torch.int16)[rows] if outliers else scales
    x = torch.empty(len(codes), COLUMNS, dtype=dtype)
    constants = {
        "GATHER": False,
        "EACH": 1,
        "N_OUTLIERS": N_OUTLIERS if outliers else 0,
        "OUTLIER_TILE": 4 if outliers else 1,
        "TILING": tiles,
        "num_warps": tiles.n_warps,
        "enable_fp_fusion": False,
    }
    arguments = (codes, scales, values, columns, scales, x, len(codes))
    return quantization._dequantize_kernel, (len(codes),), constants, arguments


def quantize_case(zero_columns=False, first_row=0):
    tiles = tiling(COLUMNS, 64)
    x = torch.ones(ROWS, COLUMNS)[first_row:]
    mask = torch.zeros(COLUMNS, dtype=torch.int8) if zero_columns else None
    codes, scales = torch.empty(len(x), COLUMNS, dtype=torch.int8), torch.empty(len(x), 2)
    taken = {"N_TAKEN": 2 if zero_columns else 0, "TAKEN_TILE": 2 if zero_columns else 1}
    columns = torch.tensor([1, 9]) if zero_columns else None
    values = torch.empty(2, len(x)) if zero_columns else None
    constants = taken | {"TILING": tiles, "num_warps": tiles.n_warps, "enable_fp_fusion": False}
    arguments = (x, mask, columns, codes, scales, values, len(x))
    return quantization._quantize_kernel, (len(x),), constants, arguments


def lion_case(gradient=torch.int8, factor=False, seed=1, step=1, first_row=0, live=False):
    constants = lion.lion_constants(COLUMNS, N_OUTLIERS, None, 256, 8, stochastic=True).values
    rows = slice(first_row, None)
    codes, momentum, other = (torch.ones(ROWS, COLUMNS, dtype=torch.int8)[rows] for _ in range(3))
    scales, momentum_scales, gradient_scales = (torch.ones(ROWS, 1)[rows] for _ in range(3))
    arguments = (
        codes, scales, torch.ones(ROWS, N_OUTLIERS)[rows],
        torch.ones(ROWS, N_OUTLIERS, dtype=torch.int16)[rows], momentum, momentum_scales,
        other.to(gradient), gradient_scales, torch.ones(ROWS, 1, dtype=torch.float64)[rows],
        torch.ones(1) if factor else None, torch.ones(8, dtype=torch.float64) if live else None,
        1e-3, 1e-4, 0.9, 1 - 0.9, 0.99, 1 - 0.99, -1.0, seed, step, 3, first_row,
    )  # fmt: skip
    return lion._lion_kernel, (len(codes),), constants, arguments


def floats_case(dtype=torch.bfloat16, seed=1, live=False):
    buffer = torch.ones(9, dtype=torch.int64)  # one row of the table, and two programs
    constants = {
        "PARAMETER": floats.TRITON_DTYPES[dtype],
        "GRADIENT": floats.TRITON_DTYPES[torch.float32],
        "HAS_MOMENTUM": True,
        "STOCHASTIC": dtype == torch.bfloat16,
        "BLOCK": floats.BLOCK,
        "num_warps": floats.N_WARPS,
        "enable_fp_fusion": False,
    }
    numbers = (1e-3, 1e-4, 0.9, 1 - 0.9, 0.99, 1 - 0.99, 1.0, seed)
    memory = torch.ones(2, 8, dtype=torch.float64) if live else None
    arguments = (buffer[:7], buffer[7:], memory, *numbers)
    return floats._lion_floats_kernel, (2,), constants, arguments


def row_case(n=700, step=0):
    """A row of the table of float parameters, and its program."""
    buffer = torch.ones(9, dtype=torch.int64)
    address = buffer.data_ptr()
    arguments = (buffer[:7], buffer[7:], 0, 1, address, address, address, n, step, 3, 0)
    constants = {
        "BLOCK": floats.BLOCK,
        "num_warps": floats.N_WARPS,
        "enable_fp_fusion": False,
    }
    return floats._row_kernel, (1,), constants, arguments


def matmul_case(
    rows=1, columns=1, summed=32, scales="ab", bias=False, given=False, requantizes=False
):
    a = torch.ones(rows, summed, dtype=torch.int8)
    b = torch.ones(columns, summed, dtype=torch.int8)
    tile = int8_product.OTHER_TILES[2]
    constants = {
        "N_OVERWRITTEN": 1 if given else 0,
        "TILE": tile,
        "num_warps": tile.n_warps,
        "num_stages": tile.n_stages,
        "enable_fp_fusion": False,
    }
    arguments = (
        a, b,
        torch.ones(rows) if "a" in scales else None,
        torch.ones(columns) if "b" in scales else None,
        torch.ones(columns) if bias else None,
        torch.tensor([3]) if given else None, torch.ones(rows, 1) if given else None,
        torch.empty(rows, columns, dtype=torch.int8 if requantizes else torch.bfloat16),
        torch.empty(rows, 1) if requantizes else None,
        rows, columns, summed, a.stride(0), b.stride(0), *((1, 1) if given else (0, 0)),
    )  # fmt: skip
    return int8_product._int8_matmul_kernel, (1,), constants, arguments


def copy_case(rows=16, columns=17, strides=(17, 1)):
    x, out = torch.ones(rows * columns, dtype=torch.int8), torch.empty(rows, 32, dtype=torch.int8)
    constants = {
        "TILE": int8_product.COPY_TILE,
        "num_warps": int8_product.COPY_WARPS,
        "enable_fp_fusion": False,
    }
    return int8_product._copy_kernel, (1, 2), constants, (x, out, rows, columns, *strides, 32)


CASES = {
    "dequantize": dequantize_case(),
    "dequantize, other rows": dequantize_case(first_row=1),
    "dequantize, fp32": dequantize_case(dtype=torch.float32),
    "dequantize, no outliers": dequantize_case(outliers=False),
    "quantize": quantize_case(),
    "quantize, some columns": quantize_case(zero_columns=True, first_row=3),
    "lion": lion_case(),
    "lion, later": lion_case(step=2),
    "lion, other rows": lion_case(first_row=1),
    "lion, large seed": lion_case(seed=2**40),
    "lion, floats": lion_case(torch.bfloat16),
    "lion, floats and factor": lion_case(torch.bfloat16, factor=True),
    "lion, floats and numbers in memory": lion_case(torch.bfloat16, live=True),
    "lion, fp32 and factor": lion_case(torch.float32, factor=True),
    "floats": floats_case(),
    "floats, fp32": floats_case(torch.float32),
    "floats, numbers in memory": floats_case(live=True),
    "row of floats": row_case(),
    "row of floats, large": row_case(n=2**31),
    "floats, largest seed of 32 bits": floats_case(seed=2**31 - 1),
    "floats, smallest seed of 64 bits": floats_case(seed=2**31),
    "floats, seed of 64 bits without a sign": floats_case(seed=2**63),
    "matmul, one by one": matmul_case(),
    "matmul": matmul_case(rows=5, columns=32),
    "matmul, odd": matmul_case(rows=16, columns=33),
    "matmul, no scales, bias": matmul_case(columns=32, scales="", bias=True),
    "matmul, scales of rows": matmul_case(columns=32, scales="a"),
    "matmul, scales of columns": matmul_case(columns=32, scales="b"),
    "matmul, given columns": matmul_case(columns=32, scales="a", given=True),
    "matmul, requantized": matmul_case(columns=32, scales="a", requantizes=True),
    "copy": copy_case(),
    "copy, turned": copy_case(strides=(1, 16)),
    "copy, one row": copy_case(rows=1),
    "copy, a row more": copy_case(rows=17),
    "copy, long strides": copy_case(strides=(2**31, 2**31 + 16)),
}
KERNELS = {kernel.__name__: kernel for kernel, _, _, _ in CASES.values()}

OPEN = {  # the arguments that a plan leaves open; the others are bound
    "_dequantize_kernel": range(4, 6),
    "_quantize_kernel": range(1, 7),
    "_lion_kernel": range(4, 21),
    "_lion_floats_kernel": range(1, 11),
    "_row_kernel": range(1, 11),
    "_int8_matmul_kernel": range(1, 16),
    "_copy_kernel": range(1, 3),
}


class Forbidden:
    """Replaces a kernel, to show that the JIT is not used again."""

    def __getitem__(self, grid):
        raise AssertionError("launched by the JIT, not from the table")


def bind(launcher, grid, constants, arguments):
    """Return a plan, and the arguments that it leaves open."""
    places = OPEN[launcher._kernel.__name__]
    bound = [... if place in places else value for place, value in enumerate(arguments)]
    return Plan(launcher, grid, constants, *bound), [arguments[place] for place in places]


def record(gpu, compiled):
    """Record the parameters of this kernel; return their formats."""
    types = [type for type in compiled.src.signature.values() if type != "constexpr"]
    formats = ["Q" if type.startswith("*") else FORMATS[type] for type in types]
    gpu.record(compiled.function, [struct.calcsize(format) for format in formats])
    return "=" + "".join(formats)


@pytest.mark.parametrize("name", CASES)
def test_every_way_hands_over_the_same_bytes(name, gpu):
    kernel, grid, options, arguments = CASES[name]
    constants = Constants(**options)
    compiled = kernel[grid](*arguments, **options)
    formats = record(gpu, compiled)

    kernel[grid](*arguments, **options)
    expected = gpu.last

    # Parameters of the JIT itself, read in another way: a recorder that sees nothing fails here.
    given = [
        x.data_ptr() if isinstance(x, torch.Tensor) else x
        for x, type in zip(arguments, compiled.src.signature.values(), strict=False)
        if type != "constexpr"
    ]
    assert expected.parameters == struct.pack(formats, *given)
    assert expected.dimensions[:3] == (*grid, 1, 1)[:3]
    assert expected.function == compiled.function

    launcher, planned = Launcher(kernel), Launcher(kernel)
    plan, open_arguments = bind(planned, grid, constants, arguments)
    for _ in range(3):
        before = gpu.launches
        launcher(grid, constants, *arguments)
        assert (gpu.last, gpu.launches) == (expected, before + 1)
        plan(*open_arguments)
        assert (gpu.last, gpu.launches) == (expected, before + 2)
        launcher._kernel = planned._kernel = Forbidden()


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_are_told_apart_as_the_jit_does(kernel, gpu):
    """One launcher gets all cases of its kernel before it gets each of them again."""
    cases = [case for case in CASES.values() if case[0].__name__ == kernel]
    launcher = Launcher(KERNELS[kernel])
    functions = []
    for jit, grid, options, arguments in cases:
        functions.append(jit[grid](*arguments, **options).function)
        launcher(grid, Constants(**options), *arguments)
        assert gpu.last.function == functions[-1]
    assert len(set(functions)) > 1

    launcher._kernel = Forbidden()
    for (_, grid, options, arguments), function in zip(cases, functions, strict=True):
        launcher(grid, Constants(**options), *arguments)
        assert gpu.last.function == function


@triton.jit(do_not_specialize=["free"])
def _small_kernel(x_ptr, y_ptr, z_ptr, n, free, factor, SIZE: triton.language.constexpr):
    """Compiles fast and uses all of its arguments."""
    index = triton.language.arange(0, SIZE)
    x = triton.language.load(x_ptr + index) * factor + n + free
    if y_ptr is not None:
        x += triton.language.load(y_ptr + index)
    triton.language.store(z_ptr + index, x)


FEW = [torch.ones(64) for _ in range(3)]
OTHERS = {  # by the position of an argument: values that replace it
    0: [FEW[0][1:], FEW[0].bfloat16(), FEW[0].bfloat16()[1:], FEW[0].half(), FEW[0].int()],
    1: [None, FEW[1][3:], FEW[1][4:], FEW[1].double()],
    2: [FEW[2][2:], FEW[2].bfloat16()],
    3: [0, 1, 2, 16, 17, -16, 2**31 - 1, 2**31, 2**31 + 1, -(2**31), -(2**31) - 1, 2**63, 2.0],
    4: [0, 1, 2, 16, 17, -16, 2**31 - 1, 2**31, 2**31 + 1, -(2**31), -(2**31) - 1, 2**63, 2.0],
    5: [0.5, 1.0, 16.0, 1, 2],
}


def test_whatever_a_kernel_is_compiled_for_is_in_the_key(gpu):
    """The launcher and the plan get all kinds of each argument before they get them again."""
    arguments, constants, grid = (*FEW, 3, 5, 0.5), Constants(SIZE=16), (2,)
    launcher = Launcher(_small_kernel)
    plan = Plan(launcher, grid, constants, arguments[0], *[...] * 5)
    calls = [arguments] + [
        (*arguments[:place], other, *arguments[place + 1 :])
        for place, others in OTHERS.items()
        for other in others
    ]
    functions = []
    for given in calls:
        functions.append(_small_kernel[grid](*given, **constants.values).function)
        launcher(grid, constants, *given)
        assert gpu.last.function == functions[-1]
        if given[0] is arguments[0]:
            plan(*given[1:])
            assert gpu.last.function == functions[-1]
    assert len(set(functions)) == 1 + 5 + 3 + 2 + 6 + 3 + 2  # then by position

    launcher._kernel = Forbidden()
    for given, function in zip(calls, functions, strict=True):
        launcher(grid, constants, *given)
        assert gpu.last.function == function
        if given[0] is arguments[0]:
            plan(*given[1:])
            assert gpu.last.function == function
    _small_kernel.device_caches.clear()


def test_constants_are_told_apart_by_value_and_type(gpu):
    kernel, grid, options, arguments = copy_case()
    launcher = Launcher(kernel)

    launcher(grid, Constants(**options), *arguments)
    first = gpu.last
    launcher(grid, Constants(**options | {"num_warps": 4}), *arguments)
    assert gpu.last.function != first.function
    assert gpu.last.dimensions != first.dimensions
    launcher(grid, Constants(**options | {"TILE": 64}), *arguments)
    assert gpu.last.function != first.function

    launcher._kernel = Forbidden()
    launcher(grid, Constants(**options), *arguments)  # another instance, equal
    assert gpu.last == first
    assert Constants(GATHER=True) != Constants(GATHER=1)
    assert Constants(GATHER=True) == Constants(GATHER=True)


def test_launch_is_on_the_stream_of_the_moment(gpu, monkeypatch):
    kernel, grid, options, arguments = dequantize_case()
    launcher, constants = Launcher(kernel), Constants(**options)
    plan, changing = bind(launcher, grid, constants, arguments)

    for stream in (7, 7, 8):
        monkeypatch.setattr(gpu.driver, "get_current_stream", lambda device, s=stream: s)
        launcher(grid, constants, *arguments)
        assert gpu.last.stream == stream
        plan(*changing)
        assert gpu.last.stream == stream


class OnDevice:
    """The attributes of a tensor that Triton needs, on the device with this number."""

    def __init__(self, tensor, device):
        self.dtype, self.data_ptr, self.get_device = tensor.dtype, tensor.data_ptr, lambda: device


def test_another_device_is_current_for_the_launch_only(gpu, monkeypatch):
    """Each device has its own kernels and streams: handles of one mean nothing to another."""
    current, entered = [0], []

    class device:  # as torch.cuda.device, which needs CUDA
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            entered.append(self.index)
            current.append(self.index)

        def __exit__(self, *exception):
            current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(gpu.driver, "get_current_device", lambda: current[-1])
    # The stream tells which device was current when it was requested, right before the launch.
    stream_of = lambda index: 100 + 10 * current[-1] + index  # noqa: E731
    monkeypatch.setattr(gpu.driver, "get_current_stream", stream_of)
    kernel, grid, options, arguments = dequantize_case()
    launcher, constants = Launcher(kernel), Constants(**options)
    of = {i: [OnDevice(x, i) for x in arguments[:6]] + [*arguments[6:]] for i in (0, 1)}
    plans = {i: bind(launcher, grid, constants, of[i]) for i in (0, 1)}
    functions = {0: set(), 1: set()}
    for index in (0, 1, 0, 1):
        launcher(grid, constants, *of[index])
        assert gpu.last.stream == 100 + 11 * index
        functions[index].add(gpu.last.function)
        plan, changing = plans[index]
        plan(*changing)
        assert gpu.last.stream == 100 + 11 * index
        functions[index].add(gpu.last.function)
    assert current == [0]
    assert set(entered) == {1}
    assert len(functions[0]) == len(functions[1]) == 1
    assert functions[0] != functions[1]


def test_launch_hooks_are_called_and_then_forgotten(gpu):
    """Profilers set them in the middle of a run and see each launch, which Triton then makes."""
    kernel, grid, options, arguments = dequantize_case()
    launcher, constants = Launcher(kernel), Constants(**options)
    plan, changing = bind(launcher, grid, constants, arguments)
    launcher(grid, constants, *arguments)
    plan(*changing)
    seen = []

    for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        chain.add(lambda metadata: seen.append(metadata.get()["name"]))
        before = gpu.launches
        launcher(grid, constants, *arguments)
        plan(*changing)
        chain.calls.clear()
        assert seen == ["_dequantize_kernel"] * 2
        assert gpu.launches == before + 2
        seen.clear()

    launcher._kernel = Forbidden()
    launcher(grid, constants, *arguments)
    plan(*changing)
    assert seen == []


def test_hooks_that_are_there_from_the_start_are_called_each_time(gpu):
    kernel, grid, options, arguments = dequantize_case()
    launcher, constants = Launcher(kernel), Constants(**options)
    plan, changing = bind(launcher, grid, constants, arguments)
    seen = []
    hook = seen.append
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        for _ in range(2):
            launcher(grid, constants, *arguments)
            plan(*changing)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        ("runtime", "launch_enter_hook", print),
        ("runtime", "launch_exit_hook", print),
        ("runtime", "debug", True),
        ("runtime", "add_stages_inspection_hook", print),
        ("compilation", "instrumentation_mode", "a mode"),
    ],
)
def test_whoever_watches_launches_gets_those_of_triton(group, name, value, monkeypatch):
    assert not needs_triton_launch()
    monkeypatch.setattr(getattr(knobs, group), name, value)
    assert needs_triton_launch()
    if name.startswith("launch"):
        monkeypatch.setattr(knobs.runtime, name, None)  # as when hooks are removed
        assert not needs_triton_launch()


def test_a_plan_finds_memory_that_was_exchanged(gpu):
    """The tensor is the same, but its memory is not; the old address must not be used."""
    kernel, grid, options, arguments = dequantize_case()
    record(gpu, kernel[grid](*arguments, **options))
    plan, changing = bind(Launcher(kernel), grid, Constants(**options), arguments)
    plan(*changing)
    old = arguments[0].data_ptr()

    arguments[0].data = arguments[0].clone()
    plan(*changing)

    address = struct.unpack_from("=Q", gpu.last.parameters)[0]
    assert address == arguments[0].data_ptr() != old


def test_a_plan_keeps_what_it_points_to(gpu):
    kernel, grid, options, arguments = dequantize_case()
    record(gpu, kernel[grid](*arguments, **options))
    addresses = [x.data_ptr() for x in arguments[:6]]
    plan, changing = bind(Launcher(kernel), grid, Constants(**options), arguments)
    del arguments
    gc.collect()
    other = [torch.empty(ROWS, COLUMNS, dtype=torch.int8) for _ in range(20)]

    plan(*changing)

    assert list(struct.unpack_from("=6Q", gpu.last.parameters)) == addresses
    assert not {x.data_ptr() for x in other} & set(addresses)


def test_a_compiled_kernel_outlives_the_cache_of_the_jit(gpu):
    """Triton 3.9 unloads a kernel that nothing references, and its handle becomes invalid."""
    launcher, constants = Launcher(_small_kernel), Constants(SIZE=32)
    arguments = (*FEW, 3, 5, 0.5)
    launcher((2,), constants, *arguments)
    expected, before = gpu.last, gpu.unloads

    _small_kernel.device_caches.clear()
    gc.collect()

    assert gpu.unloads == before
    launcher._kernel = Forbidden()
    launcher((2,), constants, *arguments)
    assert gpu.last == expected


def test_a_plan_is_not_copied_with_its_owner(gpu):
    kernel, grid, options, arguments = dequantize_case()
    plan, _ = bind(Launcher(kernel), grid, Constants(**options), arguments)
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="make one for the copy"):
            copied({"plan": plan}["plan"])


@pytest.mark.parametrize("places", [(), (5, 6, 8), (0, 1)])
def test_a_plan_leaves_one_run_of_arguments_open(places):
    kernel, grid, options, arguments = lion_case()
    given = [... if i in places else value for i, value in enumerate(arguments)]

    message = "sets the device" if 0 in places else "must be consecutive"
    with pytest.raises(ValueError, match=message):
        Plan(Launcher(kernel), grid, Constants(**options), *given)


@triton.jit
def _mixed_kernel(x_ptr, SIZE: triton.language.constexpr, n):
    pass


def test_constexpr_arguments_come_last():
    with pytest.raises(ValueError, match=r"_mixed_kernel .* Reorder"):
        Launcher(_mixed_kernel)


class Interpreted:
    """A fake interpreted kernel that records its launches."""

    def __init__(self):
        self.calls: list[Any] = []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.calls.append((grid, arguments, options))


def test_an_interpreted_kernel_is_launched_by_triton():
    """And every kernel without fused multiplications and additions."""
    kernel, constants = Interpreted(), Constants(SIZE=3, num_warps=1)
    launcher = Launcher(kernel)
    x = torch.ones(2)

    launcher((2,), constants, x, 1, None)
    Plan(launcher, (2,), constants, x, ..., None)(1)

    options = {"SIZE": 3, "num_warps": 1, "enable_fp_fusion": False}
    assert kernel.calls == [((2,), (x, 1, None), options)] * 2


def test_a_second_stand_in_of_a_process_sees_all_launches(gpu, tmp_path, monkeypatch):
    """It saw none: the second part of this file, if pytest-xdist splits it, once failed by that."""
    for name in ("TRITON_CACHE_DIR", "TRITON_LIBCUDA_PATH"):
        monkeypatch.setenv(name, "restored at the end")
    second = absent_gpu.AbsentGPU(tmp_path)
    _small_kernel.device_caches.clear()
    before = second.launches

    compiled = _small_kernel[(2,)](*FEW, 3, 5, 0.5, SIZE=64)

    assert (second.launches, second.last.function) == (before + 1, compiled.function)
    _small_kernel.device_caches.clear()
    triton.runtime.driver.set_active(gpu.driver)
