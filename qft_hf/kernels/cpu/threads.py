"""Row ranges of one matrix on PyTorch's own OpenMP threads.

Threads of another pool would share the cores with PyTorch's threads, which spin for a millisecond
after each operator: on two cores a second thread gained nothing. A thread that enters Python waits
for the interpreter, for longer than a small kernel takes. So a kernel is called from machine code,
by a function that numba compiles for each use of `for_each_row_range`.
"""

import ctypes
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

MIN_ELEMENTS = 2**15  # per range: fewer take less time than waking a thread

_Function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_Parallel = ctypes.CFUNCTYPE(None, _Function, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)


@_Parallel
def _serial(function: Any, argument: Any, n_threads: int, flags: int) -> None:
    """Replace `GOMP_parallel` if there is none: call the function once."""
    function(argument)


def _openmp_parallel() -> Any:
    """Return the `GOMP_parallel` of the OpenMP library that PyTorch has loaded.

    GNU's and LLVM's libraries both have it. `GOMP_parallel(function, argument, n_threads, flags)`
    calls `function(argument)` on each of at most `n_threads` threads and waits for all of them.
    """
    try:
        return ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (OSError, AttributeError) as error:
        warnings.warn(
            "qft_hf uses one CPU thread: its kernels run on OpenMP threads, which need a PyTorch "
            f"that is linked with GNU's or LLVM's OpenMP, and this one is not ({error}).",
            stacklevel=2,
        )
        return _serial


_parallel = _openmp_parallel()  # kept alive: machine code calls its address by the name below
_SYMBOL = "qft_hf_parallel"
binding.add_symbol(_SYMBOL, ctypes.cast(_parallel, ctypes.c_void_p).value)

_POINTER, _COUNT = cgutils.voidptr_t, ir.IntType(32)


def n_ranges(n_rows: int, row_elements: int, *, min_elements: int = MIN_ELEMENTS) -> int:
    """Return into how many ranges to split `n_rows` rows of `row_elements` elements."""
    return max(1, min(torch.get_num_threads(), n_rows, n_rows * row_elements // min_elements))


def run(
    on_ranges: Callable[..., None],
    arguments: Iterable[Any],
    n_rows: int,
    row_elements: int,
    *,
    min_elements: int = MIN_ELEMENTS,
) -> None:
    """Run a kernel on all rows of its arguments, on as many threads as are worth waking.

    Args:
        on_ranges: The kernel's `(arguments, n_rows, n_ranges)`, which calls `for_each_row_range`.
            Each kernel has one of its own, because numba keeps no function of a function compiled.
        arguments: Those of the kernel before `start` and `stop`; tensors are passed as arrays.
        n_rows: As in `n_ranges`.
        row_elements: As in `n_ranges`.
        min_elements: As in `n_ranges`.
    """
    values = (x.numpy() if isinstance(x, Tensor) else x for x in arguments)
    on_ranges(tuple(values), n_rows, n_ranges(n_rows, row_elements, min_elements=min_elements))


# The fields that the threads of a call share: the arguments, the number of rows, the number of
# ranges, how many ranges are taken, and whether one failed.
_N_FIELDS = 5
_FAILED = 4


@intrinsic
def _run(typing_context, kernel, arguments, n_rows, n_ranges):
    """Do what `for_each_row_range` documents, and return whether all ranges succeeded."""
    signature = types.boolean(kernel, arguments, types.intp, types.intp)
    call = kernel.get_call_type(typing_context, (*arguments, types.intp, types.intp), {})
    compiled = kernel.dispatcher.get_compile_result(call)

    def generate(context, builder, signature, values):
        word = context.get_value_type(types.intp)
        shared_type = ir.LiteralStructType([values[1].type, word, word, word, word])
        shared = cgutils.alloca_once(builder, shared_type)
        for field, value in enumerate([*values[1:], word(0), word(0)]):
            builder.store(value, cgutils.gep_inbounds(builder, shared, 0, field))
        context.add_linking_libs([compiled.library])
        function = _take_ranges(context, builder, shared_type, arguments, compiled.fndesc, call)
        parallel = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [_POINTER, _POINTER, _COUNT, _COUNT]),
            _SYMBOL,
        )
        pointers = [builder.bitcast(value, _POINTER) for value in (function, shared)]
        builder.call(parallel, [*pointers, builder.trunc(values[3], _COUNT), _COUNT(0)])
        failed = builder.load(cgutils.gep_inbounds(builder, shared, 0, _FAILED))
        return builder.icmp_signed("==", failed, word(0))

    return signature, generate


def _take_ranges(context, caller, shared_type, kinds, kernel, call):
    """Return the function that each thread runs: it takes ranges until none is left.

    OpenMP may provide fewer threads than there are ranges.
    """
    function = ir.Function(
        caller.module, ir.FunctionType(ir.VoidType(), [_POINTER]), f"{caller.function.name}.range"
    )
    function.linkage = "internal"
    entry, take, work, end = map(function.append_basic_block, ("entry", "take", "work", "end"))

    builder = ir.IRBuilder(entry)
    shared = builder.bitcast(function.args[0], shared_type.as_pointer())
    arguments, n_rows, n_ranges, taken, failed = (
        cgutils.gep_inbounds(builder, shared, 0, field) for field in range(_N_FIELDS)
    )
    n_rows, n_ranges = builder.load(n_rows), builder.load(n_ranges)
    builder.branch(take)

    builder.position_at_end(take)
    number = builder.atomic_rmw("add", taken, n_ranges.type(1), "monotonic")
    builder.cbranch(builder.icmp_signed("<", number, n_ranges), work, end)

    builder.position_at_end(work)
    values = cgutils.unpack_tuple(builder, builder.load(arguments))
    borrowed = [
        _borrowed(context, builder, kind, value) for kind, value in zip(kinds, values, strict=True)
    ]
    edges = [
        builder.sdiv(builder.mul(n_rows, edge), n_ranges)
        for edge in (number, builder.add(number, n_ranges.type(1)))
    ]
    status, _ = context.call_internal_no_propagate(builder, kernel, call, [*borrowed, *edges])
    builder.atomic_rmw("or", failed, builder.zext(status.is_error, n_ranges.type), "monotonic")
    builder.branch(take)

    builder.position_at_end(end)
    builder.ret_void()
    return function


def _borrowed(context, builder, kind, value):
    """Drop the reference count of an array, for which threads would contend at each row."""
    if not isinstance(kind, types.Array):
        return value
    array = context.make_array(kind)(context, builder, value)
    array.meminfo = cgutils.get_null_value(array.meminfo.type)
    array.parent = cgutils.get_null_value(array.parent.type)
    return array._getvalue()


# Inlined, since LLVM optimizes a kernel anew for each function that it is linked into.
@njit(inline="always")
def for_each_row_range(kernel, arguments, n_rows, n_ranges):
    """Call `kernel(*arguments, start, stop)` for ranges that cover `n_rows` rows once.

    It is called in a kernel, runs another kernel, and waits for all ranges.
    """
    if not _run(kernel, arguments, n_rows, n_ranges):
        raise MemoryError(
            "A CPU kernel had no memory for its buffers: free memory, or use smaller batches."
        )
