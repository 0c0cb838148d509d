"""The rule that decides what is quantized, and conversion in place."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from transformers.pytorch_utils import Conv1D

from qft_hf.config import QuantizationSpec
from qft_hf.nn import (
    QFTEmbedding,
    QFTLinear,
    conversion_plan,
    dequantize_modules_,
    quantize_modules_,
)
from qft_hf.nn.convert import kept_parameters
from qft_hf.optim import QFTLion
from qft_hf.quant import Int8Gradient, QFTWeight
from tests.nn.small import SmallModel, batch
from tests.tolerances import assert_same_bits

SPEC = QuantizationSpec(group_size=16, outlier_fraction=0.02)


def excluding(*names: str) -> QuantizationSpec:
    return QuantizationSpec(modules_to_not_convert=list(names))


# --- the rule -------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_linear_and_embedding_weights_are_quantized_and_the_rest_is_listed_with_a_reason(device):
    model = SmallModel(tied=False).to(device)

    plan = conversion_plan(model, None)

    assert list(plan.modules) == [
        "embed", "blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "head",
    ]  # fmt: skip
    assert {kept.name: kept.reason for kept in plan.kept} == {
        "blocks.0.up.bias": "vector",
        "blocks.0.down.bias": "vector",
        "blocks.1.up.bias": "vector",
        "blocks.1.down.bias": "vector",
        "norm.weight": "parameter of LayerNorm",
        "norm.bias": "parameter of LayerNorm",
    }


def test_the_plan_of_a_quantized_model_is_the_one_it_was_converted_by():
    model = SmallModel()
    before = conversion_plan(model, None)

    quantize_modules_(model, SPEC)

    after = conversion_plan(model, None)
    assert list(after.modules) == list(before.modules)
    assert [(k.name, k.reason) for k in after.kept] == [(k.name, k.reason) for k in before.kept]


def test_every_parameter_is_either_quantized_or_kept():
    model = SmallModel()

    plan = quantize_modules_(model, SPEC)

    quantized_ids = {id(p) for p in model.parameters() if isinstance(p, QFTWeight)}
    kept_ids = {id(kept.parameter) for kept in plan.kept}
    assert quantized_ids | kept_ids == {id(p) for p in model.parameters()}
    assert not quantized_ids & kept_ids


@pytest.mark.parametrize(
    ("name", "converted"),
    [
        ("head", 5),
        ("blocks.0.up", 5),
        ("up", 4),  # a component of several names
        ("blocks.1", 4),  # with everything below
        ("blocks", 2),
    ],
)
def test_excluded_modules_stay_float(name, converted):
    model = SmallModel(tied=False)

    plan = quantize_modules_(model, excluding(name))

    assert sum(isinstance(p, QFTWeight) for p in model.parameters()) == converted
    listed = [k for k in plan.kept if k.reason == "listed in modules_to_not_convert"]
    assert all(name in kept.name for kept in listed)
    assert model.loss(batch()).isfinite()


@pytest.mark.parametrize("tied", [True, False])
def test_only_what_is_listed_is_said_to_be_listed(tied):
    """The ledger said it of every plain linear module, such as an adapter, and of all in one."""
    model = SmallModel(tied=tied)
    plan = quantize_modules_(model, excluding("embed" if tied else "head"))
    assert {(k.name, k.reason) for k in kept_parameters(model)} == {
        (k.name, k.reason) for k in plan.kept
    }

    model.added = weight_norm(nn.Linear(3, 3))
    model.norm = nn.Sequential(nn.Linear(3, 3, bias=False), nn.LayerNorm(3, bias=False))

    found = {kept.name: kept.reason for kept in kept_parameters(model)}
    assert found["embed.weight" if tied else "head.weight"].startswith("listed in")
    assert {name: found[name] for name in found if name.startswith(("added", "norm"))} == {
        "added.bias": "parameter of ParametrizedLinear, whose weight is computed from others",
        "added.parametrizations.weight.original0": "parameter of ParametrizationList",
        "added.parametrizations.weight.original1": "parameter of ParametrizationList",
        "norm.0.weight": "parameter of Linear, which is not quantized",
        "norm.1.weight": "parameter of LayerNorm",
    }


@pytest.mark.parametrize("name", ["hea", "lock", "up.0", "blocks0"])
def test_part_of_a_component_is_no_name(name):
    with pytest.raises(
        ValueError, match=rf"names \['{name}'\], which match no module of SmallModel"
    ):
        conversion_plan(SmallModel(), [name])


@pytest.mark.parametrize("name", ["head", "embed"])
def test_a_tied_weight_stays_float_if_one_of_its_modules_is_excluded(name):
    """Its other module was once converted, and the excluded one could not compute with codes."""
    model = SmallModel(tied=True)

    plan = quantize_modules_(model, excluding(name))

    assert type(model.embed) is nn.Embedding
    assert type(model.head) is nn.Linear
    assert model.head.weight is model.embed.weight
    assert "embed.weight" in {k.name for k in plan.kept if k.reason.startswith("listed in")}
    model.loss(batch()).backward()
    assert type(model.embed.weight.grad) is torch.Tensor


def test_a_weight_that_one_module_holds_transposed_and_another_not_is_refused():
    model = nn.Sequential(Conv1D(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"1\.weight is shared with a module that holds it trans"):
        quantize_modules_(model, SPEC)
    quantize_modules_(model, excluding("1"))
    assert type(model[0].weight) is nn.Parameter


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"max_norm": 1.0}, "max_norm"),
        ({"sparse": True}, "sparse"),
        ({"scale_grad_by_freq": True}, "frequency-scaled"),
    ],
)
def test_embeddings_that_do_more_stay_float(arguments, reason):
    model = nn.Sequential(nn.Embedding(10, 4, **arguments), nn.Linear(4, 3))

    plan = quantize_modules_(model, SPEC)

    assert list(plan.modules) == ["1"]
    assert reason in {kept.name: kept.reason for kept in plan.kept}["0.weight"]
    model(torch.arange(5)).sum().backward()


def test_a_weight_without_an_element_stays_float():
    """It was once found after others were quantized: the model stayed between float and INT8."""
    model = nn.Sequential(nn.Linear(9, 0), nn.Linear(0, 7), nn.Linear(7, 5))

    plan = quantize_modules_(model, SPEC)

    assert list(plan.modules) == ["2"]
    reasons = {kept.name: kept.reason for kept in plan.kept}
    assert reasons["0.weight"] == reasons["1.weight"] == "weight of Linear is empty"
    model(torch.ones(3, 9)).sum().backward()
    assert isinstance(model[2].weight.grad, Int8Gradient)


def test_convolutions_stay_float_and_are_listed():
    model = nn.Sequential(nn.Conv1d(3, 4, 2), nn.Flatten(), nn.Linear(8, 2))

    plan = quantize_modules_(model, SPEC)

    assert list(plan.modules) == ["2"]
    assert {kept.name: kept.reason for kept in plan.kept}["0.weight"] == "parameter of Conv1d"


# --- in place -------------------------------------------------------------------------------------


def test_ties_names_and_the_identity_of_parameters_stay():
    model = SmallModel()
    names = [name for name, _ in model.named_parameters()]
    parameters = list(model.parameters())
    modules = list(model.modules())

    quantize_modules_(model, SPEC)

    assert model.head.weight is model.embed.weight
    assert [name for name, _ in model.named_parameters()] == names
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert type(model.embed) is QFTEmbedding
    assert type(model.head) is QFTLinear


def test_an_optimizer_made_before_trains_the_quantized_weights():
    model = SmallModel()
    optimizer = QFTLion(model.parameters(), lr=1e-3)

    quantize_modules_(model, SPEC)
    before = model.blocks[0].up.weight.codes.clone()
    model.loss(batch()).backward()
    optimizer.step()

    assert (model.blocks[0].up.weight.codes != before).any()
    state = optimizer.state[model.blocks[0].up.weight]
    assert state["momentum_codes"].dtype == torch.int8


def test_hooks_and_frozen_weights_stay():
    model = SmallModel()
    calls = []
    model.head.register_forward_hook(lambda *_: calls.append(1))
    model.head.weight.requires_grad_(False)

    quantize_modules_(model, SPEC)
    model.loss(batch()).backward()

    assert calls == [1]
    assert not model.head.weight.requires_grad
    assert model.head.weight.grad is None


def test_converting_twice_changes_nothing():
    model = SmallModel()
    quantize_modules_(model, SPEC)
    codes = model.head.weight.codes

    quantize_modules_(model, QuantizationSpec(group_size=4))

    assert model.head.weight.codes is codes


def test_values_are_those_of_the_quantizer():
    model = SmallModel()
    expected = QFTWeight.from_float(model.blocks[1].down.weight, SPEC)

    quantize_modules_(model, SPEC)

    assert_same_bits(model.blocks[1].down.weight.codes, expected.codes)
    assert_same_bits(model.blocks[1].down.weight.outlier_values, expected.outlier_values)
    assert model.blocks[1].down.weight.group_size == 16


def test_a_weight_that_is_not_finite_is_named_and_nothing_is_converted():
    model = SmallModel()
    with torch.no_grad():
        model.blocks[1].down.weight[2, 3] = float("nan")

    with pytest.raises(ValueError, match=r"blocks\.1\.down\.weight has 1 of 6300 values"):
        quantize_modules_(model, SPEC)

    assert not any(isinstance(p, QFTWeight) for p in model.parameters())
    assert type(model.embed) is nn.Embedding


def test_a_weight_of_too_many_values_is_named_and_nothing_is_converted():
    with torch.device("meta"):
        model = SmallModel(tied=False)
        model.head = nn.Linear(2**18, 2**17)

    with pytest.raises(ValueError, match=r"head\.weight has 34,359,738,368 values"):
        quantize_modules_(model, SPEC)

    assert not any(isinstance(p, QFTWeight) for p in model.parameters())


@pytest.mark.parametrize(("spec", "n_scales"), [(SPEC, 2), (QuantizationSpec(matmul="int8"), 1)])
def test_a_meta_model_is_converted_without_values(spec, n_scales):
    """INT8 products once looked at the columns of the outliers, which have no values here."""
    with torch.device("meta"):
        model = SmallModel()

    quantize_modules_(model, spec)

    assert model.embed.weight.is_meta
    assert isinstance(model.embed.weight, QFTWeight)
    assert tuple(model.blocks[0].up.weight.scales.shape) == (300, n_scales)


# --- and back -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dequantizing_gives_plain_modules_of_the_asked_dtype(dtype):
    model = SmallModel()
    quantize_modules_(model, SPEC)
    values = model.embed.weight.dequantize()
    model.blocks[0].requires_grad_(False)

    dequantize_modules_(model, dtype)

    assert type(model.embed) is nn.Embedding
    assert type(model.head) is nn.Linear
    assert model.head.weight is model.embed.weight
    assert all(type(p) is nn.Parameter and p.dtype == dtype for p in model.parameters())
    assert not model.blocks[0].up.weight.requires_grad
    assert_same_bits(model.embed.weight.detach(), values.to(dtype))
    assert "head.weight" in model.state_dict()
    assert model.loss(batch()).isfinite()


def test_an_integer_dtype_is_refused():
    with pytest.raises(ValueError, match=r"needs a float dtype, got torch\.int8"):
        dequantize_modules_(SmallModel(), torch.int8)
