"""A float module that is put into an INT8 model, such as a new head."""

import logging

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BertForSequenceClassification, Trainer

from qft_hf.hf.arguments import QFTTrainingArguments
from qft_hf.hf.config import QFTConfig
from qft_hf.hf.convert import quantize_model_
from qft_hf.hf.trainer import QFTTrainer
from qft_hf.nn import QFTLinear
from qft_hf.quant import QFTWeight
from tests.hf.checkpoints import IDS, assert_same_state
from tests.models import tiny_bert, tiny_llama


def bert_with_new_head(config=None):
    model = quantize_model_(tiny_bert(), config or QFTConfig())
    torch.manual_seed(0)
    model.classifier = nn.Linear(42, 9)
    model.config.num_labels = 9
    return model


@pytest.mark.parametrize("listed", [None, ["query"]])
def test_it_is_saved_as_float_and_loaded_as_it_was(listed, tmp_path, caplog):
    model = bert_with_new_head(QFTConfig(modules_to_not_convert=listed))
    with caplog.at_level(logging.WARNING, logger="qft_hf"):
        model.save_pretrained(tmp_path)

    again = BertForSequenceClassification.from_pretrained(tmp_path)

    assert "classifier, added to the INT8 BertForSeq" in caplog.text
    assert_same_state(again, model)
    assert type(again.classifier) is nn.Linear
    recorded = again.config.quantization_config.modules_to_not_convert
    assert recorded == [*(listed or []), "classifier"]
    caplog.clear()
    model.save_pretrained(tmp_path)
    assert "added to the INT8" not in caplog.text


@pytest.mark.parametrize("cls", [Trainer, QFTTrainer])
def test_training_makes_it_int8_as_all_others(cls, tmp_path, caplog):
    model = bert_with_new_head()
    args = QFTTrainingArguments(output_dir=tmp_path, report_to="none", use_cpu=True)

    with caplog.at_level(logging.WARNING, logger="qft_hf"):
        cls(model=model, args=args)

    assert isinstance(model.classifier.weight, QFTWeight)
    assert "quantized classifier, which was float in the INT8 BertForSequence" in caplog.text


def test_training_leaves_float_what_the_models_configuration_lists(tmp_path):
    model = bert_with_new_head(QFTConfig(modules_to_not_convert=["classifier"]))

    args = QFTTrainingArguments(output_dir=tmp_path, report_to="none", use_cpu=True)
    QFTTrainer(model=model, args=args)

    assert type(model.classifier) is nn.Linear


def test_a_model_without_a_layer_that_its_configuration_names_trains_and_is_saved(tmp_path):
    """Both once raised an error about modules_to_not_convert, and the model could not be saved."""
    listed = ["model.layers.1.mlp.up_proj", "k_proj"]
    model = quantize_model_(tiny_llama(), QFTConfig(modules_to_not_convert=listed))
    del model.model.layers[1]
    model.config.num_hidden_layers = 1

    args = QFTTrainingArguments(output_dir=tmp_path, report_to="none", use_cpu=True)
    QFTTrainer(model=model, args=args)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)

    assert_same_state(again, model)
    assert again.config.quantization_config.modules_to_not_convert == ["k_proj"]


def test_a_new_head_that_is_tied_to_an_int8_table_is_int8(tmp_path):
    model = quantize_model_(tiny_llama(tied=True), QFTConfig())
    model.lm_head = nn.Linear(44, 131, bias=False)
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        expected = model(IDS).logits

    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)

    assert isinstance(again.lm_head, QFTLinear)
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, expected)


@pytest.mark.parametrize("replaced", ["lm_head", "model.embed_tokens"])
def test_a_module_that_takes_the_place_of_a_tied_one_is_loaded_beside_the_int8_one(
    replaced, tmp_path
):
    """The saved folder once could not be loaded: its `tie_word_embeddings` tied both again."""
    model = quantize_model_(tiny_llama(tied=True), QFTConfig())
    torch.manual_seed(0)
    new = nn.Linear(44, 131, bias=False) if replaced == "lm_head" else nn.Embedding(131, 44)
    model.set_submodule(replaced, new)

    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)

    assert_same_state(again, model)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    weights = again.lm_head.weight, again.model.embed_tokens.weight
    assert sum(isinstance(weight, QFTWeight) for weight in weights) == 1
