"""An exported checkpoint is the INT8 model with float weights, without a trace of INT8."""

import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qft_hf import QFTConfig, dequantize_model_, quantize_model_
from qft_hf.hf.finetune import export_checkpoint
from tests.finetune.chats import tiny_tokenizer
from tests.fresh import try_fresh
from tests.hf.checkpoints import assert_same_state, edit_config
from tests.models import tiny_bert, tiny_llama

SCRIPT = Path(__file__).parents[2] / "scripts" / "export.py"


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "int8"
    quantize_model_(tiny_llama(tied=True), QFTConfig()).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_export_is_the_dequantized_model(dtype, checkpoint, tmp_path):
    export_checkpoint(checkpoint, tmp_path / "plain", dtype=dtype)

    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert {parameter.dtype for parameter in exported.parameters()} == {dtype}
    expected = dequantize_model_(AutoModelForCausalLM.from_pretrained(checkpoint), dtype)
    assert_same_state(exported, expected)
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())
    assert AutoTokenizer.from_pretrained(tmp_path / "plain").get_vocab() == (
        AutoTokenizer.from_pretrained(checkpoint).get_vocab()
    )


def test_classifier_keeps_its_class(tmp_path):
    quantize_model_(tiny_bert(), QFTConfig()).save_pretrained(tmp_path / "int8")

    export_checkpoint(tmp_path / "int8", tmp_path / "plain", dtype=torch.bfloat16)

    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert not (tmp_path / "plain" / "tokenizer_config.json").exists()


def test_filled_target_is_refused_and_left_alone(checkpoint, tmp_path):
    target = tmp_path / "plain"
    target.mkdir()
    (target / "notes.txt").write_text("x")
    with pytest.raises(FileExistsError, match=r"is not empty\. Choose a folder that does not"):
        export_checkpoint(checkpoint, target, dtype=torch.bfloat16)
    assert [path.name for path in target.iterdir()] == ["notes.txt"]

    (target / "notes.txt").unlink()
    export_checkpoint(checkpoint, target, dtype=torch.bfloat16)
    assert (target / "model.safetensors").exists()


def raise_disk_full(*args, **kwargs):
    raise OSError("disk full")


def test_failure_leaves_no_target(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", raise_disk_full)
    with pytest.raises(OSError, match="disk full"):
        export_checkpoint(checkpoint, tmp_path / "plain", dtype=torch.bfloat16)
    assert [path.name for path in tmp_path.iterdir()] == ["int8"]


def test_what_is_no_int8_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json\. Give the output folder"):
        export_checkpoint(tmp_path, tmp_path / "plain", dtype=torch.bfloat16)

    tiny_llama().save_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match=r"quant_method is None.* needs no export"):
        export_checkpoint(tmp_path / "float", tmp_path / "plain", dtype=torch.bfloat16)


def test_an_export_takes_the_place_of_an_earlier_one_when_it_is_whole(
    checkpoint, tmp_path, monkeypatch
):
    target = tmp_path / "plain"
    target.mkdir()
    (target / "model-00001-of-00002.safetensors").write_text("old")

    with monkeypatch.context() as patched:
        patched.setattr("transformers.PreTrainedModel.save_pretrained", raise_disk_full)
        with pytest.raises(OSError, match="disk full"):
            export_checkpoint(checkpoint, target, dtype=torch.bfloat16, replace=True)
    assert [path.name for path in target.iterdir()] == ["model-00001-of-00002.safetensors"]

    export_checkpoint(checkpoint, target, dtype=torch.bfloat16, replace=True)
    assert not list(target.glob("model-*"))
    assert AutoModelForCausalLM.from_pretrained(target).dtype == torch.bfloat16


def test_a_left_draft_of_the_old_name_is_not_taken_over(checkpoint, tmp_path):
    """The files in such a draft would end up in the export."""
    left = tmp_path / f".plain.{os.getpid()}"
    left.mkdir()
    (left / "adapter_config.json").write_text("{}")
    export_checkpoint(checkpoint, tmp_path / "plain", dtype=torch.bfloat16)
    assert not (tmp_path / "plain" / "adapter_config.json").exists()


def test_int8_weights_without_their_config_are_refused(checkpoint, tmp_path):
    """The error once said that an ordinary checkpoint needs no export."""
    edit_config(checkpoint, lambda config: config.pop("quantization_config"))
    with pytest.raises(ValueError, match=r"has INT8 weights, .* Restore the config\.json"):
        export_checkpoint(checkpoint, tmp_path / "plain", dtype=torch.bfloat16)
    assert not (tmp_path / "plain").exists()


def test_weights_of_two_runs_are_refused(checkpoint, tmp_path):
    """The single file was once exported, whatever the shards were."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="9KB")
    for path in (tmp_path / "sharded").glob("model*"):
        shutil.copy(path, checkpoint)
    with pytest.raises(ValueError, match=r"two sets of weights, .* remove the other"):
        export_checkpoint(checkpoint, tmp_path / "plain", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="two models, one from an earlier run"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


def plain_loss(folder, tmp_path):
    """Run scripts/evaluate_plain.py, which does not need qft_hf."""
    examples = tmp_path / "examples.jsonl"
    ids = list(range(9))
    examples.write_text(json.dumps({"input_ids": ids, "labels": ids}) + "\n")
    return try_fresh(SCRIPT.with_name("evaluate_plain.py"), folder, examples)


def test_the_plain_evaluation_takes_exports_and_refuses_random_weights(checkpoint, tmp_path):
    export_checkpoint(checkpoint, tmp_path / "plain", dtype=torch.float32)
    assert float(plain_loss(tmp_path / "plain", tmp_path).stdout) > 0

    edit_config(checkpoint, lambda config: config.pop("quantization_config"))
    refused = plain_loss(checkpoint, tmp_path)
    assert refused.stdout == ""
    assert "more tensors, which would be random" in refused.stderr


def test_the_script_exports(checkpoint, tmp_path, monkeypatch, capsys):
    target = tmp_path / "plain"
    monkeypatch.setattr(sys, "argv", ["export.py", str(checkpoint), str(target)])

    runpy.run_path(str(SCRIPT), run_name="__main__")

    assert capsys.readouterr().out == f"written to {target}\n"
    assert AutoModelForCausalLM.from_pretrained(target).dtype == torch.bfloat16
