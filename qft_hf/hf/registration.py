"""Makes the stock Trainer accept `TrainingArguments(optim="qft_lion")` and our other optimizers.

transformers keeps optimizer names in an enumeration and their factories in a table. Neither is
meant to be extended by other packages; both are extended here, at import.
"""

import logging
from typing import Any

from transformers import trainer, trainer_optimizer
from transformers.training_args import OptimizerNames

from ..optim import QFTOptimizer
from .callback import QFTCallback
from .compatibility import ours, quantization_config_of, trained_part
from .optimizers import (
    OPTIMIZERS,
    check_arguments,
    is_accumulating,
    optimizer_arguments,
    optimizer_name,
)
from .prepared_model import require_prepared

logger = logging.getLogger(__name__)


def restore_optimizer_name(value: str) -> OptimizerNames:
    """Return the member for a pickled name, which the import of this module has registered."""
    return OptimizerNames(value)


def register_optimizer() -> None:
    """Register the names of `OPTIMIZERS`, and the callback. Idempotent."""
    for name in OPTIMIZERS:
        if name not in OptimizerNames._value2member_map_:
            _register(name)
    callbacks: list[Any] = trainer.DEFAULT_CALLBACKS
    if QFTCallback not in callbacks:
        callbacks.append(QFTCallback)


def leaving_no_hook(train: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Detach the optimizer however training ends; callbacks are not called on an exception.

    A warning says if training ends in the middle of a step.
    """
    try:
        return train(self, *args, **kwargs)
    finally:
        if (optimizer := ours(self.optimizer)) is not None:
            optimizer.eval()
            if n := optimizer.flow.n_taken:
                logger.warning(
                    "Training has ended in the middle of a step that had taken the gradients of %d "
                    "parameters: the model is between two steps, and is evaluated and saved so. "
                    "Resume from a checkpoint, or call trainer.optimizer.zero_grad() to train on "
                    "from here",
                    n,
                )


def saving_after_the_step(
    save: Any, self: Any, args: Any, state: Any, control: Any, **kwargs: Any
) -> None:
    """Make the checkpoint that SIGTERM requests wait for the end of a step that has begun.

    transformers would also save between backward and update. The random numbers of the step are
    drawn by then, and released gradients have changed weights, but the step is not counted, so a
    run that resumes would repeat it.
    """
    if ours(kwargs.get("optimizer")) is None:
        save(self, args, state, control, **kwargs)


def _register(name: str) -> None:
    member: Any = str.__new__(OptimizerNames, name)
    member._value_ = name
    member._name_ = name.upper()
    # Enumeration members are pickled by class and value, and a new process that reads
    # training_args.bin would not know this value. A function of ours makes it import this package.
    member.__reduce_ex__ = lambda protocol: (restore_optimizer_name, (name,))
    OptimizerNames._member_names_.append(member._name_)
    OptimizerNames._member_map_[member._name_] = member
    OptimizerNames._value2member_map_[name] = member
    type.__setattr__(OptimizerNames, member._name_, member)
    trainer_optimizer._OPTIMIZER_HANDLERS[member] = _class_and_arguments


def _class_and_arguments(context: Any) -> tuple[type[QFTOptimizer], dict[str, Any]]:
    """Return the class and the arguments from which the Trainer makes one of our optimizers.

    Raises:
        TypeError: An option has a value of the wrong type.
        ValueError: An option is unknown or out of its range, or the model is not prepared for the
            arguments.
    """
    args, model = context.args, context.model
    check_arguments(args)  # again, since a hyperparameter search changes them
    arguments: dict[str, Any] = {"is_accumulating": is_accumulating}
    if model is not None:
        require_prepared(model, args)
        config = quantization_config_of(trained_part(model))
        if config is not None:
            arguments["seed"] = config.seed
    return OPTIMIZERS[optimizer_name(args)].optimizer_class, arguments | optimizer_arguments(args)
