"""Room for the side network's keys and values in the cache of the base.

A transformers cache holds a list of layers, and each attention module writes to the one with its
number. The side network's layers are numbered after the base's, so code that reorders, repeats,
selects or crops a cache does so for both.
"""

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn


def shift_layer_numbers_(layer: nn.Module, by: int) -> None:
    """Make the attention of a side layer write to cache layers after those of the base."""
    for module in layer.modules():
        if isinstance(number := vars(module).get("layer_idx"), int):
            vars(module)["layer_idx"] = number + by


def is_cache(argument: Any) -> bool:
    """Return whether an argument is a transformers cache."""
    return hasattr(argument, "layers") and hasattr(argument, "get_seq_length")


def make_room_(arguments: Iterable[Any], n_layers: int) -> None:
    """Append layers for the side network to a cache that was created for the base alone.

    Args:
        arguments: Arguments of a layer of the base; a cache among them is modified.
        n_layers: Number of layers of the base.

    Raises:
        ValueError: The base has written to the cache without the side network, or the cache is that
            of continuous batching.
    """
    for cache in arguments:
        if hasattr(cache, "free_blocks"):  # PagedAttentionCache of transformers
            raise ValueError(
                "Continuous batching has a cache for the layers of the base alone, and none for "
                "those of a side network. Call generate on a padded batch instead of "
                "generate_batch."
            )
        if not is_cache(cache):
            continue
        if len(cache.layers) >= 2 * n_layers or getattr(cache, "layer_class_to_replicate", None):
            continue  # it has these layers, or creates them when needed
        if cache.get_seq_length():
            raise ValueError(
                f"The cache holds {cache.get_seq_length()} tokens of the base and none of the side "
                "network: it was filled before the side network was attached. Start with a new one."
            )
        cache.layers.extend(copy.deepcopy(layer) for layer in cache.layers[:n_layers])
