"""Declares the operators to PyTorch as `torch.ops.qft_hf.*` and sends each call to its backend."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .backend import backend_for


def declare(
    name: str,
    schema: str,
    *,
    fake: Callable[..., Any],
    check_values: Callable[..., None] | None = None,
) -> Any:
    """Declare an operator and return a function that calls it.

    One kernel serves every device: it asks `backend_for`, which has chosen already, so that
    `QFT_BACKEND` holds for all operators. It is called through PyTorch's dispatcher only where
    something may listen, such as `torch.compile`: that takes as long as a small kernel does.

    Args:
        name: Name of the operator, and of the function in each backend.
        schema: Arguments and results in PyTorch's schema language; what is written is marked
            `(a!)`. The first argument is a tensor, or a list of tensors on one device.
        fake: Makes the results, shapes and dtypes only, for `torch.compile`.
        check_values: Takes the operator's arguments and raises for values that would do harm,
            before anything is written. Called where tensors are on the CPU: on a GPU the answer
            would have to be waited for at each call.
    """
    full_name = f"qft_hf::{name}"

    def run(first: Tensor | list[Tensor], *arguments: Any, **options: Any) -> Any:
        device = (first if isinstance(first, Tensor) else first[0]).device
        if check_values is not None and device.type == "cpu":
            check_values(first, *arguments, **options)
        return getattr(backend_for(device), name)(first, *arguments, **options)

    torch.library.define(full_name, schema)
    torch.library.register_fake(full_name, fake)
    torch.library.register_kernel(full_name, "default", run)
    operator = getattr(torch.ops.qft_hf, name).default

    def call(first: Tensor | list[Tensor], *arguments: Any, **options: Any) -> Any:
        tensor = first if isinstance(first, Tensor) else first[0]
        is_plain = type(tensor) is Tensor and not tensor.is_meta
        if is_plain and not torch.compiler.is_compiling() and not is_in_torch_dispatch_mode():
            return run(first, *arguments, **options)
        return operator(first, *arguments, **options)

    return call


def nothing(*arguments: Any, **options: Any) -> None:
    """The results of an operator that only writes into its arguments."""
