"""Wraps methods of transformers and Accelerate that offer no other way to extend them.

Importing `qft_hf.hf` imports this module, which installs the wrappers.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import accelerate
import safetensors.torch
from accelerate import Accelerator, big_modeling
from accelerate.utils import modeling
from huggingface_hub import serialization
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, initialization, trainer
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.utils.import_utils import is_peft_available

from . import (
    clipping,
    config,
    guards,
    processes,
    reference_model,
    registration,
    resizing,
    saved_names,
    side_network,
    sizes,
    unsupported,
)

# The owner and name of a method, and its wrapper, which takes the method and then the arguments of
# a call. If a method has several wrappers, a later one contains the earlier ones.
WRAPPERS: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
    (PreTrainedConfig, "get_config_dict", config.passing_to_parts),
    (PreTrainedModel, "_load_pretrained_model", guards.refusing_int8),
    (initialization, "zeros_", guards.leaving_int8_rows),
    (PreTrainedModel, "save_pretrained", guards.writing_whole),
    (PreTrainedModel, "save_pretrained", side_network.saving_alone),
    (PreTrainedModel, "_get_resized_embeddings", resizing.resizing_int8),
    (PreTrainedModel, "_get_resized_lm_head", resizing.resizing_int8),
    (PreTrainedModel, "resize_token_embeddings", resizing.fitting_states),
    (Trainer, "create_accelerator_and_postprocess", reference_model.telling_the_trainer),
    (Trainer, "train", registration.leaving_no_hook),
    (Trainer, "train", processes.reporting_failures),
    (JITCheckpointCallback, "on_pre_optimizer_step", registration.saving_after_the_step),
    (Trainer, "_save_checkpoint", processes.consolidating_state),
    (Trainer, "evaluation_loop", processes.sharing_buffers),
    (Trainer, "_load_from_checkpoint", saved_names.loading_checkpoint),
    (Trainer, "_load_best_model", saved_names.loading_checkpoint),
    (Trainer, "_load_from_checkpoint", side_network.loading_alone),
    (Trainer, "_load_best_model", side_network.loading_best),
    (Trainer, "_issue_warnings_after_load", guards.warning_except_tied),
    (trainer, "validate_quantization_for_training", side_network.allowing_side_networks),
    (Accelerator, "prepare", processes.without_other_distribution),
    (Accelerator, "prepare_optimizer", unsupported.refusing_scaler),
    (Accelerator, "prepare_model", reference_model.quantizing_references),
    (Accelerator, "prepare_model", processes.leaving_unwrapped),
    (Accelerator, "save_state", processes.consolidating_states),
    (Accelerator, "clip_grad_norm_", clipping.clipping_together),
    (Accelerator, "clip_grad_value_", clipping.refusing_released),
    # A program that imported the function before this package has the original.
    (accelerate, "load_checkpoint_in_model", guards.check_accelerate_load),
    (accelerate.utils, "load_checkpoint_in_model", guards.check_accelerate_load),
    (big_modeling, "load_checkpoint_in_model", guards.check_accelerate_load),
    (safetensors.torch, "load_model", guards.check_safetensors_load),
    (serialization, "load_torch_model", guards.check_hub_load),
    (accelerate.utils, "compute_module_sizes", sizes.counting_fields),
    (modeling, "compute_module_sizes", sizes.counting_fields),
)


if is_peft_available():
    import peft

    WRAPPERS += (
        (peft, "set_peft_model_state_dict", guards.check_adapter_load),
        (peft.peft_model, "set_peft_model_state_dict", guards.check_adapter_load),
    )


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    given = vars(owner)[name]
    kind = type(given) if isinstance(given, staticmethod | classmethod) else None
    method = given if kind is None else given.__func__

    @wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(method, *args, **kwargs)

    setattr(owner, name, wrapped if kind is None else kind(wrapped))


for row in WRAPPERS:
    _wrap(*row)
