"""The optimizers that the Trainer knows by name, and the options of each.

An optimizer is a line of `OPTIMIZERS`. An option is a line of `OPTIONS` and a field of
`QFTTrainingArguments`; its default and its range are read from the optimizer's constructor, so no
number is repeated here.
"""

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.state import GradientState
from torch import nn
from transformers import TrainingArguments

from ..config import check_type
from ..optim import QFTSGD, QFTAdamW, QFTLion, QFTOptimizer
from ..optim.release import ACCUMULATION_IS_FORBIDDEN
from ..optim.settings import LARGEST, check_settings


@dataclass(frozen=True, slots=True)
class Option:
    """One option of an optimizer."""

    type: type  # of its values: str, int, float or bool
    help: str  # its effect, for `--help` and the documentation


OPTIONS = {
    "gradient": Option(
        str,
        "When a gradient is used. stack: INT8 gradients wait for the step, about 1 byte per "
        "parameter, and are clipped exactly at no cost. release: each weight is updated during "
        "backward and its gradient freed; results are the same bits, and max_grad_norm needs a "
        "choice of clipping.",
    ),
    "accumulation": Option(
        str,
        "With gradient release: keep the INT8 gradients of micro-batches until the last one, or "
        "forbid more than one.",
    ),
    "clipping": Option(
        str,
        "With gradient release, how max_grad_norm is honored. exact: a second forward and "
        "backward pass finds the norm first (QFTTrainer). previous: by the norm of the step "
        "before. tensor: each gradient by its own norm. Unset: max_grad_norm must be 0.",
    ),
    "nonfinite": Option(
        str,
        "On a NaN or infinite gradient: raise, or skip the step and count it, which is not "
        "possible with release.",
    ),
    "stochastic_rounding": Option(
        bool,
        "Whether updates are rounded stochastically; rounding to nearest is for ablations and does "
        "not train.",
    ),
    "seed": Option(
        int,
        "Key of the random numbers that round updates and gradients. Unset: the seed of the model, "
        "or 0 for a float model.",
    ),
    "beta1": Option(
        float,
        "Weight of the momentum in the update. adam_beta1, adam_beta2 and adam_epsilon are not "
        "read.",
    ),
    "beta2": Option(float, "Decay of qft_lion's momentum, or of qft_adamw's second moment."),
    "eps": Option(float, "Term added to the root of the second moment, if there is one."),
    "momentum_bits": Option(
        int,
        "Bits of one momentum value: 8, or 4, which is experimental and costs quality.",
    ),
}
# Names of the options as fields of `QFTTrainingArguments`.
FIELDS = {name: name for name in OPTIONS} | {"seed": "quantization_seed"}

_EVERY = ("gradient", "accumulation", "clipping", "nonfinite", "stochastic_rounding", "seed")


@dataclass(frozen=True, slots=True)
class NamedOptimizer:
    """An optimizer that `TrainingArguments(optim=...)` knows.

    Attributes:
        optimizer_class: Its class, which accepts the options by name and `betas` as a pair.
        options: Names in `OPTIONS`.
        learning_rate: Default learning rate; None if the user has to set one. Lion moves every
            weight by the learning rate at each step, 3 to 10 times as far as AdamW at the same rate
            (Chen et al. 2023, section 5).
    """

    optimizer_class: type[QFTOptimizer]
    options: tuple[str, ...]
    learning_rate: float | None


OPTIMIZERS = {
    "qft_lion": NamedOptimizer(QFTLion, (*_EVERY, "beta1", "beta2", "momentum_bits"), 1e-5),
    "qft_adamw": NamedOptimizer(QFTAdamW, (*_EVERY, "beta1", "beta2", "eps"), 5e-5),
    "qft_sgd": NamedOptimizer(QFTSGD, _EVERY, None),
}
DEFAULT_OPTIMIZER = "qft_lion"

# Fields of TrainingArguments that none of our optimizers reads, and the equivalent option.
_UNREAD = {
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "adam_epsilon": "eps",
    "optim_target_modules": None,
}
_KINDS = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}
_TRUTH = {"true": True, "false": False}


def optimizer_name(args: TrainingArguments) -> str:
    """Return the name in `args.optim`, which is a string or a member of an enumeration."""
    return str(getattr(args.optim, "value", args.optim))


def named_optimizer(args: TrainingArguments) -> NamedOptimizer | None:
    """Return the entry of `OPTIMIZERS` for `args.optim`; None for another library's optimizer."""
    return OPTIMIZERS.get(optimizer_name(args))


def names() -> str:
    """Return all names, joined by "or", for an error."""
    return " or ".join(map(repr, OPTIMIZERS))


def is_accumulating() -> bool:
    """Return whether more micro-batches of this step follow, in the Trainer or with Accelerate."""
    return not GradientState().sync_gradients


def connect_to_trainer_(optimizer: QFTOptimizer, args: TrainingArguments) -> None:
    """Make an optimizer with released gradients, which the user has made, work in a Trainer.

    Args:
        optimizer: Modified: `is_accumulating` tells it about further micro-batches, unless it has
            such a function already.
        args: Arguments of the run.

    Raises:
        ValueError: `max_grad_norm` is set, but the optimizer does not clip.
    """
    if optimizer.is_accumulating is None:
        optimizer.is_accumulating = is_accumulating
    if optimizer.clipping is None:
        check_settings(
            optimizer.gradient, optimizer.nonfinite, optimizer.accumulation,
            None, norm_limit(args),
        )  # fmt: skip


def describe(option: str) -> str:
    """Return the help of an option, with its default for each optimizer that has it."""
    defaults: dict[str, list[str]] = {}
    for name, entry in OPTIMIZERS.items():
        # The help texts of these two name their defaults.
        if option in entry.options and option not in ("clipping", "seed"):
            defaults.setdefault(str(_default(entry, option)), []).append(name)
    shown = ", ".join(f"{value} ({', '.join(of)})" for value, of in defaults.items())
    return OPTIONS[option].help + (f" Default: {shown}." if shown else "")


def given_options(args: TrainingArguments) -> dict[str, Any]:
    """Return the options that are set by fields of `QFTTrainingArguments` or by `optim_args`.

    Raises:
        TypeError: A field has a value of the wrong type.
        ValueError: The optimizer is not ours; or an option is unknown, belongs to another
            optimizer, has two different values, cannot be parsed, or is NaN or infinite.
    """
    name, entry = optimizer_name(args), named_optimizer(args)
    if entry is None:
        raise ValueError(
            f"INT8 weights are trained by {names()}, got optim={name!r}. Set one of these; a side "
            "network beside a frozen model may have any optimizer."
        )
    taken = entry.options
    options: dict[str, Any] = {}
    for option, value in getattr(args, "optimizer_fields", {}).items():
        if option not in taken:
            raise ValueError(
                f"{name} has no {FIELDS[option]}, got {value!r}. Leave it out; {name} takes "
                f"{', '.join(sorted(FIELDS[one] for one in taken))}."
            )
        options[option] = _checked(FIELDS[option], value, OPTIONS[option].type)
    for option, value in _read(args.optim_args, name, taken).items():
        if options.setdefault(option, value) != value:
            raise ValueError(
                f"optim_args has {option}={value}, and {FIELDS[option]}={options[option]} was "
                "given too. Give one of them."
            )
    return options


def check_arguments(args: TrainingArguments) -> None:
    """Raise TypeError or ValueError for values and combinations that our optimizers cannot honor.

    The optimizer's constructor checks the ranges.
    """
    for name in ("learning_rate", "weight_decay"):
        value = _checked(name, getattr(args, name), float)
        if not 0 <= value <= LARGEST:
            raise ValueError(
                f"{name} must be in [0, {LARGEST:.2g}], the range of FP32, got {value}."
            )
    norm = args.max_grad_norm
    if norm != math.inf and _checked("max_grad_norm", norm, float) < 0:
        raise ValueError(f"max_grad_norm must not be negative, got {norm}. 0 turns it off.")
    _refuse_unread(args)
    options = given_options(args)
    forbids = options.get("accumulation") == "forbid"
    if forbids and not _releases(args, options):
        raise ValueError(
            "accumulation='forbid' is for gradient='release'; gradients on the stack wait for the "
            "step in any case. Set gradient='release', or leave accumulation out."
        )
    if forbids and args.gradient_accumulation_steps > 1:
        raise ValueError(ACCUMULATION_IS_FORBIDDEN)
    if _releases(args, options):
        refuse_retries(args)
    trial_optimizer(optimizer_name(args), **optimizer_arguments(args))


def trial_optimizer(name: str, **arguments: Any) -> QFTOptimizer:
    """Return an optimizer of one parameter of one element, for use before there is a model."""
    trial = nn.Parameter(torch.zeros(1, dtype=torch.float32))
    return OPTIMIZERS[name].optimizer_class([trial], **arguments)


def optimizer_arguments(args: TrainingArguments) -> dict[str, Any]:
    """Return the arguments of the constructor; options that are not set keep its defaults."""
    options = given_options(args)
    arguments: dict[str, Any] = {"lr": args.learning_rate}
    if _releases(args, options):
        arguments["max_grad_norm"] = norm_limit(args)
    if "beta1" in options or "beta2" in options:
        entry = OPTIMIZERS[optimizer_name(args)]
        arguments["betas"] = tuple(
            options.pop(beta, _default(entry, beta)) for beta in ("beta1", "beta2")
        )
    return arguments | options


def norm_limit(args: TrainingArguments) -> float | None:
    """Return the norm to which gradients are clipped, None if 0 or infinity turns that off."""
    return args.max_grad_norm if 0 < args.max_grad_norm < math.inf else None


def refuse_retries(args: TrainingArguments) -> None:
    """Raise ValueError if the Trainer would retry a batch after gradients were released."""
    if args.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size=True tries a smaller batch when memory runs out, and "
            "gradient='release' has updated some weights by then. Set auto_find_batch_size=False "
            "and a per_device_train_batch_size that fits, or gradient='stack'."
        )


def refuse_conflicting_options(
    args: TrainingArguments, optimizer: Any, *, resumed_from: dict[str, Any] | None
) -> None:
    """Raise ValueError if the optimizer uses another value than the one that `args` sets.

    Loading a checkpoint's optimizer state replaces the values of `args`, as in torch's optimizers.

    Args:
        args: Arguments of the run.
        optimizer: One of ours, without Accelerate's wrapper.
        resumed_from: Arguments with which the resumed run began, as far as they are known; None if
            no run is resumed. On resuming, learning rate and weight decay are compared too, if
            `args` does not have its default, all groups have the same value, and that value was
            the one in the resumed run's arguments: any other was set by the user's own code.
    """
    used: list[tuple[str, Any, list[Any]]] = []
    if named_optimizer(args) is not None:
        for option, value in given_options(args).items():
            used.append((FIELDS[option], value, _in_use(optimizer, option)))
    if resumed_from is not None:
        rates = {group.get("initial_lr", args.learning_rate) for group in optimizer.param_groups}
        decays = {group["weight_decay"] for group in optimizer.param_groups} - {0.0} or {0.0}
        for name, found in (("learning_rate", rates), ("weight_decay", decays)):
            is_given = getattr(args, name) != _own_default(args, name)
            if is_given and len(found) == 1 and resumed_from.get(name, *found) in found:
                used.append((name, getattr(args, name), list(found)))
    for name, value, values in used:
        if value not in values:
            raise ValueError(
                f"{name}={value} was given, and the optimizer uses {values[0]}, which comes from "
                "the checkpoint that training resumes from or from the code that made the "
                f"optimizer. Give {name}={values[0]} or leave it out; to continue with another "
                "value, start a new run from the weights of the checkpoint."
            )


def _in_use(optimizer: Any, option: str) -> list[Any]:
    """Return the values of an option that an optimizer uses, one for each group."""
    if option in ("beta1", "beta2"):
        return [group["betas"][option == "beta2"] for group in optimizer.param_groups]
    if option in optimizer.param_groups[0]:
        return [group[option] for group in optimizer.param_groups]
    return [getattr(optimizer, option)]


def _refuse_unread(args: TrainingArguments) -> None:
    """Raise for fields that are set and that only other libraries' optimizers read.

    A value that equals the default is accepted, and ignored: it may not have been set by the user,
    since other libraries copy all arguments from one class to another.
    """
    name = optimizer_name(args)
    for field, option in _UNREAD.items():
        value = getattr(args, field)
        if value == _stock_default(field):
            continue
        advice = "Leave it out."
        if option in OPTIMIZERS[name].options:
            advice = (
                f"Set {option}={value} in QFTTrainingArguments, or optim_args='{option}={value}'."
            )
        raise ValueError(f"{name} does not read {field}, got {value!r}. {advice}")


def _releases(args: TrainingArguments, options: dict[str, Any]) -> bool:
    default = _default(OPTIMIZERS[optimizer_name(args)], "gradient")
    return bool(options.get("gradient", default) == "release")


def _default(entry: NamedOptimizer, option: str) -> Any:
    """Return the default of an option in the optimizer's constructor."""
    parameters: dict[str, Any] = {}
    for base in reversed(entry.optimizer_class.__mro__):  # each class names its own options only
        if issubclass(base, QFTOptimizer):
            parameters.update(inspect.signature(base).parameters)
    if option in ("beta1", "beta2"):
        return parameters["betas"].default[option == "beta2"]
    return parameters[option].default


def note_on_default_rate(args: TrainingArguments) -> str | None:
    """Return a warning if the rate is the default of `args`, and too high for the optimizer."""
    optimizer = named_optimizer(args)
    default = type(args).__dataclass_fields__["learning_rate"].default
    if optimizer is None or optimizer.learning_rate is None or default != args.learning_rate:
        return None
    if default <= optimizer.learning_rate:
        return None
    return (
        f"learning_rate is {default:g}, the default of {type(args).__name__}, which is meant for "
        f"AdamW; for {optimizer_name(args)} begin with {optimizer.learning_rate:g}, the default of "
        "QFTTrainingArguments"
    )


def _stock_default(field: str) -> Any:
    return TrainingArguments.__dataclass_fields__[field].default


def _own_default(args: TrainingArguments, field: str) -> Any:
    """Return the value that a field has if it is left out: other libraries change defaults."""
    default = type(args).__dataclass_fields__[field].default
    # That of `QFTTrainingArguments` depends on the optimizer.
    return getattr(args, "default_rate", default) if field == "learning_rate" else default


def _read(text: str | None, name: str, taken: tuple[str, ...]) -> dict[str, Any]:
    """Return the options in `optim_args`, a text such as `"beta2=0.98,nonfinite=skip"`."""
    options: dict[str, Any] = {}
    for entry in text.replace(" ", "").split(",") if text else ():
        option, _, value = entry.partition("=")
        if option not in taken:
            raise ValueError(
                f"optim_args has {entry!r}; {name} takes {', '.join(sorted(taken))}, as in "
                "optim_args='beta2=0.98,nonfinite=skip'."
            )
        if option in options:
            raise ValueError(f"optim_args has {option} twice. Give it once.")
        kind = OPTIONS[option].type
        try:
            read = _TRUTH[value.lower()] if kind is bool else kind(value)
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"optim_args has {entry!r}; {option} must be {_KINDS[kind]}."
            ) from error
        options[option] = _checked(option, read, kind)
    return options


def _checked(name: str, value: Any, kind: type) -> Any:
    """Return `value` if it is of the right type and, for a float, finite; raise otherwise."""
    check_type(name, value, (int, float) if kind is float else (kind,), _KINDS[kind])
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value}.")
    return value
