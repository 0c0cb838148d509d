"""Which products of which modules are INT8: names, the head, and refusals."""

import copy
import pickle

import pytest
import torch
from torch import nn

from qft_hf.config import QuantizationSpec
from qft_hf.nn import Int8Products, dequantize_modules_, prepare_modules_, quantize_modules_
from qft_hf.quant import Int8Gradient
from tests.nn.small import SmallModel, batch
from tests.tolerances import assert_same_bits, snr_db

ALL = Int8Products(seed=3)
FORWARD = Int8Products(input_gradient=False, weight_gradient=False, seed=3)


class WithHead(SmallModel):
    """Names the module that computes its logits, as transformers models do."""

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def spec(products=None, **arguments) -> QuantizationSpec:
    return QuantizationSpec(matmul="int8", int8_products=products, seed=3, **arguments)


def quantized(products=None, model_class=WithHead, **arguments) -> SmallModel:
    model = model_class(**arguments)
    quantize_modules_(model, spec(products))
    return model


def chosen(model: nn.Module) -> dict[str, Int8Products | None]:
    return {name: m.products for name, m in model.named_modules() if isinstance(m, nn.Linear)}


@pytest.mark.parametrize(
    ("products", "head", "up", "down"),
    [
        (None, None, ALL, ALL),
        ({}, None, ALL, ALL),
        ({"head": ["forward"]}, FORWARD, ALL, ALL),
        ({"*": ["forward"]}, None, FORWARD, FORWARD),  # says nothing of the head
        ({"*": [], "head": ["forward"]}, FORWARD, None, None),
        ({"down": []}, None, ALL, None),
        ({"blocks": ["forward"], "blocks.0.down": []}, None, FORWARD, None),  # longest name
        ({"down": [], "blocks": ["forward"]}, None, FORWARD, FORWARD),
    ],
)
def test_names_choose_and_the_head_is_left_out_unless_named(products, head, up, down):
    choice = chosen(quantized(products))

    assert (choice["head"], choice["blocks.0.up"], choice["blocks.0.down"]) == (head, up, down)


def test_a_model_that_names_no_head_has_all_linear_modules_in_int8():
    assert set(chosen(quantized(model_class=SmallModel)).values()) == {ALL}


def test_the_other_way_of_multiplying_chooses_nothing():
    model = WithHead()
    quantize_modules_(model, QuantizationSpec(int8_products={"nowhere": ["forward"]}))

    assert set(chosen(model).values()) == {None}


@pytest.mark.parametrize("name", ["embed", "norm", "hea", "blocks.0.up.x", ""])
def test_a_name_without_a_linear_module_is_refused_before_anything_changes(name):
    model = WithHead()

    with pytest.raises(ValueError, match=r"match no quantized linear module of WithHead.*'head'"):
        quantize_modules_(model, spec({name: []}))
    assert type(model.head) is nn.Linear
    assert type(model.head.weight) is nn.Parameter


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"group_size": 64}, r'got group_size=64.*Leave group_size out, or set matmul="dequ'),
        ({"products": {"*": ["forwards"]}}, r"\['forwards'\] for '\*'.*are forward, input_grad"),
    ],
)
def test_what_cannot_be_int8_is_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        spec(**arguments)


def test_weights_with_outliers_of_each_row_are_refused():
    model = WithHead()
    quantize_modules_(model, QuantizationSpec(outlier_fraction=0.1))

    with pytest.raises(ValueError, match=r"blocks\.0\.up\.weight was quantized for matmul='deq"):
        prepare_modules_(model, spec())
    assert set(chosen(model).values()) == {None}
    source = WithHead()
    quantize_modules_(source, spec(outlier_fraction=0.1))
    with pytest.raises(RuntimeError, match=r"up\.weight was quantized.*Leave matmul='int8' out"):
        source.load_state_dict(model.state_dict())
    # The other way round works: whole outlier columns are outliers like any others.
    fitting = WithHead()
    quantize_modules_(fitting, spec(outlier_fraction=0.1))
    model.load_state_dict(fitting.state_dict())


def test_weights_of_whole_rows_without_outliers_fit_both():
    model = WithHead()
    quantize_modules_(model, QuantizationSpec(outlier_fraction=0.0))

    prepare_modules_(model, spec())

    assert chosen(model)["blocks.1.down"] == ALL


def test_a_module_shows_copies_and_loses_its_products():
    model = quantized({"down": ["forward"]})

    assert "int8=(forward, input_gradient, weight_gradient)" in repr(model.blocks[0].up)
    assert "int8=(forward)" in repr(model.blocks[0].down)
    assert "int8" not in repr(model.head)
    assert chosen(copy.deepcopy(model)) == chosen(model)
    assert pickle.loads(pickle.dumps(ALL)) == ALL
    dequantize_modules_(model, torch.float32)
    assert "products" not in vars(model.blocks[0].up)


# --- a model --------------------------------------------------------------------------------------


def losses_and_gradients(model: SmallModel, ids) -> tuple[torch.Tensor, dict]:
    loss = model.loss(ids)
    loss.backward()
    return loss.detach(), {
        name: p.grad.dequantize() if isinstance(p.grad, Int8Gradient) else p.grad
        for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("products", [None, {"head": ["forward", "weight_gradient"]}], ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_of_a_model_have_20_db_against_its_float_weights(tied, products):
    model = quantized(products, tied=tied)
    twin = copy.deepcopy(model)
    dequantize_modules_(twin, torch.float32)

    loss, ours = losses_and_gradients(model, batch())
    exact_loss, exact = losses_and_gradients(twin, batch())

    assert loss.item() == pytest.approx(exact_loss.item(), rel=1e-2)
    for name, gradient in exact.items():
        assert snr_db(gradient, ours[name]) > 20, name


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients_bit_for_bit(reentrant):
    loss, expected = losses_and_gradients(quantized(), batch())

    again, ours = losses_and_gradients(quantized(reentrant=reentrant), batch())

    assert_same_bits(again, loss)
    for name, gradient in expected.items():
        assert_same_bits(ours[name], gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_and_bf16_models_have_the_gradients_of_fp32(dtype):
    _, exact = losses_and_gradients(quantized(), batch())
    model = quantized().to(dtype)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, ours = losses_and_gradients(model, batch())

    for name, gradient in exact.items():
        assert ours[name].dtype == dtype
        assert snr_db(gradient, ours[name]) > 20, name


def test_accumulated_gradients_are_those_of_the_whole_batch():
    _, whole = losses_and_gradients(quantized(), batch())
    model = quantized()

    for part in batch().split(4):
        (model.loss(part) / 2).backward()

    for name, p in model.named_parameters():
        gradient = p.grad.dequantize() if isinstance(p.grad, Int8Gradient) else p.grad
        assert snr_db(whole[name], gradient) > 20, name
