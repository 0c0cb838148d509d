"""An exported checkpoint is the INT8 model with float weights, and no trace of INT8."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qft_hf import QFTConfig, dequantize_model_, quantize_model_
from qft_hf.hf.finetune import export_checkpoint
from tests.finetune.chats import tiny_tokenizer
from tests.hf.checkpoints import assert_same_state
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


def test_export_loads_where_qft_hf_was_never_imported(checkpoint, tmp_path):
    export_checkpoint(checkpoint, tmp_path / "plain", dtype=torch.float32)
    program = (
        "import sys, torch, transformers\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'plain')!r})\n"
        "assert not any(name.startswith('qft') for name in sys.modules)\n"
        "ids = torch.arange(9)[None]\n"
        "print(model(ids, labels=ids).loss.item())\n"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path
    ).stdout

    ids = torch.arange(9)[None]
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert float(printed) == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-6)


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
    with pytest.raises(FileExistsError, match=r"is not empty\. Choose a folder that is not there"):
        export_checkpoint(checkpoint, target, dtype=torch.bfloat16)
    assert [path.name for path in target.iterdir()] == ["notes.txt"]

    (target / "notes.txt").unlink()
    export_checkpoint(checkpoint, target, dtype=torch.bfloat16)
    assert (target / "model.safetensors").exists()


def test_failure_leaves_no_target(checkpoint, tmp_path, monkeypatch):
    def disk_full(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", disk_full)
    with pytest.raises(OSError, match="disk full"):
        export_checkpoint(checkpoint, tmp_path / "plain", dtype=torch.bfloat16)
    assert [path.name for path in tmp_path.iterdir()] == ["int8"]


def test_what_is_no_int8_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json\. Give the output folder"):
        export_checkpoint(tmp_path, tmp_path / "plain", dtype=torch.bfloat16)

    tiny_llama().save_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match=r"quant_method is None.* needs no export"):
        export_checkpoint(tmp_path / "float", tmp_path / "plain", dtype=torch.bfloat16)


def test_the_script_exports(checkpoint, tmp_path, monkeypatch, capsys):
    target = tmp_path / "plain"
    monkeypatch.setattr(sys, "argv", ["export.py", str(checkpoint), str(target)])

    runpy.run_path(str(SCRIPT), run_name="__main__")

    assert capsys.readouterr().out == f"written to {target}\n"
    assert AutoModelForCausalLM.from_pretrained(target).dtype == torch.bfloat16
