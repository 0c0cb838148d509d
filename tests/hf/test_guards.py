"""Loading and saving with transformers once qft_hf is imported."""

import errno

import huggingface_hub
import pytest
import safetensors.torch
import torch
from huggingface_hub import PyTorchModelHubMixin, save_torch_model
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM

from qft_hf import QFTConfig, dequantize_model_, quantize_model_
from qft_hf.hf.atomic_writes import PREFIX
from tests.hf.checkpoints import assert_same_state, edit_config
from tests.models import tiny_bert, tiny_llama


@pytest.fixture
def int8_folder(tmp_path):
    quantize_model_(tiny_llama(), QFTConfig()).save_pretrained(tmp_path / "int8")
    return tmp_path / "int8"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "arguments",
    [{}, {"quantization_config": QFTConfig()}, {"ignore_mismatched_sizes": True}],
    ids=["plain", "qft", "lenient"],
)
@pytest.mark.parametrize("model_class", [AutoModelForCausalLM, AutoModel, LlamaForCausalLM])
@pytest.mark.parametrize("shards", [None, "9KB"], ids=["one file", "shards"])
def test_int8_weights_without_their_config_are_refused(shards, model_class, arguments, tmp_path):
    """Transformers alone would fill in random weights."""
    model = quantize_model_(tiny_llama(), QFTConfig())
    model.save_pretrained(tmp_path, **({"max_shard_size": shards} if shards else {}))
    edit_config(tmp_path, lambda config: config.pop("quantization_config"))

    with pytest.raises(ValueError, match=r"has INT8 weights, .* Restore the config\.json"):
        model_class.from_pretrained(tmp_path, **arguments)


@pytest.mark.parametrize(
    "named",
    [None, {"quant_method": "another"}, {"quant_method": "bitsandbytes", "load_in_4bit": True}],
)
def test_int8_weights_under_the_config_of_another_format_are_refused(named, tmp_path):
    quantize_model_(tiny_llama(), QFTConfig()).save_pretrained(tmp_path)
    edit_config(tmp_path, lambda config: config.update(quantization_config=named))

    with pytest.raises(ValueError, match=r"no quantization_config of qft_hf\. Restore the config"):
        LlamaForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("model_class", [AutoModelForCausalLM, AutoModel])
def test_int8_weights_in_a_pickled_file_are_refused_too(model_class, tmp_path):
    model = quantize_model_(tiny_llama(), QFTConfig())
    tiny_llama().config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")

    with pytest.raises(ValueError, match=r"has INT8 weights, .* Restore the config\.json"):
        model_class.from_pretrained(tmp_path, use_safetensors=False)


def test_an_int8_state_dict_without_a_config_is_refused():
    model = quantize_model_(tiny_llama(), QFTConfig())
    config = tiny_llama().config
    with pytest.raises(ValueError, match=r"has INT8 weights, lm_head\.weight_q and 15 more"):
        LlamaForCausalLM.from_pretrained(None, config=config, state_dict=model.state_dict())


def test_models_of_others_load_as_ever(tmp_path):
    model = tiny_bert()
    model.save_pretrained(tmp_path)
    assert_same_state(type(model).from_pretrained(tmp_path), model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    again = type(model).from_pretrained(None, config=model.config, state_dict=state)
    assert_same_state(again, model)


def disk_full(monkeypatch, after):
    """Make the writing of weights fail half-way and leave a truncated file."""
    from transformers import modeling_utils

    write = modeling_utils.safe_save_file

    def fail(tensors, filename, metadata):
        write(tensors, filename, metadata=metadata)
        with open(filename, "r+b") as file:
            file.truncate(after)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(modeling_utils, "safe_save_file", fail)


@pytest.mark.parametrize("after", [0, 9000])
@pytest.mark.parametrize("saved", ["float over INT8", "INT8 over INT8", "INT8 over float"])
def test_a_full_disk_leaves_the_model_that_was_there(saved, after, int8_folder, monkeypatch):
    """A new config.json was once left next to truncated weights."""
    if saved == "INT8 over float":
        tiny_llama().save_pretrained(int8_folder)
    before = contents(int8_folder)
    model = AutoModelForCausalLM.from_pretrained(int8_folder)
    if saved == "float over INT8":
        dequantize_model_(model, torch.float32)
    elif saved == "INT8 over float":
        quantize_model_(model, QFTConfig())
    disk_full(monkeypatch, after)

    with pytest.raises(OSError, match="No space left") as caught:
        model.save_pretrained(int8_folder)
    assert "everything there is as it was" in str(caught.value.__notes__)
    assert contents(int8_folder) == before
    assert not list(int8_folder.glob(f"{PREFIX}*"))


def test_a_float_model_takes_the_place_of_the_int8_model_it_was(int8_folder):
    quantize_model_(tiny_llama(), QFTConfig()).save_pretrained(int8_folder, max_shard_size="9KB")
    model = dequantize_model_(AutoModelForCausalLM.from_pretrained(int8_folder), torch.float32)
    model.save_pretrained(int8_folder)
    assert not list(int8_folder.glob("*-of-*"))
    again = AutoModelForCausalLM.from_pretrained(int8_folder, dtype=torch.float32)
    assert getattr(again, "hf_quantizer", None) is None
    assert_same_state(again, model)


def test_a_damaged_int8_model_can_be_replaced(int8_folder):
    (int8_folder / "model.safetensors").write_bytes(b"no")
    tiny_llama().save_pretrained(int8_folder)
    assert_same_state(AutoModelForCausalLM.from_pretrained(int8_folder), tiny_llama())


def test_a_folder_that_is_a_file_is_left_alone(tmp_path):
    (tmp_path / "file").write_text("precious")
    model = quantize_model_(tiny_llama(), QFTConfig())
    with pytest.raises((NotADirectoryError, FileExistsError)):
        model.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"


class OfHub(nn.Module, PyTorchModelHubMixin):
    """A model of a user's own, which loads without being strict by default."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(9, 5)

    def forward(self, x):
        return self.inner(x)


def test_int8_weights_are_not_left_out_of_a_float_model_by_the_hub_s_mixin(tmp_path):
    """Such a model once kept its random weights, without an error."""
    model = quantize_model_(OfHub(), QFTConfig())
    model.save_pretrained(tmp_path)

    for load in (OfHub.from_pretrained, lambda folder: OfHub.from_pretrained(folder, strict=True)):
        with pytest.raises(ValueError, match=r"and OfHub is float .* Call quantize_model_"):
            load(tmp_path)

    again = quantize_model_(OfHub(), QFTConfig())
    safetensors.torch.load_model(again, tmp_path / "model.safetensors")
    assert_same_state(again, model)
    model = dequantize_model_(model, torch.float32)
    model.save_pretrained(tmp_path)
    assert_same_state(OfHub.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "20KB"}], ids=["file", "shards"])
def test_int8_weights_are_not_left_out_of_a_float_model_by_the_hub_s_loading(shards, tmp_path):
    """It is not strict by default, so a float model kept its initial values, without an error."""
    model = quantize_model_(tiny_llama(), QFTConfig())
    save_torch_model(model, tmp_path, **shards)
    initial = tiny_llama(seed=1)

    with pytest.raises(ValueError, match=r"and LlamaForCausalLM is float .* Call quantize_model_"):
        huggingface_hub.load_torch_model(initial, tmp_path)

    assert_same_state(initial, tiny_llama(seed=1))
    quantize_model_(initial, QFTConfig())
    huggingface_hub.load_torch_model(initial, tmp_path)
    assert_same_state(initial, model)
    (tmp_path / "float").mkdir()
    save_torch_model(tiny_llama(), tmp_path / "float")
    floats = tiny_llama(seed=1)
    huggingface_hub.load_torch_model(floats, tmp_path / "float")
    assert_same_state(floats, tiny_llama())
