"""Support for INT8 weights in `accelerator.clip_grad_norm_` and `clip_grad_value_`.

`clip_grad_norm_` clips INT8 gradients in `.grad` together with float ones. Released gradients no
longer exist: both methods would clip nothing, with a norm of 0, so they raise an error instead. In
a Trainer they do not raise, because the optimizer clips there, and the callback logs the norm.
"""

from typing import Any

from accelerate import Accelerator
from torch import Tensor

from ..optim.norms import clip_
from ..quant import Int8Gradient
from .compatibility import ours
from .reference_model import trainer_of


def clipping_together(
    clip: Any, self: Accelerator, parameters: Any, max_norm: float, norm_type: float = 2
) -> Any:
    """Make clipping by the norm count INT8 gradients, and refuse released ones."""
    _refuse_released(self)
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    gradients = [p.grad for p in parameters if p.grad is not None]
    if norm_type != 2 or not any(isinstance(g, Int8Gradient) for g in gradients):
        return clip(self, parameters, max_norm, norm_type)
    self.unscale_gradients()
    return clip_(gradients, max_norm)


def refusing_released(clip: Any, self: Accelerator, *args: Any, **kwargs: Any) -> Any:
    """Make clipping by the value refuse released gradients."""
    _refuse_released(self)
    return clip(self, *args, **kwargs)


def _refuse_released(accelerator: Accelerator) -> None:
    """Raise RuntimeError if an optimizer has already used gradients of this step."""
    if trainer_of(accelerator) is not None:
        return
    for optimizer in map(ours, accelerator._optimizers):
        if optimizer is not None and optimizer.n_released:
            raise RuntimeError(
                f"gradient='release' has used {optimizer.n_released} gradients during backward, so "
                f"nothing is left to clip. Give {type(optimizer).__name__} max_grad_norm and "
                "clipping='exact', 'previous' or 'tensor' instead, and read its released_norm "
                "after step(); or use gradient='stack'."
            )
