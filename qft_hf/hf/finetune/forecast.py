"""What a run will take, before a weight is loaded."""

from typing import Any

from ..optimizers import given_options, optimizer_name
from .parsing import RunArguments


def workload_of(arguments: RunArguments) -> dict[str, Any]:
    """Return what `estimate_memory` and `recommend` take of a run, but for the mode."""
    training = arguments.training
    return {
        "batch_size": training.per_device_train_batch_size,
        "sequence_length": arguments.data.max_length,
        "config": training.quantization_config,
        "optimizer": optimizer_name(training),
        "momentum_bits": given_options(training).get("momentum_bits", 8),
        "chunked_loss": training.chunked_loss,
    }
