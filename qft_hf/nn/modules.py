"""`QFTLinear` and `QFTEmbedding`: the plain modules with a quantized weight, and those like them.

A class derived from `nn.Linear` or `nn.Embedding` keeps its own forward and the rest of what it
adds: `quantized_class` derives from it and from ours at once, so that its `super().forward(...)`
is ours, and where it reads `self.weight` it gets the quantized weight.

In a state dict a weight is its INT8 fields under names of their own (`weight_q`, `weight_scale`,
...), never `weight`: a program that does not know the format then misses a key, instead of taking
raw codes for weights.
"""

from collections.abc import Iterator
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import QuantizationSpec
from ..quant import QFTWeight
from .attachments import attach_, attachments, replace_
from .functional import embedding, linear
from .loss import DeferredLogits
from .products import Int8Products
from .state import check_shared_columns, check_values, state_fields, state_names


class QuantizedModule(nn.Module):
    """A module some of whose parameters are `QFTWeight`; saves and loads them as INT8 fields.

    Attributes:
        plain_class: The class of the same module with float weights.
        kind: The class of this package that it is one of.
        weight_names: Names of the parameters that are quantized, where a module has them.
        replaces_forward: Whether the forward of the kind takes the place of that of `plain_class`.
        products: Which products are INT8; None: none is.
        spec: What the model that the module was quantized with was to be.
    """

    plain_class: ClassVar[type[nn.Module]]
    kind: ClassVar[type["QuantizedModule"]]
    weight_names: ClassVar[tuple[str, ...]] = ("weight",)
    replaces_forward: ClassVar[bool] = False
    products: Int8Products | None = None
    spec: QuantizationSpec | None = None

    def __init_subclass__(cls) -> None:
        """A class that is written, and not made by `quantized_class`, is a kind."""
        super().__init_subclass__()
        cls.kind = cls.__dict__.get("kind", cls)
        # As `module.weight_q`: so torch.distributed finds what a state dict names.
        for weight in cls.weight_names:
            for field, name in state_names(weight).items():
                setattr(cls, name, property(attrgetter(f"{weight}.{field}"), _refuse_setting))

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether a plain module is of this kind."""
        return isinstance(module, cls.plain_class)

    @classmethod
    def holds_transposed(cls, module: Any) -> bool:
        """Whether the weights of a module of this kind are `[inputs, outputs]`."""
        return False

    def complete_weight(self, name: str = "weight") -> QFTWeight:
        """A weight, for computing with it.

        Raises:
            RuntimeError: It is not quantized yet, or no parameter any more, or only some of its
                fields were loaded.
        """
        weight = self._parameters.get(name)
        if weight is None:
            raise RuntimeError(
                f"The {name} of {type(self).__name__} is no parameter any more: values that are "
                "computed at each use have taken its place, as torch.nn.utils.parametrizations, "
                "pruning and target_parameters of PEFT have them, and these need a float weight. "
                "List the module in modules_to_not_convert of the QFTConfig."
            )
        if not isinstance(weight, QFTWeight):
            raise RuntimeError(
                f"The {name} of {self} is not quantized. Load the model with from_pretrained, or "
                "call quantize_model_. If something put it in the place of an INT8 weight, such as "
                "fully_shard or torch.func.grad, that takes float weights alone: leave it out, or "
                "call dequantize_model_ before."
            )
        if weight.pending:
            raise RuntimeError(
                f"A checkpoint was loaded without {sorted(weight.pending)}; the {name} is a "
                "mixture of two models. Load a complete checkpoint of this model and QFTConfig."
            )
        return weight

    def _weights(self) -> Iterator[tuple[str, Any]]:
        """The parameters that are to be quantized; plain ones while a skeleton waits for them."""
        for name in self.weight_names:
            if (weight := self._parameters.get(name)) is not None:
                yield name, weight

    def _apply(self, function: Any, recurse: bool = True) -> Any:  # noqa: FBT001, FBT002 torch's
        """Move or cast as any module does; hooks and attributes of the weights stay on them."""
        attached = {name: attachments(weight) for name, weight in self._weights()}
        super()._apply(function, recurse)
        for name, weight in self._weights():
            attach_(weight, attached[name])
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as any object; a class that `quantized_class` made is found by its plain one."""
        reduced: Any = super().__reduce_ex__(protocol)
        if type(self) is not quantized_class(self.plain_class, self.kind):  # a user's, of ours
            return reduced
        return _new, (self.plain_class, self.kind), *reduced[2:]

    def _save_to_state_dict(
        self,
        destination: dict[str, Any],
        prefix: str,
        keep_vars: bool,  # noqa: FBT001 torch calls it
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, weight in self._weights():
            if isinstance(weight, QFTWeight):  # not while the skeleton waits for its weights
                del destination[prefix + name]
                destination.update(state_fields(prefix + name, weight))

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
        weights = {prefix + name: weight for name, weight in self._weights()}
        for name, weight in weights.items():
            if not isinstance(weight, QFTWeight):
                raise RuntimeError(
                    f"{name} is not quantized, so no state can be loaded into it. Load the "
                    "model with from_pretrained, or call quantize_model_ first."
                )
        fields = {name: state_fields(name, weight) for name, weight in weights.items()}
        own = {key for of_weight in fields.values() for key in of_weight}
        others = {key: value for key, value in state_dict.items() if key not in own}
        super()._load_from_state_dict(
            others, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for name, weight in weights.items():
            if name in missing_keys:
                missing_keys.remove(name)  # stored as its fields
            if foreign := set(state_names(name).values()) & others.keys():
                error_msgs.append(
                    f"{sorted(foreign)} are in the checkpoint but not in this model, whose weight "
                    f"is {weight!r}: the checkpoint was written with another QFTConfig. Load the "
                    "model from that checkpoint with from_pretrained."
                )
            assign = local_metadata.get("assign_to_params_buffers", False)
            _load_(name, weight, fields[name], state_dict, missing_keys, error_msgs, assign=assign)
            found = fields[name].keys() & state_dict.keys()
            if found and not (weight.pending or weight.is_meta):
                try:
                    check_values(name, weight)
                    if self.products is not None:
                        check_shared_columns(name, weight)
                except ValueError as error:
                    error_msgs.append(str(error))


def _refuse_setting(module: nn.Module, value: Any) -> None:
    """The setter of a field: `torch.func.functional_call` of a state dict sets them.

    Raises:
        AttributeError: Always.
    """
    raise AttributeError(
        f"The fields of an INT8 weight of {type(module).__name__} cannot be set one by one. Call "
        "load_state_dict; in functional_call pass dict(model.named_parameters()), not a state dict."
    )


def _load_(
    name: str,
    weight: QFTWeight,
    fields: dict[str, Tensor],
    state_dict: dict[str, Any],
    missing_keys: list[str],
    error_msgs: list[str],
    *,
    assign: bool,
) -> None:
    """Put what a state dict has of the weight `name` into its `fields`, or in their place.

    With `assign` the weight, which stays the same object, is made of the tensors of the state dict.
    """
    if found := fields.keys() & state_dict.keys():
        # A shard may hold some fields of a weight and the next shard the others. Until the
        # last one has come the weight is a mixture, and the module refuses to compute.
        weight.pending = (weight.pending or frozenset(fields)) - found
    taken: dict[str, Tensor] = {}
    for key, field in fields.items():
        loaded = state_dict.get(key)
        if loaded is None:
            missing_keys.append(key)
        elif loaded.shape != field.shape or loaded.dtype != field.dtype:
            error_msgs.append(
                f"{key} must be {field.dtype} of shape {tuple(field.shape)}, got "
                f"{loaded.dtype} of shape {tuple(loaded.shape)}: the checkpoint was written "
                "for another model or with another QFTConfig."
            )
        elif field.is_meta and not (assign or loaded.is_meta):
            error_msgs.append(
                f"{key} has no memory to be copied to: the model is on the meta device. Call "
                "load_state_dict(..., assign=True), or model.to_empty(device=...) before."
            )
        else:
            taken[key] = loaded
    if not assign:
        for key, loaded in taken.items():
            fields[key].copy_(loaded)
        weight.fields_changed()
    elif taken:
        names = state_names(name)
        device = next(iter(taken.values())).device
        made = {
            # An empty one, of a format without outliers, is in no state dict.
            own: taken.get(
                names[own], field if field.numel() else torch.empty_like(field, device=device)
            )
            for own, field in weight.fields().items()
        }
        replace_(weight, weight.with_fields(made))


class QFTLinear(QuantizedModule, nn.Linear):
    """`nn.Linear` with a `QFTWeight` `[out_features, in_features]`; the bias is float.

    Attributes:
        defers_logits: Whether this is the head of a model with a chunked loss: in training it
            returns `DeferredLogits`.
    """

    plain_class = nn.Linear
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


class QFTEmbedding(QuantizedModule, nn.Embedding):
    """`nn.Embedding` whose table is a `QFTWeight` `[num_embeddings, embedding_dim]`."""

    plain_class = nn.Embedding

    def forward(self, ids: Tensor) -> Tensor:
        """Integers of any shape to `[*ids.shape, embedding_dim]`; see `functional.embedding`."""
        return embedding(ids, self.complete_weight(), self.padding_idx)


# Classes that write out what nn.Linear computes. Ours does it without a float copy of the weight.
SAME_FORWARD = ("FalconLinear",)
# nn.MultiheadAttention reads the weight of this one, and does not call it.
NEVER_CALLED = ("NonDynamicallyQuantizableLinear",)

_MADE: dict[type[nn.Module], type[QuantizedModule]] = {}


def quantized_class(plain: type[nn.Module], kind: type[QuantizedModule]) -> type[QuantizedModule]:
    """The class of modules of class `plain` once their weights are quantized.

    For a class that is not itself the plain one of its kind it is made here, once. The class itself
    comes first in its method resolution order, and its kind before their base; but a kind that
    computes otherwise comes first.
    """
    if plain is kind.__dict__.get("plain_class"):
        return kind
    if plain not in _MADE:
        kind_first = kind.replaces_forward or plain.__name__ in SAME_FORWARD
        bases: Any = (kind, plain) if kind_first else (plain, kind)
        doc = f"`{plain.__name__}` with quantized weights; all else is the class's own."
        attributes = {"plain_class": plain, "kind": kind, "__doc__": doc}
        _MADE[plain] = type(f"QFT{plain.__name__}", bases, attributes)
    return _MADE[plain]


def multiplies_by_ours(module: nn.Module) -> bool:
    """Whether a linear module's products are those of `QFTLinear`, as far as its code shows.

    A forward that has `super` in it is taken to call ours; another one reads the weight itself.
    """
    cls: Any = type(module)
    if not issubclass(cls, nn.Linear) or cls.__name__.removeprefix("QFT") in NEVER_CALLED:
        return False
    if cls.forward in (nn.Linear.forward, QFTLinear.forward) or cls.__name__ in SAME_FORWARD:
        return True
    return "super" in cls.forward.__code__.co_names


def _new(plain: type[nn.Module], kind: type[QuantizedModule]) -> Any:
    """An empty module of the quantized class of `plain`; for unpickling."""
    made: Any = quantized_class(plain, kind)
    return made.__new__(made)
