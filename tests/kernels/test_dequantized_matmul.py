"""Products with an INT8 weight that is dequantized on the fly: which terms are summed, how exactly.

Float sums have no fixed order, so backends agree within a bound, and bit for bit on exact sums.
"""

import pytest
import torch

from qft_hf import kernels
from qft_hf.kernels import Weight
from qft_hf.kernels.cpu.dequantized_product import KINDS, round_to
from tests.kernels.backends import cpu, reference
from tests.kernels.states import make_product
from tests.tolerances import BF16_EPS, assert_same_bits, dequantized_matmul_bound

BACKENDS = [reference, cpu]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOKENS = [1, 2, 4, 7, 16]  # one, groups of four, and both
# One element; odd; more than one vector of every kind; split by threads.
SHAPES = [(1, 1), (7, 33), (5, 300), (70, 1100)]
GROUP_SIZES = [None, 3, 32, 100, 5000]


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("outlier_fraction", [0.0, 0.03])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_of_any_order(backend, shape, dtype, group_size, outlier_fraction, n_threads):
    for n_tokens in TOKENS:
        product = make_product(
            n_tokens, shape, group_size, dtype=dtype, outlier_fraction=outlier_fraction
        )
        weight, bias = product.expanded(reference, dtype), product.bias.to(dtype)

        y = product.run(backend)

        assert (y.dtype, y.shape, y.is_contiguous()) == (dtype, (n_tokens, shape[0]), True)
        exact = product.x.double() @ weight.double().t() + bias.double()
        error = (y.double() - exact).abs()
        assert (error <= dequantized_matmul_bound(product.x, weight, bias)).all()


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("outlier_fraction", [0.0, 0.03])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_sums_have_no_order(backend, shape, dtype, group_size, outlier_fraction):
    for n_tokens in TOKENS:
        product = make_product(
            n_tokens, shape, group_size, dtype=dtype, outlier_fraction=outlier_fraction, exact=True
        )
        weight = product.expanded(reference, torch.float32).double()

        y = product.run(backend)

        exact = product.x.double() @ weight.t() + product.bias.double()
        assert_same_bits(y.double(), exact)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int16, torch.int32], ids=str)
@pytest.mark.parametrize("group_size", [None, 3, 32])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_weight_is_that_of_dequantize(backend, dtype, group_size, index_dtype):
    """Each token selects one column, and a bias of minus that column leaves exactly 0.

    If elements were rounded only with the result, a remainder would be left. Most of them are below
    FP16's normal numbers; the token scales them above.
    """
    product = make_product(
        1, (9, 45), group_size, dtype=dtype, outlier_fraction=0.05, index_dtype=index_dtype
    )
    product.weight.scales /= 300
    weight = product.expanded(reference, dtype)

    for column, token in enumerate(1024 * torch.eye(45, dtype=dtype)):
        product.x, product.bias = token[None], -1024 * weight[:, column]
        assert (product.run(backend) == 0).all()
    if dtype != torch.float32:
        assert (weight != product.expanded(reference, torch.float32)).any()


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_the_bias_is_rounded_to_the_dtype_of_the_tokens_before_it_is_added(backend):
    """127.5 + 1 is a tie between BF16 numbers; with a bias that is not rounded it is above it."""
    product = make_product(3, (4, 20), None, dtype=torch.bfloat16)
    product.x.zero_()
    product.bias = torch.full((4,), 1 + 0.75 * BF16_EPS)
    product.x[1, 0], product.weight.codes[:, 0], product.weight.scales[:] = 1.0, 51, 2.5

    y = product.run(backend)

    assert (y[[0, 2]] == 1).all()
    assert (y[1] == 128).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_on_the_cpu_is_that_of_pytorch(dtype):
    """Ties in both directions, subnormal numbers, overflow, infinities and NaN."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (4000,), generator=generator).int()
    special = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7F800000, -(2**23)]).int()
    steps = torch.arange(-2000, 2000)
    values = torch.cat([
        bits.view(torch.float32),
        special.view(torch.float32),
        steps * 2.0**-25,  # half-steps of FP16's smallest numbers
        1 + steps * BF16_EPS / 4,
        65504 + steps.float() / 4,
    ])  # fmt: skip

    rounded = [round_to(KINDS[dtype], value) for value in values.numpy()]

    assert_same_bits(torch.tensor(rounded), values.to(dtype).float())


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_visible(backend, dtype, group_size):
    """A non-finite input shows in its token only, a non-finite scale in its row only."""
    product = make_product(6, (5, 70), group_size, dtype=dtype, outlier_fraction=0.03)
    product.x[1, 3] = float("nan")
    product.x[4, 69] = float("inf")
    product.weight.scales[2, 0] = float("nan")

    finite = product.run(backend).isfinite()

    assert not finite[[1, 4]].any()
    assert not finite[:, 2].any()
    assert finite[[0, 2, 3, 5]][:, [0, 1, 3, 4]].all()


def test_nothing_is_modified():
    product = make_product(5, (7, 33), 8, dtype=torch.float32, outlier_fraction=0.05)
    before = make_product(5, (7, 33), 8, dtype=torch.float32, outlier_fraction=0.05)

    product.run(cpu)

    tensors = (product.x, product.bias, *product.weight.tensors)
    for tensor, wanted in zip(
        tensors, (before.x, before.bias, *before.weight.tensors), strict=True
    ):
        assert_same_bits(tensor, wanted)


X, CODES, SCALES = torch.ones(3, 4), torch.ones(2, 4, dtype=torch.int8), torch.ones(2, 1)
NONE = torch.ones(2, 0)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": X.double()}, TypeError, r"x must be torch\.float32 or .*float64"),
        ({"x": X[0]}, ValueError, r"got shape \(4,\)\. Flatten"),
        ({"x": X[:0]}, ValueError, r"x must be a non-empty"),
        ({"x": torch.ones(4, 3).t()}, ValueError, r"Call \.contiguous\(\) first"),
        ({"x": X[:, :3].contiguous()}, ValueError, r"\(3, 3\) .* and \(2, 4\)"),
        ({"x": X.to("meta")}, ValueError, "on one device, got .* on meta"),
        ({"codes": CODES.float()}, TypeError, r"weight codes must be torch\.int8"),
        ({"group_size": 2}, ValueError, r"scales must .* \(2, 2\)"),
        ({"group_size": 0}, ValueError, "group_size=0"),
        ({"bias": torch.ones(4)}, ValueError, r"bias .*\(2,\) on cpu"),
        (
            {"outlier_values": torch.ones(2, 1)},
            ValueError,
            r"outlier columns must be .* same shape .*\(2, 1\) on cpu and \(2, 0\)",
        ),
        (
            {
                "outlier_values": torch.ones(2, 1),
                "outlier_columns": torch.tensor([[0], [4]]).short(),
            },
            ValueError,
            r"outlier columns must be in \[0, 4\), got 4",
        ),
    ],
)
def test_what_cannot_be_multiplied_is_refused(change, error, match):
    arguments = {
        "x": X,
        "bias": None,
        "codes": CODES,
        "scales": SCALES,
        "outlier_values": NONE,
        "outlier_columns": NONE.short(),
        "group_size": None,
        **change,
    }

    with pytest.raises(error, match=match):
        kernels.dequantized_matmul(
            arguments.pop("x"), bias=arguments.pop("bias"), weight=Weight(**arguments)
        )
