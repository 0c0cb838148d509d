"""What `accelerator.clip_grad_norm_` and `clip_grad_value_` do with gradients of INT8 weights.

INT8 gradients that wait are clipped together. Released ones they would not find: they would clip
nothing, and the norm of none is 0. So they say it; in a Trainer they are left alone, for there the
optimizer clips, and the callback logs the norm.
"""

from typing import Any

from accelerate import Accelerator
from torch import Tensor

from ..optim import QFTOptimizer
from ..optim.norms import clip_
from ..quant import Int8Gradient
from .ours import unwrapped
from .reference_model import trainer_of
from .wrapping import wrap_


def install_clipping() -> None:
    """Have each accelerator look for INT8 gradients, and for released ones. Idempotent."""
    wrap_(Accelerator, "clip_grad_norm_", _clipping_together)
    wrap_(Accelerator, "clip_grad_value_", _refusing_released)


def _clipping_together(clip: Any) -> Any:
    def clipping(self: Accelerator, parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
        _refuse_released(self)
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        gradients = [p.grad for p in parameters if p.grad is not None]
        if norm_type != 2 or not any(isinstance(g, Int8Gradient) for g in gradients):
            return clip(self, parameters, max_norm, norm_type)
        self.unscale_gradients()
        return clip_(gradients, max_norm)

    return clipping


def _refusing_released(clip: Any) -> Any:
    def refusing(self: Accelerator, *args: Any, **kwargs: Any) -> Any:
        _refuse_released(self)
        return clip(self, *args, **kwargs)

    return refusing


def _refuse_released(accelerator: Accelerator) -> None:
    if trainer_of(accelerator) is None:
        for optimizer in accelerator._optimizers:
            refuse_released(unwrapped(optimizer))


def refuse_released(optimizer: Any) -> None:
    """Raise if an optimizer has used gradients of this step already.

    Raises:
        RuntimeError: So it is.
    """
    if isinstance(optimizer, QFTOptimizer) and optimizer.n_released:
        raise RuntimeError(
            f"gradient='release' has used {optimizer.n_released} gradients during backward, so "
            f"nothing is left to clip. Give {type(optimizer).__name__} max_grad_norm and "
            "clipping='exact', 'previous' or 'tensor' instead, and read its released_norm after "
            "step(); or use gradient='stack'."
        )
