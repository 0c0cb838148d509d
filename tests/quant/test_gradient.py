"""`Int8Gradient` under autograd, accumulation and clipping."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from qft_hf.quant import Arrangement, Int8Gradient, TiledGradient, Tiles
from tests.tolerances import FP32_EPS, assert_same_bits, rounding_bound
from tests.values import scales64, values64


def gradient_of(x: torch.Tensor) -> Int8Gradient:
    gradient = Int8Gradient.zeros(x)
    gradient.set_rows_(slice(0, len(x)), x)
    return gradient


def random(rows=7, columns=300, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) * 1e-3).to(dtype)


def is_finite(gradient: Int8Gradient) -> bool:
    return bool(gradient.scales.isfinite().all())


def test_zeros_are_zero_with_scale_one():
    gradient = Int8Gradient.zeros(torch.empty(3, 600, dtype=torch.bfloat16))

    assert (gradient.codes == 0).all()
    assert tuple(gradient.scales.shape) == (3, 3)
    assert (gradient.scales == 1).all()
    assert gradient.dtype == torch.bfloat16
    assert gradient.stored_bytes == 3 * 600 + 3 * 3 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_may_come_in_any_order_and_form(dtype):
    x = random(dtype=dtype)
    whole = gradient_of(x)
    parts = Int8Gradient.zeros(torch.empty(7, 300, dtype=dtype))

    parts.set_rows_(slice(6, 7), x[6:])
    parts.set_rows_(slice(0, 3), x[:3])
    parts.set_rows_(slice(3, 6), x.t().contiguous().t()[3:6])  # not contiguous

    assert_same_bits(parts.codes, whole.codes)
    assert_same_bits(parts.scales, whole.scales)
    error = (values64(whole) - x.double()).abs()
    assert (error.numpy() <= rounding_bound(x.double().numpy(), scales64(whole).numpy())).all()
    assert_same_bits(whole.dequantize(), (whole.codes * scales64(whole).float()).to(dtype))


def tiled(x: torch.Tensor, n_rows: int, tile_source: Tiles | None = None) -> TiledGradient:
    """Return `x` in tiles of `n_rows` rows, as if each were made when it is requested."""
    rows = [slice(i, min(i + n_rows, len(x))) for i in range(0, len(x), n_rows)]
    return TiledGradient(
        tile_source or Tiles(lambda part: x[part]),
        rows,
        arrangement=Arrangement(tuple(x.shape)),
        dtype=x.dtype,
        device=x.device,
    )


@pytest.mark.parametrize("n_rows", [7, 3])
def test_tiles_are_made_when_they_are_asked_for_and_in_order(n_rows):
    x, made = random(dtype=torch.bfloat16), []
    transposed = x.t().contiguous().t()  # its tiles are not contiguous
    gradient = tiled(x, n_rows, Tiles(lambda rows: made.append(rows) or transposed[rows]))
    alias = gradient.detach()

    assert isinstance(alias, TiledGradient)
    for one in (gradient, alias):
        assert (one.shape, one.dtype, one.device) == (x.shape, x.dtype, x.device)
    assert not made

    for number, rows in enumerate(alias.rows):
        tile = alias.tile_of(rows)
        assert made == gradient.rows[: number + 1]  # no tile before its turn
        assert tile.is_contiguous()
        assert_same_bits(tile, x[rows])
    assert number == len(gradient.rows) - 1


def test_operators_read_the_values_of_tiles():
    """With release, `torch.autograd.grad` returns them. They were taken for a tensor that is stored
    in no fields: any two were equal, `copy_` did nothing, and views ended in a TypeError.
    """
    x = random()
    values = gradient_of(x).dequantize()

    assert torch.equal(tiled(x, 3), tiled(x, 7))
    assert not torch.equal(tiled(x, 3), tiled(2 * x, 3))
    assert_same_bits(tiled(x, 3).double(), values.double())
    assert_same_bits(tiled(x, 3).view(x.shape).clone(), values)
    with pytest.raises(NotImplementedError, match=r"assign a new one to \.grad"):
        tiled(x, 3).copy_(tiled(2 * x, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_rows", [7, 3])
def test_tiles_quantize_to_the_bits_of_the_whole(n_rows, dtype):
    x = random(dtype=dtype)
    eager = gradient_of(x)

    gradient = tiled(x, n_rows).detach().clone().quantized()

    assert type(gradient) is Int8Gradient
    assert gradient.dtype == dtype
    assert_same_bits(gradient.codes, eager.codes)
    assert_same_bits(gradient.scales, eager.scales)


@pytest.mark.parametrize("n_rows", [7, 3])
def test_tiles_that_are_made_quantized_are_never_float(n_rows):
    x = random()
    eager = gradient_of(x)

    def make(rows: slice) -> torch.Tensor:
        raise AssertionError("no float gradient is wanted")

    def make_quantized(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return eager.codes[rows], eager.scales[rows]

    gradient = tiled(x, n_rows, Tiles(make, make_quantized)).detach().quantized()

    assert_same_bits(gradient.codes, eager.codes)
    assert_same_bits(gradient.scales, eager.scales)


@pytest.mark.parametrize(
    "add",
    [
        lambda one, other: tiled(one, 3) + tiled(other, 7),
        lambda one, other: tiled(one, 3) + gradient_of(other),
        lambda one, other: gradient_of(one) + tiled(other, 3),
        lambda one, other: gradient_of(one).add_(tiled(other, 3)),
    ],
)
def test_gradients_in_tiles_add_as_int8_ones_do(add):
    """Autograd sums the gradients of a weight that is used twice, and of several passes."""
    one, other = random(seed=1), random(seed=2) * 5
    expected = gradient_of(one) + gradient_of(other)

    total = add(one, other)

    assert type(total) is Int8Gradient
    assert_same_bits(total.codes, expected.codes)
    assert_same_bits(total.scales, expected.scales)


def test_tiles_are_read_as_their_int8_form_and_not_written():
    gradient = tiled(random(), 3)
    values = gradient.quantized().dequantize()

    assert_same_bits(gradient * 0.5, values * 0.5)
    assert_same_bits(torch.linalg.vector_norm(gradient), torch.linalg.vector_norm(values))
    with pytest.raises(NotImplementedError, match=r"aten\.mul_\.Tensor would write"):
        gradient.mul_(0.5)


def test_add_in_place_and_out_of_place_agree():
    first, second = gradient_of(random(seed=1)), gradient_of(random(seed=2) * 5)
    kept = copy.deepcopy(first)

    total = first + second

    assert_same_bits(first.codes, kept.codes)
    exact = (first.dequantize().double() + second.dequantize().double()).numpy()
    error = abs(total.dequantize().double().numpy() - exact)
    terms = first.dequantize().abs() + second.dequantize().abs()
    assert (error <= rounding_bound(terms.numpy(), scales64(total).numpy())).all()
    first += second
    assert_same_bits(first.codes, total.codes)
    assert_same_bits(first.scales, total.scales)


@pytest.mark.parametrize(
    ("scale_", "scale"),
    [
        (lambda g: g.mul_(0.3), lambda g: g * 0.3),
        (lambda g: g.mul_(torch.tensor(0.3)), lambda g: g * torch.tensor(0.3)),
        (lambda g: g.div_(1 / 0.3), lambda g: g / (1 / 0.3)),
        (lambda g: g.div_(torch.tensor([1 / 0.3])), lambda g: g / torch.tensor(1 / 0.3)),
    ],
)
def test_scaling_changes_scales_and_never_codes(scale_, scale):
    gradient = gradient_of(random())
    before = copy.deepcopy(gradient)

    scaled = scale(gradient)

    assert_same_bits(gradient.scales, before.scales)
    assert_same_bits(scaled.codes, before.codes)
    torch.testing.assert_close(scaled.scales, before.scales * 0.3, rtol=4 * FP32_EPS, atol=0)
    assert scale_(gradient) is gradient
    assert_same_bits(gradient.codes, before.codes)
    assert_same_bits(gradient.scales, scaled.scales)


def test_zero_forgets_everything_even_nan():
    x = random()
    x[2, 5] = float("nan")
    gradient = gradient_of(x)

    gradient.zero_()

    assert (gradient.dequantize() == 0).all()
    assert is_finite(gradient)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen_and_survives(bad):
    x = random()
    x[6, 299] = bad
    gradient = gradient_of(x)

    assert not is_finite(gradient)
    assert not is_finite(gradient + gradient_of(random()))
    assert not is_finite(gradient * 0.0)  # an infinite norm clips with the factor 0
    assert not torch.linalg.vector_norm(gradient).isfinite()
    assert is_finite(gradient_of(random()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm_is_that_of_the_stored_values(dtype):
    gradient = gradient_of(random(dtype=dtype))
    exact = values64(gradient).norm()

    for norm in (torch.linalg.vector_norm(gradient), torch.linalg.vector_norm(gradient, 2.0)):
        assert norm.dtype == torch.float32
        assert norm.item() == pytest.approx(exact.item(), rel=2 * FP32_EPS)


@pytest.mark.parametrize(
    ("other", "arguments"),
    [(random(), {"alpha": 0.5}), (random()[0], {}), (torch.ones(()), {}), (0.5, {})],
)
def test_adding_in_place_what_is_no_gradient_of_the_weight_is_refused(other, arguments):
    gradient = gradient_of(random())
    before = copy.deepcopy(gradient)

    with pytest.raises(NotImplementedError, match=r"In a hook, return gradient \+ other instead"):
        gradient.add_(other, **arguments)
    assert torch.equal(gradient, before)


def test_a_sum_that_is_no_gradient_of_the_weight_is_of_the_values():
    gradient = gradient_of(random())
    values = gradient.dequantize()

    for use in (
        lambda g: g + 0.5,
        lambda g: g + random()[0],
        lambda g: torch.add(g, random(), alpha=0.5),
        lambda g: torch.zeros(7, 300).add_(g, alpha=3),
    ):
        assert_same_bits(use(gradient), use(values))


def rows_of(factor: torch.Tensor) -> torch.Tensor:
    return factor.double().expand(7, 300)


@pytest.mark.parametrize("kind", ["float", "bool"])
def test_a_factor_for_each_row_changes_scales_and_never_codes(kind):
    gradient = gradient_of(random())
    before = copy.deepcopy(gradient)
    factor = torch.tensor([1.0, 0, 0.5, 3, 0, 1, 1])[:, None]
    factor = factor.bool() if kind == "bool" else factor

    for scaled in (gradient * factor, factor * gradient):
        assert_same_bits(scaled.codes, before.codes)
        assert_same_bits(scaled.scales, before.scales * factor)
    assert_same_bits(gradient.scales, before.scales)
    assert gradient.mul_(factor) is gradient
    assert_same_bits(gradient.codes, before.codes)
    assert_same_bits(gradient.scales, before.scales * factor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(7, 300), (1, 300), (300,)], ids=str)
def test_a_factor_for_each_element_is_rounded_to_nearest(shape, dtype):
    gradient = gradient_of(random(dtype=dtype))
    before = copy.deepcopy(gradient)
    factor = torch.rand(shape, generator=torch.Generator().manual_seed(3))
    factor[..., :100] = 0
    values = values64(before)

    for scaled in (gradient * factor, factor * gradient, gradient / factor.reciprocal()):
        exact = (values * rows_of(factor)).numpy()
        error = abs(values64(scaled).numpy() - exact)
        noise = 4 * FP32_EPS * abs(exact)
        assert (error <= rounding_bound(exact, scales64(scaled).numpy()) + noise).all()
        assert (scaled.codes[:, :100] == 0).all()
    assert_same_bits(gradient.codes, before.codes)
    assert gradient.mul_(factor) is gradient
    assert_same_bits(gradient.codes, (before * factor).codes)
    assert_same_bits(gradient.scales, (before * factor).scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_mask_of_elements_leaves_the_codes_of_the_others(dtype):
    """Stored values are exact, so no rounding to the outer dtype may move them."""
    x = random(rows=400, dtype=dtype)
    gradient = gradient_of(x)
    mask = torch.ones(400, 300)
    mask[:, 7] = 0
    top = gradient.codes.abs() == 127  # they set the scales, and stay
    mask[top] = 1

    masked = gradient * mask

    assert_same_bits(masked.codes, gradient.codes * mask.to(torch.int8))
    torch.testing.assert_close(masked.scales, gradient.scales, rtol=4 * FP32_EPS, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_clipping_by_value_clamps_each_value(dtype):
    """Within half a new scale; of the 300 columns, the second group is shorter, with its scale."""
    parameter = nn.Parameter(torch.zeros(7, 300, dtype=dtype))
    gradient = parameter.grad = gradient_of(random(dtype=dtype))
    before = values64(gradient).numpy()

    nn.utils.clip_grad_value_([parameter], 5e-4)

    assert parameter.grad is gradient
    exact = np.clip(before, -5e-4, 5e-4)
    assert (exact != before).mean() > 0.5
    error = abs(values64(gradient).numpy() - exact)
    noise = 4 * FP32_EPS * abs(exact)
    assert (error <= rounding_bound(exact, scales64(gradient).numpy()) + noise).all()
    assert abs(values64(gradient).numpy()).max() <= 5e-4 * (1 + 4 * FP32_EPS)


def test_clipping_with_foreach_changes_each_gradient_as_without():
    """It was refused by an error that said multiplying and clamping work."""
    several, single = (
        [nn.Parameter(torch.zeros(7, 300)) for _ in range(2)] + [nn.Parameter(torch.zeros(5))]
        for _ in range(2)
    )
    for parameters in (several, single):
        for seed, parameter in enumerate(parameters[:2]):
            parameter.grad = gradient_of((1 + seed) * random())
        parameters[2].grad = torch.linspace(-1, 1, 5)

    norms = [
        nn.utils.clip_grad_norm_(parameters, 0.3, foreach=foreach)
        for parameters, foreach in ((several, True), (single, False))
    ]
    assert norms[0] > 0.3
    torch.testing.assert_close(*norms, rtol=4 * FP32_EPS, atol=0)
    for one, other in zip(several, single, strict=True):
        torch.testing.assert_close(values64(one.grad), values64(other.grad), rtol=1e-6, atol=0)

    before = [values64(parameter.grad) for parameter in several]
    scales = [scales64(parameter.grad) for parameter in several[:2]] + [torch.zeros(())]
    limit = 0.5 * max(value.abs().max().item() for value in before[:2])
    nn.utils.clip_grad_value_(several, limit, foreach=True)
    for parameter, value, scale in zip(several, before, scales, strict=True):
        error = (values64(parameter.grad) - value.clamp(-limit, limit)).abs()
        assert (error <= scale + 4 * FP32_EPS * limit).all()  # rounded to nearest twice


@pytest.mark.parametrize(
    "use",
    [
        lambda g: random() / g,
        lambda g: random().mul_(g),
        lambda g: torch.linalg.vector_norm(g, ord=1),
        lambda g: torch.linalg.vector_norm(g, dim=1),
        lambda g: torch.linalg.vector_norm(g, ord=float("inf")),
        lambda g: g - g * 0.5,
        lambda g: g.sum(),
        lambda g: torch.zeros(7, 300) - g,
        lambda g: g[2:4].t() @ torch.ones(2, 3),
        lambda g: g.view(-1).abs().max(),
    ],
)
def test_an_operator_that_reads_is_that_of_the_values(use):
    gradient = gradient_of(random())

    assert_same_bits(use(gradient), use(gradient.dequantize()))


def test_two_gradients_are_multiplied_and_quantized():
    gradient = gradient_of(random())

    product = gradient * gradient

    exact = gradient.dequantize().double().square().numpy()
    scale = scales64(product).numpy()
    assert type(product) is Int8Gradient
    error = np.abs(product.dequantize().double().numpy() - exact)
    assert (error <= rounding_bound(exact, scale)).all()


@pytest.mark.parametrize(
    "write", [lambda g: g.abs_(), lambda g: g[0].zero_(), lambda g: g.copy_(random())]
)
def test_writing_raises_and_says_what_to_do(write):
    gradient = gradient_of(random())
    before = copy.deepcopy(gradient)

    with pytest.raises(NotImplementedError, match=r"would write to .*return the new gradient from"):
        write(gradient)
    assert torch.equal(gradient, before)


def test_repr_tells_the_format():
    assert repr(gradient_of(random())) == (
        "Int8Gradient(shape=(7, 300), dtype=torch.float32, device=cpu)"
    )


def test_to_another_dtype_keeps_the_codes():
    gradient = gradient_of(random())

    other = gradient.to(torch.bfloat16)

    assert other.dtype == torch.bfloat16
    assert_same_bits(other.codes, gradient.codes)
