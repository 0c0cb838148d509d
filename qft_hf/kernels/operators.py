"""An operator is its own reference; backends register faster implementations.

    @operator(fake=...)
    def quantize(x, *, group_size): ...        # documented; the body is the specification

    @quantize.checks
    def _(x, *, group_size): ...               # raises before anything is written

    @quantize.register("cpu")                  # in kernels/cpu/: the same arguments and bits
    def quantize(x, *, group_size): ...

A reference that calls other operators is a composition: if a backend registers nothing for it, the
reference runs and calls that backend's kernels.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from functools import update_wrapper
from inspect import Parameter, signature
from itertools import islice
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode as dispatch_mode_is_active

from . import backend

logger = logging.getLogger(__name__)

is_compiling = torch.compiler.is_compiling

PLAIN = {Tensor, torch.nn.Parameter}  # types that intercept no operators, unlike FakeTensor

Function = Callable[..., Any]

# The name of each argument type in PyTorch's schema language.
SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Sequence[Tensor]: "Tensor[]",
    Sequence[int]: "int[]",
    int: "int",
    float: "float",
    bool: "bool",
    torch.dtype: "ScalarType",
}


class Operator:
    """A function on raw tensors of which each backend may have its own implementation.

    The first argument is a tensor, a list of tensors or one of `kernels.values`; its device decides
    which backend runs. A call with an empty list does nothing. Keyword arguments that are left out
    get the reference's defaults, so implementations need none.

    PyTorch knows it as `torch.ops.qft_hf.<name>`, with values taken apart into their fields. A call
    goes through PyTorch's dispatcher only if something may intercept it, such as `torch.compile`:
    the dispatcher takes as long as a small kernel.

    Args:
        reference: The specification in plain PyTorch.
        fake: Returns results with only the right shapes and dtypes, for `torch.compile`. None: the
            operator returns nothing.
        writes: Arguments that are modified, such as `"codes"` or `"weight.codes"`.
        composed: The reference calls other operators or PyTorch's own products. A backend that has
            no implementation then runs it without a warning.
    """

    def __init__(
        self, reference: Function, *, fake: Function | None, writes: tuple[str, ...], composed: bool
    ) -> None:
        self.name = reference.__name__
        self.reference = reference
        self._composed = composed
        self._check: Function | None = None
        self._check_values: Function | None = None
        self._takes: Function | None = None
        self._implementations: dict[str, Function] = {}
        self._chosen: dict[torch.device, Function] = {}  # by device, until a choice changes
        update_wrapper(self, reference)
        self._defaults = {
            name: parameter.default
            for name, parameter in signature(reference).parameters.items()
            if parameter.default is not Parameter.empty
        }
        # The field names of each argument that is a value; `torch.compile` traces code with them.
        self._members = {
            name: tuple(_field_types(kind)) if _is_value(kind) else ()
            for name, kind in get_type_hints(reference).items()
        }
        self._takes_value = bool(next(iter(self._members.values())))
        backend.on_change(self._chosen.clear)
        self._declare(fake, writes)

    def checks(self, function: Function) -> Function:
        """Decorator: the function raises if the arguments do not fit each other."""
        self._check = function
        return function

    def checks_values(self, function: Function) -> Function:
        """Decorator: the function raises for harmful values, before anything is written.

        It is called for tensors on the CPU only: on a GPU the host would have to wait for it.
        """
        self._check_values = function
        return function

    def supported_by_backends(self, function: Function) -> Function:
        """Decorator: the function returns whether implementations accept these arguments.

        If not, the reference runs, which may call operators with arguments that they accept.
        """
        self._takes = function
        return function

    def register(self, backend_name: str) -> Callable[[Function], Function]:
        """Decorator: the function implements this operator on a backend, with the same bits."""

        def add(function: Function) -> Function:
            self._implementations[backend_name] = function
            self._chosen.clear()
            return function

        return add

    def __call__(self, first: Any, *arguments: Any, **options: Any) -> Any:
        """Check the arguments and run the implementation for their device."""
        if self._defaults:
            options = {**self._defaults, **options}
        if self._check is not None:
            self._check(first, *arguments, **options)
        tensor = first.codes if self._takes_value else _first_tensor(first)
        if tensor is None:  # an empty list
            return None
        if (
            type(tensor) not in PLAIN
            or tensor.is_meta
            or is_compiling()
            or dispatch_mode_is_active()
        ):
            operation = getattr(torch.ops.qft_hf, self.name).default
            return operation(*self.flatten(first, *arguments, **options))
        # The rest repeats `_run`: its call would take as long as a small operator.
        device = tensor.device
        if self._check_values is not None and device.type == "cpu":
            self._check_values(first, *arguments, **options)
        function = self._chosen.get(device) or self._choose(device)
        if self._takes is not None and not self._takes(first, *arguments, **options):
            function = self.reference
        return function(first, *arguments, **options)

    def _run(self, *arguments: Any, **options: Any) -> Any:
        tensor = _first_tensor(arguments[0])
        if tensor is None:
            return None
        device = tensor.device
        if self._check_values is not None and device.type == "cpu":
            self._check_values(*arguments, **options)
        function = self._chosen.get(device) or self._choose(device)
        if self._takes is not None and not self._takes(*arguments, **options):
            function = self.reference
        return function(*arguments, **options)

    def _choose(self, device: torch.device) -> Function:
        name = backend.backend_for(device)
        if name not in (*self._implementations, backend.REFERENCE) and not self._composed:
            logger.warning(
                "the %s backend has no %s: plain PyTorch runs instead, which gives the same bits "
                "and is slower",
                name,
                self.name,
            )
        function = self._chosen[device] = self._implementations.get(name, self.reference)
        return function

    def _declare(self, fake: Function | None, writes: tuple[str, ...]) -> None:
        """Declare the operator to PyTorch, with flat arguments."""
        flat = _flat_arguments(self.reference, writes)
        hints = get_type_hints(self.reference)
        results = hints.pop("return")
        parameters = signature(self.reference).parameters
        n_positional = sum(p.kind is not Parameter.KEYWORD_ONLY for p in parameters.values())
        makers = {
            name: getattr(kind, "around", kind) for name, kind in hints.items() if _is_value(kind)
        }
        schema = f"({', '.join(flat)}) -> {_result_schema(results)}"
        full_name = f"qft_hf::{self.name}"

        def whole(values: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            left, made = iter(values), {}
            for name in parameters:
                parts = islice(left, len(self._members[name]))
                made[name] = makers[name](*parts) if name in makers else next(left)
            return tuple(made.pop(name) for name in list(made)[:n_positional]), made

        def run(*values: Any) -> Any:
            arguments, options = whole(values)
            return self._run(*arguments, **options)

        def run_fake(*values: Any) -> Any:
            arguments, options = whole(values)
            return None if fake is None else fake(*arguments, **options)

        torch.library.define(full_name, schema)
        torch.library.register_fake(full_name, run_fake)
        torch.library.register_kernel(full_name, "default", run)

    def flatten(self, *arguments: Any, **options: Any) -> list[Any]:
        """The arguments as `torch.ops.qft_hf.<name>` takes them."""
        bound = signature(self.reference).bind(*arguments, **{**self._defaults, **options})
        flat: list[Any] = []
        for name, value in bound.arguments.items():
            members = self._members[name]
            if members:
                flat.extend([getattr(value, member) for member in members])
            else:
                flat.append(list(value) if isinstance(value, tuple) else value)
        return flat


class Composition(Operator):
    """An operator only for `torch.compile`, which sees one call instead of the reference's body.

    With plain tensors it is a plain function: a dispatch mode sees the PyTorch operators of the
    reference.
    """

    def __call__(self, first: Any, *arguments: Any, **options: Any) -> Any:
        """Run the reference, or, if it is traced, record one call of the operator."""
        if type(first) in PLAIN:
            return self.reference(first, *arguments, **options)
        return super().__call__(first, *arguments, **options)


def operator(
    *, fake: Function | None = None, writes: tuple[str, ...] = (), composed: bool = False
) -> Callable[[Function], Operator]:
    """Decorator: make a function an operator and its reference; for arguments see `Operator`.

    Arguments without a default come first and may be passed by position; all others are keywords.
    """

    def make(reference: Function) -> Operator:
        return Operator(reference, fake=fake, writes=writes, composed=composed)

    return make


def composition(*, fake: Function) -> Callable[[Function], Composition]:
    """Decorator: make a function a `Composition`; for `fake` see `Operator`."""
    return lambda reference: Composition(reference, fake=fake, writes=(), composed=True)


def _first_tensor(value: Any) -> Tensor | None:
    """Return the tensor whose device counts; None for an empty list."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (list, tuple)):
        return value[0] if value else None
    codes: Tensor = value.codes
    return codes


def _is_value(kind: Any) -> bool:
    return is_dataclass(kind) or hasattr(kind, "_fields")


def _field_types(kind: Any) -> dict[str, Any]:
    """Return the fields that a value is constructed from, with their types."""
    hints = get_type_hints(kind)
    if is_dataclass(kind):
        return {f.name: hints[f.name] for f in fields(kind) if f.init}
    return {name: hints[name] for name in kind._fields}


def _flat_arguments(function: Function, writes: tuple[str, ...]) -> list[str]:
    """The arguments of an operator in PyTorch's schema language."""
    flat = []
    aliases = iter("abcdefghijkl")
    for name, kind in get_type_hints(function).items():
        if name == "return":
            continue
        members = _field_types(kind) if _is_value(kind) else {"": kind}
        for member, member_kind in members.items():
            path = f"{name}.{member}" if member else name
            schema = _argument_schema(member_kind)
            if path in writes:
                schema = schema.replace("Tensor", f"Tensor({next(aliases)}!)", 1)
            flat.append(f"{schema} {path.replace('.', '_')}")
    return flat


def _argument_schema(kind: Any) -> str:
    options = [option for option in get_args(kind) if option is not type(None)]
    if kind not in SCHEMA_TYPES and len(options) == 1:
        return f"{SCHEMA_TYPES[options[0]]}?"
    return SCHEMA_TYPES[kind]


def _result_schema(kind: Any) -> str:
    if kind is type(None):
        return "()"
    if kind is Tensor:
        return "Tensor"
    return f"({', '.join('Tensor' for _ in get_args(kind))})"
