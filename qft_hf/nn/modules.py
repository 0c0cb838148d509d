"""`QFTLinear` and `QFTEmbedding`: the plain modules with a quantized weight.

In a state dict a weight is its INT8 fields under names of their own (`weight_q`, `weight_scale`,
...), never `weight`: a program that does not know the format then misses a key, instead of taking
raw codes for weights.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..quant import QFTWeight
from .attachments import attach_, attachments
from .functional import embedding, linear
from .loss import DeferredLogits
from .products import Int8Products
from .state import STATE_NAMES, check_shared_columns, check_values, state_fields


class _QuantizedWeight(nn.Module):
    """Saves and loads `weight` as its INT8 fields."""

    weight: Any  # the plain modules declare a Tensor, and it is a QFTWeight
    products: Int8Products | None = None  # which are INT8; None: none is

    def complete_weight(self) -> QFTWeight:
        """The weight, for computing with it.

        Raises:
            RuntimeError: It is not quantized yet, or only some of its fields were loaded.
        """
        weight = self.weight
        if not isinstance(weight, QFTWeight):
            raise RuntimeError(
                f"The weight of {self} is not quantized. Load the model with from_pretrained, or "
                "call quantize_model_."
            )
        if weight.pending:
            raise RuntimeError(
                f"A checkpoint was loaded without {sorted(weight.pending)}; the weight is a "
                "mixture of two models. Load a complete checkpoint of this model and QFTConfig."
            )
        return weight

    def _apply(self, function: Any, recurse: bool = True) -> Any:  # noqa: FBT001, FBT002 torch's
        """Move or cast as any module does; hooks and attributes of the weight stay on it."""
        attached = attachments(self.weight)
        super()._apply(function, recurse)
        attach_(self.weight, attached)
        return self

    def _save_to_state_dict(
        self,
        destination: dict[str, Any],
        prefix: str,
        keep_vars: bool,  # noqa: FBT001 torch calls it
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = self.weight
        if isinstance(weight, QFTWeight):  # not while the skeleton waits for its weights
            del destination[prefix + "weight"]
            for name, field in state_fields(weight).items():
                destination[prefix + name] = field

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,  # noqa: FBT001 torch calls it so
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        weight = self.weight
        if not isinstance(weight, QFTWeight):
            raise RuntimeError(
                f"{prefix}weight is not quantized, so no state can be loaded into it. Load the "
                "model with from_pretrained, or call quantize_model_ first."
            )
        names = {prefix + name: field for name, field in state_fields(weight).items()}
        others = {key: value for key, value in state_dict.items() if key not in names}
        super()._load_from_state_dict(
            others, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if prefix + "weight" in missing_keys:
            missing_keys.remove(prefix + "weight")  # stored as its fields
        foreign = {prefix + name for name in STATE_NAMES.values()} & others.keys()
        if foreign:
            error_msgs.append(
                f"{sorted(foreign)} are in the checkpoint but not in this model, whose weight is "
                f"{weight!r}: the checkpoint was written with another QFTConfig. Load the model "
                "from that checkpoint with from_pretrained."
            )
        found = names.keys() & state_dict.keys()
        if found:
            # A shard may hold some fields of a weight and the next shard the others. Until the
            # last one has come the weight is a mixture, and the module refuses to compute.
            weight.pending = (weight.pending or frozenset(names)) - found
        for key, field in names.items():
            loaded = state_dict.get(key)
            if loaded is None:
                missing_keys.append(key)
            elif loaded.shape != field.shape or loaded.dtype != field.dtype:
                error_msgs.append(
                    f"{key} must be {field.dtype} of shape {tuple(field.shape)}, got "
                    f"{loaded.dtype} of shape {tuple(loaded.shape)}: the checkpoint was written "
                    "for another model or with another QFTConfig."
                )
            else:
                field.copy_(loaded)
        weight.fields_changed()
        if found and not weight.pending:
            try:
                check_values(prefix + "weight", weight)
                if self.products is not None:
                    check_shared_columns(prefix + "weight", weight)
            except ValueError as error:
                error_msgs.append(str(error))


class QFTLinear(_QuantizedWeight, nn.Linear):
    """`nn.Linear` with a `QFTWeight` `[out_features, in_features]`; the bias is float.

    Attributes:
        defers_logits: Whether this is the head of a model with a chunked loss: in training it
            returns `DeferredLogits`.
    """

    defers_logits = False

    def forward(self, x: Tensor) -> Any:
        """`x [..., in_features]` to `[..., out_features]`; see `functional.linear`."""
        weight = self.complete_weight()
        if self.defers_logits and self.training and torch.is_grad_enabled():
            return DeferredLogits(x, weight, self.bias)
        return linear(x, weight, self.bias, products=self.products, training=self.training)

    def extra_repr(self) -> str:
        """What `nn.Linear` shows, and the INT8 products."""
        shown = super().extra_repr()
        return shown if self.products is None else f"{shown}, int8=({self.products})"


class QFTEmbedding(_QuantizedWeight, nn.Embedding):
    """`nn.Embedding` whose table is a `QFTWeight` `[num_embeddings, embedding_dim]`."""

    def forward(self, ids: Tensor) -> Tensor:
        """Integers of any shape to `[*ids.shape, embedding_dim]`; see `functional.embedding`."""
        return embedding(ids, self.complete_weight(), self.padding_idx)


QUANTIZED_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: QFTLinear,
    nn.Embedding: QFTEmbedding,
}
PLAIN_CLASSES = {quantized: plain for plain, quantized in QUANTIZED_CLASSES.items()}


def is_quantized_module(module: nn.Module) -> bool:
    """Whether `module` is a `QFTLinear` or `QFTEmbedding`."""
    return isinstance(module, _QuantizedWeight)
