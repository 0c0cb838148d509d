"""The rule by which the layers of a model are found."""

from typing import Any

from torch import nn


def layer_stack(model: Any) -> tuple[nn.Module, list[nn.Module]]:
    """Return the module that runs the layers of a model, and the layers in the order they run.

    They are in the only `nn.ModuleList` whose length is `num_hidden_layers`; lists inside another
    one of this length do not count, nor do those outside the text decoder, as in vision towers.

    Args:
        model: A transformers model on any device; not modified.

    Raises:
        ValueError: There is no such list, or more than one.
    """
    n_layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    inside = {id(module) for module in model.get_decoder().modules()}
    lists = {
        place: module
        for place, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers and id(module) in inside
    }
    outer = [place for place in lists if not any(place.startswith(f"{other}.") for other in lists)]
    if len(outer) != 1 or getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} has no unique stack of layers: its configuration says "
            f"{n_layers} layers, and lists of that length are: {', '.join(outer) or 'none'}. "
            "Side tuning needs a decoder, or an encoder with a head for classification."
        )
    return model.get_submodule(outer[0].rpartition(".")[0]), list(lists[outer[0]])
