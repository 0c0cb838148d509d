"""The callback that every Trainer gets; it acts only on `qft_lion` runs and INT8 weights."""

import logging
import math
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..optim import QFTLion
from ..optim.flow import ACCUMULATION_IS_FORBIDDEN
from .support import (
    OPTIMIZER_NAME,
    ensure_quantized,
    refuse_foreign_optimizer,
    refuse_unsupported,
    unwrapped,
)

logger = logging.getLogger(__name__)


class QFTCallback(TrainerCallback):
    """Converts a float model when the Trainer is built, and checks the optimizer when it trains.

    Converting this early means that a checkpoint to resume from finds INT8 weights to load into.
    """

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Quantize the model of a run with `optim="qft_lion"`, or raise if that cannot work."""
        if args.optim != OPTIMIZER_NAME or model is None:
            return
        refuse_unsupported(args, model)
        if optimizer is not None and not isinstance(optimizer, QFTLion):
            raise ValueError(
                f"optim={OPTIMIZER_NAME!r} and an optimizer of class {type(optimizer).__name__} "
                "were both given. Pass no optimizer, or a QFTLion on a quantized model."
            )
        ensure_quantized(model, args)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Refuse INT8 weights under another optimizer, and `QFTLion` without INT8 weights."""
        if model is not None:
            refuse_foreign_optimizer(model, optimizer, QFTLion)
        inner = unwrapped(optimizer)
        if (
            isinstance(inner, QFTLion)
            and inner.gradient == "release"
            and args.gradient_accumulation_steps > 1
        ):
            if inner.accumulation == "forbid":
                raise ValueError(ACCUMULATION_IS_FORBIDDEN)
            logger.warning(
                "gradient=release with %d micro-batches a step: their INT8 gradients are kept "
                "until the last one, about 1 byte for each parameter, as gradient=stack does",
                args.gradient_accumulation_steps,
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Log the true global norm: the Trainer's lacks the gradients that were released.

        Reporters come after this callback, and so do all that the Trainer was built with; a
        `Trainer.log` that reads the logs before it calls `super().log` comes before.
        """
        released = getattr(unwrapped(optimizer), "released_norm", None)
        if released is not None and logs is not None and "grad_norm" in logs:
            norm = math.hypot(logs["grad_norm"], released.item())
            logs["grad_norm"] = state.log_history[-1]["grad_norm"] = norm

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """From now on a backward pass of the user's own updates no weight."""
        inner = unwrapped(optimizer)
        if isinstance(inner, QFTLion):
            inner.eval()
