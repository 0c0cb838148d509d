"""The callback that every Trainer gets; it acts only on `qft_lion` runs and INT8 weights."""

from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..optim import QFTLion
from .support import (
    OPTIMIZER_NAME,
    ensure_quantized,
    refuse_foreign_optimizer,
    refuse_unsupported,
)


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
