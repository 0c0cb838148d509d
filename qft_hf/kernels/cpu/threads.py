"""Row ranges of one matrix on as many threads as PyTorch uses. The kernels release the GIL."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

MIN_ELEMENTS = 2**15  # of a range: fewer are done sooner than a thread is woken


@cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads, thread_name_prefix="qft")


def for_each_row_range(
    kernel: Callable[[int, int], None],
    *,
    n_rows: int,
    row_elements: int,
    min_elements: int = MIN_ELEMENTS,
) -> None:
    """Call `kernel(start, stop)` for ranges that cover `n_rows` rows once; wait for all of them."""
    n_ranges = min(torch.get_num_threads(), n_rows, n_rows * row_elements // min_elements)
    if n_ranges <= 1:
        kernel(0, n_rows)
        return
    edges = [n_rows * i // n_ranges for i in range(n_ranges + 1)]
    others = _pool(n_ranges - 1).map(kernel, edges[1:-1], edges[2:])
    kernel(edges[0], edges[1])
    list(others)  # the results are all None; reading them waits and passes exceptions on
