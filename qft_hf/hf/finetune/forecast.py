"""Predicts the memory workload, disk space and steps of a run, before any weight is loaded."""

from math import ceil
from typing import Any

import torch
from torch import nn

from ...memory.estimate import state_rows
from ...memory.processes import Rows
from ...memory.side import ADAMW_STATES
from ...nn import conversion_plan
from ...side import side_network_of, side_parameters
from ..compatibility import quantization_config_of
from ..optimizers import given_options, optimizer_arguments, optimizer_name, trial_optimizer
from .parsing import RunArguments
from .side_tuning import side_checkpoint


def workload_of(arguments: RunArguments) -> dict[str, Any]:
    """Return arguments of `recommend` and of the estimate of a run: not the mode and format."""
    training, method = arguments.training, arguments.method
    work: dict[str, Any] = {
        "batch_size": training.per_device_train_batch_size,
        "sequence_length": arguments.data.max_length,
    }
    if method.side is not None:
        checkpoint = side_checkpoint(arguments.model.model_name_or_path)
        side = method.side if checkpoint is None else checkpoint.config
        return work | {"side": side, "base": method.base}
    return work | {
        "optimizer": optimizer_name(training),
        "momentum_bits": given_options(training).get("momentum_bits"),
        "chunked_loss": training.chunked_loss,
    }


def disk_bytes(arguments: RunArguments, model: nn.Module, n_examples: int) -> int:
    """Return the most bytes that a run has on the disk at one time: checkpoints, model and export.

    Args:
        arguments: Arguments of the run.
        model: A float or INT8 model on any device, also meta. If it has a side network, only that
            is written, with two floats of optimizer state per parameter.
        n_examples: Examples in an epoch.
    """
    training, export = arguments.training, arguments.output.export_dtype
    if side_network_of(model) is not None:
        model_bytes = sum(parameter.nbytes for parameter in side_parameters(model).values())
        states_bytes = ADAMW_STATES * model_bytes
    else:
        spec = quantization_config_of(model) or training.quantization_config
        # Without buffers, which are small, and which most models do not save.
        rows = state_rows(
            conversion_plan(model, spec.modules_to_not_convert),
            Rows(1, spec),  # a checkpoint has the rows of all processes
            trial_optimizer(optimizer_name(training), **optimizer_arguments(training)),
        )
        sizes = {row.state: row.bytes for row in rows}
        del sizes["gradients"]  # never written
        states_bytes = sizes.pop("momentum")
        model_bytes = sum(sizes.values())
    checkpoint_bytes = model_bytes + (0 if training.save_only_model else states_bytes)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    export_bytes = n_parameters * getattr(torch, export).itemsize if export else 0
    return n_checkpoints(training, n_examples) * checkpoint_bytes + model_bytes + export_bytes


def n_steps(training: Any, n_examples: int) -> tuple[int, int]:
    """Return the optimizer steps of a run, and those of an epoch."""
    n_batches = ceil(n_examples / (training.train_batch_size * training.world_size))
    # The Trainer moves the `num_steps` that is set here to `gradient_accumulation_steps`.
    moved = training.accelerator_config.gradient_accumulation_kwargs or {}
    accumulated = training.gradient_accumulation_steps * moved.get("num_steps", 1)
    of_epoch = max(1, ceil(n_batches / accumulated))
    if training.max_steps > 0:
        return training.max_steps, of_epoch
    return ceil(training.num_train_epochs * of_epoch), of_epoch


def n_checkpoints(training: Any, n_examples: int) -> int:
    """Return the largest number of checkpoints that are on the disk at one time."""
    steps, of_epoch = n_steps(training, n_examples)
    strategy, every = training.save_strategy, training.save_steps
    if strategy == "best":  # any evaluation may be the best one so far
        strategy, every = training.eval_strategy, training.eval_steps
    match strategy:  # an enumeration whose members equal these strings
        case "no":
            return 0
        case "steps":
            saved = ceil(steps / (every if every >= 1 else ceil(every * steps)))
        case _:
            saved = ceil(steps / of_epoch)
    if training.save_total_limit is None:
        return saved
    # An old checkpoint is removed only when the new one is complete, and the best one stays.
    best = 1 if training.load_best_model_at_end else 0
    return int(min(saved, training.save_total_limit + 1 + best))
