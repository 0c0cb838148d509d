"""`quantize_model_` and `dequantize_model_`: their results, and the models that they refuse."""

import code
import copy
import json
import re

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers.base import HfQuantizer

from qft_hf.hf.compatibility import quantization_config_of
from qft_hf.hf.config import QFTConfig
from qft_hf.hf.convert import dequantize_model_, quantize_model_
from qft_hf.nn import QFTEmbedding, QFTLinear, prepare_modules_
from qft_hf.optim import QFTAdamW, QFTLion
from qft_hf.quant import QFTWeight
from qft_hf.side import QSTConfig, attach_side_network
from tests.faults.interrupts import Interrupter
from tests.fresh import try_fresh
from tests.hf.checkpoints import IDS, assert_same_state
from tests.models import tiny_bert, tiny_llama

# Attributes that transformers sets on a quantized model and on its configuration.
MODEL_MARKS = ("hf_quantizer", "is_quantized", "quantization_method")
CONFIG_MARKS = ("quantization_config", "_is_quantized")


def plain_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 7), nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3))


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# Conversion to INT8.


def test_any_module_is_quantized_in_place_and_returned():
    model = plain_model()
    weight = model[1].weight

    assert quantize_model_(model, QFTConfig()) is model

    assert [type(layer) for layer in model] == [QFTEmbedding, QFTLinear, nn.LayerNorm, QFTLinear]
    assert model[1].weight is weight  # an optimizer that holds it now holds the INT8 weight
    assert isinstance(weight, QFTWeight)


@pytest.mark.parametrize("build", [tiny_llama, tiny_bert])
def test_marks_are_those_of_a_loaded_model(build, tmp_path):
    config = QFTConfig(group_size=16, modules_to_not_convert=["lm_head"] * (build is tiny_llama))
    build().save_pretrained(tmp_path)
    loaded = build().from_pretrained(tmp_path, quantization_config=config)

    converted = quantize_model_(build(), config)

    assert_same_state(converted, loaded)
    assert type(converted.hf_quantizer) is type(loaded.hf_quantizer)
    for name in MODEL_MARKS[1:]:
        assert getattr(converted, name) == getattr(loaded, name)
    for name in CONFIG_MARKS:
        assert getattr(converted.config, name) == getattr(loaded.config, name)
    assert converted.config.quantization_config == config


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_converted_model_saves_and_loads(tied, tmp_path):
    model = quantize_model_(tiny_llama(tied=tied), QFTConfig())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied

    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)

    assert_same_state(again, model)
    assert_same_state(copy.deepcopy(again), model)


@pytest.mark.parametrize("when", ["before", "after"])
def test_embeddings_that_were_tied_by_hand_are_saved_as_tied(when, tmp_path):
    """One of two INT8 weights was written, and nothing could load the folder."""
    model = tiny_llama(tied=False)
    if when == "after":
        quantize_model_(model, QFTConfig())
    model.lm_head.weight = model.model.embed_tokens.weight
    quantize_model_(model, QFTConfig())

    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)

    assert_same_state(again, model)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is False  # saving changes nothing


def test_a_float_part_of_a_model_tied_by_hand_is_listed_at_every_save(tmp_path):
    """The second save wrote the configuration from before the first, and nothing could load it."""
    model = tiny_llama(tied=False)
    model.lm_head.weight = model.model.embed_tokens.weight
    quantize_model_(model, QFTConfig())
    dequantize_model_(model.model.layers[0].mlp, torch.float32)

    for _ in range(2):
        model.save_pretrained(tmp_path)
        assert_same_state(AutoModelForCausalLM.from_pretrained(tmp_path), model)


def test_same_configuration_again_changes_nothing_but_new_modules():
    model = quantize_model_(tiny_bert(), QFTConfig(seed=3))
    before = state(model)

    quantize_model_(model, QFTConfig(seed=3))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    model.classifier = nn.Linear(42, 9)
    quantize_model_(model, QFTConfig(seed=3))
    assert isinstance(model.classifier.weight, QFTWeight)


def test_other_configuration_is_refused():
    model = quantize_model_(tiny_llama(), QFTConfig())

    with pytest.raises(ValueError, match=r"already quantized with .*group_size=None.* asked for"):
        quantize_model_(model, QFTConfig(group_size=32))


def test_a_plain_module_knows_its_configuration_too():
    model = quantize_model_(plain_model(), QFTConfig(group_size=8))
    before = copy.deepcopy(model)

    assert_same_state(quantize_model_(model, QFTConfig(group_size=8)), before)
    with pytest.raises(ValueError, match=r"already quantized with .*group_size=8, .* asked for"):
        quantize_model_(model, QFTConfig(group_size=16))


def test_model_of_another_method_is_refused():
    class OtherQuantizer(HfQuantizer):
        is_trainable = False
        is_serializable = None

    model = tiny_llama()
    model.hf_quantizer = OtherQuantizer(BitsAndBytesConfig(load_in_8bit=True))

    with pytest.raises(ValueError, match=r"with bitsandbytes\. QFT starts from float weights"):
        quantize_model_(model, QFTConfig())


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_bad_value_is_named_and_the_model_stays(name):
    model = tiny_llama()
    with torch.no_grad():
        model.get_parameter(name)[-1] = float("nan")

    with pytest.raises(
        ValueError, match=rf"{name} has \d+ of .* NaN or infinite.* load a good one\.$"
    ):
        quantize_model_(model, QFTConfig())

    assert not any(isinstance(parameter, QFTWeight) for parameter in model.parameters())
    assert type(model.lm_head) is nn.Linear
    assert not any(hasattr(model.config, mark) for mark in CONFIG_MARKS)


# Conversion under an optimizer.


def interrupted_conversion(share: float, config: QFTConfig, *, tied: bool = False):
    """Return a model whose conversion was interrupted after a share of its instructions."""
    quantize_model_(tiny_llama(tied=tied), config)  # later calls do less: classes are made once
    counter = Interrupter()
    counter.run(lambda: quantize_model_(tiny_llama(tied=tied), config))
    model = tiny_llama(tied=tied)
    n = int(counter.counted * share)
    assert Interrupter(n).run(lambda: quantize_model_(model, config))
    return model


@pytest.mark.parametrize("share", [0.05, 0.5, 0.7, 0.8, 0.9, 0.98])
@pytest.mark.parametrize("tied", [True, False])
def test_an_interrupted_conversion_is_finished_by_another_call(tied, share):
    """A second call refused half-converted models, and a Trainer trained them half in float."""
    config = QFTConfig(group_size=8, outlier_fraction=0.05)
    whole = quantize_model_(tiny_llama(tied=tied), config)
    model = interrupted_conversion(share, config, tied=tied)
    n_int8 = sum(isinstance(parameter, QFTWeight) for parameter in model.parameters())
    if 0 < n_int8 < sum(isinstance(parameter, QFTWeight) for parameter in whole.parameters()):
        with pytest.raises(RuntimeError, match=r"is not quantized.*call quantize_model_"):
            model(input_ids=IDS)

    quantize_model_(model, config)
    assert_same_state(whole.state_dict(), model.state_dict())
    assert [type(m) for m in whole.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(whole(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_weights_are_edited_as_the_error_says():
    """It left out the format, which is needed, and the dtype, so that norms became bf16."""
    model = quantize_model_(tiny_llama(), QFTConfig())
    with torch.no_grad(), pytest.raises(NotImplementedError) as refused:
        model.lm_head.weight[0] = 1.0
    calls = re.findall(r"\w*quantize_model_\(model, .*?\)(?=[ ,])", str(refused.value))
    del refused  # its traceback refers to the weight
    eval(calls[0], globals() | {"model": model})
    with torch.no_grad():
        model.lm_head.weight[0] = 1.0
    eval(calls[1], globals() | {"model": model})
    assert model.dtype == torch.float32
    assert torch.equal(model.lm_head.weight[0], torch.ones(44))


def test_in_an_interactive_session_the_second_try_converts(capsys):
    """It keeps the error that says to convert the model, and with it a view of the weight."""
    model = quantize_model_(tiny_llama(), QFTConfig())
    session = code.InteractiveConsole(globals() | {"model": model})
    session.push("exec('with torch.no_grad(): model.lm_head.weight[0] = 1.0')")
    for is_converted in (False, True):
        session.push("dequantize_model_(model) and None")
        assert (type(model.lm_head) is torch.nn.Linear) == is_converted
    assert "which may refer to it: try once more" in capsys.readouterr().err


def test_an_interrupted_conversion_is_not_finished_in_another_format():
    model = tiny_llama()
    prepare_modules_(model, QFTConfig())  # interrupted before the first weight
    other = QFTConfig(modules_to_not_convert=["lm_head"])
    with pytest.raises(ValueError, match="or quantize the float model again"):
        quantize_model_(model, other)
    quantize_model_(dequantize_model_(model, torch.float32), other)
    assert type(model.lm_head) is nn.Linear
    whole = quantize_model_(tiny_llama(), other)
    assert_same_state(whole.state_dict(), model.state_dict())


@pytest.mark.parametrize("gradient", ["stack", "release"])
@pytest.mark.parametrize("rule", [QFTLion, QFTAdamW])
def test_an_optimizer_goes_on_with_a_model_that_became_float_and_int8_again(rule, gradient, caplog):
    """The optimizer once raised `KeyError: 'momentum'`."""
    model = quantize_model_(tiny_llama(), QFTConfig())
    optimizer = rule(model.parameters(), lr=1e-3, gradient=gradient)

    def step():
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    losses = [step()]
    norm = optimizer.state[model.model.norm.weight]
    for change in (
        lambda: dequantize_model_(model, torch.float32),
        lambda: quantize_model_(model, QFTConfig(group_size=9)),
    ):
        caplog.clear()
        change()
        assert model.lm_head.weight not in optimizer.state  # a model to export needs no new state
        assert caplog.text == ""
        losses.append(step())
        assert "16 weights have become float or INT8 since the last step" in caplog.text
    assert losses == sorted(losses, reverse=True)
    assert optimizer.state[model.lm_head.weight]["step"] == 1
    assert optimizer.state[model.model.norm.weight] is norm
    assert norm["step"] == 3
    step()
    assert optimizer.state[model.lm_head.weight]["step"] == 2


# Conversion back to float.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_dequantized_model_is_plain_and_equal(tied, dtype):
    model = quantize_model_(tiny_llama(tied=tied, dtype=dtype), QFTConfig(group_size=16))
    # With gradients recorded, even few tokens are multiplied by the expanded weight.
    expected = model(IDS).logits.detach()
    weights = {n: p.dequantize() for n, p in model.named_parameters() if isinstance(p, QFTWeight)}

    assert dequantize_model_(model, dtype) is model

    for name, weight in weights.items():
        assert torch.equal(model.get_parameter(name), weight)
    assert {type(m) for m in model.modules()} == {type(m) for m in tiny_llama().modules()}
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.dtype == model.config.dtype == dtype
    assert not model.is_quantized
    assert not any(hasattr(model, mark) for mark in MODEL_MARKS if mark != "is_quantized")
    assert not any(hasattr(model.config, mark) for mark in CONFIG_MARKS)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected)


def test_plain_module_comes_back():
    model = quantize_model_(plain_model(), QFTConfig())

    dequantize_model_(model)

    assert [type(layer) for layer in model] == [type(layer) for layer in plain_model()]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_saved_tensors_are_cast_and_computed_tables_are_not():
    """Rotary frequencies cast to BF16 once made logits differ from those of the reloaded export."""
    model = quantize_model_(tiny_llama(), QFTConfig())
    table = model.model.rotary_emb.inv_freq.clone()
    model.register_buffer("saved", torch.ones(2))

    dequantize_model_(model)

    assert torch.equal(model.model.rotary_emb.inv_freq, table)
    assert model.saved.dtype == model.dtype == model.config.dtype == torch.bfloat16


def test_method_of_the_model_works_after_saving(tmp_path):
    """Saving turns config.dtype, the default of the method, into a string."""
    model = quantize_model_(tiny_llama(dtype=torch.bfloat16), QFTConfig())
    model.save_pretrained(tmp_path)

    model.dequantize()

    assert type(model.lm_head) is nn.Linear
    assert model.dtype == torch.bfloat16


def test_dequantized_model_can_be_quantized_again():
    model = dequantize_model_(quantize_model_(tiny_llama(), QFTConfig()), torch.float32)

    quantize_model_(model, QFTConfig(group_size=16))

    assert model.lm_head.weight.group_size == 16


def test_export_and_int8_in_a_process_without_qft_hf(tmp_path):
    """The export is an ordinary checkpoint; the INT8 one must not pass for one."""
    model = quantize_model_(tiny_llama(tied=True), QFTConfig())
    model.save_pretrained(tmp_path / "int8")
    dequantize_model_(model).save_pretrained(tmp_path / "export")
    assert "quantization_config" not in json.loads((tmp_path / "export/config.json").read_text())
    with torch.no_grad():
        torch.save(model(IDS).logits, tmp_path / "logits.pt")

    program = """
import sys, torch
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
model, info = AutoModelForCausalLM.from_pretrained(folder + "/export", output_loading_info=True)
assert not any(info.values()), info
with torch.no_grad():
    logits = model(torch.arange(3, 19)[None]).logits
assert torch.equal(logits, torch.load(folder + "/logits.pt"))
_, info = AutoModelForCausalLM.from_pretrained(folder + "/int8", output_loading_info=True)
assert "model.layers.1.mlp.down_proj.weight" in info["missing_keys"], info
assert "qft_hf" not in sys.modules
"""
    result = try_fresh(program, tmp_path)

    assert result.returncode == 0, result.stderr
    assert "Unknown quantization type, got qft" in result.stderr


def test_nothing_to_dequantize_is_an_error():
    with pytest.raises(ValueError, match=r"Sequential has no INT8 weights.* model\.to"):
        dequantize_model_(plain_model())


def test_dtype_that_is_not_float_is_refused():
    model = quantize_model_(tiny_llama(), QFTConfig())

    with pytest.raises(ValueError, match=r"needs a float dtype, got torch\.int8"):
        dequantize_model_(model, torch.int8)

    assert isinstance(model.lm_head.weight, QFTWeight)
    assert model.config.quantization_config == QFTConfig()


def test_a_part_that_was_float_at_an_earlier_save_is_int8_in_a_later_one(tmp_path):
    """The first save lists it in modules_to_not_convert, which once made the second unreadable."""
    model = quantize_model_(tiny_llama(), QFTConfig(modules_to_not_convert=["o_proj"]))
    layer = model.model.layers[0].mlp
    dequantize_model_(layer, torch.float32)
    model.save_pretrained(tmp_path)
    quantize_model_(layer, QFTConfig())
    model.save_pretrained(tmp_path)

    again = AutoModelForCausalLM.from_pretrained(tmp_path)

    assert_same_state(again, model)
    assert again.config.quantization_config.modules_to_not_convert == ["o_proj"]
    assert type(again.model.layers[0].mlp.up_proj.weight) is QFTWeight


@pytest.mark.parametrize("format", [{"group_size": 11}, {"outlier_fraction": 0.05}], ids=str)
def test_a_part_of_another_format_is_refused_when_the_model_is_saved(format, tmp_path):
    """The folder was written, and nothing could load it."""
    model = quantize_model_(tiny_llama(), QFTConfig())
    layer = dequantize_model_(model.model.layers[0].mlp, torch.float32)
    quantize_model_(layer, QFTConfig(**format))

    with pytest.raises(ValueError, match=r"several formats, .* Save its parts separately"):
        model.save_pretrained(tmp_path / "model")

    assert not any(tmp_path.rglob("*.*"))


def test_a_tied_weight_that_was_dequantized_in_one_place_says_what_the_other_needs():
    model = quantize_model_(tiny_llama(tied=True), QFTConfig())
    expected = dequantize_model_(copy.deepcopy(model), torch.float32)(IDS).logits
    for part in (model.lm_head, model.model.layers):
        dequantize_model_(part, torch.float32)
    with pytest.raises(RuntimeError, match=r"shares the weight was dequantized, call dequantize_m"):
        model(IDS)

    dequantize_model_(model.model.embed_tokens, torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model(IDS).logits, expected)


def test_the_float_base_of_an_int8_side_network_is_refused_with_what_to_do():
    """The error said that the model had several formats, of which it had one."""
    model = attach_side_network(tiny_llama(), QSTConfig(r=2))
    quantize_model_(model.side_network, QFTConfig())

    with pytest.raises(ValueError, match=r"float base, .* Call quantize_model_ before attach_side"):
        quantize_model_(model, QFTConfig())

    dequantize_model_(model.side_network, torch.float32)
    quantize_model_(model, QFTConfig(group_size=11))
    assert quantization_config_of(model.side_network) == QFTConfig(group_size=11)
