"""`chunk_loss_`: training of a causal language model that never holds all logits at once."""

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..nn import DeferredLogits, QFTLinear, linear_cross_entropy
from ..nn.loss import COMPUTES, IGNORED
from ..nn.products import output_head

Model = TypeVar("Model", bound=nn.Module)


def chunk_loss_(model: Model) -> Model:
    """Have `model(input_ids=..., labels=...)` compute its loss in chunks of the vocabulary.

    It saves the memory of the logits, `tokens * vocabulary * 10` bytes in bf16, and costs one more
    product with the head. In training, the output's `logits` cannot be used; evaluation and
    generation do not change.

    Args:
        model: A causal language model of transformers with an INT8 head; modified.

    Returns:
        `model`.

    Raises:
        ValueError: The model has no INT8 output head, a head with INT8 products or a forward of its
            own, or another loss than next-token cross-entropy, or it computes with its logits.
    """
    causal: Any = model
    head = output_head(model)
    if not isinstance(head, QFTLinear):
        has, advice = "none", "."
        if head is not None:
            has = f"a float {type(head).__name__}"
            advice = (
                ", or quantize the head, too: take it out of modules_to_not_convert, and call "
                "quantize_model_ before chunk_loss_."
            )
        raise ValueError(
            f"A chunked loss needs an INT8 output head, and {type(model).__name__} has {has}. "
            f"Leave chunked_loss off{advice}"
        )
    if type(head).forward is not QFTLinear.forward:
        raise ValueError(
            f"A chunked loss computes the logits itself, and {type(head).__name__}, the head of "
            f"{type(model).__name__}, does more than that. Leave chunked_loss off."
        )
    if head.products is not None:
        raise ValueError(
            f"A chunked loss multiplies with the dequantized head, and int8_products asks for its "
            f"{head.products} in INT8. Take the head out of int8_products, or leave chunked_loss "
            "off."
        )
    loss = causal.loss_function
    if loss not in (ForCausalLMLoss, _loss):
        raise ValueError(
            f"A chunked loss is the next-token cross-entropy, and {type(model).__name__} uses "
            f"{getattr(loss, '__name__', loss)}. Leave chunked_loss off."
        )
    refuse_logit_transforms(causal)
    head.defers_logits = True
    causal.loss_function = _loss
    return model


def refuse_logit_transforms(model: Any) -> None:
    """Raise ValueError if a model does more with its logits than pass them to its loss.

    The check is a forward pass in which stand-ins for decoder and head compute nothing: the decoder
    returns zeros for two tokens. If a model reads more from its decoder than the stand-in returns,
    only the first training step detects a computation with logits.

    Args:
        model: A causal language model, float or INT8, on any device; unchanged afterward.
    """
    base, head, loss = model.base_model, model.get_output_embeddings(), model.loss_function
    if base is model or head is None:
        return
    weight = head.weight
    hidden = torch.zeros(1, 2, weight.shape[1], dtype=weight.dtype, device=weight.device)
    ids = torch.zeros(1, 2, dtype=torch.int64, device=weight.device)
    stand_ins = {
        base: lambda *args, **kwargs: _OfDecoder(last_hidden_state=hidden),
        head: lambda x: DeferredLogits(x, weight, None),
    }
    before = {module: vars(module).get("forward") for module in stand_ins}
    try:
        for module, forward in stand_ins.items():
            module.forward = forward
        model.loss_function = lambda *args, **kwargs: hidden.sum()
        with torch.random.fork_rng():
            model(input_ids=ids, labels=ids, use_cache=False)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if COMPUTES in str(error):
            raise ValueError(
                f"A chunked loss computes no logits, and {type(model).__name__} scales or caps its "
                "own, or otherwise computes with them. Leave chunked_loss off."
            ) from error
    finally:
        model.loss_function = loss
        for module, forward in before.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward


class _OfDecoder(BaseModelOutputWithPast):
    """The output of a stand-in for a decoder; all other attributes are None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _loss(
    logits: Any,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Any = None,
    ignore_index: int = IGNORED,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Compute `ForCausalLMLoss` of transformers, also for deferred logits."""
    if not isinstance(logits, DeferredLogits):  # evaluation
        return ForCausalLMLoss(
            logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs
        )
    if kwargs.get("label_smoothing") or kwargs.get("weight") is not None:
        raise ValueError(f"A chunked loss supports no {sorted(kwargs)}. Leave chunked_loss off.")
    if shift_labels is None:  # each token but the last predicts the next one
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.reshape(-1).to(logits.hidden.device)
    targets = torch.where(targets == ignore_index, IGNORED, targets)
    losses = linear_cross_entropy(logits.hidden.flatten(0, -2), logits.weight, targets, logits.bias)
    count = num_items_in_batch if num_items_in_batch is not None else (targets != IGNORED).sum()
    return losses.sum() / (count.to(losses.device) if isinstance(count, Tensor) else count)
