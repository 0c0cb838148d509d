"""`accelerator.clip_grad_norm_` finds no gradients that were released, and says so.

It would return the norm of none, 0, and clip nothing. In a Trainer it is left alone: there the
optimizer clips, and the callback logs the norm.
"""

from functools import wraps
from typing import Any

from accelerate import Accelerator

from ..optim import QFTOptimizer
from .reference_model import MARK
from .support import unwrapped


def install_clipping() -> None:
    """Have each accelerator of a loop of the user's own look for released gradients. Idempotent."""
    clip: Any = Accelerator.clip_grad_norm_
    if hasattr(clip, MARK):
        return

    @wraps(clip)
    def clip_grad_norm_(self: Accelerator, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self, MARK):
            for optimizer in self._optimizers:
                refuse_released(unwrapped(optimizer))
        return clip(self, *args, **kwargs)

    setattr(clip_grad_norm_, MARK, True)
    accelerator_class: Any = Accelerator
    accelerator_class.clip_grad_norm_ = clip_grad_norm_


def refuse_released(optimizer: Any) -> None:
    """Raise if an optimizer has used gradients of this step already.

    Raises:
        RuntimeError: So it is.
    """
    if isinstance(optimizer, QFTOptimizer) and optimizer.n_released:
        raise RuntimeError(
            f"gradient='release' has used {optimizer.n_released} gradients during backward, so "
            f"clip_grad_norm_ would clip nothing. Give {type(optimizer).__name__} max_grad_norm "
            "and clipping='exact', 'previous' or 'tensor' instead, and read its released_norm "
            "after step(); or use gradient='stack'."
        )
