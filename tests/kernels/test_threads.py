"""Row ranges of CPU kernels on OpenMP's threads."""

import ctypes
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from numba import njit

from qft_hf.kernels.cpu import threads

threads_do = threads.for_each_row_range


@njit(nogil=True)
def _mark(visits, size, starts, start, stop):
    visits[start:stop] += 1
    size[start] = stop - start
    starts[start] = 1


@njit(nogil=True)
def mark(visits, size, starts, n_ranges):
    threads_do(_mark, (visits, size, starts), visits.shape[0], n_ranges)


@njit(nogil=True)
def _meet(here, patience, met, start, stop):
    """Announce a range of one row and wait for the others."""
    here[start] = 1
    for _ in range(patience):
        if here.sum() == here.shape[0]:
            met[start] = True
            return


@njit(nogil=True)
def meet(here, patience, met, n_ranges):
    threads_do(_meet, (here, patience, met), here.shape[0], n_ranges)


@njit(nogil=True)
def _fail(failing, start, stop):
    if start == failing:
        raise ValueError("stands for what numba raises without memory")


@njit(nogil=True)
def fail(failing, n_rows, n_ranges):
    threads_do(_fail, (failing,), n_rows, n_ranges)


@njit(nogil=True)
def _add(x, factor, y, start, stop):
    for row in range(start, stop):
        y[row] += factor * x[row]


@njit(nogil=True)
def add(x, factor, y, n_ranges):
    threads_do(_add, (x, factor, y), x.shape[0], n_ranges)


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("n_ranges", [1, 2, 3, 7])
@pytest.mark.parametrize("n_rows", [7, 10, 1000])
def test_each_row_comes_once_in_ranges_of_like_size(n_rows, n_ranges):
    visits, size, starts = np.zeros((3, n_rows), np.int64)

    mark(visits, size, starts, n_ranges)

    assert (visits == 1).all()
    assert starts.sum() == n_ranges
    assert set(size[starts == 1]) <= {n_rows // n_ranges, -(-n_rows // n_ranges)}


def test_no_rows_are_no_work():
    visits = np.zeros(0, np.int64)

    mark(visits, visits, visits, 1)


@pytest.mark.usefixtures("three_threads")
def test_the_ranges_run_at_the_same_time():
    """Each range waits for the others: on fewer threads the first would wait in vain."""
    met = np.zeros(3, np.bool_)

    meet(np.zeros(3, np.int64), 10**9, met, 3)

    assert met.all()


@pytest.mark.parametrize("failing", [0, 2])
def test_what_fails_in_a_range_is_told(failing):
    with pytest.raises(MemoryError, match="A CPU kernel had no memory"):
        fail(failing, 3, 3)


def test_arrays_live_on_and_are_written_whatever_their_layout():
    """Kernels receive arrays without counting a reference to them."""
    x, y = np.arange(20.0).reshape(10, 2), np.ones((10, 4))
    references = sys.getrefcount(x), sys.getrefcount(y)

    for _ in range(3):
        add(x[::-1], np.float64(2.0), y[:, 1::2], 2)

    assert np.array_equal(y[:, 1::2], 1 + 6 * x[::-1])
    assert (y[:, ::2] == 1).all()
    assert (sys.getrefcount(x), sys.getrefcount(y)) == references


def test_callers_on_several_threads_do_not_mix():
    visits = [np.zeros(n_rows, np.int64) for n_rows in range(30, 90)]

    def call(mine: np.ndarray) -> None:
        for _ in range(50):
            mark(mine, np.zeros_like(mine), np.zeros_like(mine), 3)

    callers = [threading.Thread(target=call, args=(mine,)) for mine in visits]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()

    assert all((mine == 50).all() for mine in visits)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize(
    ("n_rows", "row_elements", "wanted"),
    [
        (100, threads.MIN_ELEMENTS, 3),
        (2, threads.MIN_ELEMENTS, 2),
        (64, threads.MIN_ELEMENTS // 32, 2),
        (64, threads.MIN_ELEMENTS // 64, 1),
        (64, 1, 1),
        (0, 64, 1),
    ],
)
def test_few_rows_and_few_elements_are_split_less(n_rows, row_elements, wanted):
    assert threads.n_ranges(n_rows, row_elements) == wanted


def test_without_openmp_one_thread_does_it_and_says_so():
    """Runs in another process, since this one has already bound its machine code to OpenMP."""
    code = """
import ctypes, numba, torch, warnings
import numpy as np
loaded, ctypes.CDLL = ctypes.CDLL, lambda path: object()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from qft_hf.kernels.cpu import threads
ctypes.CDLL = loaded
assert any("qft_hf uses one CPU thread" in str(warning.message) for warning in caught), caught
from tests.kernels.test_threads import mark, meet
visits, size, starts = np.zeros((3, 100), np.int64)
mark(visits, size, starts, 3)
assert (visits == 1).all() and starts.sum() == 3
met = np.zeros(2, np.bool_)
meet(np.zeros(2, np.int64), 100, met, 2)
assert met.tolist() == [False, True], met
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_openmp_is_that_of_pytorch():
    library = ctypes.CDLL(torch._C.__file__)

    assert ctypes.cast(threads._parallel, ctypes.c_void_p).value == (
        ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value
    )
