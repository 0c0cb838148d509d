"""`QFTLinear` and `QFTEmbedding` in a model: gradients, checkpointing, state dicts."""

import copy
import io

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

from qft_hf.config import QuantizationSpec
from qft_hf.nn import (
    QFTEmbedding,
    QFTLinear,
    QuantizedModule,
    dequantize_modules_,
    prepare_modules_,
    quantize_modules_,
    state_fields,
    state_names,
)
from qft_hf.quant import Int8Gradient
from tests.nn.small import SmallModel, batch
from tests.tolerances import assert_same_bits, assert_same_tensors, snr_db

SPEC = QuantizationSpec(group_size=40, outlier_fraction=0.02)
NO_OUTLIERS = QuantizationSpec(outlier_fraction=0.0)


def quantized(spec: QuantizationSpec = SPEC, **arguments) -> SmallModel:
    model = SmallModel(**arguments)
    quantize_modules_(model, spec)
    return model


def float_twin(model: SmallModel, dtype: torch.dtype = torch.float32) -> SmallModel:
    """Return a copy with the same weights in plain modules."""
    twin = copy.deepcopy(model)
    dequantize_modules_(twin, dtype)
    return twin


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: p.grad.dequantize() if isinstance(p.grad, Int8Gradient) else p.grad
        for name, p in model.named_parameters()
    }


# --- results that are changed in place ------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "shape", [(40, 64), (3, 64), (2, 20, 64), (1, 2, 64), (2, 2, 10, 64), (64,)]
)
@pytest.mark.parametrize("matmul", ["dequantize", "int8"])
def test_a_layer_s_result_may_be_changed_in_place(matmul, shape, bias):
    """As with nn.Linear. Ours was once a view, whose change in place autograd forbids."""
    torch.manual_seed(1)
    in_place = nn.Sequential(nn.Linear(64, 70, bias=bias), nn.ReLU(inplace=True))
    quantize_modules_(in_place, QuantizationSpec(matmul=matmul))
    apart = copy.deepcopy(in_place)
    apart[1].inplace = False
    x = torch.randn(shape)
    results = []
    for model in (in_place, apart):
        given = x.clone().requires_grad_()
        y = model(given)
        (y.square() * torch.arange(70)).sum().backward()
        results.append((y.detach(), given.grad, *gradients(model).values()))

    for ours, theirs in zip(*results, strict=True):
        assert_same_bits(ours, theirs)
    for training in (
        True,
        False,
    ):  # also results computed without gradients, when gradients are on again
        with torch.no_grad():
            y = in_place.train(training)[0](x)
        y.mul_(torch.ones(70, requires_grad=True))
        assert y.requires_grad


@pytest.mark.parametrize("shape", [(3,), (2, 3), ()])
def test_rows_of_a_table_may_be_scaled_in_place(shape):
    table = nn.Embedding(20, 30)
    quantize_modules_(table, SPEC)
    other = copy.deepcopy(table)
    ids = torch.randint(20, shape, generator=torch.Generator().manual_seed(0))

    x = table(ids)
    x *= 30**0.5
    x.exp().sum().backward()
    (other(ids) * 30**0.5).exp().sum().backward()

    assert_same_bits(table.weight.grad.codes, other.weight.grad.codes)
    assert_same_bits(table.weight.grad.scales, other.weight.grad.scales)
    assert table.weight.grad.codes.any()


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_are_those_of_the_float_model(tied):
    model = quantized(tied=tied)
    twin = float_twin(model)

    loss, twin_loss = model.loss(batch()), twin.loss(batch())
    loss.backward()
    twin_loss.backward()

    assert_same_bits(loss.detach(), twin_loss.detach())
    ours, theirs = gradients(model), gradients(twin)
    assert ours.keys() == theirs.keys()
    assert ("head.weight" in ours) != tied
    for name, exact in theirs.items():
        # Rounding to 1 / 254 of the largest value of a group; Gaussian values give 40 dB or more.
        assert snr_db(exact, ours[name]) > 38, name


@pytest.mark.parametrize(("n_batches", "rows"), [(1, 8), (2, 4), (8, 1)])
def test_accumulation_agrees_with_the_float_gradient_to_int8_rounding(n_batches, rows):
    """A batch at once or in parts: 30 dB in every tensor, the tied table included."""
    model = quantized()
    twin = float_twin(model)
    twin.loss(batch()).backward()

    for part in batch().split(rows):
        (model.loss(part) / n_batches).backward()

    ours = gradients(model)
    for name, exact in gradients(twin).items():
        assert snr_db(exact, ours[name]) >= 30, name


def test_every_quantized_parameter_has_an_int8_gradient():
    model = quantized()

    model.loss(batch()).backward()

    kinds = {name: type(p.grad).__name__ for name, p in model.named_parameters()}
    weights = {name for name in kinds if name.endswith("weight") and name != "norm.weight"}
    assert {name for name, kind in kinds.items() if kind == "Int8Gradient"} == weights


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients_bit_for_bit(reentrant):
    model = quantized()
    model.loss(batch()).backward()
    recomputing = quantized(reentrant=reentrant)

    recomputing.loss(batch()).backward()

    for parameter, expected in zip(recomputing.parameters(), model.parameters(), strict=True):
        if isinstance(expected.grad, Int8Gradient):
            assert_same_bits(parameter.grad.codes, expected.grad.codes)
            assert_same_bits(parameter.grad.scales, expected.grad.scales)
        else:
            assert_same_bits(parameter.grad, expected.grad)


def test_a_bf16_model_computes_like_its_float_twin():
    model = quantized().to(torch.bfloat16)
    twin = float_twin(model, torch.bfloat16)

    loss, twin_loss = model.loss(batch()), twin.loss(batch())
    loss.backward()
    twin_loss.backward()

    assert_same_bits(loss.detach(), twin_loss.detach())
    ours = gradients(model)
    for name, exact in gradients(twin).items():
        assert ours[name].dtype == torch.bfloat16
        assert snr_db(exact, ours[name]) > 30, name


def test_autocast_computes_like_the_float_twin():
    model = quantized()
    twin = float_twin(model)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, twin_loss = model.loss(batch()), twin.loss(batch())
    loss.backward()
    twin_loss.backward()

    assert_same_bits(loss.detach(), twin_loss.detach())
    ours = gradients(model)
    for name, exact in gradients(twin).items():
        assert snr_db(exact, ours[name]) > 30, name


def test_frozen_modules_are_left_alone():
    model = quantized()
    model.blocks[0].requires_grad_(False)

    model.loss(batch()).backward()

    assert all(p.grad is None for p in model.blocks[0].parameters())
    assert all(p.grad is not None for p in model.blocks[1].parameters())


def test_module_to_dtype_keeps_codes_and_casts_what_is_float():
    model = quantized()
    codes = model.blocks[0].up.weight.codes.clone()

    model.to(torch.bfloat16)

    weight = model.blocks[0].up.weight
    assert (weight.dtype, weight.scales.dtype) == (torch.bfloat16, torch.float32)
    assert_same_bits(weight.codes, codes)
    assert model.blocks[0].up.bias.dtype == torch.bfloat16
    assert model.head.weight is model.embed.weight


# --- state dict -----------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [SPEC, NO_OUTLIERS], ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_a_state_dict_restores_another_model_bit_for_bit(tied, spec):
    model, other = quantized(spec, tied=tied, seed=1), quantized(spec, tied=tied, seed=2)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)

    other.load_state_dict(torch.load(file, weights_only=True))

    for name, parameter in model.named_parameters():
        restored = other.get_parameter(name)
        if hasattr(parameter, "fields"):
            for field_name, field in parameter.fields().items():
                assert_same_bits(getattr(restored, field_name), field)
        else:
            assert_same_bits(restored.detach(), parameter.detach())
    assert_same_bits(other.loss(batch()).detach(), model.loss(batch()).detach())


def test_a_state_dict_holds_fields_under_names_of_their_own():
    """Programs that do not know the format would take an INT8 tensor named `weight` for weights."""
    model = quantized(tied=False)
    state = model.state_dict()

    weight, bias = model.blocks[0].up.weight, model.blocks[0].up.bias
    written = {
        "blocks.0.up.weight_q": weight.codes,
        "blocks.0.up.weight_scale": weight.scales,
        "blocks.0.up.weight_outlier_value": weight.outlier_values,
        "blocks.0.up.weight_outlier_column": weight.outlier_columns,
        "blocks.0.up.bias": bias,
    }
    assert_same_tensors({key: state[key] for key in state if "blocks.0.up." in key}, written)
    assert not any(isinstance(value, nn.Parameter) for value in state.values())
    assert "head.weight" not in state
    assert "norm.weight" in state


def test_without_outliers_there_are_two_fields():
    weight = quantized(NO_OUTLIERS).head.weight

    assert set(state_fields("weight", weight)) == {"weight_q", "weight_scale"}


def test_a_whole_module_can_be_saved():
    model = quantized()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)

    other = torch.load(file, weights_only=False)

    assert other.head.weight is other.embed.weight
    assert_same_bits(other.loss(batch()).detach(), model.loss(batch()).detach())


def test_deepcopy_is_independent_and_keeps_ties():
    model = quantized()
    loss = model.loss(batch()).detach()

    other = copy.deepcopy(model)
    other.embed.weight.codes.zero_()

    assert other.head.weight is other.embed.weight
    assert_same_bits(model.loss(batch()).detach(), loss)


@pytest.mark.parametrize("name", sorted(state_names("weight").values()))
def test_a_missing_field_is_named_and_the_module_refuses_to_compute(name):
    model = quantized(tied=False)
    state = quantized(tied=False, seed=1).state_dict()
    del state[f"blocks.1.down.{name}"]

    with pytest.raises(RuntimeError, match=rf"Missing key.*blocks\.1\.down\.{name}"):
        model.load_state_dict(state)
    assert model.load_state_dict(state, strict=False).missing_keys == [f"blocks.1.down.{name}"]
    with pytest.raises(RuntimeError, match=rf"without .*{name}.*Load a complete checkpoint"):
        model.loss(batch())


def test_a_forward_that_reads_the_weight_refuses_a_mixture_too():
    """Only forwards of this package asked whether all fields were loaded; others computed."""
    layer, other = (
        nn.Sequential(nn.Linear(32, 32), nn.MultiheadAttention(32, 4)) for _ in range(2)
    )
    for model in (layer, other):
        quantize_modules_(model, QuantizationSpec())
    state = {
        key: field for key, field in other.state_dict().items() if "in_proj_weight_scale" not in key
    }
    layer.load_state_dict(state, strict=False)
    before = layer.state_dict()

    x = torch.ones(3, 1, 32)
    for act in (
        lambda: layer[1](x, x, x),
        lambda: layer[1].in_proj_weight[:3].sum(),
        lambda: layer[1].in_proj_weight.dequantize(),
        lambda: dequantize_modules_(layer, torch.float32),
    ):
        with pytest.raises(RuntimeError, match=r"in_proj_weight_scale.*Load a complete checkpoint"):
            act()
    assert_same_tensors(layer.state_dict(), before)


def test_fields_may_come_in_several_files():
    """A sharded checkpoint may cut between the fields of one weight."""
    model, source = quantized(tied=False), quantized(tied=False, seed=1)
    state = source.state_dict()
    keys = sorted(state)

    model.load_state_dict({key: state[key] for key in keys[::2]}, strict=False)
    model.load_state_dict({key: state[key] for key in keys[1::2]}, strict=False)

    assert_same_bits(model.loss(batch()).detach(), source.loss(batch()).detach())


@pytest.mark.parametrize("spec", [SPEC, NO_OUTLIERS], ids=["outliers", "none"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("place", ["meta", "cpu"])
def test_with_assign_weights_are_made_of_the_tensors_of_the_state(place, tied, spec):
    """Codes were once copied to the meta device, which has no memory, and values checked there."""
    model, source = quantized(spec, tied=tied), quantized(spec, tied=tied, seed=1)
    source.blocks[0].up.weight.requires_grad_(False)
    model.blocks[0].up.weight.requires_grad_(False)
    model.to(place)
    weights = [module.weight for module in model.modules() if isinstance(module, QuantizedModule)]
    state = source.state_dict()

    model.load_state_dict(state, assign=True)

    assert_same_tensors(model.state_dict(), state)
    modules = [module for module in model.modules() if isinstance(module, QuantizedModule)]
    assert all(module.weight is weight for module, weight in zip(modules, weights, strict=True))
    codes = model.blocks[1].down.weight.codes
    assert codes.data_ptr() == state["blocks.1.down.weight_q"].data_ptr()
    ids = batch()
    loss = model.loss(ids)
    loss.backward()
    assert_same_bits(loss.detach(), source.loss(ids).detach())
    assert model.blocks[0].up.weight.grad is None
    assert isinstance(model.head.weight.grad, Int8Gradient)


@pytest.mark.parametrize("tied", [True, False])
def test_a_skeleton_gets_memory_by_to_empty_and_stays_int8(tied):
    """Weights became float parameters, which no INT8 state can be loaded into."""
    source = quantized(tied=tied, seed=1)
    model = quantized(tied=tied).to("meta").to_empty(device="cpu")

    assert (model.head.weight is model.embed.weight) == tied
    assert model.embed.weight.is_table
    assert model.loss(batch()).shape == ()  # of undefined values, but it reads only its own memory
    model.load_state_dict(source.state_dict())
    assert_same_tensors(model.state_dict(), source.state_dict())
    assert_same_bits(model.loss(batch()).detach(), source.loss(batch()).detach())


def test_a_function_that_makes_float_tensors_of_weights_is_refused():
    """They became INT8 weights of zeros, as if they were skeletons without values."""
    model = quantized()
    before = model.state_dict()

    with pytest.raises(TypeError, match=r"A Tensor was assigned to \.data of QFTWeight"):
        model._apply(lambda tensor: torch.empty_like(tensor).copy_(tensor))
    assert_same_tensors(model.state_dict(), before)


def test_a_skeleton_without_assign_says_what_to_do():
    model = quantized().to("meta")
    reason = r"head\.weight_q has no memory .* assign=True\), or model\.to_empty"
    with pytest.raises(RuntimeError, match=reason):
        model.load_state_dict(quantized().state_dict())
    model.load_state_dict(quantized().to("meta").state_dict())  # nothing comes, nothing is lost


def test_a_functional_call_takes_parameters_and_no_state_dict():
    model, other = quantized(tied=False), quantized(tied=False, seed=1)
    ids = batch()

    logits = torch.func.functional_call(model, dict(other.named_parameters()), (ids,))

    assert_same_bits(logits, other(ids))
    for state in (other.state_dict(), {"head.weight_q": other.head.weight_q}):
        with pytest.raises(AttributeError, match=r"pass dict\(model\.named_parameters\(\)\)"):
            torch.func.functional_call(model, state, (ids,))
    assert_same_tensors(model.state_dict(), quantized(tied=False).state_dict())


def test_an_unknown_key_is_named():
    model = quantized()

    with pytest.raises(RuntimeError, match=r"Unexpected key.*blocks\.0\.up\.weight_zero"):
        model.load_state_dict(model.state_dict() | {"blocks.0.up.weight_zero": torch.zeros(1)})


def test_outliers_for_a_model_without_them_are_refused():
    """Non-strict loading would silently drop them, and with them a percent of the weights."""
    state = quantized(tied=False).state_dict()
    model = quantized(QuantizationSpec(group_size=40, outlier_fraction=0.0), tied=False)

    with pytest.raises(
        RuntimeError, match=r"outlier_column.*but not in this model.*from_pretrained"
    ):
        model.load_state_dict(state, strict=False)


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        (
            "weight_q",
            lambda t: t[:-1],
            r"must be torch\.int8 of shape \(300, 21\), got .*\(299, 21\)",
        ),
        ("weight_q", lambda t: t.float(), r"must be torch\.int8 .*got torch\.float32"),
        ("weight_scale", lambda t: t.bfloat16(), r"must be torch\.float32 .*got torch\.bfloat16"),
        ("weight_outlier_value", lambda t: t[:, :0], r"written for another model or with another"),
        ("weight_outlier_column", lambda t: t.int(), r"must be torch\.int16 .*got torch\.int32"),
    ],
)
def test_a_field_of_another_form_is_refused(name, change, match):
    model = quantized()
    state = model.state_dict()
    state[f"blocks.0.up.{name}"] = change(state[f"blocks.0.up.{name}"])

    with pytest.raises(RuntimeError, match=match):
        model.load_state_dict(state)


def test_float_weights_are_not_loaded_into_codes():
    model = quantized(tied=False)
    codes = model.head.weight.codes.clone()

    with pytest.raises(
        RuntimeError, match=r"Missing key.*up\.weight_q[\s\S]*call dequantize_model_\(model"
    ):
        model.load_state_dict(SmallModel(tied=False).state_dict())
    assert_same_bits(model.head.weight.codes, codes)


def test_a_skeleton_that_waits_for_its_weights_says_so():
    model = SmallModel()
    prepare_modules_(model, SPEC)

    assert isinstance(model.head, QFTLinear)
    assert isinstance(model.embed, QFTEmbedding)
    with pytest.raises(
        RuntimeError, match=r"is not quantized\. Load the model with from_pretrained"
    ):
        model.loss(batch())
    with pytest.raises(
        RuntimeError, match=r"embed\.weight is not quantized, so no state.*quantize_"
    ):
        model.load_state_dict(quantized().state_dict())


PARAMETRIZATIONS = {
    "weight norm": lambda head: nn.utils.parametrizations.weight_norm(head),
    "spectral norm": lambda head: nn.utils.parametrizations.spectral_norm(head),
    "pruning": lambda head: nn.utils.prune.l1_unstructured(head, "weight", 0.5),
}


@pytest.mark.parametrize("put", PARAMETRIZATIONS.values(), ids=PARAMETRIZATIONS)
def test_a_weight_that_is_computed_from_others_is_refused_and_says_where_it_works(put):
    """It was once a KeyError that named nothing but "weight"."""
    model = quantized()
    put(model.head)

    with pytest.raises(RuntimeError, match=r"Linear is no longer .* modules_to_not_convert"):
        model.loss(batch())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("layer", [nn.Linear(9, 5), nn.Embedding(9, 5)])
def test_a_trace_that_would_not_see_the_kernels_is_refused(layer):
    """Compiled kernels were called with sizes that are tensors, and numba failed to compile."""
    module = nn.Sequential(copy.deepcopy(layer))
    quantize_modules_(module, SPEC)
    x = torch.ones(3, dtype=torch.int64) if isinstance(layer, nn.Embedding) else torch.ones(3, 9)

    with pytest.raises(RuntimeError, match=r"Use torch\.export, or trace a float model"):
        torch.jit.trace(module, x)
    exported = torch.export.export(module, (x,)).module()
    assert_same_bits(exported(x), module(x))


def test_quantized_modules_are_told_from_plain_ones():
    model = quantized()

    assert isinstance(model.head, QuantizedModule)
    assert isinstance(model.embed, QuantizedModule)
    assert not isinstance(model.norm, QuantizedModule)
    assert not isinstance(nn.Linear(2, 2), QuantizedModule)


def test_modules_keep_their_attributes_and_show_their_class():
    model = quantized()

    assert (model.embed.padding_idx, model.embed.num_embeddings) == (3, 37)
    assert repr(model.head).startswith("QFTLinear(in_features=21, out_features=37")
