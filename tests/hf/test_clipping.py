"""Gradient clipping by an Accelerator in the user's own training loop."""

import pytest
import torch
from accelerate import Accelerator

from qft_hf import QFTConfig, QFTLion, QFTTrainer, QFTTrainingArguments, quantize_model_
from qft_hf.quant import QFTWeight
from tests.hf.checkpoints import IDS
from tests.models import tiny_llama
from tests.tolerances import FP32_EPS


def prepared(**options):
    accelerator = Accelerator(cpu=True)
    model = quantize_model_(tiny_llama(), QFTConfig())
    optimizer = QFTLion(model.parameters(), lr=1e-3, **options)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.backward(model(input_ids=IDS, labels=IDS).loss)
    return accelerator, model, optimizer


def test_gradients_that_wait_are_clipped_by_their_norm():
    accelerator, model, _ = prepared()
    gradients = [p.grad.dequantize() for p in model.parameters()]
    expected = torch.stack([g.norm() for g in gradients]).norm()

    norm = accelerator.clip_grad_norm_(model.parameters(), 0.1)

    assert norm.item() == pytest.approx(expected.item(), rel=1e-5)
    clipped = torch.stack([p.grad.dequantize().norm() for p in model.parameters()]).norm()
    assert clipped.item() == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("max_norm", [0.1, 1e9, float("inf")])
def test_they_are_scaled_as_by_torch(max_norm):
    """PyTorch scales gradients one by one, the accelerator scales them with one operation."""
    (accelerator, model, _), (_, other, _) = prepared(), prepared()

    norm = accelerator.clip_grad_norm_(model.parameters(), max_norm)
    expected = torch.nn.utils.clip_grad_norm_(other.parameters(), max_norm)

    assert norm.dtype == expected.dtype == torch.float32
    assert norm.item() == pytest.approx(expected.item(), rel=4 * FP32_EPS)
    for mine, its in zip(model.parameters(), other.parameters(), strict=True):
        if isinstance(mine, QFTWeight):
            assert torch.equal(mine.grad.codes, its.grad.codes)
            mine, its = mine.grad.scales, its.grad.scales
        else:
            mine, its = mine.grad, its.grad
        torch.testing.assert_close(mine, its, rtol=8 * FP32_EPS, atol=0)


def test_of_other_norms_and_of_float_models_torch_clips():
    accelerator, model, _ = prepared()
    gradients = [p.grad.dequantize() for p in model.parameters()]
    largest = max(gradient.abs().max().item() for gradient in gradients)
    norm = accelerator.clip_grad_norm_(model.parameters(), 0.1, norm_type=float("inf"))
    assert norm.item() == pytest.approx(largest)

    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.tensor([3.0, 4.0, 0.0])
    assert accelerator.clip_grad_norm_(parameter, 1.0).item() == pytest.approx(5.0)
    assert parameter.grad.norm().item() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("max_norm", [0.1, float("inf")])
def test_gradients_that_were_released_are_said_to_be(max_norm):
    """`clip_grad_norm_` once returned 0.0 and clipped nothing."""
    accelerator, model, optimizer = prepared(gradient="release")

    with pytest.raises(RuntimeError, match=r"has used 21 gradients .* Give QFTLion max_grad_norm"):
        accelerator.clip_grad_norm_(model.parameters(), max_norm)

    optimizer.step()  # the step itself can still be completed
    assert optimizer.optimizer.released_norm > 0
    accelerator.clip_grad_norm_(model.parameters(), max_norm)  # nothing is released now


def test_clipping_released_gradients_by_value_is_refused():
    """PyTorch once raised its own error about an empty list."""
    accelerator, model, _ = prepared(gradient="release")

    with pytest.raises(RuntimeError, match=r"has used 21 gradients .* Give QFTLion max_grad_norm"):
        accelerator.clip_grad_value_(model.parameters(), 0.1)


def test_gradients_that_wait_are_clipped_by_value():
    accelerator, model, _ = prepared(gradient="stack")
    assert model.lm_head.weight.grad.abs().max() > 0.01

    accelerator.clip_grad_value_(model.parameters(), 0.01)

    largest = torch.stack([p.grad.abs().max() for p in model.parameters()])
    assert largest.max() == pytest.approx(0.01, rel=1e-6)


@pytest.mark.parametrize("gradient", ["stack", "release"])
def test_an_accelerator_that_scales_losses_is_refused(gradient):
    """With release, scaled gradients once moved weights before any error."""
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu")  # as mixed_precision="fp16" on a GPU makes it
    model = quantize_model_(tiny_llama(), QFTConfig())
    accelerator.prepare(torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=1.0))

    with pytest.raises(ValueError, match="Use mixed_precision='bf16', which needs no scaling"):
        accelerator.prepare(model, QFTLion(model.parameters(), lr=1e-3, gradient=gradient))


def test_a_scaler_of_ones_own_is_refused_and_changes_nothing():
    model = quantize_model_(tiny_llama(), QFTConfig())
    optimizer = QFTLion(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(input_ids=IDS, labels=IDS).loss).backward()

    for use in (scaler.unscale_, scaler.step):
        with pytest.raises(NotImplementedError, match="Use bfloat16, which needs no scaling"):
            use(optimizer)
    assert not optimizer.state


@pytest.mark.parametrize("unscales", [False, True])
def test_a_scaler_with_release_is_refused_with_what_has_happened(unscales):
    """The step ended in "No inf checks were recorded", which says neither what to do nor that
    weights had been updated."""
    model = quantize_model_(tiny_llama(), QFTConfig())
    optimizer = QFTLion(model.parameters(), lr=1e-3, gradient="release")
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(input_ids=IDS, labels=IDS).loss).backward()
    if unscales:
        scaler.unscale_(optimizer)

    with pytest.raises(NotImplementedError, match=r"Use bfloat16, .* and load the model again"):
        scaler.step(optimizer)


def test_a_scaler_of_float_weights_works_with_stack():
    layer = torch.nn.Linear(3, 5)
    before = layer.weight.detach().clone()
    optimizer = QFTLion(layer.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(layer(torch.ones(2, 3)).sum()).backward()
    scaler.step(optimizer)

    assert not torch.equal(layer.weight, before)


def test_a_trainer_is_left_alone(tmp_path):
    args = QFTTrainingArguments(
        tmp_path, gradient="release", clipping="previous", max_steps=2, report_to="none",
        use_cpu=True, logging_steps=1, save_strategy="no",
    )  # fmt: skip
    data = [{"input_ids": IDS[0], "labels": IDS[0]}] * 8
    trainer = QFTTrainer(model=tiny_llama(), args=args, train_dataset=data)
    trainer.train()

    assert trainer.state.log_history[0]["grad_norm"] > 0
