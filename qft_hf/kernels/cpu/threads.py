"""Row ranges of one matrix on PyTorch's own OpenMP threads. The kernels release the GIL.

Threads of another pool would share the cores with those of PyTorch, which spin for a millisecond
after each of its operators: on two cores a second thread gained nothing.
"""

import ctypes
import warnings
from collections.abc import Callable
from functools import cache
from itertools import pairwise

import torch

MIN_ELEMENTS = 2**15  # of a range: fewer are done sooner than a thread is woken

_call = ctypes.CFUNCTYPE(None, ctypes.py_object)(lambda work: work())


@cache
def _openmp_parallel() -> Callable[..., None] | None:
    """`GOMP_parallel(function, argument, n_threads, flags)` of the OpenMP that PyTorch has loaded.

    GNU's and LLVM's libraries both have it. It calls `function(argument)` on each of at most
    `n_threads` threads and waits for all.
    """
    try:
        parallel: Callable[..., None] = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (OSError, AttributeError) as error:
        warnings.warn(
            "qft_hf uses one CPU thread: its kernels run on the threads of OpenMP, wanted is a "
            f"PyTorch that is linked with GNU's or LLVM's OpenMP, and this one is not ({error}).",
            stacklevel=2,
        )
        return None
    return parallel


def for_each_row_range(
    kernel: Callable[[int, int], None],
    *,
    n_rows: int,
    row_elements: int,
    min_elements: int = MIN_ELEMENTS,
) -> None:
    """Call `kernel(start, stop)` for ranges that cover `n_rows` rows once; wait for all of them."""
    n_ranges = min(torch.get_num_threads(), n_rows, n_rows * row_elements // min_elements)
    if n_ranges <= 1 or (parallel := _openmp_parallel()) is None:
        kernel(0, n_rows)
        return
    edges = [n_rows * i // n_ranges for i in range(n_ranges + 1)]
    # OpenMP may give fewer threads than asked for: each takes ranges until none is left.
    ranges = iter(list(pairwise(edges)))
    errors = []

    def work() -> None:
        try:
            for start, stop in ranges:
                kernel(start, stop)
        except BaseException as error:  # noqa: BLE001 - lost where C calls Python, unless kept
            errors.append(error)

    parallel(_call, ctypes.py_object(work), n_ranges, 0)
    if errors:
        raise errors[0]
