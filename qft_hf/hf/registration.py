"""Makes `TrainingArguments(optim="qft_lion")` and its like known to the stock Trainer.

transformers keeps optimizer names in an enumeration and their factories in a table, neither meant
to be extended from outside; both are extended here, at import.
"""

from typing import Any

from transformers import trainer, trainer_optimizer
from transformers.training_args import OptimizerNames

from ..optim import QFTOptimizer
from .callback import QFTCallback
from .optimizers import (
    OPTIMIZERS,
    check_arguments,
    is_accumulating,
    is_ours,
    optimizer_arguments,
    optimizer_name,
)
from .ours import quantization_config_of, unwrapped
from .prepared_model import require_prepared
from .wrapping import wrap_


def restore_optimizer_name(value: str) -> OptimizerNames:
    """Unpickle the name: importing this module has registered it."""
    return OptimizerNames(value)


def register_optimizer() -> None:
    """Add each name of `OPTIMIZERS` with its handler, the callback, and the end. Idempotent."""
    for name in OPTIMIZERS:
        if name not in OptimizerNames._value2member_map_:
            _register(name)
    callbacks: list[Any] = trainer.DEFAULT_CALLBACKS
    if QFTCallback not in callbacks:
        callbacks.append(QFTCallback)
    wrap_(trainer.Trainer, "train", _leaving_no_hook)


def _leaving_no_hook(train: Any) -> Any:
    """However training ends: no callback is told of an exception."""

    def training(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return train(self, *args, **kwargs)
        finally:
            optimizer = unwrapped(self.optimizer)
            if is_ours(optimizer):
                optimizer.eval()

    return training


def _register(name: str) -> None:
    member: Any = str.__new__(OptimizerNames, name)
    member._value_ = name
    member._name_ = name.upper()
    # Enumeration members pickle by class and value, and a fresh process that reads
    # training_args.bin would not know this value: pickled by a function of ours, it imports us.
    member.__reduce_ex__ = lambda protocol: (restore_optimizer_name, (name,))
    OptimizerNames._member_names_.append(member._name_)
    OptimizerNames._member_map_[member._name_] = member
    OptimizerNames._value2member_map_[name] = member
    type.__setattr__(OptimizerNames, member._name_, member)
    trainer_optimizer._OPTIMIZER_HANDLERS[member] = _class_and_arguments


def _class_and_arguments(context: Any) -> tuple[type[QFTOptimizer], dict[str, Any]]:
    """What the Trainer makes an optimizer of ours by, for its arguments and model; changes nothing.

    Raises:
        TypeError: An option has a value of the wrong type.
        ValueError: An option is unknown or out of its range, or the model is not prepared for the
            arguments.
    """
    args, model = context.args, context.model
    check_arguments(args)  # again: a search for hyperparameters changes them
    arguments: dict[str, Any] = {"is_accumulating": is_accumulating}
    if model is not None:
        require_prepared(model, args)
        config = quantization_config_of(model)
        if config is not None:
            arguments["seed"] = config.seed
    return OPTIMIZERS[optimizer_name(args)].optimizer_class, arguments | optimizer_arguments(args)
