"""Runs on text of models that also have a vision encoder."""

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import (
    AutoModelForImageTextToText,
    BartConfig,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    T5Config,
)

from qft_hf.hf.finetune import finetune
from qft_hf.hf.finetune.check import check
from qft_hf.hf.finetune.export import export_checkpoint
from qft_hf.quant import QFTWeight
from tests.finetune.flags import leave_run, parsed, write_jsonl
from tests.scripts.commands import load

TINY = load("families").TINY
N_TOKENS = 330  # those from 320 on stand for images
TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def flags(folder):
    """Write a tokenizer and data for the model in `folder`, and return the flags of a run on it."""
    return leave_run(folder, max_steps=12, per_device_train_batch_size=4, learning_rate=2e-3)


can_be_scored = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.20"),
    reason="older versions of its Trainer take the cache in the model's output for a result",
)


def enlarged(config):
    """Set a configuration's vocabulary to the tiny tokenizer's tokens and some for images."""
    config.get_text_config().vocab_size = N_TOKENS
    for number, name in enumerate(TOKENS, start=1):
        if hasattr(config, name):
            setattr(config, name, N_TOKENS - number)
    return config


def is_of_vision(name):
    return "vis" in name or "projector" in name


@pytest.mark.parametrize(
    "name",
    [
        "Qwen2.5-VL",
        pytest.param("LLaVA", marks=can_be_scored),
        pytest.param("Gemma 3, with images", marks=can_be_scored),
    ],
)
def test_its_text_is_trained_and_what_sees_stays(name, tmp_path, caplog):
    """Qwen2.5-VL and LLaVA once ended in a list of two hundred other configurations."""
    before = AutoModelForImageTextToText.from_config(enlarged(TINY[name].config()))
    before.save_pretrained(tmp_path / "model")
    arguments = parsed(flags(tmp_path))
    found = check(arguments)

    summary = finetune(arguments)

    assert "vision of " in caplog.text
    assert summary.after["loss"] < summary.before["loss"]
    parameters = dict(before.named_parameters()).items()
    n_frozen = sum(is_of_vision(name) for name, _ in parameters)
    assert f"does not read: {n_frozen} tensors of its parameters are frozen" in caplog.text
    assert summary.parameters == sum(p.numel() for _, p in parameters)
    assert summary.trained_parameters == sum(
        p.numel() for name, p in parameters if not is_of_vision(name)
    )
    assert found.trained_parameters == summary.trained_parameters
    trained = f"{summary.trained_parameters:,} of"
    assert f"trained                 {trained} them, in INT8" in str(found)
    assert f"{trained} {summary.parameters:,} parameters, 12 steps" in str(summary)
    after = AutoModelForImageTextToText.from_pretrained(tmp_path / "run")
    assert any(isinstance(p, QFTWeight) for p in after.parameters())
    export_checkpoint(tmp_path / "run", tmp_path / "plain", dtype=torch.float32)
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "plain").state_dict()
    moved = {
        key: float((plain[key] - value).norm() / value.norm().clamp(min=1e-9))  # some begin at 0
        for key, value in before.state_dict().items()
        if value.ndim == 2
    }
    sees = {key for key in moved if is_of_vision(key)}
    assert 0 < len(sees) < len(moved)
    assert max(moved[key] for key in sees) < 0.02  # rounding to INT8
    assert min(moved[key] for key in moved.keys() - sees if "layers" in key) > 0.02


def test_a_part_that_is_left_out_is_named(tmp_path, caplog):
    config = enlarged(
        Qwen3_5Config(
            vision_config=dict(
                depth=1, hidden_size=32, intermediate_size=48, out_hidden_size=48, num_heads=2,
                patch_size=4, num_position_embeddings=16,
            ),
            text_config=dict(
                hidden_size=48, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, head_dim=12, linear_num_key_heads=2,
                linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
                layer_types=["linear_attention", "full_attention"],
                rope_parameters={
                    "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2],
                    "partial_rotary_factor": 1.0,
                },
            ),
        )
    )  # fmt: skip
    Qwen3_5ForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    finetune(parsed(flags(tmp_path), max_steps=1))

    assert "transformers loads only its Qwen3_5ForCausalLM" in caplog.text
    assert "vision is left out" in caplog.text


def test_a_model_with_an_encoder_of_text_is_refused_before_data_are_read(tmp_path):
    """The answers would go to T5's encoder, and Bart's encoder would silently be left out."""
    for config, reason in (
        (T5Config(d_model=12, d_kv=6, num_layers=1, num_heads=2), "has an encoder"),
        (BartConfig(d_model=12, encoder_layers=1, decoder_layers=1), "has an encoder"),
        (TINY["ViT"].config(), "belongs to none"),
    ):
        config.save_pretrained(tmp_path / "model")
        told = flags(tmp_path) | {"train_data": write_jsonl(tmp_path / "bad.jsonl", [{}])}

        with pytest.raises(ValueError, match=f"A causal language model is needed.* {reason}"):
            finetune(parsed(told))
