"""`QFTLinear`, `QFTEmbedding` and quantized classes of modules derived from the plain ones.

A class derived from `nn.Linear` or `nn.Embedding` keeps its own forward and everything else that it
adds: `quantized_class` creates a subclass of it and of the class here, so that its
`super().forward(...)` calls the forward here, and `self.weight` is the quantized weight.

In a state dict a weight is stored as its INT8 fields under their own names (`weight_q`,
`weight_scale`, ...), never as `weight`: a program that does not know the format then reports a
missing key, instead of using raw codes as weights.
"""

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
from .state import (
    check_shared_columns,
    check_values,
    state_fields,
    state_names,
    with_state_fields,
)


class QuantizedModule(nn.Module):
    """A module some of whose parameters are `QFTWeight`; saves and loads them as INT8 fields.

    Attributes:
        plain_class: The class of the same module with float weights.
        kind: The class of this package that implements it.
        weight_names: Names of the parameters that are quantized, if a module has them.
        replaces_forward: Whether the forward of the kind replaces that of `plain_class`.
        products: Which products are INT8; None: none.
        spec: The specification that the model of this module was quantized with.
    """

    plain_class: ClassVar[type[nn.Module]]
    kind: ClassVar[type["QuantizedModule"]]
    weight_names: ClassVar[tuple[str, ...]] = ("weight",)
    replaces_forward: ClassVar[bool] = False
    products: Int8Products | None = None
    spec: QuantizationSpec | None = None

    def __init_subclass__(cls) -> None:
        """Make each class a kind, except those that `quantized_class` creates."""
        super().__init_subclass__()
        cls.kind = cls.__dict__.get("kind", cls)
        # `module.weight_q` exists because torch.distributed looks up the names of a state dict.
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

    @classmethod
    def weights_in(cls, module: nn.Module) -> dict[str, Any]:
        """Return the parameters of a module of this kind that are or will be `QFTWeight`."""
        own = module._parameters
        return {name: weight for name in cls.weight_names if (weight := own.get(name)) is not None}

    def complete_weight(self, name: str = "weight") -> QFTWeight:
        """Return a weight that is ready for computation.

        Raises:
            RuntimeError: It is not quantized, is no longer a parameter, or only some of its fields
                were loaded; or `torch.jit.trace` runs.
        """
        weight = self._parameters.get(name)
        if weight is None:
            raise RuntimeError(
                f"The {name} of {type(self).__name__} is no longer a parameter: "
                "torch.nn.utils.parametrizations, pruning or target_parameters of PEFT have "
                "replaced it by values that are computed at each use, which needs a float weight. "
                "List the module in modules_to_not_convert of the QFTConfig."
            )
        if not isinstance(weight, QFTWeight):
            raise RuntimeError(
                f"The {name} of {self} is not quantized. Load the model with from_pretrained, or "
                "call quantize_model_. If something replaced an INT8 weight by it, such as "
                "fully_shard or torch.func.grad, that supports float weights only: do not use it, "
                "or call dequantize_model_ before. If a module that shares the weight was "
                "dequantized, call dequantize_model_ on this one too."
            )
        if torch.jit.is_tracing():  # type: ignore[attr-defined]
            raise RuntimeError(
                "torch.jit.trace records operators of PyTorch, and INT8 weights are multiplied by "
                "kernels that it does not see. Use torch.export, or trace a float model: "
                "dequantize_model_(copy.deepcopy(model))."
            )
        weight.check_complete(name)
        return weight

    def _apply(self, function: Any, recurse: bool = True) -> Any:  # noqa: FBT001, FBT002 torch's
        """Move or cast like any module; hooks and attributes of the weights are kept."""
        attached = {name: attachments(weight) for name, weight in self.weights_in(self).items()}
        super()._apply(lambda tensor: _applied(function, tensor), recurse)
        for name, weight in self.weights_in(self).items():
            attach_(weight, attached[name])
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as usual; a class made by `quantized_class` is pickled by its plain class."""
        reduced: Any = super().__reduce_ex__(protocol)
        cls = type(self)
        if cls is not quantized_class(cls.plain_class, cls.kind):  # a user's subclass
            return reduced
        return _new, (cls.plain_class, cls.kind), *reduced[2:]

    def _save_to_state_dict(
        self,
        destination: dict[str, Any],
        prefix: str,
        keep_vars: bool,  # noqa: FBT001 torch calls it
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, weight in self.weights_in(self).items():
            if isinstance(weight, QFTWeight):  # False in a model that is not loaded yet
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
        weights = {prefix + name: weight for name, weight in self.weights_in(self).items()}
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


def _applied(function: Any, tensor: Tensor) -> Tensor:
    """Return what a function makes of a tensor; if it reads no values, an INT8 weight stays one."""
    made: Tensor = function(tensor)
    if not isinstance(tensor, QFTWeight) or isinstance(made, QFTWeight):
        return made
    # `to_empty` makes a float tensor of the same shape, and memory for fields that have none, too.
    # Zeros: kernels rely on valid columns. What is made of values is float, and torch refuses it.
    fields = {name: function(field.to("meta")) for name, field in tensor.fields().items()}
    empty = tensor.with_fields({name: field.zero_() for name, field in fields.items()})
    return empty if empty.device == made.device else made


def _refuse_setting(module: nn.Module, value: Any) -> None:
    """Raise AttributeError: `torch.func.functional_call` sets a field if given a state dict."""
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
    """Copy the fields of the weight `name` from a state dict into `fields`.

    With `assign` the tensors of the state dict replace them; the weight stays the same object.
    """
    if found := fields.keys() & state_dict.keys():
        # A shard may have some fields of a weight and the next shard the others. Until the last
        # one is loaded, the weight is a mixture, and the module refuses to compute.
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
        replace_(weight, with_state_fields(weight, name, taken))


class QFTLinear(QuantizedModule, nn.Linear):
    """`nn.Linear` with a `QFTWeight` `[out_features, in_features]`; the bias is float.

    Attributes:
        defers_logits: Whether this is the head of a model with a chunked loss, which in training
            returns `DeferredLogits`.
    """

    plain_class = nn.Linear
    defers_logits = False

    def forward(self, x: Tensor) -> Any:
        """Map `x [..., in_features]` to `[..., out_features]`; see `functional.linear`."""
        weight = self.complete_weight()
        if self.defers_logits and self.training and torch.is_grad_enabled():
            return DeferredLogits(x, weight, self.bias)
        return linear(x, weight, self.bias, products=self.products, training=self.training)

    def extra_repr(self) -> str:
        """Return the text of `nn.Linear` and the INT8 products."""
        shown = super().extra_repr()
        return shown if self.products is None else f"{shown}, int8=({self.products})"


class QFTEmbedding(QuantizedModule, nn.Embedding):
    """`nn.Embedding` whose table is a `QFTWeight` `[num_embeddings, embedding_dim]`."""

    plain_class = nn.Embedding

    def forward(self, ids: Tensor) -> Tensor:
        """Map `ids` of any shape to `[*ids.shape, embedding_dim]`; see `functional.embedding`."""
        return embedding(ids, self.complete_weight(), self.padding_idx)


# Classes whose forward repeats that of nn.Linear. Ours needs no float copy of the weight.
SAME_FORWARD = ("FalconLinear",)
# nn.MultiheadAttention reads the weight of this class and does not call its forward.
NEVER_CALLED = ("NonDynamicallyQuantizableLinear",)

_MADE: dict[type[nn.Module], type[QuantizedModule]] = {}


def quantized_class(plain: type[nn.Module], kind: type[QuantizedModule]) -> type[QuantizedModule]:
    """Return the class that modules of class `plain` get when their weights are quantized.

    If `plain` is not the plain class of its kind, a class is created once. In its method resolution
    order `plain` comes first, then the kind, then their common base. A kind that replaces forward
    comes before `plain`.
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


def uses_our_forward(module: nn.Module) -> bool:
    """Whether a linear module uses the products of `QFTLinear`, judging by its code.

    A forward that contains `super` is assumed to call ours; any other reads the weight itself.
    """
    cls: Any = type(module)
    if not issubclass(cls, nn.Linear) or cls.__name__.removeprefix("QFT") in NEVER_CALLED:
        return False
    if cls.forward in (nn.Linear.forward, QFTLinear.forward) or cls.__name__ in SAME_FORWARD:
        return True
    return "super" in cls.forward.__code__.co_names


def _new(plain: type[nn.Module], kind: type[QuantizedModule]) -> Any:
    """Return an uninitialized module of the quantized class of `plain`, for unpickling."""
    made: Any = quantized_class(plain, kind)
    return made.__new__(made)
