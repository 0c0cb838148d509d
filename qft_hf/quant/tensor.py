"""Base of the INT8 tensors: autograd and the Trainer see a float tensor, memory has INT8 fields.

Idea: wrapper subclasses as in torchao's quantized training, Apache/BSD-licensed. The operators here
work on the fields; all others read the values (`reading.py`).
"""

from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from .. import kernels
from ..kernels.operators import PLAIN
from .arrangement import Arrangement
from .reading import Readable, aten, read, view, viewing


class Int8Tensor(Readable):
    """A tensor of a float `dtype` whose values are stored in INT8 `FIELDS`, as a matrix.

    Attributes:
        stored: The fields in the form that operators of `kernels` accept.
        arrangement: How the values of this tensor are placed in the stored matrix.
    """

    FIELDS: ClassVar[tuple[str, ...]]
    stored: kernels.Quantized | kernels.Weight
    arrangement: Arrangement

    @staticmethod
    def __new__(
        cls,
        codes: Tensor,
        *_: Any,
        dtype: torch.dtype,
        arrangement: Arrangement | None = None,
        **__: Any,
    ) -> Self:
        """Make the outer tensor, on the device of the codes and without storage."""
        shape = codes.shape if arrangement is None else arrangement.shape
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=codes.device)

    @property
    def codes(self) -> Tensor:
        """int8 `[rows, columns]`."""
        return self.stored.codes

    @property
    def scales(self) -> Tensor:
        """fp32 `[rows, n_groups]`."""
        return self.stored.scales

    @property
    def is_traced(self) -> bool:
        """Whether its fields are tensors that a compiler traces."""
        return any(type(field) not in PLAIN for field in self.fields().values())

    def fields(self) -> dict[str, Tensor]:
        """Return the stored tensors by name; they share memory with this tensor."""
        return {name: getattr(self, name) for name in self.FIELDS}

    def with_fields(self, fields: dict[str, Tensor], *, dtype: torch.dtype | None = None) -> Self:
        """Return a tensor of the same class and format with other fields."""
        arguments: dict[str, Any] = {**fields, **self._format(), "dtype": dtype or self.dtype}
        return type(self)(**arguments)

    def aliased(self, fields: dict[str, Tensor]) -> Self:
        """Return a tensor with `fields`, which share the memory of this tensor's fields."""
        with viewing(self):
            return self.with_fields(fields)

    def fields_changed(self) -> None:
        """Update what depends on the fields; to be called after values were copied into them."""

    @property
    def stored_bytes(self) -> int:
        """Bytes of all fields."""
        return sum(field.nbytes for field in self.fields().values())

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """`stored_bytes`; torch itself would return the size of the values in float."""
        return self.stored_bytes

    def element_size(self) -> float:  # type: ignore[override]
        """Return the mean number of bytes stored per element, including scales and outliers."""
        return self.stored_bytes / max(1, self.numel())

    def share_memory_(self) -> Self:
        """Move the fields to memory that other processes see."""
        for field in self.fields().values():
            field.share_memory_()
        return self

    def is_shared(self) -> bool:
        """Return whether the fields are in memory that other processes can see."""
        return all(field.is_shared() for field in self.fields().values())

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        """Return the names of the inner tensors and the metadata for `__tensor_unflatten__`."""
        return list(self.FIELDS), self._format()

    def _format(self) -> dict[str, Any]:
        """Return the arguments of `__init__` other than the fields."""
        format: dict[str, Any] = {"dtype": self.dtype}
        if not self.arrangement.is_plain:
            format["arrangement"] = self.arrangement
        return format

    @classmethod
    def __tensor_unflatten__(
        cls, fields: dict[str, Any], meta: dict[str, Any], outer_size: Any, outer_stride: Any
    ) -> Self:
        """Rebuild from `__tensor_flatten__`."""
        return cls(**fields, **meta)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Return shape and format without the values, which would have to be expanded."""
        details = ", ".join(f"{name}={value}" for name, value in self._format().items())
        return f"{type(self).__name__}(shape={tuple(self.shape)}, {details}, device={self.device})"


@Int8Tensor.implements(aten.detach.default, aten.clone.default, aten.alias.default)
def _each_field(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensor = args[0]
    # A clone is always contiguous: other memory formats have no meaning for codes.
    kwargs.pop("memory_format", None)
    fields = {name: operator(field) for name, field in tensor.fields().items()}
    is_copy = operator is aten.clone.default
    made = tensor.with_fields(fields) if is_copy else tensor.aliased(fields)
    return return_and_correct_aliasing(operator, args, kwargs, made)


@Int8Tensor.implements(aten._to_copy.default)
def _to_copy(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensor = args[0]
    dtype = kwargs.get("dtype") or tensor.dtype
    if not dtype.is_floating_point:
        raise NotImplementedError(
            f"{type(tensor).__name__} cannot be converted to {dtype}: its dtype is the float type "
            "that it represents. Its INT8 codes are in .codes."
        )
    device = kwargs.get("device") or tensor.device
    non_blocking = kwargs.get("non_blocking", False)
    fields = {
        name: field.to(device, copy=True, non_blocking=non_blocking)
        for name, field in tensor.fields().items()
    }
    return tensor.with_fields(fields, dtype=dtype)


@Int8Tensor.implements(aten.copy_.default)
def _copy_(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    target, source = args[:2]
    if type(target) is not type(source):
        return read(operator, args, kwargs)
    # Shapes of fields are compared too: copying field by field could broadcast, or fail half-way.
    shapes, source_shapes = (
        {name: tuple(field.shape) for name, field in tensor.fields().items()}
        for tensor in (target, source)
    )
    formats_differ = target._format() | {"dtype": None} != source._format() | {"dtype": None}
    if formats_differ or shapes != source_shapes:
        raise ValueError(
            f"Cannot copy {source!r} with fields {source_shapes} into {target!r} with fields "
            f"{shapes}: their formats differ. Quantize both with the same QFTConfig."
        )
    for name, field in target.fields().items():
        field.copy_(getattr(source, name))
    target.fields_changed()
    return target


@Int8Tensor.implements(aten.equal.default)
def _equal(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    # transformers calls this for two weights that a checkpoint should have tied.
    tensor, other = args
    if type(tensor) is not type(other) or tensor._format() != other._format():
        return bool(read(operator, args, kwargs))
    fields = other.fields()
    return all(torch.equal(field, fields[name]) for name, field in tensor.fields().items())


@Int8Tensor.implements(aten.view.default)
def _view(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # Torch views a parameter in its own shape to find its autograd node.
    tensor, shape = args
    if tuple(shape) != tuple(tensor.shape):
        return view(operator, args, kwargs)
    return return_and_correct_aliasing(operator, args, kwargs, tensor.aliased(tensor.fields()))
