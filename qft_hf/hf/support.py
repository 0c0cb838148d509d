"""What a run that trains INT8 weights needs: supported arguments and a prepared model.

`prepare_model_` is the one place that quantizes a model for training. Each Trainer calls it as soon
as it has a model. `QFTTrainer`: on the model that it is given and on those that `model_init` makes,
before they are moved, so that float weights never reach the device. The stock Trainer: in
`on_init_end`, when it has moved the model, for it asks nobody earlier. A model that `model_init`
makes in `train()` it shows to nobody before the optimizer is made, when a checkpoint to resume from
has been loaded into it: one that is float there is refused.
"""

import logging
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from ..layout import outliers_per_row
from ..nn import QFTLinear
from ..optim.processes import SEVERAL_GPUS
from ..quant import QFTWeight
from ..side import SideNetwork, side_network_of
from .chunked_loss import chunk_loss_
from .config import QFTConfig
from .convert import quantize_model_
from .coverage import added_modules
from .graphed_step import refuse_uncapturable
from .liger import WITHOUT_FUSED, refuse_kernels
from .optimizers import (
    OPTIMIZERS,
    check_arguments,
    given_options,
    is_ours,
    names,
    optimizer_name,
)

logger = logging.getLogger(__name__)


def has_quantized_weights(model: nn.Module) -> bool:
    """Whether any parameter of `model` is a `QFTWeight`."""
    return any(isinstance(parameter, QFTWeight) for parameter in model.parameters())


def trained_part(model: nn.Module) -> nn.Module:
    """What one of our optimizers trains in INT8: the side network of a model, or all of it."""
    return side_network_of(model) or model


def quantization_config_of(model: Any) -> QFTConfig | None:
    """The `QFTConfig` a model or side network was quantized with, if it carries one."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if isinstance(model, SideNetwork):
        config = model.quantization
    return config if isinstance(config, QFTConfig) else None


def prepare_model_(model: nn.Module, args: TrainingArguments) -> None:
    """Make a model what a run trains: INT8, with the loss that `args` asks for. Idempotent.

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
    if getattr(args, "chunked_loss", False):
        try:
            chunk_loss_(model)
        except ValueError as error:
            if not args.use_liger_kernel:
                raise
            raise ValueError(f"{error} {WITHOUT_FUSED}") from error


def require_prepared(model: nn.Module, args: TrainingArguments) -> None:
    """Raise if `prepare_model_` has not seen a model that is to be trained.

    Raises:
        ValueError: The model is float, in another format, or has not the loss that was asked for.
    """
    advice = (
        "transformers.Trainer prepares the model that it is given, and not what model_init makes "
        "in train()"
    )
    part = trained_part(model)
    if not has_quantized_weights(part):
        raise ValueError(
            f"No weight of {type(part).__name__} is INT8. {advice}: have model_init return "
            "quantize_model_(model, QFTConfig()), or use qft_hf.QFTTrainer."
        )
    refuse_other_format(part, args)
    heads = [m for m in model.modules() if isinstance(m, QFTLinear) and m.defers_logits]
    if getattr(args, "chunked_loss", False) and not heads:
        raise ValueError(
            f"chunked_loss=True was asked for, and {type(model).__name__} computes its loss as "
            f"usual. {advice}: have model_init return chunk_loss_(model), or use "
            "qft_hf.QFTTrainer."
        )


def _quantize_(model: nn.Module, args: TrainingArguments) -> None:
    """Quantize a float model in place, with the format that `args` asks for, and log one line."""
    config = getattr(args, "quantization_config", None)
    quantize_model_(model, config or QFTConfig(seed=given_options(args).get("seed", 0)))
    quantized = sum(p.numel() for p in model.parameters() if isinstance(p, QFTWeight))
    total = sum(p.numel() for p in model.parameters())
    # A warning, because it is the one line a user of the stock Trainer must see.
    logger.warning(
        "optim=%s: quantized the float %s to INT8 before training, %s of %s parameters",
        optimizer_name(args),
        type(model).__name__,
        f"{quantized:,}",
        f"{total:,}",
    )


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
    """Raise if `args` sets another format than that of an INT8 model, which it cannot change.

    Raises:
        ValueError: Names what differs.
    """
    wanted = dict(getattr(args, "format_fields", {}))
    current = quantization_config_of(model)
    if current is not None:
        found = {name: getattr(current, name) for name in wanted}
        seed = given_options(args).get("seed", current.seed)
        if current.matmul == "int8" and seed != current.seed:  # it rounds gradients there too
            wanted["seed"], found["seed"] = seed, current.seed
    else:
        found = _visible_format(model, wanted)
        wanted = {name: wanted[name] for name in found}
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
    if not {"group_size", "outlier_fraction", "modules_to_not_convert"} & set(different):
        advice = (
            "load it with quantization_config=QFTConfig(...) that says so, where INT8 products "
            "need outliers in whole columns, or " + advice
        )
    raise ValueError(
        f"{asked} was asked for, and the model is INT8 already, with {has}. Leave that out to "
        f"train the model as it is; else {advice}."
    )


def _visible_format(model: nn.Module, wanted: dict[str, Any]) -> dict[str, Any]:
    """What of `wanted` shows on a model that carries no record of its format."""
    weights = [p for p in model.parameters() if isinstance(p, QFTWeight)]
    fraction = wanted.get("outlier_fraction")
    counts = {
        weight.outlier_values.shape[1] == outliers_per_row(weight.codes.shape[1], fraction or 0.0)
        for weight in weights
    }
    products = any(getattr(module, "products", None) for module in model.modules())
    visible = {
        "group_size": weights[0].group_size,
        "outlier_fraction": fraction if counts == {True} else "another share",
        "matmul": "int8" if products else "dequantize",
    }
    return {name: value for name, value in visible.items() if name in wanted}


def refuse_optimizer(optimizer: Any, args: TrainingArguments) -> None:
    """Raise if an optimizer that the user passes to a Trainer cannot be what the run needs.

    Raises:
        ValueError: It is of another library, or `args` sets options that it would not see.
    """
    if optimizer is None:
        return
    name = optimizer_name(args)
    if not is_ours(optimizer):
        classes = " or ".join(entry.optimizer_class.__name__ for entry in OPTIMIZERS.values())
        raise ValueError(
            f"optim={name!r} and an optimizer of class {type(optimizer).__name__} were both given. "
            f"Pass no optimizer, or a {classes} on a quantized model."
        )
    if options := given_options(args):
        raise ValueError(
            f"An optimizer was passed, and {', '.join(options)} were set for one that the Trainer "
            f"makes. Pass no optimizer, or give {type(optimizer).__name__} these options yourself."
        )


def refuse_unsupported(args: TrainingArguments, model: nn.Module) -> None:
    """Raise for what cannot work with INT8 weights, before anything has happened.

    Raises:
        TypeError: An option has a value of the wrong type.
        ValueError: An argument or the model is not supported; the text says what to do instead.
    """
    check_arguments(args)
    if side_network_of(model) is not None and given_options(args).get("gradient") == "release":
        raise ValueError(
            "gradient='release' is for training all parameters of a model, and only its side "
            "network is trained, whose gradients take a few MB. Leave gradient out."
        )
    # The launcher says it too, by an environment variable.
    if args.fp16 or args.mixed_precision == "fp16":
        raise ValueError(
            "fp16=True, or --mixed_precision fp16 of accelerate launch, scales the loss and "
            "unscales float gradients, which INT8 gradients are not. Use bf16=True, which needs no "
            "scaling."
        )
    if args.fp16_full_eval:
        raise ValueError(
            "fp16_full_eval=True leaves the model in float16 after evaluation, whose range is too "
            "narrow to train on from. Use bf16_full_eval=True, or leave it off."
        )
    if args.deepspeed:
        raise ValueError(
            "DeepSpeed partitions float parameters and cannot hold INT8 weights. Remove deepspeed: "
            "the INT8 model needs a fifth of the memory of FP32 Adam on one device. " + SEVERAL_GPUS
        )
    if args.fsdp:
        raise ValueError(
            "FSDP shards float parameters and gathers them layer by layer, and cannot hold INT8 "
            "weights. Remove fsdp. " + SEVERAL_GPUS
        )
    if args.world_size > 1:
        _refuse_of_several(args)
    if getattr(args, "chunked_loss", False) and args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} needs all logits, which a "
            "chunked loss never has. Set label_smoothing_factor=0, or leave chunked_loss off."
        )
    if getattr(args, "cuda_graph", False):
        refuse_uncapturable(args, model)
    if getattr(args, "sync_ref_model", False):  # of TRL
        raise ValueError(
            "sync_ref_model=True mixes the policy's values into those of the reference model, and "
            "INT8 weights cannot be mixed in place. Leave sync_ref_model off."
        )
    if args.torch_compile:
        raise ValueError(
            "torch_compile=True: PyTorch's compiler stops at every product with an INT8 weight, "
            "and would compile, and check at each step, the few operations between. Leave it off; "
            "on a GPU, cuda_graph=True of QFTTrainingArguments spares the host the whole pass."
        )
    if args.use_liger_kernel:
        refuse_kernels(args, model)
    parallelism = getattr(args, "parallelism_config", None)
    if (getattr(model, "_tp_size", None) or 1) > 1 or getattr(parallelism, "tp_enabled", False):
        raise ValueError(
            "Tensor parallelism splits float weights by columns and rows. Load the model without "
            "tp_plan; device_map places whole layers on several devices. " + SEVERAL_GPUS
        )
    if isinstance(model, nn.DataParallel) or args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible and the Trainer would wrap the model in "
            "nn.DataParallel, which copies float weights. Set CUDA_VISIBLE_DEVICES to one GPU. "
            + SEVERAL_GPUS
        )
    if hasattr(model, "peft_config"):
        raise ValueError(
            f"The model has PEFT adapters, and {optimizer_name(args)} trains every parameter. Set "
            "optim='adamw_torch' to train the adapters on frozen INT8 weights, or pass the base "
            "model to train it whole."
        )
    part = trained_part(model)
    half = [name for name, p in part.named_parameters() if p.dtype == torch.float16]
    if half:
        raise ValueError(
            f"{half[0]} and {len(half) - 1} more parameters are float16, whose range is too narrow "
            "to train without loss scaling. Load the model with dtype=torch.bfloat16."
        )


def _refuse_of_several(args: TrainingArguments) -> None:
    """Raise for what works on one process and not on several."""
    checkpointing: Any = args.gradient_checkpointing_kwargs or {}
    if args.gradient_checkpointing and checkpointing.get("use_reentrant"):
        raise ValueError(
            "Under use_reentrant=True backward passes lie inside of others, and several processes "
            "cannot see when a step's gradients are complete. Set "
            "gradient_checkpointing_kwargs={'use_reentrant': False}, which is the default."
        )
    if args.save_on_each_node:
        raise ValueError(
            "save_on_each_node=True writes a checkpoint on each machine, and the optimizer state "
            "of all rows is on the first one alone. Set save_on_each_node=False, and an output_dir "
            "that all machines see."
        )
    if args.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size=True tries a smaller batch where memory runs out, and other "
            "processes would not know. Set auto_find_batch_size=False and a "
            "per_device_train_batch_size that fits."
        )


def unwrapped(optimizer: Any) -> Any:
    """The optimizer inside Accelerate's wrapper, or itself."""
    return getattr(optimizer, "optimizer", optimizer)


def refuse_foreign_optimizer(model: nn.Module, optimizer: Any) -> None:
    """Raise unless INT8 weights that are trained and one of our optimizers go together.

    Frozen ones, such as those under adapters, may have any optimizer: it never sees them.

    Raises:
        TypeError: INT8 weights under another optimizer, or a float model under one of ours.
    """
    inner = unwrapped(optimizer)
    trained = [
        name
        for name, parameter in model.named_parameters()
        if isinstance(parameter, QFTWeight) and parameter.requires_grad
    ]
    if trained and not is_ours(inner):
        advice = (
            f"Set optim={names()} and pass no optimizer of your own; or freeze them, as adapters "
            "do: weight.requires_grad_(False)."
        )
        if hasattr(model, "peft_config"):
            advice = (
                "Beside adapters only float modules can be trained: list those of modules_to_save "
                "in modules_to_not_convert of the QFTConfig."
            )
        raise TypeError(
            f"{len(trained)} INT8 weights ({trained[0]}, ...) are to be trained, and the optimizer "
            f"is {type(inner).__name__}, which cannot update them. {advice}"
        )
    part = trained_part(model)
    if is_ours(inner) and not has_quantized_weights(part):
        raise TypeError(
            f"The optimizer is {type(inner).__name__}, and no weight of {type(part).__name__} is "
            "INT8. Call qft_hf.quantize_model_(model, QFTConfig()) before training."
        )
