"""Makes `TrainingArguments(optim="qft_lion")` known to the stock Trainer.

transformers keeps optimizer names in an enumeration and their factories in a table, neither meant
to be extended from outside; both are extended here, at import.
"""

from typing import Any

from accelerate.state import GradientState
from transformers import trainer, trainer_optimizer
from transformers.training_args import OptimizerNames, TrainingArguments

from ..optim import QFTLion
from .callback import QFTCallback
from .support import OPTIMIZER_NAME, ensure_quantized, quantization_config_of

# What `optim_args="name=value,..."` may set, and how its text is read.
OPTIM_ARGS = {
    "accumulation": str,
    "beta1": float,
    "beta2": float,
    "clipping": str,
    "gradient": str,
    "momentum_bits": int,
    "nonfinite": str,
    "seed": int,
}


def restore_optimizer_name(value: str) -> OptimizerNames:
    """Unpickle the name: importing this module has registered it."""
    return OptimizerNames(value)


def register_optimizer() -> None:
    """Add the name, its handler and the callback that converts float models. Idempotent."""
    if OPTIMIZER_NAME in OptimizerNames._value2member_map_:
        return
    member: Any = str.__new__(OptimizerNames, OPTIMIZER_NAME)
    member._value_ = OPTIMIZER_NAME
    member._name_ = OPTIMIZER_NAME.upper()
    # Enumeration members pickle by class and value, and a fresh process that reads
    # training_args.bin would not know this value: pickled by a function of ours, it imports us.
    member.__reduce_ex__ = lambda protocol: (restore_optimizer_name, (OPTIMIZER_NAME,))
    OptimizerNames._member_names_.append(member._name_)
    OptimizerNames._member_map_[member._name_] = member
    OptimizerNames._value2member_map_[OPTIMIZER_NAME] = member
    type.__setattr__(OptimizerNames, member._name_, member)
    trainer_optimizer._OPTIMIZER_HANDLERS[member] = _handle
    callbacks: list[Any] = trainer.DEFAULT_CALLBACKS
    callbacks.append(QFTCallback)


def is_accumulating() -> bool:
    """Whether the Trainer, or a loop with Accelerate, has more micro-batches for this step."""
    return not GradientState().sync_gradients


def _handle(context: Any) -> tuple[type[QFTLion], dict[str, Any]]:
    """The Trainer's way of asking for an optimizer: class and keyword arguments."""
    return optimizer_class_and_arguments(context.args, context.model)


def optimizer_class_and_arguments(
    args: TrainingArguments, model: Any
) -> tuple[type[QFTLion], dict[str, Any]]:
    """`QFTLion` and its arguments for a run; a float `model` is quantized in place first.

    Raises:
        ValueError: `optim_args` has an unknown name or a value that cannot be read.
    """
    arguments: dict[str, Any] = {"lr": args.learning_rate, "is_accumulating": is_accumulating}
    nonfinite = getattr(args, "nonfinite", None)  # a field of QFTTrainingArguments
    if nonfinite is not None:
        arguments["nonfinite"] = nonfinite
    if model is not None:
        ensure_quantized(model, args)
        config = quantization_config_of(model)
        if config is not None:
            arguments["seed"] = config.seed
    chosen = _parse_optim_args(args.optim_args)
    if chosen.get("gradient") == "release" and args.max_grad_norm:
        arguments["max_grad_norm"] = args.max_grad_norm
    beta1, beta2 = _betas(args)
    arguments["betas"] = (chosen.pop("beta1", beta1), chosen.pop("beta2", beta2))
    return QFTLion, arguments | chosen


def _betas(args: TrainingArguments) -> tuple[float, float]:
    """Lion's betas; `adam_beta1` and `adam_beta2` count only where they differ from Adam's."""
    fields = TrainingArguments.__dataclass_fields__
    own = {"adam_beta1": 0.9, "adam_beta2": 0.99}
    values = [
        getattr(args, name) if getattr(args, name) != fields[name].default else lion
        for name, lion in own.items()
    ]
    return values[0], values[1]


def _parse_optim_args(text: str | None) -> dict[str, Any]:
    chosen = {}
    for entry in filter(None, (text or "").replace(" ", "").split(",")):
        name, _, value = entry.partition("=")
        if name not in OPTIM_ARGS:
            raise ValueError(
                f"optim_args has {entry!r}; qft_lion takes {', '.join(sorted(OPTIM_ARGS))}, as in "
                "optim_args='beta2=0.98,nonfinite=skip'."
            )
        try:
            chosen[name] = OPTIM_ARGS[name](value)
        except ValueError as error:
            raise ValueError(
                f"optim_args has {entry!r}; {name} must be a {OPTIM_ARGS[name].__name__}."
            ) from error
    return chosen
