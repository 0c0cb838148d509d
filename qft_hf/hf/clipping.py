"""`accelerator.clip_grad_norm_` and `clip_grad_value_` find no released gradients, and say so.

They would clip nothing, and the norm of none is 0. In a Trainer it is left alone: there the
optimizer clips, and the callback logs the norm.
"""

from typing import Any

from accelerate import Accelerator

from ..optim import QFTOptimizer
from .ours import unwrapped
from .reference_model import trainer_of
from .wrapping import wrap_


def install_clipping() -> None:
    """Have each accelerator of a loop of the user's own look for released gradients. Idempotent."""
    for name in ("clip_grad_norm_", "clip_grad_value_"):
        wrap_(Accelerator, name, _refusing_released)


def _refusing_released(clip: Any) -> Any:
    def refusing(self: Accelerator, *args: Any, **kwargs: Any) -> Any:
        if trainer_of(self) is None:
            for optimizer in self._optimizers:
                refuse_released(unwrapped(optimizer))
        return clip(self, *args, **kwargs)

    return refusing


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
