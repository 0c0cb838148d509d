"""Classes derived from nn.Linear and nn.Embedding: quantized, and otherwise unchanged."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from transformers.models.bart.modeling_bart import (
    BartLearnedPositionalEmbedding,
    BartScaledWordEmbedding,
)
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

from qft_hf.config import QuantizationSpec
from qft_hf.nn import (
    QFTEmbedding,
    QFTLinear,
    conversion_plan,
    dequantize_modules_,
    quantize_modules_,
)
from qft_hf.optim import QFTLion
from qft_hf.quant import Int8Gradient, QFTWeight
from tests.tolerances import assert_same_bits

SPEC = QuantizationSpec(group_size=16, outlier_fraction=0.02)
IDS = torch.tensor([[3, 7, 1, 20], [2, 2, 0, 5]])
VECTORS = torch.randn(2, 4, 21, generator=torch.Generator().manual_seed(1))


class Scaled(nn.Linear):
    """A user's class: doubles the output of nn.Linear, and has a second matrix."""

    def __init__(self):
        super().__init__(21, 30)
        self.mix = nn.Parameter(torch.eye(30))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return 2 * super().forward(x) @ self.mix


class Shifted(Scaled):
    """Derived from a derived class."""

    def forward(self, x):
        return super().forward(x) + 1


def named(*names):
    """A linear module that has attributes of these names."""
    linear = nn.Linear(21, 30)
    for name in names:
        setattr(linear, name, "its own")
    return linear


CASES = {
    "falcon": (lambda: FalconLinear(21, 30), VECTORS),
    "falcon without bias": (lambda: FalconLinear(21, 30, bias=False), VECTORS),
    "a user's": (Scaled, VECTORS),
    "derived twice": (Shifted, VECTORS),
    "gemma 3": (lambda: Gemma3TextScaledWordEmbedding(30, 21, 0, embed_scale=4.6), IDS),
    "bart words": (lambda: BartScaledWordEmbedding(30, 21, 1, embed_scale=4.6), IDS),
    "bart positions": (lambda: BartLearnedPositionalEmbedding(30, 21), IDS),
    "opt positions": (lambda: OPTLearnedPositionalEmbedding(30, 21), torch.ones_like(IDS)),
}


@pytest.fixture(params=CASES)
def case(request):
    """Return a model of one module, and its input."""
    make, x = CASES[request.param]
    torch.manual_seed(0)
    return nn.Sequential(make()), x


def quantized_twins(model):
    """Return the model in INT8, and a float one with the values of its INT8 weights."""
    quantize_modules_(model, SPEC)
    return model, dequantized(model)


def dequantized(model):
    twin = copy.deepcopy(model)
    dequantize_modules_(twin, torch.float32)
    return twin


def test_the_classs_own_forward_computes_with_the_quantized_weight(case):
    model, x = case
    plain = type(model[0])

    model, twin = quantized_twins(model)
    output, expected = model(x), twin(x)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (output * weights).sum().backward()
    (expected * weights).sum().backward()

    assert type(twin[0]) is plain
    assert_same_bits(output.detach(), expected.detach())
    gradient = model[0].weight.grad
    assert isinstance(gradient, Int8Gradient)
    # INT8 gradients are rounded to nearest: half a step of their scale at most.
    error = (gradient.dequantize() - twin[0].weight.grad).abs()
    assert (error <= 0.51 * gradient.scales.repeat_interleave(256, dim=1)[:, :21]).all()
    assert gradient.dequantize().abs().max() > 0


def test_a_derived_class_is_an_instance_of_both_and_says_so(case):
    model, _ = case
    plain = type(model[0])

    quantize_modules_(model, SPEC)

    assert isinstance(model[0], plain)
    assert isinstance(model[0], QFTLinear if issubclass(plain, nn.Linear) else QFTEmbedding)
    assert repr(model[0]).startswith(f"QFT{plain.__name__}(")
    assert isinstance(model[0].weight, QFTWeight)


def copies(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    yield torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    yield copy.deepcopy(model)
    yield pickle.loads(pickle.dumps(model))


def test_copies_are_of_the_same_class_and_equal(case):
    model, x = case
    quantize_modules_(model, SPEC)

    for other in copies(model):
        assert type(other[0]) is type(model[0])
        assert vars(other[0]).keys() == vars(model[0]).keys()
        assert_same_bits(other(x).detach(), model(x).detach())
        other[0].weight.codes.zero_()

    assert model[0].weight.codes.any()


def test_state_is_saved_and_loaded_under_the_same_names_as_of_plain_modules(case):
    model, x = case
    quantize_modules_(model, SPEC)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert {"0.weight_q", "0.weight_scale"} < state.keys()
    assert "0.weight" not in state
    expected = model(x).detach()
    model[0].weight.codes.zero_()

    model.load_state_dict(state)

    assert_same_bits(model(x).detach(), expected)


def test_one_class_is_made_for_all_modules_of_a_class():
    model = nn.Sequential(FalconLinear(21, 30), FalconLinear(30, 5))

    quantize_modules_(model, SPEC)

    assert type(model[0]) is type(model[1])


def test_a_head_tied_to_a_scaled_embedding_shares_its_weight():
    model = nn.ModuleDict(
        {"embed": Gemma3TextScaledWordEmbedding(30, 21, 0, embed_scale=4.6), "head": Scaled()}
    )
    model["head"].weight = model["embed"].weight

    quantize_modules_(model, SPEC)

    assert model["head"].weight is model["embed"].weight
    assert isinstance(model["head"].weight, QFTWeight)
    assert model["head"].weight.is_table
    model["head"](model["embed"](IDS)).sum().backward()
    assert isinstance(model["head"].weight.grad, Int8Gradient)


def test_what_a_derived_class_has_beside_its_weight_stays_float_and_is_listed():
    plan = conversion_plan(nn.Sequential(Scaled()), None)

    assert {kept.name: kept.reason for kept in plan.kept} == {
        "0.bias": "vector",
        "0.mix": "next to the weight of its module",
    }


def bitsandbytes_like():
    class Int8Params(nn.Parameter):
        pass

    module = Scaled()
    module.weight = Int8Params(module.weight.detach())
    return module


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: MarianSinusoidalPositionalEmbedding(30, 21),
            "table of MarianSinusoidalPositionalEmbedding, which is computed and not trained",
        ),
        (
            lambda: parametrizations.weight_norm(nn.Linear(21, 30)),
            "parameter of ParametrizedLinear, whose weight is computed from others",
        ),
        (
            lambda: torch.nn.utils.parametrize.register_parametrization(
                Scaled(), "weight", nn.Identity()
            ),
            "parameter of ParametrizedScaled, whose weight is computed from others",
        ),
        (lambda: nn.LazyLinear(30), "weight of LazyLinear is a UninitializedParameter"),
        (bitsandbytes_like, "weight of Scaled is a Int8Params"),
        (lambda: nn.Linear(21, 30, dtype=torch.float64), "weight of Linear is torch.float64"),
        (lambda: named("spec"), "parameter of Linear, whose attribute 'spec' INT8 modules would"),
        (lambda: named("products"), "parameter of Linear, whose attribute 'products' INT8 modules"),
    ],
)
def test_what_cannot_be_quantized_stays_as_it_is_with_the_true_reason(make, reason):
    model = nn.Sequential(make(), nn.Linear(30, 4))
    cls = type(model[0])

    plan = quantize_modules_(model, SPEC)

    assert list(plan.modules) == ["1"]
    assert type(model[0]) is cls
    assert any(kept.reason.startswith(reason) for kept in plan.kept)


def test_attributes_of_a_module_may_have_the_names_of_its_class():
    """They were taken for those of the class: such a module could not be copied or dequantized."""
    model = nn.Sequential(named("kind", "plain_class", "weight_names"))
    quantize_modules_(model, SPEC)
    x = torch.ones(2, 21)

    for made in (model, *copies(model)):
        assert list(conversion_plan(made, None).weights) == ["0.weight"]
        assert made[0].kind == made[0].plain_class == made[0].weight_names == "its own"
        assert_same_bits(made(x).detach(), model(x).detach())
    values = model[0].weight.dequantize().detach()
    dequantize_modules_(model, torch.float32)
    assert type(model[0]) is nn.Linear
    assert_same_bits(model[0].weight.detach(), values)


# --- classes that read their weight themselves


class Reads(nn.Linear):
    """Computes the product itself, as some model classes do."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


def attention(**arguments):
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(12, 3, batch_first=True, **arguments)
    with torch.no_grad():
        layer.out_proj.bias.uniform_(-1, 1)
    return layer


def encoder_layer():
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(12, 3, dim_feedforward=20, batch_first=True, dropout=0.0)


Q, K = (torch.randn(2, n, 12, generator=torch.Generator().manual_seed(n)) for n in (5, 7))
READERS = {
    "linear": (lambda: Reads(12, 9), (Q,)),
    "self-attention": (attention, (Q, Q, Q)),
    "cross-attention": (attention, (Q, K, K)),
    "three inputs": (attention, (Q, K, K + 1)),
    "other widths": (lambda: attention(kdim=8, vdim=10), (Q, K[..., :8], K[..., :10])),
    "encoder layer": (encoder_layer, (Q,)),
}


@pytest.mark.parametrize("case", READERS.values(), ids=READERS.keys())
def test_a_class_that_reads_its_weight_computes_with_the_values_and_trains(case):
    make, inputs = case
    model = make()

    plan = quantize_modules_(model, SPEC)
    twin = dequantized(model)

    assert {kept.reason for kept in plan.kept} <= {"vector", "parameter of LayerNorm"}
    (output, *_), (expected, *_) = (as_tuple(m(*inputs)) for m in (model, twin))
    assert_same_bits(output.detach(), expected.detach())
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    optimizer = QFTLion(model.parameters(), lr=1e-3)
    (output * weights).sum().backward()
    (expected * weights).sum().backward()
    before = {name: weight.codes.clone() for name, weight in plan.weights.items()}
    for name, weight in plan.weights.items():
        gradient = weight.grad
        assert isinstance(gradient, Int8Gradient), name
        expected_gradient = twin.get_parameter(name).grad
        error = (gradient.values() - expected_gradient).abs()
        scales = gradient.scales.repeat_interleave(256, dim=1)[:, : weight.shape[1]]
        assert (error <= 0.51 * scales + 1e-6 * expected_gradient.abs().max()).all(), name
    optimizer.step()
    assert all((w.codes != before[name]).any() for name, w in plan.weights.items())


def as_tuple(output):
    return output if isinstance(output, tuple) else (output,)


@pytest.mark.parametrize("make", [attention, encoder_layer])
def test_evaluation_of_attention_is_that_of_the_values(make):
    """Without gradients, PyTorch has a function of its own for attention."""
    model = make().eval()
    quantize_modules_(model, SPEC)
    twin = dequantized(model)
    inputs = (Q, Q, Q) if make is attention else (Q,)

    with torch.no_grad():
        (output, *_), (expected, *_) = (as_tuple(m(*inputs)) for m in (model, twin))

    torch.testing.assert_close(output, expected)


def test_the_state_of_attention_is_saved_and_loaded():
    model = attention()
    quantize_modules_(model, SPEC)
    expected = model(Q, Q, Q)[0].detach()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert {"in_proj_weight_q", "in_proj_weight_scale", "out_proj.weight_q"} < state.keys()
    assert not {"in_proj_weight", "out_proj.weight"} & state.keys()
    other = attention()
    quantize_modules_(other, SPEC)
    other.in_proj_weight.codes.zero_()

    other.load_state_dict(state)

    assert_same_bits(other(Q, Q, Q)[0].detach(), expected)
    del state["in_proj_weight_scale"]
    with pytest.raises(RuntimeError, match=r"Missing key.*in_proj_weight_scale"):
        other.load_state_dict(state)


def test_int8_products_are_only_for_modules_that_multiply_by_ours():
    model = nn.ModuleDict(
        {
            "falcon": FalconLinear(21, 30),
            "scaled": Scaled(),
            "reads": Reads(21, 30),
            "attention": attention(),
            "plain": nn.Linear(21, 30),
        }
    )
    quantize_modules_(model, QuantizationSpec(matmul="int8"))

    chosen = {name for name, m in model.named_modules() if getattr(m, "products", None)}
    assert chosen == {"falcon", "scaled", "plain"}
