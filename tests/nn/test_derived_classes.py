"""Classes derived from nn.Linear and nn.Embedding: quantized, and otherwise what they were."""

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
from qft_hf.quant import Int8Gradient, QFTWeight
from tests.tolerances import assert_same_bits

SPEC = QuantizationSpec(group_size=16, outlier_fraction=0.02)
IDS = torch.tensor([[3, 7, 1, 20], [2, 2, 0, 5]])
VECTORS = torch.randn(2, 4, 21, generator=torch.Generator().manual_seed(1))


class Scaled(nn.Linear):
    """A user's own: twice the values that nn.Linear computes, and a matrix beside the weight."""

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
    """A model of one module, and its input."""
    make, x = CASES[request.param]
    torch.manual_seed(0)
    return nn.Sequential(make()), x


def quantized_twins(model):
    """The model in INT8, and a float one with the values that its INT8 weights have."""
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
        "0.mix": "beside the weight of its module",
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
    ],
)
def test_what_cannot_be_quantized_stays_as_it_is_with_the_true_reason(make, reason):
    model = nn.Sequential(make(), nn.Linear(30, 4))
    cls = type(model[0])

    plan = quantize_modules_(model, SPEC)

    assert list(plan.modules) == ["1"]
    assert type(model[0]) is cls
    assert reason in {kept.reason for kept in plan.kept}
