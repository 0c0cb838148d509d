"""Signal-to-noise ratio of the three INT8 products inside real models, against FP32 throughout."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from qft_hf import QFTConfig, quantize_model_
from qft_hf.nn import Int8Products, linear
from qft_hf.quant import Int8Gradient, QFTWeight
from tests.models import tiny_llama
from tests.tolerances import snr_db

DATA = Path(__file__).parents[2] / "data"
CONFIG = QFTConfig(matmul="int8")
PRODUCTS = ("output", "input gradient", "weight gradient")


def passes(
    model: nn.Module, inputs: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Yield name, FP32 weight, input `[N, C]`, output gradient `[N, R]` of inner linear modules."""
    inner = {
        module: name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings()
    }
    real = inputs["attention_mask"].flatten().bool()  # padding has no gradient
    seen = {}

    def forward(module: nn.Module, arguments: tuple[Tensor], output: Tensor) -> None:
        x = arguments[0].detach().flatten(0, -2)[real]

        def backward(grad: Tensor) -> None:
            seen[inner[module]] = (module.weight.detach(), x, grad.flatten(0, -2)[real])

        output.register_hook(backward)

    hooks = [module.register_forward_hook(forward) for module in inner]
    model(**inputs).loss.backward()
    for hook in hooks:
        hook.remove()
    for name, tensors in seen.items():
        yield name, *tensors


def ratios(weight: Tensor, x: Tensor, grad_y: Tensor, config: QFTConfig = CONFIG) -> list[float]:
    """Return the SNR of output, input gradient and weight gradient in dB."""
    quantized = nn.Parameter(QFTWeight.from_float(weight, config))
    leaf = x.clone().requires_grad_()
    products = Int8Products() if config.matmul == "int8" else None
    y = linear(leaf, quantized, products=products)
    y.backward(grad_y)
    exact = x @ weight.t(), grad_y @ weight, grad_y.t() @ x
    ours = y.detach(), leaf.grad, quantized.grad.dequantize()
    return [snr_db(a, b) for a, b in zip(exact, ours, strict=True)]


def test_a_tiny_model_has_30_db_in_every_product():
    ids = torch.randint(3, 131, (4, 24), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}

    names = []
    for name, *tensors in passes(tiny_llama(), inputs):
        names.append(name)
        assert min(ratios(*tensors)) > 30, name
    assert len(names) == 14


@pytest.fixture(scope="module")
def smollm2() -> nn.Module:
    if not (DATA / "smollm2").exists() or not (DATA / "chitchat").exists():
        pytest.skip("fetch it: python scripts/fetch_demo.py smollm2 chitchat")
    return AutoModelForCausalLM.from_pretrained(DATA / "smollm2", dtype=torch.float32)


def dialogues(n: int) -> dict[str, Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(DATA / "smollm2")
    with (DATA / "chitchat" / "train.jsonl").open() as file:
        chats = [json.loads(next(file))["messages"] for _ in range(n)]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    inputs = dict(
        tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=96)
    )
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return inputs


@pytest.mark.slow
def test_smollm2_on_dialogues_has_20_db_in_every_product_of_every_module(smollm2):
    found = {name: ratios(*tensors) for name, *tensors in passes(smollm2, dialogues(8))}

    assert len(found) == 30 * 7
    for index, product in enumerate(PRODUCTS):
        lowest = sorted((values[index], name) for name, values in found.items())
        assert lowest[0][0] > 20, (product, lowest[:5])


@pytest.mark.slow
def test_a_step_of_smollm2_descends_nearly_as_far_as_the_exact_one(smollm2):
    """Noise adds up through 30 layers; the measure is how much of sum |gradient| Lion descends.

    Without outlier columns for the large columns of activations the share is 90 %.
    """
    inputs = dialogues(4)

    def gradients(model: nn.Module) -> dict[str, Tensor]:
        model.zero_grad()
        model(**inputs).loss.backward()
        return {
            name: p.grad.dequantize() if isinstance(p.grad, Int8Gradient) else p.grad
            for name, p in model.named_parameters()
            if p.ndim == 2
        }

    exact = gradients(smollm2)
    ours = gradients(quantize_model_(copy.deepcopy(smollm2), CONFIG))

    descent = sum(float((ours[name].sign() * gradient).sum()) for name, gradient in exact.items())
    assert descent > 0.97 * sum(float(gradient.abs().sum()) for gradient in exact.values())
