"""Refuses arguments and models that cannot work with trained INT8 weights, before a run begins."""

from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn
from transformers import TrainingArguments

from ..optim.processes import SEVERAL_GPUS
from ..side import side_network_of
from .compatibility import ours, trained_part
from .compiled_layers import refuse_uncompilable
from .liger import refuse_kernels
from .optimizers import check_arguments, given_options, optimizer_name
from .processes import refuse_distribution
from .uncapturable import refuse_uncapturable
from .wording import and_more


def refuse_unsupported(args: TrainingArguments, model: nn.Module) -> None:
    """Raise TypeError or ValueError for what does not work with our optimizers."""
    refuse_arguments(args)
    _refuse_distribution(args, model)
    _refuse_features(args, model)
    _refuse_model(args, model)


def refuse_deepspeed(args: TrainingArguments) -> None:
    """Raise ValueError for DeepSpeed; `TrainingArguments` itself asks for its installation."""
    if args.deepspeed:
        advice = "the INT8 model needs a fifth of the memory of FP32 Adam on one device."
        refuse_distribution(DistributedType.DEEPSPEED, advice=f"Remove deepspeed: {advice}")


def refuse_arguments(args: TrainingArguments) -> None:
    """Raise TypeError or ValueError for arguments with which our optimizers train no model."""
    check_arguments(args)
    _refuse_fp16(args)
    refuse_deepspeed(args)
    if args.fsdp:
        refuse_distribution(DistributedType.FSDP, advice="Remove fsdp.")
    parallelism = args.parallelism_config
    if any(getattr(parallelism, f"{kind}_enabled", False) for kind in ("dp_shard", "cp", "sp")):
        raise ValueError(
            "parallelism_config has a dp_shard_size, cp_size or sp_size above 1, for FSDP or "
            "DeepSpeed, which cannot hold INT8 weights. Leave them out. " + SEVERAL_GPUS
        )
    if getattr(args, "chunked_loss", False) and args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} needs all logits, which a "
            "chunked loss never has. Set label_smoothing_factor=0, or leave chunked_loss off."
        )


def refusing_scaler(prepare: Any, self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
    """Make an Accelerator that scales losses refuse our optimizers."""
    if self.scaler is not None and ours(optimizer) is not None:
        raise ValueError(
            f"An Accelerator with mixed_precision={self.mixed_precision!r} scales the loss and "
            "then unscales float gradients, and gradients here are INT8. Use "
            "mixed_precision='bf16', which needs no scaling."
        )
    return prepare(self, optimizer, *args, **kwargs)


def _refuse_fp16(args: TrainingArguments) -> None:
    # The launcher can set it too, by an environment variable.
    if args.fp16 or args.mixed_precision == "fp16":
        raise ValueError(
            "fp16=True, or --mixed_precision fp16 of accelerate launch, scales the loss and then "
            "unscales float gradients, and gradients here are INT8. Use bf16=True, which needs no "
            "scaling."
        )
    if args.fp16_full_eval:
        raise ValueError(
            "fp16_full_eval=True leaves the model in float16 after evaluation, whose range is too "
            "narrow to continue training. Use bf16_full_eval=True, or leave it off."
        )


def _refuse_distribution(args: TrainingArguments, model: nn.Module) -> None:
    """Raise for ways to use several devices other than one process for each."""
    asked_for = getattr(args.parallelism_config, "tp_enabled", False)
    if asked_for or (getattr(model, "_tp_size", None) or 1) > 1:
        raise ValueError(
            "Tensor parallelism splits float weights by columns and rows. Load the model without "
            "tp_plan; device_map places whole layers on several devices. " + SEVERAL_GPUS
        )
    if isinstance(model, nn.DataParallel) or args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible and the Trainer would wrap the model in "
            "nn.DataParallel, which copies float weights. Set CUDA_VISIBLE_DEVICES to one GPU "
            "before Python starts. " + SEVERAL_GPUS
        )
    if args.world_size > 1:
        _refuse_of_several(args)


def _refuse_of_several(args: TrainingArguments) -> None:
    """Raise for options that work with one process and not with several."""
    checkpointing: Any = args.gradient_checkpointing_kwargs or {}
    # PyTorch's default is True; transformers sets False if it has no arguments to pass to PyTorch.
    passed = checkpointing.keys() - {"every_n_layers", "offload"}
    if args.gradient_checkpointing and checkpointing.get("use_reentrant", bool(passed)):
        raise ValueError(
            "With use_reentrant=True, the default next to other gradient_checkpointing_kwargs or "
            "activation_checkpointing_kwargs, backward passes are nested, and several processes "
            "cannot determine when a step's gradients are complete. Add 'use_reentrant': False to "
            "them."
        )
    if args.save_on_each_node:
        raise ValueError(
            "save_on_each_node=True writes a checkpoint on each machine, and the optimizer state "
            "of all rows is on the first one alone. Set save_on_each_node=False, and an output_dir "
            "that all machines see."
        )
    if args.enable_jit_checkpoint:
        raise ValueError(
            "enable_jit_checkpoint=True saves when SIGTERM arrives, which the processes may see at "
            "different steps, and a checkpoint needs the optimizer state of all of them. Set "
            "enable_jit_checkpoint=False, and save_steps for the progress that you can lose."
        )
    if args.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size=True tries a smaller batch on the process whose memory runs out, "
            "and the other processes would not follow. Set auto_find_batch_size=False and a "
            "per_device_train_batch_size that fits."
        )


def _refuse_features(args: TrainingArguments, model: nn.Module) -> None:
    """Raise for other options that do not work with INT8 weights or with each other."""
    if side_network_of(model) is not None and given_options(args).get("gradient") == "release":
        raise ValueError(
            "gradient='release' is for training all parameters of a model, and only its side "
            "network is trained, whose gradients are small. Leave gradient out."
        )
    if getattr(args, "cuda_graph", False):
        refuse_uncapturable(args, model)
    if getattr(args, "sync_ref_model", False):  # of TRL
        raise ValueError(
            "sync_ref_model=True mixes the policy's values into those of the reference model, and "
            "INT8 weights cannot be mixed in place. Leave sync_ref_model off."
        )
    refuse_uncompilable(args, model)
    if args.use_liger_kernel:
        refuse_kernels(args, model)


def _refuse_model(args: TrainingArguments, model: nn.Module) -> None:
    """Raise for a model with parameters that cannot be trained."""
    if hasattr(model, "peft_config"):
        raise ValueError(
            f"The model has PEFT adapters, and {optimizer_name(args)} trains every parameter. To "
            "train the adapters on frozen INT8 weights, use transformers.Trainer with "
            "optim='adamw_torch'; to train every parameter, load the model without adapters."
        )
    part = trained_part(model)
    half = [name for name, p in part.named_parameters() if p.dtype == torch.float16]
    if half:
        raise ValueError(
            f"{and_more(half)}: float16, whose range is too narrow "
            "to train without loss scaling. Load the model with dtype=torch.bfloat16."
        )
