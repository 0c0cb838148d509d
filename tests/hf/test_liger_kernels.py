"""Liger's own kernels on INT8 models in Triton's interpreter, which needs a separate process:
`TRITON_INTERPRET=1 pytest tests/hf/test_liger_kernels.py`.
"""

import importlib
import logging
import os
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.integrations.liger import apply_liger_kernel

from qft_hf import (
    QFTConfig,
    QFTTrainer,
    QFTTrainingArguments,
    QFTWeight,
    QSTConfig,
    attach_side_network,
    chunk_loss_,
    quantize_model_,
)
from qft_hf.quant import Int8Gradient
from tests.hf.checkpoints import assert_same_state
from tests.hf.test_trainer import arguments, dense, history
from tests.tolerances import FP32_EPS

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("liger_kernel")
triton = importlib.import_module("triton")
interpreter = importlib.import_module("triton.runtime.interpreter")
tl = importlib.import_module("triton.language")

WITHOUT_FUSED = {"fused_linear_cross_entropy": False}
SIZES = {
    "vocab_size": 61, "hidden_size": 28, "intermediate_size": 37, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 14, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 19}
IDS = torch.tensor([[5, 60, 17, 8, 33], [9, 2, 41, 41, 7]])

# Kernel launches in one forward and backward pass of two layers, by family: for each layer's
# norms, the last norm, each MLP and each rotation.
KERNELS = {
    "llama": {"_rms_norm": 2 * 2 + 1, "_swiglu": 2, "_triton_rope": 2 * 2},
    "gemma": {"_rms_norm": 2 * 2 + 1, "_geglu_tanh": 2, "_triton_rope": 2 * 2},
    "qwen3": {"_rms_norm": 2 * 4 + 1, "_swiglu": 2, "_triton_rope": 2 * 2},
}


def build(family: str) -> Any:
    classes = {
        "llama": (LlamaForCausalLM, LlamaConfig, {}),
        "gemma": (GemmaForCausalLM, GemmaConfig, {"tie_word_embeddings": True}),
        "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),
        "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, EXPERTS),
    }
    cls, config, more = classes[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = cls(config(**SIZES, **more))
        for name, parameter in model.named_parameters():
            if "norm" in name:  # neither zeros nor ones: Gemma adds one
                parameter.data += 0.3 * torch.randn_like(parameter)
    return model


@pytest.fixture(autouse=True)
def _as_compiled(monkeypatch):
    """Give Triton's interpreter what only compiled kernels have."""
    as_tensor = interpreter._implicit_cvt

    def convert(argument: Any) -> Any:
        """Convert Python floats to FP32 as the compiler does; the interpreter does not."""
        if not isinstance(argument, float):
            return as_tensor(argument)
        handle = interpreter.TensorHandle(np.array([argument], np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    def elementwise(function: Any) -> Any:
        """Implement a function of CUDA's library, for which the interpreter has only the name."""

        def call(x: Any) -> Any:
            handle = interpreter.TensorHandle(function(x.handle.data), x.handle.dtype)
            return tl.tensor(handle, x.type)

        return call

    monkeypatch.setattr(interpreter, "_implicit_cvt", convert)
    rsqrt, tanh = elementwise(lambda x: 1 / np.sqrt(x)), elementwise(np.tanh)
    monkeypatch.setattr("liger_kernel.ops.rms_norm.rsqrt", rsqrt)
    monkeypatch.setattr("liger_kernel.ops.geglu.tanh", tanh)


@pytest.fixture(autouse=True)
def _restored(monkeypatch):
    """Restore functions and classes of modules, which Liger replaces for all later models."""
    families = ("llama", "gemma", "qwen3", "qwen3_moe")
    modules = [
        importlib.import_module(f"transformers.models.{name}.modeling_{name}") for name in families
    ]
    for module in [*modules, torch.nn.functional]:
        for name, value in list(vars(module).items()):
            if callable(value):
                monkeypatch.setattr(module, name, value)


@pytest.fixture
def launched(monkeypatch) -> Counter:
    """Count launches of kernels by name."""
    counts: Counter = Counter()
    run = interpreter.GridExecutor.__call__

    def count(self: Any, *args: Any, **kwargs: Any) -> Any:
        counts[self.fn.__name__] += 1
        return run(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", count)
    return counts


def pass_over(model: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return the loss and the gradients by name of one pass, and clear the model's gradients."""
    labels = IDS.clone()
    labels[0, :2] = -100
    loss = model(input_ids=IDS, labels=labels).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return loss.detach(), gradients


# With and without Liger all arithmetic is FP32 and differs only in the order of sums. Between
# embeddings and loss a value passes 2 layers of at most 20 operations, twice; the longest sums
# have 61 terms. SHARE bounds the rounding error, relative to the largest value of a tensor.
SHARE = 2 * 2 * 20 * 61 * FP32_EPS


def assert_close(found: tuple, expected: tuple) -> None:
    """Assert equality up to rounding, which may change an INT8 code by one."""
    torch.testing.assert_close(found[0], expected[0], rtol=SHARE, atol=0)
    assert found[1].keys() == expected[1].keys()
    for name, wanted in expected[1].items():
        got = found[1][name]
        assert wanted is not None
        quantum = wanted.scales.max() if isinstance(wanted, Int8Gradient) else 0.0
        got, wanted = dense(got), dense(wanted)
        assert wanted.abs().max() > 0, name
        bound = SHARE * wanted.abs().max() + 1.01 * quantum
        assert (got - wanted).abs().max() <= bound, name


# --- loss and gradients ---------------------------------------------------------------------


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma", "qwen3"])
def test_loss_and_gradients_are_those_without_liger(family, chunked, launched):
    model = quantize_model_(build(family), QFTConfig()).train()
    if chunked:
        chunk_loss_(model)
    expected = pass_over(model)
    assert not launched
    apply_liger_kernel(model, WITHOUT_FUSED)
    assert_close(pass_over(model), expected)

    for kernel, n in KERNELS[family].items():
        counts = {name: count for name, count in launched.items() if name.startswith(kernel)}
        both_ways = 1 if kernel == "_triton_rope" else 2
        assert sum(counts.values()) == n * both_ways, counts


def test_its_loss_of_whole_logits_is_that_without_it(launched):
    model = quantize_model_(build("llama"), QFTConfig()).train()
    expected = pass_over(model)
    apply_liger_kernel(model, WITHOUT_FUSED | {"cross_entropy": True})
    assert_close(pass_over(model), expected)
    assert launched["liger_cross_entropy_kernel"] == 1


@pytest.mark.filterwarnings("ignore:`past_key_values`:FutureWarning")  # Liger's own use of it
@pytest.mark.parametrize("kernels", [None, WITHOUT_FUSED], ids=["fused", "whole"])
@pytest.mark.parametrize("base", ["float", "int8"])
def test_a_side_network_learns_the_same_beside_a_base_with_liger(base, kernels, launched):
    """The head is frozen, so Liger's fused loss computes no gradient for it."""
    model = build("llama")
    if base == "int8":
        quantize_model_(model, QFTConfig())
    attach_side_network(model, QSTConfig(r=2)).train()
    with torch.no_grad():  # a new side network has no effect
        model.side_network.upsample.copy_(torch.linspace(-1, 1, 28)[:, None])
    expected = pass_over(model)
    apply_liger_kernel(model, kernels)
    assert_close(pass_over(model), expected)
    assert launched["_swiglu_forward_kernel"] == 2
    assert (launched["liger_cross_entropy_kernel"] > 0) == (kernels is None)


# --- whole runs -----------------------------------------------------------------------------


def rows(n: int = 6) -> list[dict[str, torch.Tensor]]:
    ids = (torch.arange(n)[:, None] * 7 + torch.arange(5)) % 61
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def run(folder, family="llama", cls=QFTTrainer, args_cls=QFTTrainingArguments, **options) -> Any:
    settings = {"per_device_train_batch_size": 1, "max_steps": 3} | options
    trainer = cls(
        model=build(family),
        args=arguments(folder, args_cls, **settings),
        train_dataset=rows(),
        eval_dataset=rows(2),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("matmul", ["dequantize", "int8"])
def test_a_run_takes_the_course_of_one_without_and_trains_all(matmul, tmp_path, caplog, launched):
    options = {"matmul": matmul, "gradient_checkpointing": True}
    plain = run(tmp_path, chunked_loss=True, **options)
    assert not launched
    start = quantize_model_(build("llama"), QFTConfig(matmul=matmul))
    with caplog.at_level(logging.WARNING):
        trainer = run(tmp_path, use_liger_kernel=True, **options)
    assert trainer.model.lm_head.defers_logits
    assert caplog.text.count("chunked_loss=True takes its place") == 1
    # Three steps; checkpointing repeats the forward pass of all but the last norm.
    assert launched["_swiglu_forward_kernel"] == 3 * 2 * 2
    assert launched["_swiglu_backward_kernel"] == 3 * 2
    # A last bit can flip the sign of an update; losses differ by far less than they fall.
    losses = history(trainer, "loss")
    assert losses == pytest.approx(history(plain, "loss"), rel=3e-3)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=3e-3)
    before = dict(start.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        assert (float_of(parameter) != float_of(before[name])).any(), name


def float_of(parameter: Any) -> torch.Tensor:
    with torch.no_grad():
        return parameter.dequantize() if isinstance(parameter, QFTWeight) else parameter


@pytest.mark.parametrize(("family", "matmul"), [("llama", "dequantize"), ("gemma", "int8")])
def test_release_has_the_bits_of_stack(family, matmul, tmp_path):
    options = {"use_liger_kernel": True, "matmul": matmul, "max_grad_norm": 0, "max_steps": 2}
    stack, release = (
        run(tmp_path, family, gradient=gradient, **options) for gradient in ("stack", "release")
    )
    assert history(release, "loss") == history(stack, "loss")
    assert_same_state(release.model, stack.model)


def test_the_stock_trainer_has_them_too(tmp_path, launched):
    options = {"use_liger_kernel": True, "liger_kernel_config": WITHOUT_FUSED}
    run(tmp_path, cls=Trainer, args_cls=TrainingArguments, **options)
    assert launched["_swiglu_backward_kernel"] == 3 * 2


def test_beside_experts_in_int8_all_but_their_kernel_works(tmp_path, launched):
    options = {"use_liger_kernel": True, "liger_kernel_config": {"swiglu": False}, "max_steps": 1}
    plain = run(tmp_path, "qwen3_moe", max_steps=1)
    assert not launched
    trainer = run(tmp_path, "qwen3_moe", **options)
    assert history(trainer, "loss") == pytest.approx(history(plain, "loss"), rel=SHARE)
    assert launched["_triton_rope"] == 2 * 2
