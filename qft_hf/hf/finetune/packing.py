"""Packs examples of all lengths into blocks of one length, where no example sees another.

A block has `position_ids` that restart at 0 with each example, and no attention mask: transformers
then builds a mask by which no token sees another example. Not every model family does this;
`refuse_leaky_packing` tests the model itself.
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ...nn.loss import IGNORED


def pack(examples: Dataset, block_tokens: int) -> Dataset:
    """Concatenate the examples in order and cut them into blocks; only the last one is shorter.

    An example that crosses the end of a block continues in the next one as if it began there. The
    first token of an example has no label, because no token of the example precedes it. All tokens
    are held in memory once, at 24 bytes per token.

    Args:
        examples: Columns `input_ids` and `labels`, lists of equal length in each row.
        block_tokens: Length of a block, at least 1.

    Returns:
        The same columns, and `position_ids`.
    """
    table = _table(examples)
    lengths = pc.list_value_length(table["input_ids"]).to_numpy()
    streams = {name: pc.list_flatten(table[name]).to_numpy() for name in ("input_ids", "labels")}
    index = np.arange(lengths.sum())
    example_starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    positions = index - np.maximum(example_starts, index - index % block_tokens)
    streams["labels"] = np.where(positions == 0, IGNORED, streams["labels"])
    offsets = pa.array([*index[::block_tokens], len(index)], type=pa.int32())
    return Dataset(
        pa.table(
            {
                name: pa.ListArray.from_arrays(offsets, pa.array(stream, type=pa.int64()))
                for name, stream in (streams | {"position_ids": positions}).items()
            }
        )
    )


def collate_blocks(blocks: Sequence[dict[str, Any]], *, pad_token_id: int) -> dict[str, Tensor]:
    """Batch blocks: int64, `[batch, longest]`. Padding forms its own example, without labels."""
    longest = max(len(block["input_ids"]) for block in blocks)
    paddings: dict[str, Sequence[int]] = {
        "input_ids": [pad_token_id] * longest,
        "labels": [IGNORED] * longest,
        "position_ids": range(longest),
    }
    return {
        name: torch.tensor([[*b[name], *padding[: longest - len(b[name])]] for b in blocks])
        for name, padding in paddings.items()
    }


def refuse_leaky_packing(model: PreTrainedModel) -> None:
    """Raise ValueError if a packed example sees the one before it.

    The outputs of an example must have zero derivatives by the embeddings of the one before: a
    masked attention weight is zero, and so is every product with it, in any dtype. Comparing output
    values would not work: an expert of a mixture multiplies the tokens of all examples that chose
    it in one product, whose size affects the last bits. The check is one pass of 16 tokens; the
    model is left as it was.
    """
    ids = torch.arange(16, device=model.device)[None] + 2
    positions = torch.arange(8, device=model.device).repeat(2)[None]
    embeddings: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        embeddings.append(output.detach().requires_grad_())
        return embeddings[-1]

    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    was_training = model.training
    hook = model.get_input_embeddings().register_forward_hook(keep)
    model.eval().requires_grad_(requires_grad=False)  # only embeddings need a derivative
    try:
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, 8:].float()
        # Weighted, because a norm before it may make the plain sum constant.
        seen = (logits * torch.linspace(-1, 1, logits.shape[-1], device=logits.device)).sum()
        (gradient,) = torch.autograd.grad(seen, embeddings[:1])
        crosses = bool(gradient[0, :8].any())
    except TypeError:  # the model takes no position_ids
        crosses = True
    finally:
        hook.remove()
        model.train(was_training)
        for parameter in learned:
            parameter.requires_grad_()
    if crosses:
        raise ValueError(
            f"packing would let examples see each other: {type(model).__name__} does not keep them "
            "apart by their positions. Set packing to false."
        )


def refuse_leaky_packing_family(
    model_class: Any, config: PreTrainedConfig, device: torch.device, **how: Any
) -> bool:
    """Run `refuse_leaky_packing` for an architecture, on a shortened model with random weights.

    Returns whether `model_class.from_config(..., **how)` can create that model on `device`: some
    architectures cannot be shortened, as their layers refer to others. Raises what
    `refuse_leaky_packing` raises.
    """
    try:
        with device:
            model = model_class.from_config(shortened(config), **how)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return False
    refuse_leaky_packing(model)
    return True


def shortened(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config of a model that is small enough to be created for this test alone.

    It has one layer of each type, or the first two layers, of full width but with a narrow MLP,
    which sees one token at a time. Its vocabulary is as large as the check needs.
    """
    short = copy.deepcopy(config)
    text: Any = short.get_text_config()
    types = getattr(text, "layer_types", None)
    n_layers = text.num_hidden_layers
    kept = sorted(map(types.index, set(types))) if types else list(range(min(2, n_layers)))
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == n_layers:  # an entry for each layer
            setattr(text, name, [value[layer] for layer in kept])
        elif isinstance(value, int) and name.endswith(("intermediate_size", "ffn_dim")):
            setattr(text, name, min(value, 64))
    text.num_hidden_layers = len(kept)
    if hasattr(text, "num_kv_shared_layers"):
        text.num_kv_shared_layers = 0  # it may be the number of layers that are left out
    text.vocab_size = 32
    text.pad_token_id = None  # it may be outside the vocabulary
    return short


def count_tokens(examples: Dataset) -> int:
    """Return the number of tokens in all examples."""
    return pc.sum(pc.list_value_length(_table(examples)["input_ids"])).as_py() or 0


def _table(examples: Dataset) -> pa.Table:
    """Return the rows with every filter and selection applied, unlike `examples.data`."""
    return examples.with_format("arrow")[:]
