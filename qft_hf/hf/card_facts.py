"""Facts about a trained model, for its card and for the summary of its run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import QuantizationSpec
from ..memory.ledger import elements
from ..version import __version__
from .compatibility import ours, quantization_config_of, unwrapped
from .remote_code import auto_class


@dataclass(frozen=True, slots=True)
class CardFacts:
    """The facts in a model card; it omits those that are None or empty."""

    name: str  # the model's repository on the Hub, or the name of its folder
    architecture: str  # class of the model
    parameters: tuple[int, int]  # number of all parameters, and of the trained ones
    auto_class: str | None = None  # loads a model with code of its own; None: `architecture` does
    base_model: str | None = None  # name on the Hub of what was tuned; None if it was a local one
    datasets: Sequence[str] = ()  # names on the Hub of the training data
    files: Sequence[str] = ()  # names of local files with training data
    # Names on the Hub of the evaluation data, none if any of it is local. None if it was held out
    # from the training data.
    evaluated: Sequence[str] | None = None
    optimizer: str | None = None  # the rule and how its state was stored; None without training
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)  # by name
    format: QuantizationSpec | None = None  # of the weights
    # Fields of a side network's `QSTConfig`, and `base`: how its frozen base is stored.
    side: Mapping[str, Any] | None = None
    state_bytes: Mapping[str, int] = field(default_factory=dict)  # of the training state, by kind
    history: Sequence[Mapping[str, Any]] = ()  # `log_history` of the Trainer
    counts: str | None = None  # amount of training data, in one line
    export_dtype: str | None = None  # of an ordinary checkpoint, in the subfolder of that name
    license: str | None = None  # identifier on the Hub
    language: Sequence[str] = ()  # language codes
    tags: Sequence[str] = ()  # other than those of this package
    versions: Mapping[str, str] = field(default_factory=dict)  # by package


def facts_of_trainer(trainer: Any, **known: Any) -> CardFacts:
    """Return the facts that a Trainer knows.

    Args:
        trainer: A `QFTTrainer`, trained or not.
        **known: Fields of `CardFacts` that the caller knows; they replace those of the Trainer.
    """
    ledger = trainer.ledger
    config: Any = getattr(trainer.model, "config", None)
    origin = getattr(config, "_name_or_path", "")
    facts: dict[str, Any] = {
        "name": trainer.args.hub_model_id or Path(str(trainer.args.output_dir)).resolve().name,
        "architecture": type(trainer.model).__name__,
        "auto_class": None if config is None else auto_class(vars(config)),
        "parameters": parameters_of(trainer.model),
        "base_model": origin if origin and not Path(origin).exists() else None,
        "optimizer": optimizer_of(trainer),
        "hyperparameters": hyperparameters_of(trainer),
        "format": quantization_config_of(trainer.model),
        "state_bytes": {row.state: row.bytes for row in ledger.rows} if ledger else {},
        "history": trainer.state.log_history,
        "versions": {"qft_hf": __version__},
    }
    return CardFacts(**{**facts, **known})


def parameters_of(model: Any) -> tuple[int, int]:
    """Return how many parameters a model has, and how many of them are trained."""
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return sum(map(elements, parameters)), sum(map(elements, trained))


def optimizer_of(trainer: Any) -> str | None:
    """Return the optimizer's description, or its class and package if it is not ours, or None."""
    optimizer: Any = unwrapped(trainer.optimizer)
    if optimizer is None:
        return None
    if (inner := ours(optimizer)) is not None:
        return inner.description
    package, name = type(optimizer).__module__.partition(".")[0], type(optimizer).__name__
    return f"PyTorch's {name}" if package == "torch" else f"{name} of {package}"


def hyperparameters_of(trainer: Any) -> dict[str, Any]:
    """Return what a run was trained with: the optimizer's own values, not the Trainer's fields."""
    args, optimizer = trainer.args, unwrapped(trainer.optimizer)
    values: dict[str, Any] = {
        "learning rate": args.learning_rate,
        "schedule": getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type),
        "warm-up steps": args.get_warmup_steps(trainer.state.max_steps),
    }
    if optimizer is not None:
        group = optimizer.param_groups[0]
        values |= {name: group[name] for name in ("betas", "eps") if name in group}
        decays = [group.get("weight_decay", 0.0) for group in optimizer.param_groups]
        values["weight decay"] = max(decays)
    if (inner := ours(optimizer)) is not None:
        values |= {"gradients": inner.gradient, "seed of rounding": group["seed"]}
    return values | {
        "largest gradient norm": args.max_grad_norm,
        "examples a step": trainer.get_total_train_batch_size(args),
        "micro-batches a step": args.gradient_accumulation_steps * args.world_size,
        "steps": trainer.state.global_step,
        "epochs": round(trainer.state.epoch or 0.0, 4),
        "activations": "bf16 autocast"
        if args.bf16
        else str(getattr(trainer.model, "dtype", "")).removeprefix("torch."),
        "seed": args.seed,
    }
