"""Check sums of tensors: every way to load a model refuses a flipped bit and names the tensor."""

import json
import logging
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from qft_hf import QFTConfig, QFTTrainer, quantize_model_
from qft_hf.hf import quantizer
from qft_hf.hf.checkpoint import MARK, newest_whole_checkpoint
from qft_hf.hf.finetune import export_checkpoint
from qft_hf.hf.tensor_files import KEY, SWITCH, checksums, damaged, tensor_names
from tests.hf.checkpoints import assert_same_state, edit_tensors, flip_bit
from tests.hf.test_trainer import trainer_on
from tests.models import tiny_llama

UP = "model.layers.1.mlp.up_proj."
FIELDS = ["weight_q", "weight_scale", "weight_outlier_value", "weight_outlier_column"]
NAMES = [*(UP + field for field in FIELDS), "model.norm.weight"]


def save(folder, *, shards=None, seed=0):
    model = quantize_model_(tiny_llama(tied=True, seed=seed), QFTConfig())
    model.save_pretrained(folder, **({"max_shard_size": shards} if shards else {}))
    return model


def files(folder):
    return sorted(map(str, folder.glob("*.safetensors")))


def file_of(folder, name):
    return next(file for file in folder.glob("*.safetensors") if name in tensor_names([str(file)]))


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("shards", [None, "9KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("name", NAMES)
def test_one_flipped_bit_is_refused_by_name(name, shards, tmp_path):
    """A flipped bit turns a code or a scale into another valid one, which would be trained on."""
    save(tmp_path, shards=shards)
    load(tmp_path)
    flip_bit(file_of(tmp_path, name), name, byte=40)

    with pytest.raises(ValueError, match=rf"- {name} in .* is not what was saved\nIt is damaged"):
        load(tmp_path)


@pytest.mark.parametrize("bit", range(8))
def test_every_bit_of_a_code_counts(bit, tmp_path):
    save(tmp_path)
    flip_bit(tmp_path / "model.safetensors", UP + "weight_q", byte=1001, bit=bit)
    assert len(damaged(files(tmp_path))) == 1


def test_type_and_shape_count_beside_the_bytes():
    tensor = torch.arange(24, dtype=torch.int32).view(4, 6)
    forms = [tensor, tensor.view(6, 4), tensor.view(torch.float32), tensor.flatten()]
    assert len(set(checksums(dict(enumerate(forms))).values())) == 4
    assert checksums({"a": tensor}) == checksums({"a": tensor.t().contiguous().t()})


@pytest.mark.parametrize("fault", ["codes", "momentum norm"])
def test_a_resume_refuses_it_without_a_mark_too(fault, tmp_path):
    name = UP + "weight_q" if fault == "codes" else "model.norm.weight"
    run = trainer_on(tiny_llama(), tmp_path, QFTTrainer, save_strategy="steps", save_steps=2)
    run.train()
    last = tmp_path / f"checkpoint-{run.state.max_steps}"
    first = min(tmp_path.iterdir())
    for mark in tmp_path.glob(f"*/{MARK}"):
        mark.unlink()
    flip_bit(last / "model.safetensors", name, byte=9)

    again = trainer_on(tiny_llama(), tmp_path, QFTTrainer)
    before = {key: value.clone() for key, value in again.model.state_dict().items()}
    with pytest.raises(ValueError, match=f"{name} in .* is not what was saved"):
        again.train(resume_from_checkpoint=str(last))
    again.state.best_model_checkpoint = str(last)
    with pytest.raises(ValueError, match=f"{name} in .* is not what was saved"):
        again._load_best_model()
    for key, value in again.model.state_dict().items():
        assert torch.equal(value, before[key])
    assert last != first
    assert newest_whole_checkpoint(tmp_path) < last


def test_an_export_refuses_it(tmp_path):
    save(tmp_path / "int8")
    flip_bit(tmp_path / "int8" / "model.safetensors", UP + "weight_q")
    with pytest.raises(ValueError, match=rf"{UP}weight_q in .* is not what was saved"):
        export_checkpoint(tmp_path / "int8", tmp_path / "plain", dtype=torch.bfloat16)
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize("has_sums", [True, False], ids=["with sums", "without"])
def test_a_shard_of_another_checkpoint_is_refused(has_sums, tmp_path):
    """The shard's names and shapes fit the model, and its own check sums are correct."""
    save(tmp_path / "one", shards="9KB")
    save(tmp_path / "other", shards="9KB", seed=1)
    shard = file_of(tmp_path / "other", UP + "weight_q")
    if not has_sums:
        shutil.copy(shard, tmp_path / "other" / "model.safetensors")
        edit_tensors(tmp_path / "other", lambda tensors: None)
        shutil.move(tmp_path / "other" / "model.safetensors", shard)
    shutil.copy(shard, tmp_path / "one" / shard.name)

    problem = "are shards of two checkpoints" if has_sums else f"{UP}weight_.* not what was saved"
    with pytest.raises(ValueError, match=problem):
        load(tmp_path / "one")


def test_switched_off_it_loads_and_says_so(tmp_path, monkeypatch, caplog):
    model = save(tmp_path)
    flip_bit(tmp_path / "model.safetensors", UP + "weight_q")
    monkeypatch.setenv(SWITCH, "0")
    with caplog.at_level(logging.WARNING):
        state = load(tmp_path).state_dict()
    assert "QFT_CHECKSUMS=0: check sums of" in caplog.text
    assert not torch.equal(state[UP + "weight_q"], model.state_dict()[UP + "weight_q"])


def test_files_of_earlier_versions_have_none_and_load(tmp_path):
    model = save(tmp_path)
    edit_tensors(tmp_path, lambda tensors: None)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as tensors:
        assert KEY not in tensors.metadata()
    assert_same_state(load(tmp_path), model)


@pytest.mark.parametrize("text", ["{", "[1]", "7"])
def test_sums_that_cannot_be_read_are_named(text, tmp_path):
    save(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", KEY: text})
    with pytest.raises(ValueError, match=r"qft_checksums of .* cannot be read"):
        load(tmp_path)


def test_tensors_that_are_stored_in_another_layout_have_sums_too(tmp_path):
    """Files of mixtures of experts have one matrix per expert; the model has one tensor for all."""
    config = MixtralConfig(
        vocab_size=131, hidden_size=44, intermediate_size=75, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=3,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    quantize_model_(model, QFTConfig())
    model.save_pretrained(tmp_path)

    names = tensor_names(files(tmp_path))
    with safe_open(tmp_path / "model.safetensors", framework="pt") as tensors:
        listed = json.loads(tensors.metadata()[KEY])
    assert set(names) - set(model.state_dict()), "another layout"
    assert set(names) <= set(listed)
    assert damaged(files(tmp_path)) == []


def test_a_model_that_is_saved_as_it_is_held_is_not_laid_out_anew_for_its_sums(
    tmp_path, monkeypatch
):
    """A conversion would compile a pattern for each name and take ten times as long as the sums."""
    save(tmp_path)
    model = load(tmp_path)
    called = []
    monkeypatch.setattr(quantizer, "revert_weight_conversion", lambda *_: called.append(1))
    model.save_pretrained(tmp_path)
    assert not called
    assert_same_state(load(tmp_path), model)


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    """Safetensors says that there is no such file, and the advice was to copy it again."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.R_OK)
    with pytest.raises(ValueError, match=r"model\.safetensors may not be read\. Ask its owner"):
        tensor_names([file])
