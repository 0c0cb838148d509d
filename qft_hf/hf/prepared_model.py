"""Prepares a model for a run: makes it INT8, with the loss that the arguments ask for.

`prepare_model_` is the one place that quantizes a model for training. Each Trainer calls it as soon
as it has a model. `QFTTrainer` calls it on the model that it is given and on those that
`model_init` makes, before it moves them, so float weights never reach the device. In the stock
Trainer, the callback calls it in `on_init_end`, the first event, after the model has been moved. A
model that `model_init` makes in `train()` is not visible there before the optimizer is created; by
then a checkpoint to resume from has been loaded into it, so a float model is refused.
"""

import copy
import logging

from torch import nn
from transformers import TrainingArguments

from ..nn import QFTLinear
from ..quant import QFTWeight
from .chunked_loss import chunk_loss_
from .compatibility import has_quantized_weights, quantization_config_of, trained_part
from .config import QFTConfig
from .convert import quantize_model_
from .coverage import added_modules
from .liger import WITHOUT_FUSED
from .optimizers import given_options, optimizer_name
from .unsupported import refuse_unsupported

logger = logging.getLogger(__name__)


def prepare_model_(model: nn.Module, args: TrainingArguments) -> None:
    """Make a model INT8 and give it the loss that `args` asks for. Idempotent.

    Raises:
        TypeError: An option has a value of the wrong type.
        ValueError: An argument or the model is not supported, or the model is INT8 in another
            format than `args` asks for.
    """
    refuse_unsupported(args, model)
    part = trained_part(model)
    if has_quantized_weights(part):
        refuse_other_format(part, args)
        _quantize_added_(part, args)
    else:
        _quantize_(part, args)
    _chunk_loss_(model, args)


def refuse_before_loading(model: nn.Module, args: TrainingArguments) -> None:
    """Raise what `prepare_model_` will raise, as far as a model without its weights shows it.

    Args:
        model: Model without storage, made from the configuration of a float or INT8 checkpoint; not
            modified.
        args: Arguments of a run with one of our optimizers.
    """
    refuse_unsupported(args, model)
    part = trained_part(model)
    own = quantization_config_of(part)
    if own is not None:
        refuse_other_format(part, args)
    converted = quantize_model_(copy.deepcopy(part), own or _format(args))
    _chunk_loss_(converted, args)


def _chunk_loss_(model: nn.Module, args: TrainingArguments) -> None:
    """Chunk the loss if `args` asks for it; an error says that Liger's kernels may have done so."""
    if not getattr(args, "chunked_loss", False):
        return
    try:
        chunk_loss_(model)
    except ValueError as error:
        if not args.use_liger_kernel:
            raise
        raise ValueError(f"{error} {WITHOUT_FUSED}") from error


def require_prepared(model: nn.Module, args: TrainingArguments) -> None:
    """Raise ValueError if a model that is about to be trained is not prepared."""
    advice = (
        "transformers.Trainer prepares the model that it is given, and not what model_init makes "
        "in train()"
    )
    part = trained_part(model)
    if not has_quantized_weights(part):
        name = "model" if part is model else "model.side_network"
        form = "args.quantization_config" if hasattr(args, "quantization_config") else "QFTConfig()"
        raise ValueError(
            f"No weight of {type(part).__name__} is INT8. {advice}: have model_init call "
            f"quantize_model_({name}, {form}), or use qft_hf.QFTTrainer."
        )
    refuse_other_format(part, args)
    heads = [m for m in model.modules() if isinstance(m, QFTLinear) and m.defers_logits]
    if getattr(args, "chunked_loss", False) and not heads:
        raise ValueError(
            f"chunked_loss=True was asked for, and {type(model).__name__} computes its loss as "
            f"usual. {advice}: have model_init also call chunk_loss_(model), or use "
            "qft_hf.QFTTrainer."
        )


def _quantize_(model: nn.Module, args: TrainingArguments) -> None:
    """Quantize a float model in place, in the format that `args` asks for, and log one line."""
    quantize_model_(model, _format(args))
    quantized = sum(p.numel() for p in model.parameters() if isinstance(p, QFTWeight))
    total = sum(p.numel() for p in model.parameters())
    # A warning, because it is the one line that a user of the stock Trainer must see.
    logger.warning(
        "optim=%s: quantized the float %s to INT8 before training, %s of %s parameters",
        optimizer_name(args),
        type(model).__name__,
        f"{quantized:,}",
        f"{total:,}",
    )


def _format(args: TrainingArguments) -> QFTConfig:
    """Return the format that a float model is quantized to."""
    config: QFTConfig | None = getattr(args, "quantization_config", None)
    return config or QFTConfig(seed=given_options(args).get("seed", 0))


def _quantize_added_(model: nn.Module, args: TrainingArguments) -> None:
    """Quantize float modules that were added to an INT8 model, such as a new head."""
    config = quantization_config_of(model)
    if config is not None and (added := added_modules(model, config)):
        quantize_model_(model, config)
        logger.warning(
            "optim=%s: quantized %s, which was float in the INT8 %s. To keep a module float, list "
            "it in modules_to_not_convert of the model's quantization_config",
            optimizer_name(args),
            ", ".join(added),
            type(model).__name__,
        )


def refuse_other_format(model: nn.Module, args: TrainingArguments) -> None:
    """Raise ValueError if `args` asks for another format than an INT8 model has: it is fixed."""
    wanted = dict(getattr(args, "format_fields", {}))
    current = quantization_config_of(model)
    if current is None:
        if wanted:
            raise ValueError(
                f"{', '.join(wanted)} was given, and {type(model).__name__} has INT8 weights of "
                "several formats. Leave that out to train the model as it is; otherwise start from "
                "the float model."
            )
        return
    found = {name: getattr(current, name) for name in wanted}
    seed = given_options(args).get("seed", current.seed)
    if current.matmul == "int8" and seed != current.seed:  # the seed also rounds gradients there
        wanted["seed"], found["seed"] = seed, current.seed
    for values in (wanted, found):
        if "modules_to_not_convert" in values:
            values["modules_to_not_convert"] = sorted(values["modules_to_not_convert"] or [])
    different = [name for name in wanted if wanted[name] != found[name]]
    if not different:
        return
    asked, has = (
        ", ".join(f"{name}={values[name]!r}" for name in different) for values in (wanted, found)
    )
    advice = "start from the float model"
    # INT8 products need outliers in whole columns, which other INT8 models seldom have.
    if set(different) <= {"matmul", "int8_products", "seed"} and wanted.get("matmul") != "int8":
        advice = (
            "load it in Python with a quantization_config=QFTConfig(...) that has this and the "
            "other fields of its own, or " + advice
        )
    raise ValueError(
        f"{asked} was asked for, and the model is INT8 already, with {has}. Leave that out to "
        f"train the model as it is; otherwise {advice}."
    )
