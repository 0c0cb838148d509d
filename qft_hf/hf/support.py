"""What a run with `qft_lion` needs: supported arguments and a quantized model."""

import logging
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from ..quant import QFTWeight
from .config import QFTConfig
from .convert import quantize_model_

logger = logging.getLogger(__name__)

OPTIMIZER_NAME = "qft_lion"


def has_quantized_weights(model: nn.Module) -> bool:
    """Whether any parameter of `model` is a `QFTWeight`."""
    return any(isinstance(parameter, QFTWeight) for parameter in model.parameters())


def quantization_config_of(model: Any) -> QFTConfig | None:
    """The `QFTConfig` a model was quantized with, if it carries one."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return config if isinstance(config, QFTConfig) else None


def ensure_quantized(model: nn.Module, args: TrainingArguments) -> None:
    """Quantize a float model in place, with the format that `args` asks for, and log one line.

    Raises:
        ValueError: The model is INT8 already, and `args` asks for INT8 products that it has not.
    """
    if has_quantized_weights(model):
        current = quantization_config_of(model)
        if getattr(args, "matmul", None) == "int8" and current and current.matmul != "int8":
            raise ValueError(
                "matmul='int8' was asked for, and the model is INT8 already, with "
                f"matmul={current.matmul!r}. Load it with quantization_config=QFTConfig(matmul="
                "'int8'), which needs critical values in whole columns, or start from the float "
                "model."
            )
        return
    config = getattr(args, "quantization_config", None) or QFTConfig()
    quantize_model_(model, config)
    quantized = sum(p.numel() for p in model.parameters() if isinstance(p, QFTWeight))
    total = sum(p.numel() for p in model.parameters())
    # A warning, because it is the one line a user of the stock Trainer must see.
    logger.warning(
        "optim=%s: quantized the float %s to INT8 before training, %s of %s parameters",
        OPTIMIZER_NAME,
        type(model).__name__,
        f"{quantized:,}",
        f"{total:,}",
    )


def refuse_unsupported(args: TrainingArguments, model: nn.Module) -> None:
    """Raise for what cannot work with INT8 weights, before anything has happened.

    Raises:
        ValueError: An argument or the model is not supported; the text says what to do instead.
    """
    if args.fp16:
        raise ValueError(
            "fp16=True scales the loss and unscales float gradients, which INT8 gradients are not. "
            "Use bf16=True, which needs no scaling."
        )
    if args.deepspeed:
        raise ValueError(
            "DeepSpeed partitions float parameters and cannot hold INT8 weights. Remove deepspeed: "
            "the INT8 model needs a fifth of the memory of FP32 Adam on one device."
        )
    if args.fsdp:
        raise ValueError("FSDP is not supported with INT8 weights yet. Train on one process.")
    if args.world_size > 1:
        raise ValueError(
            f"{args.world_size} processes were started, and INT8 gradients are not yet summed "
            "across processes: replicas would drift apart. Start one process."
        )
    if getattr(args, "chunked_loss", False) and args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} needs all logits, which a "
            "chunked loss never has. Set label_smoothing_factor=0, or leave chunked_loss off."
        )
    if args.torch_compile:
        raise ValueError("torch_compile is not supported with INT8 weights yet. Leave it off.")
    parallelism = getattr(args, "parallelism_config", None)
    if (getattr(model, "_tp_size", None) or 1) > 1 or getattr(parallelism, "tp_enabled", False):
        raise ValueError(
            "Tensor parallelism splits float weights by columns and rows. Load the model without "
            "tp_plan; device_map places whole layers on several devices."
        )
    if isinstance(model, nn.DataParallel) or args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible and the Trainer would wrap the model in "
            "nn.DataParallel, which copies float weights. Set CUDA_VISIBLE_DEVICES to one GPU."
        )
    if hasattr(model, "peft_config"):
        raise ValueError(
            "The model has PEFT adapters; QFT trains every parameter itself. Pass the base model."
        )
    half = [name for name, p in model.named_parameters() if p.dtype == torch.float16]
    if half:
        raise ValueError(
            f"{half[0]} and {len(half) - 1} more parameters are float16, whose range is too narrow "
            "to train without loss scaling. Load the model with dtype=torch.bfloat16."
        )


def unwrapped(optimizer: Any) -> Any:
    """The optimizer inside Accelerate's wrapper, or itself."""
    return getattr(optimizer, "optimizer", optimizer)


def refuse_foreign_optimizer(model: nn.Module, optimizer: Any, optimizer_class: type) -> None:
    """Raise unless quantized weights and `QFTLion` go together.

    Raises:
        TypeError: QFT weights under another optimizer, or a float model under `QFTLion`.
    """
    inner = unwrapped(optimizer)
    ours = isinstance(inner, optimizer_class)
    if has_quantized_weights(model) and not ours:
        raise TypeError(
            f"The model has INT8 weights and the optimizer is {type(inner).__name__}, which cannot "
            f"update them. Set optim={OPTIMIZER_NAME!r} and pass no optimizer of your own."
        )
    if ours and not has_quantized_weights(model):
        raise TypeError(
            f"optim={OPTIMIZER_NAME!r} was asked for and no weight of {type(model).__name__} is "
            "quantized. Call qft_hf.quantize_model_(model, QFTConfig()) before training."
        )
