"""Float columns next to the INT8 products of a backward pass, on every backend that a CPU runs."""

import pytest
import torch
from torch import Tensor

from qft_hf import kernels
from tests.kernels.backends import cpu, reference
from tests.tolerances import EPS, FP32_EPS, assert_same_bits, matmul_bound

BACKENDS = [reference, cpu]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Tokens, outputs, outliers of the weight and of the input. The CPU works in blocks of 32 tokens,
# eight tokens at a time, in blocks of 256 outputs, and on four outliers at a time.
SIZES = [(1, 1, 1, 1), (7, 33, 3, 0), (33, 257, 4, 5), (203, 600, 9, 14)]


def make_case(
    sizes: tuple[int, ...], dtype: torch.dtype, *, exact: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a gradient and the outliers of a weight and an input, the latter column by column.

    With `exact` all are small integers, whose sums are exact in any order and in each dtype.
    """
    tokens, outputs, of_weight, of_input = sizes
    generator = torch.Generator().manual_seed(sum(sizes))

    def make(*shape: int) -> Tensor:
        if not exact:
            return torch.randn(shape, generator=generator)
        few = torch.rand(shape, generator=generator) < 0.3
        return torch.randint(-1, 2, shape, generator=generator).float() * few

    return (
        make(tokens, outputs).to(dtype),
        make(outputs, of_weight),
        make(of_input, tokens).to(dtype).t(),
    )


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_exact_sums_are_returned_exactly(backend, sizes, dtype, n_threads):
    gradient, of_weight, of_input = make_case(sizes, dtype, exact=True)

    for_x, for_weight = backend.outlier_products(gradient, of_weight, of_input)

    exact = gradient.double()
    assert torch.equal(for_x, (exact @ of_weight.double()).to(dtype))
    assert torch.equal(for_weight, (exact.t() @ of_input.double()).to(dtype))
    assert for_weight.t().is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sums_are_off_by_their_rounding_at_most(backend, sizes, dtype, n_threads):
    gradient, of_weight, of_input = make_case(sizes, dtype)
    rounded = of_weight.to(dtype)

    results = backend.outlier_products(gradient, of_weight, of_input)

    for found, left, right in zip(
        results, (gradient, gradient.t()), (rounded, of_input), strict=True
    ):
        exact = left.double() @ right.double()
        sums = matmul_bound(left, right)
        rounding = 0 if dtype == torch.float32 else EPS[dtype] * (exact.abs() + sums)
        assert ((found.double() - exact).abs() <= sums + rounding).all()


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_what_is_not_wanted_is_empty_and_the_other_the_same(backend):
    gradient, of_weight, of_input = make_case(SIZES[-1], torch.float32)
    for_x, for_weight = backend.outlier_products(gradient, of_weight, of_input)

    alone, nothing = backend.outlier_products(gradient, of_weight, None)
    assert_same_bits(alone, for_x)
    assert nothing.numel() == 0

    nothing, alone = backend.outlier_products(gradient, None, of_input)
    assert_same_bits(alone, for_weight)
    assert nothing.numel() == 0


# For all of these, PyTorch's FP32 products return other bits on two, three or eight threads.
@pytest.mark.parametrize(
    "sizes", [(48, 64, 0, 5), (192, 576, 0, 5), (1000, 192, 0, 5), (33, 11008, 41, 5)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_changes_no_bit(sizes, dtype):
    case = make_case(sizes, dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for n_threads in (1, 2, 3, 8):
            torch.set_num_threads(n_threads)
            results.append(cpu.outlier_products(*case))
    finally:
        torch.set_num_threads(before)

    for others in results[1:]:
        for found, expected in zip(others, results[0], strict=True):
            assert_same_bits(found, expected)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_where_it_belongs(backend, bad):
    gradient, of_weight, of_input = make_case(SIZES[2], torch.float32)
    gradient[9, 256] = bad

    for_x, for_weight = backend.outlier_products(gradient, of_weight, of_input)

    assert not for_x[9].isfinite().any()
    assert not for_weight[256].isfinite().any()
    for_x[9], for_weight[256] = 0.0, 0.0
    assert for_x.isfinite().all()
    assert for_weight.isfinite().all()


def test_factors_are_rounded_to_the_dtype_of_the_gradient():
    gradient = torch.ones(1, 1, dtype=torch.bfloat16)
    finer = torch.tensor([[1 + FP32_EPS * 2**10]])

    for_x, for_weight = kernels.outlier_products(gradient, finer, finer)

    assert for_x.dtype == for_weight.dtype == torch.bfloat16
    assert for_x.item() == for_weight.item() == 1.0


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({0: torch.ones(5, 7).long()}, TypeError, "gradient must be torch.float32 or"),
        ({0: torch.ones(7, 5).t()}, ValueError, "Call .contiguous"),
        ({1: torch.ones(5, 2)}, ValueError, r"weight_outliers must be \[7, k\] on cpu"),
        ({2: torch.ones(7, 2)}, ValueError, r"input_outliers must be \[5, k\] on cpu"),
        ({2: torch.ones(5)}, ValueError, r"5 tokens and 7 outputs, got shape \(5,\)"),
        ({1: torch.ones(7, 2, device="meta")}, ValueError, "on meta"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, match):
    arguments = dict(enumerate((torch.ones(5, 7), torch.ones(7, 2), torch.ones(5, 3))))

    with pytest.raises(error, match=match):
        kernels.outlier_products(*(arguments | change).values())
