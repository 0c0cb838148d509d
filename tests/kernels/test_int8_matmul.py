"""Products of INT8 codes against integers in numpy: exact, on every backend that a CPU runs."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from qft_hf import kernels
from qft_hf.kernels.int8_product import MAX_SUMMED
from tests.kernels.backends import cpu, reference
from tests.tolerances import assert_same_bits, matmul_bound

BACKENDS = [reference, cpu]
# [M, K, N]: smallest; odd; K at and over the 1024 codes that FP32 sums exactly; more than one tile.
SHAPES = [(1, 1, 1), (3, 33, 7), (17, 1024, 5), (5, 1025, 33), (2, 3000, 9), (2060, 20, 2100)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def codes(rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows * 1009 + columns)
    return torch.randint(-127, 128, (rows, columns), generator=generator, dtype=torch.int8)


def scales(rows: int) -> Tensor:
    return torch.rand(rows, 1, generator=torch.Generator().manual_seed(rows)) * 0.1 + 1e-3


def other_order(x: Tensor) -> Tensor:
    """The same matrix, stored column by column."""
    return x.t().contiguous().t()


def inside(x: Tensor) -> Tensor:
    """The same matrix as rows and columns of a larger one."""
    larger = torch.full((x.shape[0] + 3, x.shape[1] + 5), 127, dtype=torch.int8)
    larger[1:-2, 2:-3] = x
    return larger[1:-2, 2:-3]


def product32(
    a: Tensor, b: Tensor, a_scales: Tensor | None, b_scales: Tensor | None, bias: Tensor | None
) -> np.ndarray:
    """The definition: an integer sum, then FP32 operations in the order of the docstring."""
    out = (a.numpy().astype(np.int64) @ b.numpy().astype(np.int64)).astype(np.float32)
    if a_scales is not None:
        out = out * a_scales.numpy()
    if b_scales is not None:
        out = out * b_scales.numpy().T
    if bias is not None:
        out = out + bias.float().numpy()
    return out


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("scaled_by", ["both", "rows", "columns", "neither"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_integer_product(backend, shape, scaled_by):
    m, k, n = shape
    a, b = codes(m, k), codes(n, k).t()
    a_scales = scales(m) if scaled_by in ("both", "rows") else None
    b_scales = scales(n) if scaled_by in ("both", "columns") else None
    bias = torch.linspace(-1, 1, n) if scaled_by in ("both", "neither") else None

    out = backend.int8_matmul(a, b, a_scales, b_scales, bias=bias, dtype=torch.float32)

    assert_same_bits(out, torch.from_numpy(product32(a, b, a_scales, b_scales, bias)))


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("b_form", [Tensor.contiguous, other_order, inside])
@pytest.mark.parametrize("a_form", [Tensor.contiguous, other_order, inside])
def test_operands_may_be_stored_either_way(backend, a_form, b_form):
    a, b = codes(19, 35), codes(35, 21)

    out = backend.int8_matmul(
        a_form(a), b_form(b), scales(19), scales(21), bias=None, dtype=torch.float32
    )

    assert_same_bits(out, torch.from_numpy(product32(a, b, scales(19), scales(21), None)))


@pytest.mark.parametrize("has_vnni", [True, False])
@pytest.mark.parametrize("b_form", [Tensor.contiguous, other_order, inside])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 3), (17, 64, 9), (3, 1030, 2)], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_both_products_of_a_cpu_are_exact(shape, b_form, has_vnni, autocast, monkeypatch):
    """PyTorch's own product, which is slow without VNNI, and the one that sums in FP32 parts."""
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: has_vnni)
    m, k, n = shape
    a, b, bias = codes(m, k), b_form(codes(k, n)), torch.linspace(-1, 1, n)

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = cpu.int8_matmul(a, b, scales(m), scales(n), bias=bias, dtype=torch.bfloat16)

    expected = torch.from_numpy(product32(a, b, scales(m), scales(n), bias))
    assert_same_bits(out, expected.bfloat16())


@pytest.mark.parametrize("has_vnni", [True, False])
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_a_sum_of_zeros_has_no_sign(backend, has_vnni, monkeypatch):
    """A float product of one term returned -0 for 0 times a negative code."""
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: has_vnni)
    a, b = torch.zeros(3, 1, dtype=torch.int8), -torch.ones(1, 5, dtype=torch.int8)

    out = backend.int8_matmul(a, b, scales(3), scales(5), dtype=torch.float32)

    assert_same_bits(out, torch.zeros(3, 5))


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_result_is_rounded_once(backend, dtype):
    """The bias, of any dtype, is added in FP32 before that rounding."""
    a, b, bias = codes(9, 70), codes(70, 8), torch.linspace(-1, 1, 8).bfloat16()

    out = backend.int8_matmul(a, b, scales(9), scales(8), bias=bias, dtype=dtype)

    exact = torch.from_numpy(product32(a, b, scales(9), scales(8), bias))
    assert_same_bits(out, exact.to(dtype))


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (9, 70, 8), (2050, 3, 2100)], ids=str)
def test_columns_that_are_given_take_the_place_of_products(backend, shape, dtype):
    """Given columns may be in any order, tile and dtype, and nothing of the product is left."""
    m, k, n = shape
    a, b = codes(m, k), codes(n, k).t()
    columns = torch.tensor([0, 2099, 2047, 2048, 100])
    columns = columns[columns < n]
    values = torch.randn(m, len(columns), generator=torch.Generator().manual_seed(m)).to(dtype)
    values[m // 2, 0] = torch.nan
    expected = torch.from_numpy(product32(a, b, scales(m), None, torch.ones(n)))
    expected[:, columns] = values.float()

    out = backend.int8_matmul(
        a, b, scales(m), None,
        bias=torch.ones(n), columns=columns, values=values, dtype=torch.bfloat16,
    )  # fmt: skip

    assert_same_bits(out, expected.bfloat16())


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sum_fits(backend, sign):
    """All codes at the end of their range, with the longest K of one call of a backend."""
    k = MAX_SUMMED
    a = torch.full((2, k), 127, dtype=torch.int8)
    b = torch.full((k, 3), 127 * sign, dtype=torch.int8)

    out = backend.int8_matmul(a, b, None, None, bias=None, dtype=torch.float32)

    assert 127 * 127 * k < 2**31
    assert (out == float(np.float32(sign * 127 * 127 * k))).all()


def test_a_longer_sum_is_added_in_parts():
    k = 2 * MAX_SUMMED + 100
    a, b, bias = codes(2, k), codes(3, k).t(), torch.tensor([1.0, -2.0, 3.0])
    given = {"columns": torch.tensor([1]), "values": torch.tensor([[5.0], [7.0]])}

    out = kernels.int8_matmul(a, b, scales(2), scales(3), bias=bias, dtype=torch.float32)
    partly = kernels.int8_matmul(
        a, b, scales(2), scales(3), bias=bias, **given, dtype=torch.float32
    )

    edges = [0, MAX_SUMMED, 2 * MAX_SUMMED, k]
    parts = [
        product32(a[:, start:stop], b[start:stop], scales(2), scales(3), None)
        for start, stop in pairwise(edges)
    ]
    assert_same_bits(out, torch.from_numpy((parts[0] + parts[1] + parts[2]) + bias.numpy()))
    assert_same_bits(partly[:, [0, 2]], out[:, [0, 2]].contiguous())
    assert partly[:, 1].tolist() == [5.0, 7.0]


@pytest.mark.parametrize(("m", "k", "n"), [(0, 5, 3), (4, 0, 3), (4, 5, 0)])
def test_an_empty_operand_gives_zeros_or_the_bias(m, k, n):
    a, b = torch.ones(m, k, dtype=torch.int8), torch.ones(k, n, dtype=torch.int8)

    plain = kernels.int8_matmul(a, b, None, None, dtype=torch.bfloat16)
    biased = kernels.int8_matmul(a, b, None, None, bias=torch.arange(n) + 0.5, dtype=torch.float32)

    assert_same_bits(plain, torch.zeros(m, n, dtype=torch.bfloat16))
    assert_same_bits(biased, (torch.arange(n) + 0.5).expand(m, n).contiguous())


def test_the_three_products_of_a_linear_layer():
    """The recipe in the docstring against float products of the dequantized operands."""
    generator = torch.Generator().manual_seed(0)
    x, w, g = (torch.randn(size, generator=generator) for size in [(13, 40), (24, 40), (13, 24)])
    x_codes, x_scales = kernels.quantize(x, group_size=None)
    w_codes, w_scales = kernels.quantize(w, group_size=None)
    row_codes, row_scales, column_codes, column_scales = kernels.quantize_gradient(
        g, w_scales, x_scales, seed=1
    )

    y = kernels.int8_matmul(x_codes, w_codes.t(), x_scales, w_scales, dtype=torch.float32)
    grad_x = kernels.int8_matmul(row_codes, w_codes, row_scales, None, dtype=torch.float32)
    grad_w = kernels.int8_matmul(column_codes, x_codes, column_scales, None, dtype=torch.float32)

    for out, left, right in [
        (y, x_codes * x_scales, (w_codes * w_scales).t()),
        (grad_x, row_codes * row_scales, w_codes.float()),
        (grad_w, column_codes * column_scales, x_codes.float()),
    ]:
        error = (out.double() - left.double() @ right.double()).abs()
        assert (error <= matmul_bound(left, right)).all()
    # Errors: half a scale of each operand of `y`, one scale of the stochastic gradient codes.
    assert ((y - x @ w.t()).abs() <= _step_bound(x, x_scales, w.t(), w_scales.t())).all()
    exact = (g * w_scales.t()).double()
    bound = row_scales.double() * w_codes.double().abs().sum(0) * 1.001
    assert ((grad_x - exact @ w_codes.double()).abs() <= bound).all()
    exact = (g * x_scales).t().double()
    bound = column_scales.double() * x_codes.double().abs().sum(0) * 1.001
    assert ((grad_w - exact @ x_codes.double()).abs() <= bound).all()


def _step_bound(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> Tensor:
    """Error of a product of two operands that are each off by at most half a scale."""
    k = a.shape[1]
    half_a, half_b = 0.501 * a_scales.double(), 0.501 * b_scales.double()
    return (
        half_a * b.double().abs().sum(0)
        + (a.double().abs().sum(1, keepdim=True)) * half_b
        + (k * half_a * half_b)
    )


ONES = torch.ones(2, 4, dtype=torch.int8)


@pytest.mark.parametrize(
    ("a", "b", "options", "error", "match"),
    [
        (ONES.float(), ONES.t(), {}, TypeError, r"a must be torch\.int8, got torch\.float32"),
        (ONES, ONES.t().float(), {}, TypeError, r"b must be torch\.int8"),
        (ONES[0], ONES.t(), {}, ValueError, r"a must be a matrix, got shape \(4,\)\. Flatten"),
        (ONES, ONES, {}, ValueError, r"\(2, 4\).*\(2, 4\).*Pass \.t\(\) of a matrix"),
        (ONES, ONES.t().to("meta"), {}, ValueError, "on one device, got .* on cpu and .* on meta"),
        (ONES, ONES.repeat(2, 2)[::2, ::2].t(), {}, ValueError, r"got strides .*\.contiguous\(\)"),
        (ONES, ONES.t(), {"dtype": torch.int32}, TypeError, r"returns floats, got dtype=.*int32"),
        (
            ONES,
            ONES.t(),
            {"a_scales": torch.ones(2)},
            ValueError,
            r"a_scales must be float32 of shape \(2, 1\), as quantize",
        ),
        (
            ONES,
            ONES.t(),
            {"b_scales": torch.ones(2, 1).double()},
            ValueError,
            r"b_scales must be float32 .*got torch\.float64",
        ),
        (
            ONES,
            ONES.t(),
            {"a_scales": torch.ones(2, 1, device="meta")},
            ValueError,
            "a_scales must be contiguous and on cpu",
        ),
        (
            ONES,
            ONES.t(),
            {"bias": torch.ones(4)},
            ValueError,
            r"bias must have shape \(2,\) on cpu, got shape \(4,\)",
        ),
        (
            ONES,
            ONES.t(),
            {"columns": torch.tensor([0])},
            ValueError,
            "columns and values, or neither, got only the columns",
        ),
        (
            ONES,
            ONES.t(),
            {"columns": torch.tensor([0]).short(), "values": torch.ones(2, 1)},
            ValueError,
            r"columns must be int64 of shape \[k\] on cpu, got torch\.int16",
        ),
        (
            ONES,
            ONES.t(),
            {"columns": torch.tensor([0]), "values": torch.ones(1, 2)},
            ValueError,
            r"values must be float of shape \(2, 1\).*got torch\.float32 of shape \(1, 2\)",
        ),
        (
            ONES,
            ONES.t(),
            {"columns": torch.tensor([0, -1]), "values": torch.ones(2, 2)},
            IndexError,
            r"columns must be in \[0, 2\), got -1",
        ),
        (
            ONES,
            ONES.t(),
            {"columns": torch.tensor([2]), "values": torch.ones(2, 1)},
            IndexError,
            r"columns must be in \[0, 2\), got 2",
        ),
    ],
)
def test_what_cannot_be_multiplied_is_refused(a, b, options, error, match):
    arguments = {"a_scales": None, "b_scales": None, "dtype": torch.float32, **options}
    with pytest.raises(error, match=match):
        kernels.int8_matmul(a, b, **arguments)
