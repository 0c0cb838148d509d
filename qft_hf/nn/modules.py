"""`QFTLinear` and `QFTEmbedding`: the plain modules with a quantized weight.

In a state dict a weight is its INT8 fields under names of their own (`weight_q`, `weight_scale`,
...), never `weight`: a program that does not know the format then misses a key, instead of taking
raw codes for weights.
"""

from typing import Any

from torch import Tensor, nn

from ..quant import QFTWeight
from .functional import embedding, linear

# Name in a state dict, by field of `QFTWeight`.
STATE_NAMES = {
    "codes": "weight_q",
    "scales": "weight_scale",
    "outlier_values": "weight_outlier_value",
    "outlier_columns": "weight_outlier_column",
}


def state_fields(weight: QFTWeight) -> dict[str, Tensor]:
    """The fields of a weight by their names in a state dict; without outliers there are two."""
    return {
        STATE_NAMES[name]: field.detach()
        for name, field in weight.fields().items()
        if field.numel() > 0
    }


class _QuantizedWeight(nn.Module):
    """Saves and loads `weight` as its INT8 fields."""

    weight: nn.Parameter

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
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
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        weight = self.weight
        if not isinstance(weight, QFTWeight):
            raise RuntimeError(
                f"{prefix}weight is not quantized yet, so no state can be loaded into it. Load the "
                "model with from_pretrained, or call quantize_model_ first."
            )
        names = {prefix + name: field for name, field in state_fields(weight).items()}
        others = {key: value for key, value in state_dict.items() if key not in names}
        super()._load_from_state_dict(
            others, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if prefix + "weight" in missing_keys:
            missing_keys.remove(prefix + "weight")  # stored as its fields
        for key, field in names.items():
            loaded = state_dict.get(key)
            if loaded is None:  # also when a sharded checkpoint has it in another file
                missing_keys.append(key)
            elif loaded.shape != field.shape or loaded.dtype != field.dtype:
                error_msgs.append(
                    f"{key} must be {field.dtype} of shape {tuple(field.shape)}, got "
                    f"{loaded.dtype} of shape {tuple(loaded.shape)}: the checkpoint was written for "
                    "another model or with another QFTConfig."
                )
            else:
                field.copy_(loaded)


class QFTLinear(_QuantizedWeight, nn.Linear):
    """`nn.Linear` whose weight is a `QFTWeight` `[out_features, in_features]`; the bias is float."""

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., in_features]` to `[..., out_features]`; see `functional.linear`."""
        return linear(x, self.weight, self.bias)


class QFTEmbedding(_QuantizedWeight, nn.Embedding):
    """`nn.Embedding` whose table is a `QFTWeight` `[num_embeddings, embedding_dim]`."""

    def forward(self, ids: Tensor) -> Tensor:
        """Integers of any shape to `[*ids.shape, embedding_dim]`; see `functional.embedding`."""
        return embedding(ids, self.weight, self.padding_idx)


QUANTIZED_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: QFTLinear,
    nn.Embedding: QFTEmbedding,
}
PLAIN_CLASSES = {quantized: plain for plain, quantized in QUANTIZED_CLASSES.items()}


def is_quantized_module(module: nn.Module) -> bool:
    """Whether `module` is a `QFTLinear` or `QFTEmbedding`."""
    return isinstance(module, _QuantizedWeight)
