"""Row ranges of one matrix on as many threads as PyTorch uses. The kernels release the GIL."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

MIN_ELEMENTS = 2**15  # fewer are done sooner than a thread is woken


@cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads, thread_name_prefix="qft")


def for_each_row_range(
    kernel: Callable[[int, int], None], *, n_rows: int, row_elements: int
) -> None:
    """Call `kernel(start, stop)` for ranges that cover `n_rows` rows once; wait for all of them."""
    n_ranges = min(torch.get_num_threads(), n_rows, n_rows * row_elements // MIN_ELEMENTS)
    if n_ranges <= 1:
        kernel(0, n_rows)
        return
    edges = [n_rows * i // n_ranges for i in range(n_ranges + 1)]
    # The results are all None; reading them waits and passes exceptions on.
    list(_pool(n_ranges).map(kernel, edges[:-1], edges[1:]))
