"""`int8_linear`: an INT8 product and its outlier columns, on the backends of a CPU."""

import pytest
import torch
from torch import Tensor

from qft_hf import kernels
from qft_hf.kernels import Input, Weight
from tests.kernels.backends import cpu, reference
from tests.tolerances import assert_same_bits, int8_linear_bound

BACKENDS = [reference, cpu]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Tokens, rows, columns, outlier columns of the weight and of the input.
SIZES = [(1, 1, 1, 0, 0), (5, 7, 33, 1, 0), (5, 7, 33, 0, 2), (70, 40, 300, 20, 37)]


def make_case(
    sizes: tuple[int, ...], dtype: torch.dtype, *, exact: bool
) -> tuple[Input, Tensor, Weight, Tensor]:
    """Return an input, the floats it was quantized from, a weight and a bias.

    With `exact` all of them are small integers, so that every sum of them is exact in any order and
    fits the shortest dtype.
    """
    tokens, rows, columns, n_of_weight, n_of_input = sizes
    generator = torch.Generator().manual_seed(sum(sizes))

    def integers(*shape: int) -> Tensor:
        return torch.randint(-1, 2, shape, generator=generator)

    def floats(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    make = integers if exact else floats
    x = make(tokens, columns).to(dtype)
    of_input = torch.randperm(columns, generator=generator)[:n_of_input].sort().values
    of_weight = torch.randperm(columns, generator=generator)[:n_of_weight].sort().values
    kept = integers(tokens, columns) * (torch.rand(columns, generator=generator) < 0.1)
    codes = kept if exact else torch.randint(-127, 128, (tokens, columns), generator=generator)
    codes = codes.index_fill(1, of_input, 0).to(torch.int8)
    limit = 1 if exact else 127
    w_codes = torch.randint(-limit, limit + 1, (rows, columns), generator=generator)
    w_codes = w_codes.index_fill(1, of_weight, 0).to(torch.int8)
    scales, w_scales = (
        torch.ones(size, 1) if exact else torch.rand(size, 1, generator=generator) * 0.01 + 1e-3
        for size in (tokens, rows)
    )
    weight = Weight(
        w_codes, w_scales, make(rows, n_of_weight).float(),
        of_weight.short().expand(rows, n_of_weight).contiguous(), None,
    )  # fmt: skip
    values = x.t().index_select(0, of_input).t()
    return Input(codes, scales, of_input, values), x, weight, make(rows).to(dtype)


def terms(
    x: Input, floats: Tensor, weight: Weight, bias: Tensor | None, dtype: torch.dtype
) -> list[tuple[Tensor, Tensor]]:
    """Pairs of fp64 factors `[N, k]` and `[k, R]` whose products make up the output."""
    n = len(floats)
    columns = weight.outlier_columns[0].long()
    coded = weight.codes[:, x.columns].float() * weight.scales
    pairs = [
        (x.codes.double() * x.scales, (weight.codes.double() * weight.scales).t()),
        (floats[:, columns].to(dtype), weight.outlier_values.to(dtype).t()),
        (x.values.to(dtype), coded.to(dtype).t()),
    ]
    if bias is not None:
        pairs.append((torch.ones(n, 1), bias[None]))
    return [(left.double(), right.double()) for left, right in pairs]


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_small_integers_give_the_exact_sum(backend, sizes, dtype, has_bias):
    """Nothing is rounded, so that a missing, repeated or misplaced term shows."""
    x, floats, weight, bias = make_case(sizes, dtype, exact=True)
    bias = bias if has_bias else None
    exact = sum(left @ right for left, right in terms(x, floats, weight, bias, dtype))

    y = backend.int8_linear(x, floats, weight, bias=bias, dtype=dtype)

    assert exact.abs().max() <= 256
    assert_same_bits(y, exact.to(dtype))


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_sum_is_off_by_its_roundings_alone(backend, sizes, dtype):
    x, floats, weight, bias = make_case(sizes, dtype, exact=False)
    pairs = terms(x, floats, weight, bias, dtype)

    y = backend.int8_linear(x, floats, weight, bias=bias, dtype=dtype)

    exact = sum(left @ right for left, right in pairs)
    assert ((y.double() - exact).abs() <= int8_linear_bound(pairs, dtype)).all()


def test_without_outlier_columns_it_is_the_integer_product():
    x, floats, weight, bias = make_case((5, 7, 33, 0, 0), torch.bfloat16, exact=False)

    y = kernels.int8_linear(x, floats, weight, bias=bias, dtype=torch.bfloat16)

    expected = kernels.int8_matmul(
        x.codes, weight.codes.t(), x.scales, weight.scales, bias=bias, dtype=torch.bfloat16
    )
    assert_same_bits(y, expected)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"floats": torch.ones(5, 32)}, ValueError, r"the 33 columns of the weight.*\(5, 32\)"),
        ({"floats": torch.ones(33, 5).t()}, ValueError, r"contiguous.*strides \(1, 5\)"),
        ({"bias": torch.ones(8)}, ValueError, r"bias must have shape \(7,\)"),
        ({"dtype": torch.int8}, TypeError, "int8_linear returns floats"),
        ({"scales": torch.ones(4, 1)}, ValueError, r"scales of x must be float32 of shape \(5, 1"),
        ({"codes": torch.ones(5, 33)}, TypeError, "x must be torch.int8, got torch.float32"),
        ({"values": torch.ones(5, 2)}, ValueError, r"column by column, got .*strides \(2, 1\)"),
        ({"values": torch.ones(5, 2, 1)}, ValueError, r"shape \(5, 2\) .*got \(5, 2, 1\)"),
        ({"values": torch.ones(3, 5).t()}, ValueError, r"shape \(5, 2\) .*got \(5, 3\)"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, match):
    """Triton's kernel reads outliers column by column: it once returned wrong sums for others."""
    x, floats, weight, bias = make_case((5, 7, 33, 1, 2), torch.float32, exact=False)
    given = {"floats": floats, "bias": bias, "dtype": torch.float32, **change}
    x = x._replace(**{name: given.pop(name) for name in x._fields if name in given})

    with pytest.raises(error, match=match):
        kernels.int8_linear(x, given.pop("floats"), weight, **given)


def test_a_weight_whose_groups_are_no_rows_is_refused():
    x, floats, weight, _ = make_case((5, 7, 33, 1, 1), torch.float32, exact=False)
    grouped = Weight(weight.codes, torch.ones(7, 3), *weight.tensors[2:], 11)

    with pytest.raises(ValueError, match=r"groups of 11 columns\. Quantize it with group_size="):
        kernels.int8_linear(x, floats, grouped, dtype=torch.float32)
