"""The one rule that lists the layers of a model."""

from typing import Any

from torch import nn


def layer_stack(model: Any) -> tuple[nn.Module, list[nn.Module]]:
    """The module that runs the layers of a model, and the layers in the order that they run.

    They are those of the only list that is as long as the configuration says, lists within lists
    left aside.

    Args:
        model: Of transformers, on any device. Not changed.

    Raises:
        ValueError: There is no such list, or more than one.
    """
    n_layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = {
        place: module
        for place, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    }
    outer = [place for place in lists if not any(place.startswith(f"{other}.") for other in lists)]
    if len(outer) != 1 or getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} has no stack of layers that can be told: its configuration "
            f"says {n_layers} layers, and lists of that length are: {', '.join(outer) or 'none'}. "
            "Side tuning needs a decoder, or an encoder with a head for classification."
        )
    return model.get_submodule(outer[0].rpartition(".")[0]), list(lists[outer[0]])
