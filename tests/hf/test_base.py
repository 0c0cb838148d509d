"""The frozen base of a side network: which weights are stored in NF4, and in how many bytes."""

import sys

import bitsandbytes
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MixtralConfig,
)

from qft_hf import QFTConfig, QFTWeight, memory_ledger
from qft_hf.hf.base import base_format, nf4_weights
from qft_hf.layout import nf4_bytes
from tests.models import tiny_bert, tiny_llama

# Odd sizes; NF4 has a scale for 64 elements and a scale of scales for 256 * 64 = 16,384.
SHAPES = [(3, 5), (1, 64), (5, 13), (129, 127), (130, 129), (300, 211)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bytes_of_nf4_are_those_of_a_layer_of_bitsandbytes(shape):
    layer = bitsandbytes.nn.Linear4bit(
        shape[1], shape[0], bias=False, compress_statistics=True, quant_type="nf4"
    ).to("cpu")

    codes, scales = nf4_bytes(shape[0] * shape[1])
    rows = {row.state: row.bytes for row in memory_ledger(layer).rows}
    assert rows == {"NF4 weights": codes, "NF4 scales": scales}
    # An independent count: the tensors that bitsandbytes saves for the layer.
    saved = layer.state_dict()
    packed = {name for name in saved if "quant_state" in name}  # JSON that names shape and kind
    assert sum(saved[name].nbytes for name in saved.keys() - packed) + 4 == codes + scales
    assert memory_ledger(layer).n_parameters == shape[0] * shape[1]


def test_the_ledger_names_the_format_of_every_weight_of_bitsandbytes():
    """FP4 weights were counted as NF4, and 8-bit weights as float parameters."""
    four = bitsandbytes.nn.Linear4bit(64, 48, bias=False, quant_type="fp4").to("cpu")
    eight = bitsandbytes.nn.Linear8bitLt(64, 48, has_fp16_weights=False).to("cpu")

    rows = {row.state: row.bytes for row in memory_ledger(four).rows}
    assert rows.keys() == {"FP4 weights", "FP4 scales"}
    assert rows["FP4 weights"] == 64 * 48 / 2
    for _ in range(2):  # the first forward moves the scales
        ledger = memory_ledger(eight)
        rows = {row.state: row.bytes for row in ledger.rows}
        expected = {"8-bit weights": 64 * 48, "8-bit scales": 4 * 48, "float parameters": 4 * 48}
        assert rows == expected
        assert ledger.bytes_by_kind == {
            "weights": sum(expected.values()),
            "gradients": 0,
            "momentum": 0,
        }
        eight(torch.ones(2, 64))
    integers = nn.ParameterList([nn.Parameter(torch.ones(3, dtype=torch.int32), False)])
    assert [row.state for row in memory_ledger(integers).rows] == ["integer parameters"]


@pytest.mark.parametrize("module", [nn.ReLU(), nn.BatchNorm1d(4, affine=False)], ids=str)
def test_a_module_without_parameters_has_a_table(module):
    """It divided by zero."""
    ledger = memory_ledger(module)
    assert "nan % of FP32 Adam; 0 of 0 parameters in INT8" in str(ledger)
    assert ledger.total_bytes == sum(buffer.nbytes for buffer in module.buffers())


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_tables_call_both_moments_of_adamw_optimizer_state(optimizer):
    """They were called `momentum`, as the key of `bytes_by_kind` still is."""
    layer = nn.Linear(3, 5)
    stepped = optimizer(layer.parameters(), lr=0.1)
    layer(torch.ones(2, 3)).sum().backward()
    stepped.step()

    ledger = memory_ledger(layer, stepped)

    is_adamw = optimizer is torch.optim.AdamW
    assert ledger.bytes_by_kind["momentum"] == (2 * 4 * 20 if is_adamw else 0)
    assert ("optimizer state " in str(ledger)) == is_adamw
    assert "momentum" not in str(ledger)


def tiny_gpt2():
    config = GPT2Config(vocab_size=131, n_embd=44, n_layer=2, n_head=2, n_positions=64)
    return GPT2LMHeadModel(config)


@pytest.mark.parametrize(
    "make", [tiny_llama, lambda: tiny_llama(tied=True), tiny_bert, tiny_gpt2],
    ids=["untied", "tied", "classifier", "GPT-2"],
)  # fmt: skip
def test_the_weights_that_are_counted_are_those_that_transformers_stores_in_nf4(make, tmp_path):
    model = make()
    counted = {id(weight) for weight in nf4_weights(model)}
    names = {name for name, p in model.named_parameters() if id(p) in counted}
    model.save_pretrained(tmp_path)

    loaded = type(model).from_pretrained(tmp_path, quantization_config=base_format("nf4", model))

    stored = {n for n, p in loaded.named_parameters() if isinstance(p, bitsandbytes.nn.Params4bit)}
    assert stored == names
    assert len(stored) >= 2 * 4
    ledger = memory_ledger(loaded)
    assert ledger.n_parameters == sum(p.numel() for p in model.parameters())
    rows = {row.state: row.bytes for row in ledger.rows}
    shapes = [p.numel() for n, p in model.named_parameters() if n in names]
    assert rows["NF4 weights"] == sum(nf4_bytes(n)[0] for n in shapes)
    assert rows["NF4 scales"] == sum(nf4_bytes(n)[1] for n in shapes)


@pytest.mark.parametrize("has_experts", [False, True])
def test_a_base_of_which_most_would_stay_float_in_nf4_is_reported(has_experts, tmp_path, caplog):
    """A mixture of experts was loaded at nearly its float size, as the base that was to be small.

    Only `qft-hf plan` and `qft-hf check` said so, by their numbers.
    """
    sizes = {"vocab_size": 131, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 128, "num_key_value_heads": 2}
    config = MixtralConfig(**sizes, num_local_experts=4) if has_experts else LlamaConfig(**sizes)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)

    quantization = base_format("nf4", model)

    loaded = type(model).from_pretrained(tmp_path, quantization_config=quantization)
    floats = sum(p.numel() for p in loaded.model.layers.parameters() if p.is_floating_point())
    all_of_them = sum(p.numel() for p in model.model.layers.parameters())
    assert (floats > all_of_them / 2) == has_experts
    assert ("leaves experts float. base=int8 stores them" in caplog.text) == has_experts


def test_a_new_classifier_on_a_base_of_nf4_is_made_in_float(tmp_path):
    """The classifier once became an unquantized 4-bit weight, and the first forward raised."""
    tiny_bert().base_model.save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, quantization_config=base_format("nf4", tiny_bert())
    )
    assert type(model.classifier) is nn.Linear
    assert model(torch.arange(8)[None]).logits.isfinite().all()


def test_a_base_of_int8_has_the_format_that_was_asked_for(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    for config, group_size in ((None, None), (QFTConfig(group_size=11), 11)):
        form = base_format("int8", tiny_llama(), config=config)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=form)
        assert isinstance(model.lm_head.weight, QFTWeight)
        assert model.lm_head.weight.group_size == group_size
    assert base_format("float", tiny_llama()) is None


def test_nf4_without_bitsandbytes_says_what_to_install_and_what_else_there_is(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not there
    with pytest.raises(ImportError, match=r"pip install 'bitsandbytes.*set base to 'int8'"):
        base_format("nf4", tiny_llama())


def test_an_unknown_base_names_those_that_there_are():
    with pytest.raises(ValueError, match="base must be 'nf4' or 'int8' or 'float', got 'int4'"):
        base_format("int4", tiny_llama())


def test_a_module_of_a_class_of_its_own_stays_float():
    class Own(nn.Linear):
        pass

    model = tiny_llama()
    model.model.layers[0].mlp.up_proj = Own(44, 75)
    assert len(nf4_weights(model)) == 2 * 7 - 1
