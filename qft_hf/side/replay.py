"""Checkpointing of the base's hidden states: it runs again in backward to train downsample modules.

A downsample module with parameters needs its input for their gradient: a tensor as wide as the base
in each layer. With checkpointing none is kept. Backward collects the gradients of the modules'
outputs, which are narrow. After the last one, the base runs once more without autograd, and each
module computes its gradient when its input is available again.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Replay:
    """One forward pass of a base that will run again.

    Args:
        downsamples: `D_0` to `D_L`.
        run: Runs the base again as it ran, and passes each hidden state to `learn`.
    """

    def __init__(self, downsamples: Sequence[nn.Module], run: Callable[["Replay"], None]) -> None:
        self.downsamples = downsamples
        self.run = run
        self.parameters = [p for module in downsamples for p in _trained(module)]
        self.token = _Begin.apply(self, *self.parameters)
        self.output_gradients: dict[int, Tensor] = {}
        self.of_parameters: dict[int, Any] = {}  # by id of the parameter

    def narrow(self, number: int, hidden: Tensor) -> Tensor:
        """Return `D_number(hidden)` without keeping `hidden` for backward."""
        with torch.no_grad():
            value = self.downsamples[number](hidden)
        narrow: Tensor = _Narrow.apply(self, number, self.token, value)
        return narrow

    def learn(self, number: int, hidden: Tensor) -> None:
        """Compute the gradients of `D_number` from the same hidden state, computed again."""
        gradient = self.output_gradients.pop(number, None)
        parameters = _trained(self.downsamples[number])
        if gradient is None or not parameters:
            return
        with torch.enable_grad():
            value = self.downsamples[number](hidden)
        gradients = torch.autograd.grad(value, parameters, gradient)
        self.of_parameters |= dict(zip(map(id, parameters), gradients, strict=True))

    def gradients(self) -> list[Any]:
        """Run the base again, and return the gradients of all parameters in their order."""
        self.run(self)
        return [self.of_parameters.pop(id(parameter), None) for parameter in self.parameters]


def _trained(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a downsample module that are not frozen."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


class _Begin(torch.autograd.Function):
    """Maps parameters to a token; its backward runs after those of all `_Narrow`."""

    @staticmethod
    def forward(ctx: Any, replay: Replay, *parameters: Tensor) -> Tensor:
        ctx.replay = replay
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return None, *ctx.replay.gradients()


class _Narrow(torch.autograd.Function):
    """Returns a narrow state that, to autograd, is a function of a token."""

    @staticmethod
    def forward(ctx: Any, replay: Replay, number: int, token: Tensor, value: Tensor) -> Tensor:
        ctx.replay, ctx.number = replay, number
        ctx.token = token.new_zeros(())
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.replay.output_gradients[ctx.number] = gradient
        return None, None, ctx.token, None
