"""A tensor that is not stored as float, and that any operator can read.

Code that does not know about INT8 slices, multiplies or measures a weight like any tensor:
`F.linear(x, weight[a:b])`. An operator that only reads computes with the float values, which exist
while it runs; PyTorch's own derivative of it returns a float gradient, which `optim/flow.py`
quantizes when it arrives. A view, such as a slice or a transpose, computes its values each time it
is read, so autograd keeps no float copy of it. An operator that would write values raises, because
there is no memory to keep them.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
Operator = Callable[..., Any]

COLLECTIVE = (
    "{operator} of torch.distributed would exchange {stored!r} as a float tensor, which has no "
    "memory for values, only for codes and scales: received values would be lost. Create the "
    "optimizer of qft_hf after init_process_group: its broadcast() gives all processes the same "
    "weights, and it averages gradients itself. Do not use collectives or wrappers."
)


class Readable(Tensor):
    """A tensor that reads as a float tensor, whatever form it is stored in."""

    to_change: ClassVar[str] = ""  # part of error messages: what to do instead of writing
    _operators: ClassVar[dict[Any, Operator]] = {}

    # Functions of torch treat it as a plain tensor; `__torch_dispatch__` handles the operators.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __init_subclass__(cls) -> None:
        """Give each subclass its own table on top of the common operators."""
        super().__init_subclass__()
        cls._operators = dict(cls._operators)

    @classmethod
    def implements(cls, *operators: Any) -> Callable[[Operator], Operator]:
        """Decorator: the function runs these ATen operators, as `f(operator, args, kwargs)`."""

        def register(function: Operator) -> Operator:
            for operator in operators:
                cls._operators[operator] = function
            return function

        return register

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        operator: Any,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the function registered for an operator; other operators read values or raise."""
        return cls._operators.get(operator, read)(operator, args, kwargs or {})

    def values(self) -> Tensor:
        """Return the values as a plain tensor of this tensor's dtype, without a gradient."""
        raise NotImplementedError

    @property
    def is_traced(self) -> bool:
        """Whether a compiler traces it; compilers do not support views computed when read."""
        return False

    def dequantize(self) -> Tensor:
        """Return the values as a plain tensor of this tensor's dtype; gradients pass through it."""
        return torch.alias_copy(self)

    @property
    def data(self) -> Tensor:
        """The same tensor without its history; it can be set to another tensor of its class.

        Raises:
            TypeError: It is set to a tensor of another class.
        """
        return Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, value: Tensor) -> None:
        self._take(value)

    def _take(self, value: Tensor) -> None:
        raise TypeError(
            f"A {type(value).__name__} was assigned to .data of {self!r}, which has no memory for "
            f"values, only for codes and scales. {self.to_change}"
        )

    def numpy(self, *, force: bool = False) -> Any:
        """Return the values as a read-only array: writes to it would not reach this tensor."""
        array = self.dequantize().numpy(force=force)
        array.flags.writeable = False
        return array

    def tolist(self) -> Any:
        """Return the values as nested lists."""
        return self.dequantize().tolist()

    def __dlpack__(self, **options: Any) -> Any:
        """Return the values for another library, as a copy: writes would not reach this tensor."""
        return self.dequantize().__dlpack__(**options)

    def share_memory_(self) -> Self:
        """Move to memory that other processes see.

        Raises:
            NotImplementedError: This is a view, which has no memory.
        """
        raise NotImplementedError(f"{self!r} has no memory to share: call model.share_memory().")


@Readable.implements(aten.alias_copy.default)
def _alias_copy(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    stored: Readable = args[0]
    return stored.values()


@Readable.implements(
    aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default,
    aten.full_like.default, aten.new_empty.default, aten.new_zeros.default,
    aten.new_ones.default, aten.new_full.default,
)  # fmt: skip
def _another(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # The result has other values, so those of the stored tensor are not computed.
    stored, *others = args
    form = torch.empty((), dtype=stored.dtype, device=stored.device).expand(stored.shape)
    return operator(form, *others, **kwargs).contiguous()


def viewing(stored: Readable) -> AbstractContextManager[Any]:
    """Return a context for making a view of a stored tensor.

    Under `torch.inference_mode` PyTorch requires that a view of a tensor from outside of it is no
    inference tensor.
    """
    if torch.is_inference_mode_enabled() and not stored.is_inference():
        return torch.inference_mode(mode=False)
    return nullcontext()


class View(Readable):
    """A view of a stored tensor, such as `weight[a:b]` or `weight.t()`.

    Like any view it shows the values that the tensor has when the view is read.

    Args:
        make: Computes the values.
        like: A tensor on the meta device with the shape, strides and dtype of the view.
        of: The tensor that it is a view of.
    """

    @staticmethod
    def __new__(cls, make: Callable[[], Tensor], *, like: Tensor, of: Readable) -> Self:
        """Make the outer tensor, without storage."""
        with viewing(of):
            return Tensor._make_wrapper_subclass(
                cls, like.shape, strides=like.stride(), dtype=like.dtype, device=of.device
            )

    def __init__(self, make: Callable[[], Tensor], *, like: Tensor, of: Readable) -> None:
        self.values = make  # type: ignore[method-assign]
        self.of = of
        self.to_change = of.to_change  # type: ignore[misc]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Return the shape of the view and the tensor that it is a view of."""
        return f"View(shape={tuple(self.shape)}, of {self.of!r})"


def read(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator on the values of stored tensors instead of on the tensors.

    Raises:
        NotImplementedError: It would write to a stored tensor, or exchange it among processes.
    """
    if operator.namespace == "c10d":  # the schemas of collectives do not say what they write
        stored = next(x for x in tree_leaves((args, kwargs)) if isinstance(x, Readable))
        raise NotImplementedError(COLLECTIVE.format(operator=operator, stored=stored))
    for stored, is_written in _aliased(operator, args, kwargs):
        if not is_written:
            return view(operator, args, kwargs)
        raise NotImplementedError(
            f"{operator} would write to {stored!r}, which has no memory for values, only for codes "
            f"and scales. {stored.to_change}"
        )
    stored = next(x for x in tree_leaves((args, kwargs)) if isinstance(x, Readable))
    warn_of_memory(operator, stored)
    args, kwargs = tree_map_only(Readable, lambda x: x.values(), (args, kwargs))
    return operator(*args, **kwargs)


def _aliased(
    operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[Readable, bool]]:
    """Yield stored tensors that a result would share memory with, and whether each is written."""
    for place, argument in enumerate(operator._schema.arguments):
        if argument.alias_info is not None:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            for leaf in tree_leaves(value):
                if isinstance(leaf, Readable):
                    yield leaf, argument.alias_info.is_write


def view(
    operator: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    make: Callable[[], Tensor] | None = None,
) -> Any:
    """Return the result of `operator`, which makes a view of its first argument, a stored tensor.

    Args:
        operator: An operator that returns a view or a list of views.
        args: Its positional arguments, the stored tensor first.
        kwargs: Its keyword arguments.
        make: Computes the values of the view without those of the whole tensor; None: they are
            taken from all values.
    """
    stored, *rest = args
    if stored.is_traced:
        return operator(stored.values(), *rest, **kwargs)
    like = torch.empty_strided(stored.shape, stored.stride(), dtype=stored.dtype, device="meta")
    likes = operator(like, *rest, **kwargs)

    def made() -> Any:
        return operator(stored.values(), *rest, **kwargs)

    if isinstance(likes, Tensor):
        return View(make or made, like=likes, of=stored)
    return [
        View(lambda part=part: made()[part], like=like, of=stored)  # type: ignore[misc]
        for part, like in enumerate(likes)
    ]


_warned = False


def warn_of_memory(operator: Any, stored: Readable) -> None:
    """Warn, once per process, about the memory that reading values takes."""
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"{operator} reads {stored!r}, whose values are expanded to float for this: "
            f"{stored.numel() * stored.dtype.itemsize / 1e6:.1f} MB while the operator runs. The "
            "gradient of a trained weight that is used outside of its module is a whole float "
            "tensor too, until it is quantized. This warning is shown only for the first use.",
            stacklevel=4,  # the line that calls the operator
        )
