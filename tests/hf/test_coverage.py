"""Warnings and errors about models of which a large share would stay float."""

import json
import logging

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM

from qft_hf.hf.config import QFTConfig
from qft_hf.hf.convert import quantize_model_
from qft_hf.quant import QFTWeight
from tests.models import tiny_llama


def convolutional(n_convolutions=2):
    """300 INT8 parameters, and 24 float parameters in each convolution."""
    torch.manual_seed(0)
    layers = [nn.Conv1d(4, 6, 1, bias=False) for _ in range(n_convolutions)]
    return nn.Sequential(nn.Linear(100, 3, bias=False), *layers)


def tiny_mamba():
    """A Mamba, whose convolutions and state matrices are not linear layers."""
    config = MambaConfig(vocab_size=31, hidden_size=12, state_size=40, num_hidden_layers=1)
    return MambaForCausalLM(config)


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if "stay float" in r.getMessage()]


def test_one_warning_says_the_share_the_names_and_the_reason(caplog):
    quantize_model_(convolutional(), QFTConfig())

    assert warnings_of(caplog) == [
        "13.8% of the parameters of Sequential stay float, as do their gradients and momentum: "
        "13.8% 1.weight and 1 more (parameter of Conv1d). List their modules in "
        "modules_to_not_convert if that is intended."
    ]


def test_a_tenth_or_less_is_not_worth_a_word(caplog):
    quantize_model_(convolutional(n_convolutions=1), QFTConfig(strict=True))  # 24 of 324 stay float

    assert warnings_of(caplog) == []


def test_what_is_listed_is_meant(caplog):
    model = convolutional(n_convolutions=5)

    quantize_model_(model, QFTConfig(modules_to_not_convert=["1", "2", "3", "4"], strict=True))

    assert warnings_of(caplog) == []
    assert type(model[1].weight) is nn.Parameter


def test_strict_refuses_and_the_model_stays_as_it_is():
    model = convolutional()

    with pytest.raises(ValueError, match=r"13\.8% of .*1\.weight and 1 more.*the model is unchang"):
        quantize_model_(model, QFTConfig(strict=True))

    assert type(model[0]) is nn.Linear
    assert type(model[0].weight) is nn.Parameter


def test_loading_warns_and_strict_refuses(tmp_path, caplog):
    tiny_mamba().save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="qft_hf"):
        model = MambaForCausalLM.from_pretrained(tmp_path, quantization_config=QFTConfig())

    assert len(warnings_of(caplog)) == 1
    assert "mixer.A_log" in warnings_of(caplog)[0]
    assert "parameter of MambaMixer" in warnings_of(caplog)[0]
    assert any(isinstance(parameter, QFTWeight) for parameter in model.parameters())
    with pytest.raises(ValueError, match=r"stay float.*mixer\.A_log.*strict=True refuses it"):
        MambaForCausalLM.from_pretrained(tmp_path, quantization_config=QFTConfig(strict=True))


def test_strict_is_asked_of_a_conversion_and_no_part_of_the_format(tmp_path, caplog):
    model = quantize_model_(tiny_llama(), QFTConfig(strict=True))
    quantize_model_(model, QFTConfig())  # the same format
    model.save_pretrained(tmp_path)
    recorded = json.loads((tmp_path / "config.json").read_text())["quantization_config"]

    assert "strict" not in recorded
    assert QFTConfig.from_dict(recorded | {"strict": True}).strict
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=QFTConfig(strict=True)
    )
    assert again.config.quantization_config.strict
    with pytest.raises(TypeError, match="strict must be True or False, got 1"):
        QFTConfig(strict=1)


def test_an_int8_checkpoint_with_much_in_float_is_refused_on_request_and_else_read_in_silence(
    tmp_path, caplog
):
    quantize_model_(tiny_mamba(), QFTConfig()).save_pretrained(tmp_path)
    caplog.clear()

    MambaForCausalLM.from_pretrained(tmp_path)

    assert warnings_of(caplog) == []
    with pytest.raises(ValueError, match="strict=True refuses it"):
        MambaForCausalLM.from_pretrained(tmp_path, quantization_config=QFTConfig(strict=True))


def test_a_model_with_nothing_to_quantize_says_so_and_not_that_it_should_be_quantized():
    model = nn.Sequential(nn.Conv1d(4, 6, 1))

    with pytest.raises(ValueError, match=r"No weight of Sequential can be INT8.*ordinary optim"):
        quantize_model_(model, QFTConfig())
    with pytest.raises(ValueError, match="No weight of Sequential can be INT8"):
        quantize_model_(nn.Sequential(nn.Linear(3, 4)), QFTConfig(modules_to_not_convert=["0"]))


class Reads(nn.Linear):
    """A linear layer whose own forward multiplies by its weight."""

    def forward(self, x):
        return x @ self.weight.T


def test_int8_products_that_cannot_be_are_said(caplog):
    def model():
        return nn.Sequential(nn.Linear(40, 50), Reads(50, 60), nn.MultiheadAttention(60, 2))

    quantize_model_(model(), QFTConfig())
    assert caplog.records == []
    quantize_model_(model(), QFTConfig(matmul="int8"))

    (message,) = [record.getMessage() for record in caplog.records]
    assert "no effect on 3 modules of Sequential (1, ...)" in message  # and two of attention
