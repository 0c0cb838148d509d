"""`Int8Gradient`: what autograd, accumulation and clipping do with it."""

import copy

import pytest
import torch
from torch import nn

from qft_hf.quant import Int8Gradient
from qft_hf.quant.gradient import RowTiles
from tests.tolerances import FP32_EPS, assert_same_bits, rounding_bound


def gradient_of(x: torch.Tensor) -> Int8Gradient:
    gradient = Int8Gradient.zeros(*x.shape, dtype=x.dtype, device=x.device)
    gradient.set_rows_(slice(0, len(x)), x)
    return gradient


def random(rows=7, columns=300, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) * 1e-3).to(dtype)


def spread(gradient: Int8Gradient) -> torch.Tensor:
    return gradient.scales.double()[:, torch.arange(gradient.shape[1]) // 256]


def test_zeros_are_zero_with_scale_one():
    gradient = Int8Gradient.zeros(3, 600, dtype=torch.bfloat16, device="cpu")

    assert (gradient.codes == 0).all()
    assert tuple(gradient.scales.shape) == (3, 3)
    assert (gradient.scales == 1).all()
    assert gradient.dtype == torch.bfloat16
    assert gradient.stored_bytes == 3 * 600 + 3 * 3 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_may_come_in_any_order_and_form(dtype):
    x = random(dtype=dtype)
    whole = gradient_of(x)
    parts = Int8Gradient.zeros(7, 300, dtype=dtype, device="cpu")

    parts.set_rows_(slice(6, 7), x[6:])
    parts.set_rows_(slice(0, 3), x[:3])
    parts.set_rows_(slice(3, 6), x.t().contiguous().t()[3:6])  # not contiguous

    assert_same_bits(parts.codes, whole.codes)
    assert_same_bits(parts.scales, whole.scales)
    error = (whole.codes.double() * spread(whole) - x.double()).abs()
    assert (error.numpy() <= rounding_bound(x.double().numpy(), spread(whole).numpy())).all()
    assert_same_bits(whole.dequantize(), (whole.codes * spread(whole).float()).to(dtype))


def row_tiles(x: torch.Tensor, n_rows: int) -> RowTiles:
    """Tiles of `n_rows` rows of `x`, as if they were made when they are asked for."""
    rows = [slice(i, min(i + n_rows, len(x))) for i in range(0, len(x), n_rows)]
    return RowTiles(lambda part: x[part], rows, shape=tuple(x.shape), device=x.device)


@pytest.mark.parametrize(
    "use",
    [
        lambda g: g.codes,
        lambda g: g.scales,
        lambda g: g.squared_norm(),
        lambda g: torch.linalg.vector_norm(g),
        lambda g: g.mul_(0.5),
        lambda g: g.clone(),
        lambda g: g + g.detach(),
        lambda g: g.is_finite(),
        lambda g: g.dequantize(),
        lambda g: g.stored_bytes,
        lambda g: g.zero_(),
    ],
)
@pytest.mark.parametrize("n_rows", [7, 3])
def test_a_deferred_gradient_is_made_and_quantized_when_it_is_used(use, n_rows):
    x = random(dtype=torch.bfloat16)
    eager = gradient_of(x)
    tiles = row_tiles(x, n_rows)
    deferred = Int8Gradient.deferred(tiles, dtype=torch.bfloat16)
    alias = deferred.detach()
    assert deferred.tiles is tiles
    assert alias.tiles is tiles
    assert (deferred.shape, deferred.dtype, deferred.device) == (x.shape, x.dtype, x.device)

    found, expected = use(deferred), use(eager)

    assert deferred.tiles is None
    assert alias.tiles is None
    with pytest.raises(RuntimeError, match="use its codes and scales"):
        next(iter(tiles))
    assert_same_bits(deferred.codes, eager.codes)
    assert_same_bits(deferred.scales, eager.scales)
    assert alias.codes is deferred.codes  # as aliases of one tensor share its memory
    if isinstance(found, Int8Gradient):
        assert_same_bits(found.codes, expected.codes)
        assert_same_bits(found.scales, expected.scales)
    else:
        assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))


@pytest.mark.parametrize("n_rows", [7, 3])
def test_tiles_that_are_made_quantized_are_never_float(n_rows):
    x = random()
    eager = gradient_of(x)

    def make(rows: slice) -> torch.Tensor:
        raise AssertionError("no float gradient is wanted")

    tiles = RowTiles(
        make,
        row_tiles(x, n_rows).rows,
        shape=tuple(x.shape),
        device=x.device,
        make_quantized=lambda rows: (eager.codes[rows], eager.scales[rows]),
    )
    gradient = Int8Gradient.deferred(tiles, dtype=x.dtype)

    assert_same_bits(gradient.codes, eager.codes)
    assert_same_bits(gradient.scales, eager.scales)
    assert tiles.make is tiles.make_quantized is None  # what they refer to is let go


def test_a_gradient_has_no_other_attributes():
    deferred = Int8Gradient.deferred(row_tiles(random(), 7), dtype=torch.float32)
    with pytest.raises(AttributeError, match="has no attribute 'outlier_values'"):
        deferred.outlier_values  # noqa: B018


def test_add_in_place_and_out_of_place_agree():
    first, second = gradient_of(random(seed=1)), gradient_of(random(seed=2) * 5)
    kept = copy.deepcopy(first)

    total = first + second

    assert_same_bits(first.codes, kept.codes)
    exact = (first.dequantize().double() + second.dequantize().double()).numpy()
    error = abs(total.dequantize().double().numpy() - exact)
    terms = first.dequantize().abs() + second.dequantize().abs()
    assert (error <= rounding_bound(terms.numpy(), spread(total).numpy())).all()
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
    assert gradient.is_finite()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen_and_survives(bad):
    x = random()
    x[6, 299] = bad
    gradient = gradient_of(x)

    assert not gradient.is_finite()
    assert not (gradient + gradient_of(random())).is_finite()
    assert not (gradient * 0.0).is_finite()  # an infinite norm clips with the factor 0
    assert not torch.linalg.vector_norm(gradient).isfinite()
    assert gradient_of(random()).is_finite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm_is_that_of_the_stored_values(dtype):
    gradient = gradient_of(random(dtype=dtype))
    exact = (gradient.codes.double() * spread(gradient)).norm()

    for norm in (torch.linalg.vector_norm(gradient), torch.linalg.vector_norm(gradient, 2.0)):
        assert norm.dtype == torch.float32
        assert norm.item() == pytest.approx(exact.item(), rel=2 * FP32_EPS)


def test_a_float_is_not_added():
    gradient = gradient_of(random())

    for left, right in ((gradient, random()), (random(), gradient)):
        with pytest.raises(NotImplementedError, match="must go through its QFT module"):
            left.add_(right)


def test_alpha_is_refused():
    gradient = gradient_of(random())

    with pytest.raises(NotImplementedError, match="alpha=1 only; scale them first"):
        gradient.add_(gradient_of(random()), alpha=0.5)


@pytest.mark.parametrize("shape", [(7, 1), (7, 300)])
def test_a_factor_for_each_row_or_element_is_refused(shape):
    gradient = gradient_of(random())

    with pytest.raises(NotImplementedError, match=rf"scaled by one number, got .*{shape[1]}\)"):
        gradient.mul_(torch.ones(shape))
    with pytest.raises(NotImplementedError, match="scaled by one number"):
        gradient / torch.ones(shape)


@pytest.mark.parametrize("arguments", [{"ord": 1}, {"ord": 2, "dim": 1}, {"ord": float("inf")}])
def test_another_norm_is_refused(arguments):
    with pytest.raises(NotImplementedError, match="Use norm_type=2"):
        torch.linalg.vector_norm(gradient_of(random()), **arguments)


@pytest.mark.parametrize(
    ("use", "operator"),
    [
        (lambda g: g - g, r"aten\.sub\.Tensor"),
        (lambda g: g.sum(), r"aten\.sum\.default"),
        (lambda g: torch.sqrt(g), r"aten\.sqrt\.default"),
        (lambda g: torch.zeros(7, 300) - g, r"aten\.sub\.Tensor"),
        (lambda g: g.clamp_(-1, 1), r"aten\.clamp_\.default"),
    ],
)
def test_an_unknown_operator_is_named(use, operator):
    with pytest.raises(NotImplementedError, match=operator):
        use(gradient_of(random()))


def test_adding_to_a_float_out_of_place_is_refused():
    with pytest.raises(NotImplementedError, match="mix INT8 and float gradients"):
        random() + gradient_of(random())


def test_repr_tells_the_format():
    assert repr(gradient_of(random())) == (
        "Int8Gradient(shape=(7, 300), dtype=torch.float32, device=cpu)"
    )


def test_to_another_dtype_keeps_the_codes():
    gradient = gradient_of(random())

    other = gradient.to(torch.bfloat16)

    assert other.dtype == torch.bfloat16
    assert_same_bits(other.codes, gradient.codes)


def test_clipping_by_value_is_refused_by_name():
    parameter = nn.Parameter(torch.zeros(7, 300))
    parameter.grad = gradient_of(random())

    with pytest.raises(NotImplementedError, match=r"aten\..*clamp"):
        nn.utils.clip_grad_value_([parameter], 1e-3)
