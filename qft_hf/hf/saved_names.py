"""Names of tensors in checkpoints, which transformers writes in the layout of the model's hub.

`from_pretrained` translates these names. The Trainer and Accelerate do not: they load a checkpoint
by the names that the model has, and ignore tensors with other names.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from .compatibility import has_quantized_weights


def names_by_saved_name(model: Any) -> dict[str, str]:
    """Return the names of a model's tensors by those in its checkpoints, where the two differ.

    Args:
        model: A module; one of transformers with INT8 weights has saved names of its own.
    """
    is_int8 = isinstance(model, PreTrainedModel) and has_quantized_weights(model)
    if not is_int8 or getattr(model, "_weight_conversions", None) == []:
        return {}
    # Names are translated with tensors, which stay the same objects.
    stand_ins = {name: torch.empty(0) for name in model.state_dict()}
    own_names = {id(stand_in): name for name, stand_in in stand_ins.items()}
    saved = revert_weight_conversion(model, stand_ins)
    found = {name: own_names[id(stand_in)] for name, stand_in in saved.items()}
    return {name: own for name, own in found.items() if name not in stand_ins}


def with_own_names(model: PreTrainedModel, saved: Iterable[str]) -> set[str]:
    """Return names of tensors in a checkpoint, and the names as which `from_pretrained` reads them.

    Args:
        model: The model that is loaded; its modules need not be quantized yet.
        saved: Names in the files.
    """
    renamings = [s for s in get_model_conversion_mapping(model) if isinstance(s, WeightRenaming)]
    names = set(saved)
    return names | {rename_source_key(name, renamings, [])[0] for name in names}


@contextmanager
def saved_names_accepted(model: Any) -> Iterator[None]:
    """Let `load_state_dict` find a model's tensors under their saved names, too, in this block."""
    names = names_by_saved_name(model)

    def translate(module: Any, state: dict[str, Any], *_: Any) -> None:
        for name in state.keys() & names.keys():
            state[names[name]] = state.pop(name)

    hook = model.register_load_state_dict_pre_hook(translate)
    try:
        yield
    finally:
        hook.remove()


def loading_checkpoint(load: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    """Make the Trainer find the tensors of a checkpoint that it resumes from, or of the best."""
    with saved_names_accepted(self.model):
        load(self, *args, **kwargs)
