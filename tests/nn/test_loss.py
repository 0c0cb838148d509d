"""Cross-entropy by chunks of the vocabulary, against float64 on all logits at once."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qft_hf.config import QuantizationSpec
from qft_hf.nn import DeferredLogits, QFTLinear, linear_cross_entropy
from qft_hf.nn import loss as loss_module
from qft_hf.quant import Int8Gradient, QFTWeight
from tests.nn.small import Alive, Largest, randn
from tests.tolerances import BF16_EPS, FP32_EPS
from tests.values import scales64, values64

N, WORDS, COLUMNS = 11, 37, 261  # nothing divides anything; two gradient groups
EPS = {torch.float32: FP32_EPS, torch.bfloat16: BF16_EPS}


def problem(dtype=torch.float32, *, with_bias=True):
    weight = QFTWeight.from_float(
        randn(WORDS, COLUMNS, seed=1, dtype=dtype) * 0.2, QuantizationSpec(outlier_fraction=0.02)
    )
    x = randn(N, COLUMNS, seed=2, dtype=dtype).requires_grad_()
    bias = nn.Parameter(randn(WORDS, seed=3, dtype=dtype)) if with_bias else None
    labels = torch.randint(WORDS, (N,), generator=torch.Generator().manual_seed(4))
    labels[0], labels[1], labels[5] = 0, WORDS - 1, -100  # first and last word, and no loss
    return x, nn.Parameter(weight), bias, labels


def exact_loss(x, weight, bias, labels):
    """Return the losses in float64, and the leaves for gradients: x, dense weight and bias."""
    x, dense = (
        x.detach().double().requires_grad_(),
        weight.detach().dequantize().double().requires_grad_(),
    )
    bias = None if bias is None else bias.detach().double().requires_grad_()
    loss = F.cross_entropy(F.linear(x, dense, bias), labels, reduction="none")
    return loss, x, dense, bias


@pytest.mark.parametrize("words_at_a_time", [1, 5, 36, 10**6])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_and_gradients_equal_those_of_whole_logits(
    dtype, with_bias, words_at_a_time, monkeypatch
):
    monkeypatch.setattr(loss_module, "LOGITS_ELEMENTS", words_at_a_time * N)
    x, weight, bias, labels = problem(dtype, with_bias=with_bias)
    grad_loss = randn(N, seed=5).abs() + 0.1

    loss = linear_cross_entropy(x, weight, labels, bias)
    loss.backward(grad_loss)
    exact, exact_x, exact_weight, exact_bias = exact_loss(x, weight, bias, labels)
    exact.backward(grad_loss.double())

    # Logits are FP32 sums plus the bias, rounded to dtype. Their log-sum is off by at most the
    # largest error of a logit, and the exponent of a probability by at most twice that error.
    eps, dense = EPS[dtype], weight.dequantize().double()
    logits = F.linear(exact_x, exact_weight, exact_bias).detach()
    magnitude = (x.detach().double().abs() @ dense.abs().t()).max() + 1
    logit_error = (COLUMNS + 2) * FP32_EPS * magnitude + 2 * eps * logits.abs().max()
    assert loss.dtype == torch.float32
    assert ((loss - exact).abs() <= 2 * logit_error + 8 * FP32_EPS * logits.abs().max()).all()
    assert loss[5] == 0

    probabilities = logits.softmax(dim=1)
    target = F.one_hot(labels.clamp_min(0), WORDS)
    size = grad_loss[:, None].double() * (labels != -100)[:, None]
    exact_grad = (size * (probabilities - target)).abs()
    wrong = size * probabilities * (2 * logit_error).expm1() + 2 * eps * exact_grad
    # The products sum in dtype's precision at worst and are rounded to it.
    error = (x.grad.double() - exact_x.grad).abs()
    assert (error <= (wrong + (WORDS + 2) * eps * exact_grad) @ dense.abs()).all()
    assert (x.grad[5] == 0).all()

    gradient = weight.grad
    assert isinstance(gradient, Int8Gradient)
    wrong = wrong + (N + 2) * eps * exact_grad
    error = (values64(gradient) - exact_weight.grad).abs()
    noise = wrong.t() @ x.detach().double().abs()
    assert (error <= 0.5 * scales64(gradient) + noise * (1 + 8 * FP32_EPS)).all()
    if bias is not None:
        assert ((bias.grad.double() - exact_bias.grad).abs() <= wrong.sum(dim=0)).all()


def test_runs_of_words_agree_with_all_words_to_the_code(monkeypatch):
    """Results of a chunk depend on the others only through the last bits of the log-sum."""
    results = []
    for words in (10**6, 7):
        monkeypatch.setattr(loss_module, "LOGITS_ELEMENTS", words * N)
        x, weight, bias, labels = problem()
        linear_cross_entropy(x, weight, labels, bias).sum().backward()
        results.append((x.grad, weight.grad, bias.grad))
    (x, weight, bias), (x_runs, weight_runs, bias_runs) = results
    torch.testing.assert_close(x_runs, x, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bias_runs, bias, rtol=1e-5, atol=1e-6)
    assert (weight_runs.codes.int() - weight.codes).abs().max() <= 1


def test_no_tensor_is_as_large_as_the_logits(monkeypatch):
    n_tokens, words = 40, 500
    monkeypatch.setattr(loss_module, "LOGITS_ELEMENTS", 30 * n_tokens)
    weight = nn.Parameter(QFTWeight.from_float(randn(words, 8, seed=1), QuantizationSpec()))
    x = randn(n_tokens, 8, seed=2).requires_grad_()
    labels = torch.arange(n_tokens)
    with Largest() as largest:
        linear_cross_entropy(x, weight, labels).sum().backward()
    assert largest.elements == 30 * n_tokens
    with Largest() as largest:
        F.cross_entropy(F.linear(x, weight.dequantize()), labels).backward()
    assert largest.elements == n_tokens * words


def test_one_chunk_of_logits_exists_at_a_time(monkeypatch):
    n_tokens, words = 100, 64
    monkeypatch.setattr(loss_module, "LOGITS_ELEMENTS", words * n_tokens)
    weight = nn.Parameter(QFTWeight.from_float(randn(600, 8, seed=1), QuantizationSpec()))
    x = randn(n_tokens, 8, seed=2).requires_grad_()
    with Alive(at_least=words * n_tokens) as alive:
        linear_cross_entropy(x, weight, torch.arange(n_tokens)).sum().backward()
    assert alive.elements == words * n_tokens


def test_gradients_of_runs_add_up_in_fp32(monkeypatch):
    """One word adds almost 1, 1,023 add 1/1024: BF16 has a spacing of 1/128 at 1, and loses them.

    All words are equally likely; the label is the first, whose row is the negative of the others'.
    """
    monkeypatch.setattr(loss_module, "LOGITS_ELEMENTS", 1)
    rows = torch.ones(1024, 8, dtype=torch.bfloat16)
    rows[0] = -1
    weight = nn.Parameter(QFTWeight.from_float(rows, QuantizationSpec()))
    x = torch.zeros(1, 8, dtype=torch.bfloat16).requires_grad_()

    linear_cross_entropy(x, weight, torch.tensor([0])).sum().backward()

    assert ((x.grad.double() - 2 * 1023 / 1024).abs() <= 2 * BF16_EPS).all()


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_what_needs_no_gradient_gets_none(frozen):
    x, weight, bias, labels = problem()
    tensors = {"x": x, "weight": weight, "bias": bias}
    tensors[frozen].requires_grad_(False)
    linear_cross_entropy(x, weight, labels, bias).sum().backward()
    assert {name for name, tensor in tensors.items() if tensor.grad is None} == {frozen}


def test_under_autocast_the_product_is_bf16():
    x, weight, bias, labels = problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(x, weight, labels, bias)
    expected = linear_cross_entropy(
        x.bfloat16(), QFTWeight(**weight.fields(), group_size=None, dtype=torch.bfloat16), labels,
        bias,
    )  # fmt: skip
    assert torch.equal(loss, expected)
    loss.sum().backward()
    assert x.grad.dtype == torch.float32


def test_bad_input_says_what_to_do():
    x, weight, bias, labels = problem()
    with pytest.raises(ValueError, match="Flatten leading dimensions"):
        linear_cross_entropy(x[None], weight, labels[None], bias)
    for bad in (WORDS, -1):
        with pytest.raises(ValueError, match=rf"outside \[0, {WORDS}\), the first is {bad}"):
            linear_cross_entropy(x, weight, torch.full((N,), bad), bias)
    with pytest.raises(TypeError, match=r"run under torch\.autocast"):
        linear_cross_entropy(x.bfloat16(), weight, labels, bias)


@pytest.mark.parametrize("bad", [WORDS, -1])
def test_a_label_out_of_range_that_is_not_checked_makes_nan(bad):
    """A GPU does not check labels; the loss was once that of no word, and finite."""
    x, weight, bias, labels = problem()
    labels[2] = bad
    loss = loss_module._LinearCrossEntropy.apply(x, weight, bias, labels)
    loss.sum().backward()

    is_bad = torch.arange(N) == 2
    assert torch.equal(loss.isnan(), is_bad)
    assert torch.equal(x.grad.isnan().all(dim=1), is_bad)
    assert not weight.grad.finite_probe.isfinite().all()


def test_the_head_is_not_moved_with_saved_activations():
    """Hooks that offload activations once got the head, too."""
    x, weight, bias, labels = problem()
    linear_cross_entropy(x, weight, labels, bias).sum().backward()
    expected = [x.grad, weight.grad.dequantize(), bias.grad]

    packed = []

    def pack(tensor):
        packed.append(tensor.shape)
        return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)

    again_x, again_weight, again_bias, _ = problem()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = linear_cross_entropy(again_x, again_weight, labels, again_bias)
    loss.sum().backward()
    assert x.shape in packed
    assert weight.shape not in packed
    for of_hooks, alone in zip(
        [again_x.grad, again_weight.grad.dequantize(), again_bias.grad], expected, strict=True
    ):
        assert torch.equal(of_hooks, alone)


@pytest.mark.parametrize("needs_x", [False, True])
def test_a_head_that_has_changed_since_the_forward_pass_is_refused(needs_x):
    x, weight, bias, labels = problem()
    loss = linear_cross_entropy(x.requires_grad_(needs_x), weight, labels, bias).sum()
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="has changed since the forward pass"):
        loss.backward()


@pytest.mark.parametrize(
    "use",
    [
        lambda logits: logits / 2,
        lambda logits: 3 * logits,
        lambda logits: logits[:, -1],
        lambda logits: logits.float(),
        torch.tanh,
        lambda logits: F.cross_entropy(logits, torch.zeros(N, dtype=torch.int64)),
    ],
)
def test_deferred_logits_refuse_all_that_would_compute_with_them(use):
    x, weight, bias, _ = problem()
    with pytest.raises((TypeError, AttributeError), match="Leave chunked_loss off"):
        use(DeferredLogits(x, weight, bias))


def test_the_head_defers_in_training_only():
    x, weight, bias, _ = problem()
    head = QFTLinear(COLUMNS, WORDS)
    head.weight, head.bias = weight, bias
    assert isinstance(head(x), torch.Tensor)
    head.defers_logits = True
    assert isinstance(head(x), DeferredLogits)
    with torch.no_grad():
        assert isinstance(head(x), torch.Tensor)
    assert isinstance(head.eval()(x), torch.Tensor)
