"""Code that does not know INT8 reads a weight as it reads any tensor, and cannot write to it."""

import copy
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qft_hf import kernels
from qft_hf.config import QuantizationSpec
from qft_hf.quant import Int8Gradient, QFTWeight, quantized, reading
from tests.tolerances import assert_same_bits

ROWS, COLUMNS = 13, 300
SPEC = QuantizationSpec(group_size=70, outlier_fraction=0.02)
X = torch.randn(5, COLUMNS, generator=torch.Generator().manual_seed(3))
IDS = torch.tensor([[1, 12, 1], [0, 5, 7]])


def make_weight(seed: int = 0, **arguments) -> nn.Parameter:
    x = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))
    return nn.Parameter(QFTWeight.from_float(x, SPEC), **arguments)


def float_twin(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().dequantize(), requires_grad=weight.requires_grad)


READS = {
    "linear": lambda w: F.linear(X, w),
    "linear 3-D with bias": lambda w: F.linear(X[None], w, torch.ones(ROWS)),
    "product with a transpose": lambda w: X @ w.t(),
    "product with a slice of rows": lambda w: X @ w[3:9].t(),
    "slice with negative ends": lambda w: w[-7:-2] * 2,
    "slices without a row": lambda w: torch.cat([w[3:3], w[9:4], w[:2]]) * 2,
    "slice of rows and columns": lambda w: w[2:6, 100:270].exp(),
    "slice with a step": lambda w: w[1:11:3] * 2,
    "columns": lambda w: w[..., 5:9].tanh(),
    "row": lambda w: w[-1] * w[2],
    "rows by number": lambda w: w[torch.tensor([4, 4, 0])] * 3,
    "embedding": lambda w: F.embedding(IDS, w, padding_idx=5),
    "index_select": lambda w: w.index_select(0, IDS[0]) * 1,
    "times": lambda w: torch.arange(1.0, 1 + ROWS)[:, None] * w,
    "plus itself": lambda w: w + w.detach(),
    "squares": lambda w: w.pow(2).sum(),
    "norm": lambda w: torch.linalg.vector_norm(w),
    "norm of rows": lambda w: F.normalize(w, dim=1),
    "mean": lambda w: w.mean(dim=0),
    "chunks": lambda w: w.chunk(3)[1] @ w.chunk(3)[0].t(),
    "split and unbind": lambda w: w.split([3, 10])[1].unbind()[4] * 2,
    "as another shape": lambda w: w.view(-1)[7:2000] * 2,
    "broadcast": lambda w: w.unsqueeze(0).expand(2, -1, -1) * 2,
    "einsum": lambda w: torch.einsum("nc,rc->nr", X, w),
    "cat": lambda w: torch.cat([w, torch.ones(1, COLUMNS)]),
    "layer_norm": lambda w: F.layer_norm(w, (COLUMNS,)),
    "copied into": lambda w: torch.zeros(ROWS, COLUMNS).copy_(w) * 2,
    "values": lambda w: w.dequantize() * 2 if isinstance(w, QFTWeight) else w * 2,
    "values of a view": lambda w: w.t().dequantize() * 2 if isinstance(w, QFTWeight) else w.t() * 2,
    "checkpointed": lambda w: torch.utils.checkpoint.checkpoint(
        lambda x: F.linear(x, w[:5]), X, use_reentrant=False
    ),
}


@pytest.mark.parametrize("use", READS.values(), ids=READS)
def test_an_operator_that_reads_is_that_of_the_values_and_so_is_its_gradient(use):
    weight = make_weight()
    twin = float_twin(weight)
    results = []
    for parameter in (weight, twin):
        y = use(parameter)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(8)))
        results.append((y.detach(), parameter.grad))

    (y, gradient), (exact_y, exact_gradient) = results
    assert type(y) is Tensor
    assert_same_bits(y, exact_y)
    assert_same_bits(gradient, exact_gradient)
    assert exact_gradient.abs().max() > 0


@pytest.mark.parametrize("use", READS.values(), ids=READS)
@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_is_the_same(use, is_frozen, context):
    """Under inference_mode every view used to raise; only operators without one were tested."""
    weight = make_weight(requires_grad=not is_frozen)
    twin = float_twin(weight)

    with context():
        y = use(weight)

    assert not y.requires_grad
    assert y.is_inference() == (context is torch.inference_mode)
    assert_same_bits(y.clone(), use(twin).detach())
    assert not is_frozen or not use(weight).requires_grad


SHAPES = {"experts": ((3, 5, 70), False), "transposed": ((70, 5), True), "both": ((3, 70, 5), True)}
PARTS = {
    "first": lambda w: w[1] * 2,
    "range": lambda w: w[-2:] * 2,
    "no range": lambda w: torch.cat([w[1:1], w[1:]]) * 2,
    "last dimension": lambda w: w[..., 1:4] * 2,
    "transpose": lambda w: w.transpose(-1, -2) @ torch.arange(1.0, 1 + w.shape[-2]),
    "rows of one": lambda w: w[0][2:4] * 2,
    "embedding": lambda w: F.embedding(torch.tensor([1, 0]), w if w.ndim == 2 else w[0]) * 2,
}


@pytest.mark.parametrize("use", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize(("shape", "transposed"), SHAPES.values(), ids=SHAPES)
def test_weights_of_other_shapes_are_read_in_their_own(shape, transposed, use):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    weight = nn.Parameter(QFTWeight.from_float(x, SPEC, transposed=transposed))
    twin = float_twin(weight)
    results = []
    for parameter in (weight, twin):
        y = use(parameter)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(8)))
        results.append((y.detach(), parameter.grad))

    for ours, theirs in zip(*results, strict=True):
        assert_same_bits(ours, theirs)
    summed = quantized(weight.grad, weight) + weight.grad
    assert summed.arrangement == weight.arrangement
    bound = summed.scales.max() * 3
    assert ((summed.dequantize() - 2 * twin.grad).abs() <= bound).all()


def test_an_expert_is_made_of_its_rows_alone(rows_made):
    x = torch.randn(4, 5, 70, generator=torch.Generator().manual_seed(5))
    for transposed, rows in ((False, 5), (True, 70)):
        weight = nn.Parameter(QFTWeight.from_float(x, SPEC, transposed=transposed))
        weight[2] @ torch.ones(70)
        weight[1:3].sum()
        assert rows_made == [rows, 2 * rows]
        rows_made.clear()


def test_autocast_reads_in_its_dtype():
    weight = make_weight()
    twin = float_twin(weight)
    results = []
    for parameter in (weight, twin):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = F.linear(X, parameter)
        y.float().square().sum().backward()
        results.append((y.detach(), parameter.grad))

    assert results[0][0].dtype == torch.bfloat16
    for ours, theirs in zip(*results, strict=True):
        assert_same_bits(ours, theirs)


def test_a_gradient_of_the_module_and_one_from_outside_add_up_in_int8():
    """Autograd may add them in either order and over two passes; each is rounded once."""
    weight = make_weight()
    parts = [torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(s)) for s in (1, 2)]
    ours, theirs = Int8Gradient.from_float(parts[0], dtype=torch.float32), parts[1]
    expected = ours.clone()
    expected.add_(Int8Gradient.from_float(theirs, dtype=torch.float32))

    for total in (ours + theirs, ours.clone().add_(theirs)):
        assert_same_bits(total.codes, expected.codes)
        assert_same_bits(total.scales, expected.scales)
    other = theirs + ours
    assert type(other) is Int8Gradient
    bound = (ours.scales + expected.scales + other.scales).amax()
    assert ((other.dequantize() - expected.dequantize()).abs() <= bound).all()
    weight.grad = theirs.clone()  # an INT8 gradient may be added to an earlier float one
    weight.grad += ours
    assert_same_bits(weight.grad, theirs + ours.dequantize())


# --- views ----------------------------------------------------------------------------------------


@pytest.fixture
def rows_made(monkeypatch):
    """Record how many rows are dequantized each time."""
    made: list[int] = []
    expand = kernels.expand

    def count(*args, **options):
        made.append(len(found := expand(*args, **options)))
        return found

    monkeypatch.setattr(kernels, "expand", count)
    return made


@pytest.mark.parametrize(
    ("use", "rows"),
    [
        (lambda w: X @ w[3:9].t(), [6]),
        (lambda w: w[3:9, 2:5] + 1, [6]),
        (lambda w: w[-2] * 2, [1]),
        (lambda w: F.embedding(IDS, w), [6]),
        (lambda w: w.t(), []),
        (lambda w: torch.zeros_like(w), []),
        (lambda w: w[2:4].shape, []),
    ],
)
def test_only_rows_that_are_read_are_made_and_only_when_they_are(use, rows, rows_made):
    use(make_weight())

    assert rows_made == rows


@pytest.mark.parametrize(
    "make",
    [
        torch.zeros_like,
        torch.ones_like,
        lambda w: torch.full_like(w, 3, dtype=torch.float16),
        lambda w: torch.zeros_like(w.t()),
        lambda w: w.new_zeros(4, 2),
        lambda w: w.new_ones(3),
        lambda w: w.new_full((2,), 7.0),
    ],
)
def test_a_tensor_like_a_weight_is_plain_and_float(make):
    weight = make_weight()

    made = make(weight)

    assert type(made) is Tensor
    assert made.is_contiguous()
    assert_same_bits(made, make(float_twin(weight)).contiguous())


def test_autograd_keeps_no_float_copy_of_a_weight():
    weight = make_weight()
    kept = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        F.linear(X.clone().requires_grad_(), weight)

    assert sorted(type(tensor).__name__ for tensor in kept) == ["Tensor", "View"]


def test_a_view_shows_the_values_of_the_moment():
    weight = make_weight()
    view = weight.detach()[2:5].t()
    before = view.dequantize()

    with torch.no_grad():
        weight.copy_(make_weight(seed=1))

    assert_same_bits(view.dequantize(), weight.detach().dequantize()[2:5].t())
    assert not torch.equal(view, before)
    assert (view.shape, view.stride(), view.dtype) == ((COLUMNS, 3), (1, COLUMNS), torch.float32)
    assert repr(view) == f"View(shape=(300, 3), of View(shape=(3, 300), of {weight.detach()!r}))"


def test_a_row_that_is_not_there_is_an_index_error():
    for row in (ROWS, -ROWS - 1):
        with pytest.raises(IndexError, match=f"index {row} is out of bounds"):
            make_weight()[row]


# --- writing --------------------------------------------------------------------------------------


WRITES = {
    "in place": lambda w: w.mul_(torch.full((ROWS, 1), 2.0)),
    "normal_": nn.init.normal_,
    "from float": lambda w: w.copy_(torch.zeros(ROWS, COLUMNS)),
    "from a gradient": lambda w: w.copy_(Int8Gradient.from_float(w.values(), dtype=w.dtype)),
    "row": lambda w: w.__setitem__(0, 0.0),
    "rows": lambda w: w.__setitem__(slice(2, 4), torch.ones(2, COLUMNS)),
    "mask": lambda w: w.__setitem__(torch.arange(ROWS) > 3, 1.0),
    "rows by number": lambda w: w.__setitem__(torch.tensor([2]), 1.0),
    "view of a row": lambda w: w[0].zero_(),
    "view of a view": lambda w: w.t()[3:4].fill_(1),
    "view as another shape": lambda w: w.view(-1)[0].fill_(1),
    "part": lambda w: w.chunk(2)[0].normal_(),
    "data in place": lambda w: w.data.add_(1),
    "data of a view": lambda w: w[0].data.zero_(),
    "out": lambda w: torch.add(w, 1, out=w),
    "one of a list": lambda w: torch._foreach_mul_([w], 2.0),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_writing_raises_and_says_what_to_do(write):
    weight = make_weight()
    before = copy.deepcopy(weight)

    with (
        torch.no_grad(),
        pytest.raises(NotImplementedError, match=r"would write to .*call dequantize_model_\(model"),
    ):
        write(weight)
    assert torch.equal(weight, before)


def test_float_data_is_refused():
    """It was once lost silently."""
    weight = make_weight()
    for tensor in (weight, weight[0]):
        with pytest.raises(
            TypeError, match=r"was assigned to \.data of .*dequantize_model_\(model"
        ):
            tensor.data = torch.zeros(ROWS, COLUMNS)


def test_the_data_of_another_weight_takes_the_place_of_its_own():
    weight, other = make_weight(), make_weight(seed=1)

    weight.data = other.data

    assert_same_bits(weight.detach().dequantize(), other.detach().dequantize())
    assert weight.codes.data_ptr() == other.codes.data_ptr()
    weight.data = weight.data.to(torch.bfloat16)
    assert weight.dtype == weight.dequantize().dtype == torch.bfloat16


READERS = {
    "weight": lambda w: w,
    "transpose": lambda w: w.t(),
    "rows": lambda w: w[2:5],
    "gradient": lambda w: quantized(w.dequantize(), w),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_numpy_and_lists_have_the_values_and_cannot_be_written_to(read):
    """They once failed, and with them callbacks that plot histograms of weights and gradients."""
    tensor = read(make_weight().detach())
    values = tensor.dequantize()
    for array in (tensor.numpy(), np.asarray(tensor), tensor.cpu().numpy(force=True)):
        assert array.shape == tuple(tensor.shape)
        assert_same_bits(torch.from_numpy(array.copy()), values)
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    assert tensor.tolist() == values.tolist()
    with pytest.raises(RuntimeError, match=r"requires grad. Use tensor\.detach\(\)\.numpy\(\)"):
        make_weight().numpy()


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_other_libraries_get_a_copy_of_the_values(read):
    """PyTorch passes the address of the memory, of which there is none: NumPy read anything."""
    tensor = read(make_weight().detach())
    values = tensor.dequantize()
    assert_same_bits(torch.from_numpy(np.from_dlpack(tensor).copy()), values)
    assert_same_bits(torch.from_dlpack(tensor), values)
    with pytest.raises(BufferError, match=r"use tensor\.detach"):
        np.from_dlpack(make_weight())


def test_a_weight_equals_its_values():
    weight = make_weight()

    assert torch.equal(weight, float_twin(weight))
    assert torch.equal(float_twin(weight)[2:5], weight[2:5])
    assert not torch.equal(weight, float_twin(weight) + 1)
    assert not torch.equal(weight, make_weight(seed=1))


def test_a_copy_of_the_values_may_be_written():
    weight = make_weight()
    before = weight.detach().dequantize()

    for values in (weight.dequantize(), weight[:4].dequantize(), weight * 1):
        values.mul_(2).sum().backward()

    assert_same_bits(weight.detach().dequantize(), before)


# --- what it costs --------------------------------------------------------------------------------


def test_the_cost_is_said_once_at_the_line_that_reads(monkeypatch):
    monkeypatch.setattr(reading, "_warned", False)
    weight = make_weight()

    with pytest.warns(UserWarning, match=r"aten\.mm.*QFTWeight.*: 0\.0 MB.*gradient") as caught:
        X @ weight.t()

    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        X @ weight.t()
        F.linear(X, make_weight())


def test_asking_for_the_values_needs_no_warning(monkeypatch):
    monkeypatch.setattr(reading, "_warned", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_weight().dequantize()
        make_weight()[2:4].dequantize()


def test_a_tensor_that_has_no_values_is_unfinished():
    with pytest.raises(NotImplementedError):
        reading.Readable.values(torch.zeros(1))
