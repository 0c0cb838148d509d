"""Products of experts and their gradients, against each expert's own product in float."""

import pytest
import torch
from torch import Tensor, nn

from qft_hf.config import QuantizationSpec
from qft_hf.nn import Groups, grouped_linear
from qft_hf.optim import QFTSGD, QFTAdamW, QFTLion
from qft_hf.quant import Int8Gradient, QFTWeight
from tests.nn.small import randn
from tests.tolerances import BF16_EPS, FP32_EPS, assert_same_bits, matmul_bound
from tests.values import scales64, values64

SHAPES = [(24, 264), (19, 261)]  # of one expert; with rows that grouped products can read or not
COUNTS = [3, 0, 5, 1, 0, 2]  # tokens of each expert
E, S = len(COUNTS), sum(COUNTS)
# Elements of a tile: all experts, three of the first shape, parts of one.
TILES = [10**9, 3 * 24 * 264, 1000]


def experts(shape=SHAPES[0], *, transposed=False, dtype=torch.float32) -> nn.Parameter:
    x = randn(E, *shape, seed=7, dtype=dtype) * 0.05
    if transposed:
        x = x.mT.contiguous()
    return nn.Parameter(QFTWeight.from_float(x, QuantizationSpec(), transposed=transposed))


def matrices(weight: Tensor) -> Tensor:
    """Return the float matrices `[E, R, C]`."""
    values = weight.dequantize()
    return values.mT if weight.arrangement.transposed else values


def groups(counts) -> Groups:
    return Groups(torch.tensor(counts).cumsum(0).tolist(), torch.device("cpu"))


def runs(counts=COUNTS) -> list[slice]:
    ends = torch.tensor(counts).cumsum(0).tolist()
    return [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]


@pytest.mark.parametrize("tile_elements", TILES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_token_meets_its_expert(monkeypatch, dtype, shape, transposed, tile_elements):
    monkeypatch.setattr("qft_hf.layout.TILE_ELEMENTS", tile_elements)
    eps = FP32_EPS if dtype == torch.float32 else BF16_EPS
    weight = experts(shape, transposed=transposed, dtype=dtype)
    dense = matrices(weight).double()
    x = randn(S, shape[1], seed=1, dtype=dtype).requires_grad_()
    grad_y = randn(S, shape[0], seed=3, dtype=dtype)

    y = grouped_linear(x, weight, groups(COUNTS))
    y.backward(grad_y)

    assert (y.dtype, y.shape, x.grad.dtype) == (dtype, (S, shape[0]), dtype)
    gradient = weight.grad
    assert isinstance(gradient, Int8Gradient)
    assert (gradient.shape, gradient.dtype) == (weight.shape, dtype)
    for e, run in enumerate(runs()):
        rows = slice(e * shape[0], (e + 1) * shape[0])
        tokens, grads = x.detach()[run].double(), grad_y[run].double()
        error = (y.detach()[run] - tokens @ dense[e].t()).abs()
        assert (error <= matmul_bound(tokens, dense[e].t(), eps)).all()
        error = (x.grad[run] - grads @ dense[e]).abs()
        assert (error <= matmul_bound(grads, dense[e], eps)).all()
        exact = grads.t() @ tokens  # zeros for an expert without tokens
        noise = matmul_bound(grads.t(), tokens, eps) + 8 * FP32_EPS * exact.abs()
        if not COUNTS[e]:
            assert not gradient.codes[rows].any()
            noise = torch.zeros(shape, dtype=torch.float64)
        stored = values64(gradient)[rows]
        assert ((stored - exact).abs() <= 0.5 * scales64(gradient)[rows] + noise).all()


@pytest.mark.parametrize("tile_elements", TILES)
@pytest.mark.parametrize("counts", [COUNTS, [0, 4, 4, 3, 0, 0], [0, 0, 0, 0, 0, 11]], ids=str)
def test_experts_without_tokens_are_not_expanded(monkeypatch, counts, tile_elements):
    monkeypatch.setattr("qft_hf.layout.TILE_ELEMENTS", tile_elements)
    weight = experts()
    expanded = []
    dequantize = QFTWeight.dequantize_matrices
    monkeypatch.setattr(
        QFTWeight,
        "dequantize_matrices",
        lambda self, numbers, *rest: (
            expanded.extend(numbers.tolist()) or dequantize(self, numbers, *rest)
        ),
    )
    with torch.no_grad():
        grouped_linear(randn(S, 264, seed=1), weight, groups(counts), training=True)

    assert expanded == [e for e, count in enumerate(counts) if count]


def test_a_few_of_the_matrices_are_those_of_the_whole():
    weight = experts(transposed=True, dtype=torch.bfloat16)
    dense = matrices(weight)
    for numbers in ([0], [5], [1, 2, 3], [0, 2, 5], list(range(E))):
        found = weight.dequantize_matrices(torch.tensor(numbers))
        assert_same_bits(found, dense[numbers].contiguous())
    assert weight.dequantize_matrices(torch.tensor([1, 4]), torch.float32).dtype == torch.float32


@pytest.mark.parametrize("tile_elements", TILES)
def test_a_weight_may_lack_the_last_experts_if_they_have_no_tokens(monkeypatch, tile_elements):
    """The second weight of LongCat-Flash lacks its identity experts."""
    monkeypatch.setattr("qft_hf.layout.TILE_ELEMENTS", tile_elements)
    results = []
    for counts in (COUNTS, [*COUNTS, 0, 0]):
        weight = experts()
        x = randn(S, 264, seed=1).requires_grad_()
        y = grouped_linear(x, weight, groups(counts))
        y.backward(randn(S, 24, seed=3))
        results.append((y.detach(), x.grad, weight.grad.dequantize()))
    for one, other in zip(*results, strict=True):
        assert_same_bits(one, other)


def test_no_token_at_all_gives_a_gradient_of_zeros():
    weight = experts()
    x = torch.zeros(0, 264, requires_grad=True)
    y = grouped_linear(x, weight, groups([0] * E))
    y.sum().backward()

    assert y.shape == (0, 24)
    assert x.grad.shape == (0, 264)
    assert not weight.grad.codes.any()


def test_gradients_that_would_be_differentiated_again_are_refused():
    x = randn(S, 264).requires_grad_()
    y = grouped_linear(x, experts(), groups(COUNTS)).square().sum()
    with pytest.raises(RuntimeError, match=r"create_graph=True.*reached a quantized weight"):
        torch.autograd.grad(y, [x], create_graph=True)


def test_few_tokens_are_multiplied_without_expanding_outside_training(monkeypatch):
    weight = experts()
    x = randn(S, 264, seed=1)
    monkeypatch.setattr(QFTWeight, "dequantize_matrices", None)  # calling it fails
    with torch.no_grad():
        y = grouped_linear(x, weight, groups(COUNTS))
    for e, run in enumerate(runs()):
        dense = matrices(weight)[e]
        assert ((y[run] - x[run].double() @ dense.double().t()).abs() <= 2 * matmul_bound(
            x[run], dense.t()
        )).all()  # fmt: skip


def test_the_default_device_changes_nothing():
    """Numbers of experts were made on it."""
    weight, x, counted = experts(), randn(S, 264, seed=1), groups(COUNTS)
    expected = grouped_linear(x, weight, counted)
    counted = groups(COUNTS)

    with torch.device("meta"):
        y = grouped_linear(x, weight, counted)

    assert_same_bits(y, expected)


def test_autocast_computes_in_its_dtype_and_returns_gradients_in_theirs():
    weight = experts()
    x = randn(S, 264, seed=1).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = grouped_linear(x, weight, groups(COUNTS))
    y.sum().backward()

    assert (y.dtype, x.grad.dtype, weight.grad.dtype) == (
        torch.bfloat16, torch.float32, torch.float32,
    )  # fmt: skip
    with pytest.raises(TypeError, match="needs an input of the weight's dtype"):
        grouped_linear(x.bfloat16(), weight, groups(COUNTS))


# --- updates --------------------------------------------------------------------------------------

MICRO_BATCHES = [COUNTS, [0, 0, 1, 0, 6, 4]]


def trained(optimizer_class, mode: str, steps: int = 3, **settings) -> nn.Parameter:
    """Train with steps of two micro-batches that use different experts."""
    weight = experts(transposed=True)
    optimizer = optimizer_class([weight], lr=1e-3, weight_decay=0.1, gradient=mode, **settings)
    optimizer.train()
    for step in range(steps):
        x, grad_y = randn(S, 264, seed=step), randn(S, 24, seed=10 + step)
        if mode == "release":
            with optimizer.accumulate():
                grouped_linear(x, weight, groups(MICRO_BATCHES[0])).backward(grad_y)
        else:
            grouped_linear(x, weight, groups(MICRO_BATCHES[0])).backward(grad_y)
        grouped_linear(x, weight, groups(MICRO_BATCHES[1])).backward(grad_y)
        optimizer.step()
        grouped_linear(x, weight, groups(MICRO_BATCHES[1])).backward(grad_y)  # alone, in tiles
        optimizer.step()
    return weight


@pytest.mark.parametrize("tile_elements", TILES)
@pytest.mark.parametrize("optimizer_class", [QFTLion, QFTAdamW, QFTSGD])
def test_release_has_the_bits_of_stack(monkeypatch, optimizer_class, tile_elements):
    monkeypatch.setattr("qft_hf.layout.TILE_ELEMENTS", tile_elements)
    stack, release = (trained(optimizer_class, mode) for mode in ("stack", "release"))

    for name, field in stack.fields().items():
        assert torch.equal(release.fields()[name], field), name
    assert not torch.equal(stack.codes, experts(transposed=True).codes)


@pytest.mark.parametrize("mode", ["stack", "release"])
def test_an_expert_without_tokens_steps_as_lion_does_with_a_gradient_of_zero(mode):
    weight, lr, decay, beta2 = experts(), 1e-3, 0.5, 0.9
    optimizer = QFTLion(
        [weight], lr=lr, betas=(0.9, beta2), weight_decay=decay, gradient=mode,
        stochastic_rounding=False,
    )  # fmt: skip
    optimizer.train()
    x, grad_y = randn(S, 264, seed=1), randn(S, 24, seed=3)
    grouped_linear(x, weight, groups([2, 1, 2, 2, 2, 2])).backward(grad_y)
    optimizer.step()
    state = optimizer.state[weight]
    rows = slice(24, 48)  # of expert 1, which has a momentum now and gets no token next

    def momentum() -> Tensor:
        return (
            state["momentum_codes"][rows]
            * state["momentum_scales"][rows].repeat_interleave(256, dim=1)[:, :264]
        )

    before, values = momentum(), matrices(weight)[1]
    grouped_linear(x, weight, groups(COUNTS)).backward(grad_y)
    optimizer.step()

    scale = state["momentum_scales"][rows].max()
    assert ((momentum() - beta2 * before).abs() <= 0.5 * scale * (1 + 8 * FP32_EPS)).all()
    expected = values - lr * (before.sign() + decay * values)
    # Codes are rounded to nearest; outliers are FP32.
    allowed = 0.5 * weight.scales[rows] + 8 * FP32_EPS * (values.abs() + lr)
    assert ((matrices(weight)[1] - expected).abs() <= allowed).all()
