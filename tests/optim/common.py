"""Models, steps and float64 Lion for the tests of the optimizer."""

from typing import Any

import torch
from torch import Tensor, nn

from qft_hf.config import QuantizationSpec
from qft_hf.nn import quantize_modules_
from qft_hf.optim import QFTLion, QFTOptimizer
from qft_hf.quant import Int8Gradient, QFTWeight
from tests.nn.small import SmallModel, batch

SPEC = QuantizationSpec(group_size=40, outlier_fraction=0.02)


def make_model(*, dtype: torch.dtype = torch.float32, seed: int = 0, **arguments) -> SmallModel:
    model = SmallModel(seed=seed, **arguments).to(dtype)
    quantize_modules_(model, SPEC)
    return model


def make_optimizer(model: nn.Module, kind: type[QFTOptimizer] = QFTLion, **arguments: Any) -> Any:
    """Return an optimizer of two groups, one with and one without decay; no value is neutral."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0, "lr": 2e-3},
    ]
    return kind(groups, **{"lr": 1e-3, "seed": 11, **arguments})


def backward(model: SmallModel, step: int, n_parts: int = 1) -> Tensor:
    """Compute gradients of batch number `step` in `n_parts` micro-batches; return the mean loss."""
    losses = []
    for part in batch(step).chunk(n_parts):
        loss = model.loss(part) / n_parts
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def train(model, optimizer, steps, *, n_parts: int = 1) -> list[Tensor]:
    losses = []
    for step in steps:
        losses.append(backward(model, step, n_parts))
        optimizer.step()
    return losses


def spoil(model: SmallModel, where: str) -> None:
    """Make the gradient of an `"int8"` weight or of a `"float"` parameter non-finite."""
    if where == "int8":
        model.blocks[1].up.weight.grad.scales[7, 0] = float("nan")
    else:
        model.norm.bias.grad[3] = float("inf")


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of everything a model stores."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, QFTWeight):
            for field_name, field in parameter.fields().items():
                tensors[f"{name}.{field_name}"] = field.clone()
        else:
            tensors[name] = parameter.detach().clone()
    return tensors


def state_tensors(optimizer: QFTOptimizer) -> dict[str, Tensor]:
    """Return copies of the state of every parameter, by position and name."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        f"{index}.{name}": torch.as_tensor(value).clone()
        for index, parameter in enumerate(parameters)
        for name, value in optimizer.state.get(parameter, {}).items()
    }


def snapshot(model: nn.Module, optimizer: QFTOptimizer) -> dict[str, Tensor]:
    return model_tensors(model) | state_tensors(optimizer)


def zero_gradient(parameter: nn.Parameter) -> Int8Gradient:
    return Int8Gradient.zeros(parameter)
