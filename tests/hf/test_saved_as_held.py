"""`save_pretrained` writes a loadable checkpoint of any model and any part of one."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    EncoderDecoderModel,
)

from qft_hf import QFTConfig, QFTLion, QFTWeight, quantize_model_
from tests.hf.checkpoints import IDS, assert_same_state
from tests.models import tiny_llama


def tiny_part(cls: type, **overrides):
    config = BertConfig(
        vocab_size=61, hidden_size=36, num_hidden_layers=1, num_attention_heads=3,
        intermediate_size=50, max_position_embeddings=20, **overrides,
    )  # fmt: skip
    return cls(config)


class Around(nn.Module):
    """A user's module that contains a transformers model."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = tiny_llama().model
        self.head = nn.Linear(44, 3)


# --- a state dict that is passed


@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize("tied", [False, True])
def test_a_state_dict_that_is_passed_is_what_is_saved(tied, by_name, tmp_path):
    """INT8 models once ignored it and saved the current weights instead of the best ones."""
    model = quantize_model_(tiny_llama(tied=tied), QFTConfig(group_size=9))
    best = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = QFTLion(model.parameters(), lr=1e-2)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    moved = copy.deepcopy(model.state_dict())

    if by_name:
        model.save_pretrained(tmp_path, state_dict=best)
    else:
        model.save_pretrained(tmp_path, True, best)

    assert_same_state(AutoModelForCausalLM.from_pretrained(tmp_path), best)
    assert_same_state(model, moved)
    model.save_pretrained(tmp_path)
    assert_same_state(AutoModelForCausalLM.from_pretrained(tmp_path), moved)


def test_half_a_state_dict_is_refused_and_the_folder_is_as_it_was(tmp_path):
    model = quantize_model_(tiny_llama(), QFTConfig())
    model.save_pretrained(tmp_path)
    state = model.state_dict()
    state["lm_head.weight"] = state.pop("lm_head.weight_q").float()

    with pytest.raises(ValueError, match=r"lacks lm_head\.weight_q, .* after dequantize_model_"):
        model.save_pretrained(tmp_path, state_dict=state)
    assert_same_state(AutoModelForCausalLM.from_pretrained(tmp_path), model)


def test_a_model_of_which_only_a_part_was_loaded_is_not_saved(tmp_path):
    """Forwards refused it, and it was saved without a word."""
    model = quantize_model_(tiny_llama(), QFTConfig())
    model.save_pretrained(tmp_path)
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lost = "model.layers.0.mlp.up_proj.weight_q"
    other = quantize_model_(tiny_llama(seed=1), QFTConfig()).state_dict()
    model.load_state_dict({n: t for n, t in other.items() if n != lost}, strict=False)

    with pytest.raises(RuntimeError, match=r"the model\.layers\.0\.mlp\.up_proj\.weight is a mix"):
        model.save_pretrained(tmp_path)
    assert_same_state(AutoModelForCausalLM.from_pretrained(tmp_path), whole)

    model.save_pretrained(tmp_path, state_dict=whole)
    model.load_state_dict(whole)
    model.save_pretrained(tmp_path)
    assert_same_state(AutoModelForCausalLM.from_pretrained(tmp_path), whole)


# --- a part


def test_the_encoder_of_an_int8_model_of_two_is_a_model(tmp_path):
    """The encoder's config.json once did not mention INT8, and nothing could load the folder."""
    whole = EncoderDecoderModel(
        encoder=tiny_part(BertModel),
        decoder=tiny_part(BertLMHeadModel, is_decoder=True, add_cross_attention=True),
    )
    quantize_model_(whole, QFTConfig(outlier_fraction=0.1))
    marks = (vars(whole.encoder).copy(), vars(whole.encoder.config).copy())

    whole.encoder.save_pretrained(tmp_path)

    assert_same_state(AutoModel.from_pretrained(tmp_path), whole.encoder)
    assert marks == (vars(whole.encoder), vars(whole.encoder.config))


def test_a_model_inside_of_a_module_is_a_model(tmp_path):
    around = quantize_model_(Around(), QFTConfig(group_size=11))
    around.encoder.save_pretrained(tmp_path)
    assert_same_state(AutoModel.from_pretrained(tmp_path), around.encoder)


@pytest.mark.parametrize("matmul", ["dequantize", "int8"])
def test_a_part_lists_what_of_it_is_float(matmul, tmp_path):
    """The float layer's name in the part differs from its listed name in the whole model."""
    config = QFTConfig(matmul=matmul, modules_to_not_convert=["model.layers.0"])
    model = quantize_model_(tiny_llama(), config)

    model.model.save_pretrained(tmp_path)

    assert_same_state(AutoModel.from_pretrained(tmp_path), model.model)
    assert model.config.quantization_config.modules_to_not_convert == ["model.layers.0"]


def test_a_part_has_the_products_it_had(tmp_path):
    chosen = {"model.layers.0": ["forward"], "model.layers.1.mlp": []}
    model = quantize_model_(tiny_llama(), QFTConfig(matmul="int8", int8_products=chosen, seed=3))

    model.model.save_pretrained(tmp_path)

    again = AutoModel.from_pretrained(tmp_path)
    products = [
        {n: getattr(m, "products", None) for n, m in x.named_modules()}
        for x in (again, model.model)
    ]
    assert products[0] == products[1]
    assert len(set(products[0].values())) == 3  # none, forward alone, all


def test_a_model_with_an_int8_part_is_a_model(tmp_path):
    model = tiny_llama()
    quantize_model_(model.model.layers, QFTConfig())

    model.save_pretrained(tmp_path)

    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_state(again, model)
    assert not isinstance(again.lm_head.weight, QFTWeight)


def test_parts_of_two_formats_are_refused_before_anything_is_written(tmp_path):
    model = tiny_llama()
    quantize_model_(model.model.layers[0], QFTConfig(group_size=8))
    quantize_model_(model.model.layers[1], QFTConfig(group_size=16))
    with pytest.raises(ValueError, match=r"INT8 weights of several formats, .*Save its parts"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


# --- a float model


def test_a_float_model_of_an_int8_configuration_is_saved_as_float(tmp_path):
    """The model's config.json once claimed INT8, and nothing could load the folder."""
    int8 = quantize_model_(tiny_llama(), QFTConfig())
    model = type(int8)(int8.config)

    model.save_pretrained(tmp_path)

    assert_same_state(AutoModelForCausalLM.from_pretrained(tmp_path), model)
    assert isinstance(int8.config.quantization_config, QFTConfig)


def test_tokens_can_be_added_to_a_model_inside_of_a_module():
    around = quantize_model_(Around(), QFTConfig(group_size=11))
    old = around.encoder.embed_tokens.weight.codes.clone()
    around.encoder.resize_token_embeddings(140, mean_resizing=False)
    table = around.encoder.embed_tokens.weight
    assert table.shape == (140, 44)
    assert table.group_size == 11
    assert torch.equal(table.codes[:131], old)
