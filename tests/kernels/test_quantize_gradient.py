"""One gradient quantized by rows and by columns: properties of rounding, on every CPU backend."""

import numpy as np
import pytest
import torch
from torch import Tensor

from qft_hf import kernels
from qft_hf.kernels.cpu.output_gradient import _stochastic_code
from qft_hf.kernels.groups import stochastic_codes
from tests.kernels.backends import cpu, reference
from tests.kernels.states import random, ties
from tests.kernels.test_backends_agree import extremes
from tests.kernels.test_philox import exact_philox
from tests.tolerances import assert_same_bits, mean_error, stochastic_bound

SEED = 0x1234_5678_9ABC_DEF1
# Smallest; odd; one over a quad and over a block of 64 tokens; several blocks of 256 outputs.
SHAPES = [(1, 1), (7, 33), (5, 8), (65, 129), (130, 600)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def factors(rows: int) -> Tensor:
    return torch.rand(rows, 1, generator=torch.Generator().manual_seed(rows)) + 0.1


def forms(results: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return codes and scales by rows, and codes and scales by columns."""
    row_codes, row_scales, column_codes, column_scales = results
    return (row_codes, row_scales), (column_codes, column_scales)


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("make_input", [random, ties, extremes])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_cpu_returns_the_bits_of_the_reference(shape, dtype, make_input, stochastic, n_threads):
    gradient = make_input(shape, None).to(dtype)
    gradient[:, 3::11] = 0.0
    arguments = (gradient, factors(shape[1]), factors(shape[0]))
    before = gradient.clone()

    actual = cpu.quantize_gradient(*arguments, stochastic=stochastic, seed=SEED)

    expected = reference.quantize_gradient(*arguments, stochastic=stochastic, seed=SEED)
    for tensor, wanted in zip(actual, expected, strict=True):
        assert_same_bits(tensor, wanted)
    assert_same_bits(gradient, before)


def test_every_code_follows_from_the_definition():
    """Both forms of a small gradient, element by element, with Philox in Python integers."""
    gradient = random((5, 7), None)
    results = kernels.quantize_gradient(gradient, factors(7), factors(5), seed=SEED)

    scaled = [gradient.numpy() * factors(7).numpy().T, (gradient.numpy() * factors(5).numpy()).T]
    for stream, (form, values) in enumerate(zip(forms(results), scaled, strict=True)):
        codes, scales = (tensor.numpy() for tensor in form)
        absmax = np.abs(values).max(axis=1)
        assert (scales[:, 0] == absmax * np.float32(1 / 127)).all()
        steps = values * (np.float32(1) / scales)
        rows, columns = values.shape
        for row in range(rows):
            for column in range(columns):
                counter = [row * -(-columns // 4) + column // 4, int(absmax[row].view(np.int32))]
                words = exact_philox([*counter, stream, 0], [SEED % 2**32, SEED // 2**32])
                uniform = (words[column % 4] >> 8) / 2**24
                step = float(steps[row, column])
                # Ends of the range would need clamping only after a rounding error.
                assert codes[row, column] == min(127, max(-127, np.floor(step + uniform)))


@pytest.mark.parametrize("form", [0, 1])
def test_rounding_is_unbiased(form):
    """The mean over seeds is the value, within five standard errors and a value's FP32 noise."""
    n_seeds = 400
    gradient = torch.linspace(-1, 1, 12).view(3, 4) ** 3
    gradient[0] *= 1e-3  # most of a row far below one code of its column
    sums = torch.zeros(2, 3, 4, dtype=torch.float64)

    for seed in range(n_seeds):
        results = kernels.quantize_gradient(gradient, factors(4), factors(3), seed=seed)
        rows, columns = forms(results)
        sums[0] += rows[0].double() * rows[1].double()
        sums[1] += (columns[0].double() * columns[1].double()).t()

    exact = [gradient * factors(4).t(), gradient * factors(3)][form].double()
    scales = [rows[1], columns[1].t()][form].double()
    bound = scales * (5 * mean_error(0.5, n_seeds) + 128 * 2.0**-22)
    assert ((sums[form] / n_seeds - exact).abs() <= bound).all()
    # The bound is tight enough: nearest rounding exceeds it.
    results = kernels.quantize_gradient(gradient, factors(4), factors(3), stochastic=False, seed=0)
    nearest = forms(results)[form]
    values = nearest[0].double() * nearest[1].double()
    values = values if form == 0 else values.t()
    assert not ((values - exact).abs() <= bound).all()


@pytest.mark.parametrize("make_input", [random, ties])
def test_rounding_moves_a_value_by_less_than_a_scale(make_input):
    gradient = make_input((65, 129), None)

    results = kernels.quantize_gradient(gradient, factors(129), factors(65), seed=SEED)
    rows, columns = forms(results)

    for (codes, scales), values in [
        (rows, gradient * factors(129).t()),
        (columns, (gradient * factors(65)).t()),
    ]:
        error = (codes.double() * scales.double() - values.double()).abs().numpy()
        assert (error <= stochastic_bound(scales.double().numpy())).all()
        assert codes.abs().max() == 127


@pytest.mark.parametrize("backend", [reference, cpu], ids=str)
def test_values_on_the_grid_stay(backend):
    """A multiple of the scale needs no rounding, so it stays for every random number."""
    gradient = torch.arange(-127.0, 128.0).repeat(40, 1)
    ones = torch.ones(255, 1), torch.ones(40, 1)

    for seed in range(30):  # 300,000 values: a chance of 2**-18 of moving one would show
        rows = backend.quantize_gradient(gradient, ones[0], None, stochastic=True, seed=seed)
        assert (rows[1] == 1).all()
        assert (rows[0] == gradient).all()
        columns = backend.quantize_gradient(
            gradient.t().contiguous(), None, ones[0], stochastic=True, seed=seed
        )
        assert (columns[2] == gradient).all()


@pytest.mark.parametrize("backend", [cpu, reference], ids=str)
def test_a_column_is_scaled_by_its_largest_value_wherever_it_stands(backend):
    """Each column has one nonzero value, each at another token."""
    _, _, codes, scales = backend.quantize_gradient(
        torch.eye(130), None, torch.ones(130, 1), seed=3
    )

    assert (scales * 127 - 1).abs().max() < 1e-6
    assert torch.equal(codes, 127 * torch.eye(130, dtype=torch.int8))


def test_codes_end_at_127():
    """The largest value of a row can come out one unit of FP32 above 127 codes."""
    over = float(np.nextafter(np.float32(127), np.float32(128)))

    codes = stochastic_codes(torch.tensor([over, -over]), torch.tensor([1 - 2.0**-24, 0.0]))

    assert codes.tolist() == [127, -127]
    assert _stochastic_code(np.float32(over), np.uint32(2**32 - 1)) == 127
    assert _stochastic_code(np.float32(-over), np.uint32(0)) == -127


def test_nearest_rounding_is_that_of_quantize():
    gradient = ties((6, 24), None)

    results = kernels.quantize_gradient(gradient, factors(24), factors(6), stochastic=False, seed=0)
    rows, columns = forms(results)

    for form, values in [
        (rows, gradient * factors(24).t()),
        (columns, (gradient * factors(6)).t()),
    ]:
        for tensor, wanted in zip(
            form, kernels.quantize(values.contiguous(), group_size=None), strict=True
        ):
            assert_same_bits(tensor, wanted)


@pytest.mark.parametrize("stochastic", [True, False])
def test_zeros_stay_zero_and_do_not_touch_their_neighbours(stochastic):
    gradient = torch.ones(6, 9)
    gradient[2], gradient[:, 5] = 0.0, 0.0
    ones = torch.ones(9, 1), torch.ones(6, 1)

    results = kernels.quantize_gradient(gradient, *ones, stochastic=stochastic, seed=SEED)
    rows, columns = forms(results)

    for (codes, scales), values in [(rows, gradient), (columns, gradient.t())]:
        assert (codes == 127 * values).all()
        assert (scales[(values == 0).all(dim=1)] == np.float32(1e-30)).all()


@pytest.mark.parametrize("backend", [reference, cpu], ids=str)
def test_what_some_devices_take_for_zero_counts_as_zero(backend):
    """With the smallest scale, no random number rounds a subnormal value away from 0."""
    gradient = torch.tensor([2.0**-127, -(2.0**-149), -(2.0**-126)]).repeat(3000, 1)
    ones = torch.ones(3, 1), torch.ones(3000, 1)

    results = backend.quantize_gradient(gradient, *ones, stochastic=True, seed=SEED)

    for codes, scales in forms(results):
        assert (codes == 0).all()
        assert (scales == np.float32(1e-30)).all()
    values = torch.tensor([2.0**-126, -(2.0**-126)]) / 1e-30
    for word in (0, 2**32 - 1):
        assert (stochastic_codes(values, torch.full((2,), (word >> 8) / 2**24)) == 0).all()
        assert {_stochastic_code(value, np.uint32(word)) for value in values.numpy()} == {0}


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("backend", [reference, cpu], ids=str)
def test_factors_of_zeros_take_no_codes_from_the_others(backend, stochastic):
    """Tokens and weight rows of zeros have the smallest scale, which becomes their factor."""
    gradient = random((30, 40), None)
    row_factors, column_factors = factors(40) * 1e-3, factors(30) * 1e-3
    row_factors[::7], column_factors[::5] = 1e-30, 1e-30
    options = {"stochastic": stochastic, "seed": SEED}

    results = backend.quantize_gradient(gradient, row_factors, column_factors, **options)

    zeros = row_factors.clone(), column_factors.clone()
    zeros[0][::7], zeros[1][::5] = 0.0, 0.0
    for tensor, wanted in zip(
        results, backend.quantize_gradient(gradient, *zeros, **options), strict=True
    ):
        assert_same_bits(tensor, wanted)


@pytest.mark.parametrize("backend", [reference, cpu], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_keeps_a_scale_that_tells(backend, bad):
    gradient = random((7, 10), None)
    gradient[4, 6] = bad

    row_codes, row_scales, column_codes, column_scales = backend.quantize_gradient(
        gradient, factors(10), factors(7), stochastic=True, seed=SEED
    )

    for codes, scales, row in [(row_codes, row_scales, 4), (column_codes, column_scales, 6)]:
        finite = scales.isfinite().flatten()
        assert finite.tolist() == [i != row for i in range(len(finite))]
        assert (codes[row] == 0).all()
        assert (codes[finite].abs().amax(dim=1) == 127).all()


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("backend", [reference, cpu], ids=str)
def test_a_form_is_made_where_its_factors_are_given(backend, stochastic):
    gradient, options = random((7, 10), None), {"stochastic": stochastic, "seed": SEED}
    both = forms(backend.quantize_gradient(gradient, factors(10), factors(7), **options))

    rows, no_columns = forms(backend.quantize_gradient(gradient, factors(10), None, **options))
    no_rows, columns = forms(backend.quantize_gradient(gradient, None, factors(7), **options))

    empty = torch.empty(0, 0, dtype=torch.int8), torch.empty(0, 1)
    for form, wanted in [
        (rows, both[0]),
        (columns, both[1]),
        (no_rows, empty),
        (no_columns, empty),
    ]:
        for tensor, expected in zip(form, wanted, strict=True):
            assert_same_bits(tensor, expected)


@pytest.mark.parametrize(
    ("gradient", "row_factors", "column_factors", "error", "match"),
    [
        (torch.ones(2, 3).double(), factors(3), None, TypeError, r"gradient must be .*float64"),
        (torch.ones(0, 3), factors(3), None, ValueError, r"gradient must be a non-empty"),
        (torch.ones(3, 2).t(), factors(3), None, ValueError, r"gradient must be contiguous"),
        (torch.ones(2, 3), None, None, ValueError, "row factors, column factors, or both; got"),
        (torch.ones(2, 3), factors(2), None, ValueError, r"row_factors must be .* \(3, 1\)"),
        (torch.ones(2, 3), None, factors(3), ValueError, r"column_factors must be .* \(2, 1\)"),
    ],
)
def test_what_cannot_be_quantized_is_refused(gradient, row_factors, column_factors, error, match):
    with pytest.raises(error, match=match):
        kernels.quantize_gradient(gradient, row_factors, column_factors, seed=0)
