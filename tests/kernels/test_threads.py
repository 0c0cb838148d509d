"""Row ranges of CPU kernels on OpenMP's threads."""

import threading

import pytest
import torch

from qft_hf.kernels.cpu import threads


def ranges(**sizes: int) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    threads.for_each_row_range(lambda start, stop: found.append((start, stop)), **sizes)
    return sorted(found)


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("n_rows", [1, 2, 3, 10, 1000])
def test_each_row_comes_once(n_rows):
    found = ranges(n_rows=n_rows, row_elements=threads.MIN_ELEMENTS)

    assert len(found) == min(3, n_rows)
    assert [row for start, stop in found for row in range(start, stop)] == list(range(n_rows))


@pytest.mark.usefixtures("three_threads")
def test_few_elements_are_not_split():
    assert ranges(n_rows=64, row_elements=threads.MIN_ELEMENTS // 64) == [(0, 64)]


@pytest.mark.usefixtures("three_threads")
def test_the_ranges_run_at_the_same_time():
    """Each waits for the others: on fewer threads the barrier would break."""
    barrier = threading.Barrier(3, timeout=30)

    threads.for_each_row_range(
        lambda start, stop: barrier.wait(), n_rows=3, row_elements=threads.MIN_ELEMENTS
    )


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("failing", [0, 2])
def test_what_a_range_raises_arrives(failing):
    def kernel(start: int, stop: int) -> None:
        if start == failing:
            raise ValueError(f"row {start}")

    with pytest.raises(ValueError, match=f"row {failing}"):
        threads.for_each_row_range(kernel, n_rows=3, row_elements=threads.MIN_ELEMENTS)


@pytest.mark.usefixtures("three_threads")
def test_callers_on_several_threads_do_not_mix():
    results: dict[int, list[tuple[int, int]]] = {}

    def call(n_rows: int) -> None:
        results[n_rows] = ranges(n_rows=n_rows, row_elements=threads.MIN_ELEMENTS)

    callers = [threading.Thread(target=call, args=(n_rows,)) for n_rows in range(3, 9)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()

    for n_rows, found in results.items():
        assert [row for start, stop in found for row in range(start, stop)] == list(range(n_rows))


@pytest.mark.usefixtures("three_threads")
def test_without_openmp_one_thread_does_it_and_says_so(monkeypatch):
    monkeypatch.setattr(threads.ctypes, "CDLL", lambda path: object())
    threads._openmp_parallel.cache_clear()
    try:
        with pytest.warns(UserWarning, match="qft_hf uses one CPU thread"):
            assert ranges(n_rows=3, row_elements=threads.MIN_ELEMENTS) == [(0, 3)]
    finally:
        threads._openmp_parallel.cache_clear()
