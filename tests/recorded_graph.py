"""A CPU stand-in for a CUDA graph: records operations with their numbers and memory addresses.

Like a graph, capturing changes nothing, a replay runs the same operations with the same numbers on
the same memory, without the Python between them, and reading a value on the host raises. A number
that Python would change from step to step therefore keeps its captured value.
"""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
LOOKS = {aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default}
CONSTANT = aten.lift_fresh.default  # the end of `torch.tensor`: a copy from the host, on a GPU


class RecordedGraph(TorchDispatchMode):
    """Capture once, replay often, with the methods of `qft_hf.hf.graphed_step.Graph`."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Any]]] = []
        self.replays = 0
        self._own: dict[int, Tensor] = {}  # memory allocated while capturing, by address
        self._before: dict[int, tuple[Tensor, Tensor]] = {}  # other memory that is written, copied

    def capture(self, function: Callable[[], Tensor]) -> Tensor:
        # transformers must believe that a CUDA stream is capturing.
        capturing = patch("transformers.utils.import_utils.is_cuda_stream_capturing", lambda: True)
        try:
            with torch.random.fork_rng(), capturing, self:
                return function()
        finally:
            with torch.no_grad():
                for written, value in self._before.values():
                    written.copy_(value)

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad():
            for operation, args, kwargs, results in self.operations:
                again = operation(*args, **kwargs)
                new_results = [x for x in tree_leaves(again) if isinstance(x, Tensor)]
                for old, new in zip(results, new_results, strict=True):
                    if old is not new:
                        old.copy_(new)

    def run(self, function: Callable[[], Tensor]) -> Tensor:
        return function()

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if any(type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__ for x in leaves):
            return NotImplemented  # an INT8 tensor unwraps itself; its operations arrive here
        if operation in LOOKS or (operation is CONSTANT and args[0].numel()):
            raise RuntimeError(f"operation not permitted when stream is capturing: {operation}")
        self._keep_what_is_written(operation, args, kwargs)
        result = operation(*args, **kwargs)
        results = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        given = {_address(x) for x in leaves}
        is_view = results and all(_address(x) in given for x in results)
        if not is_view or operation._schema.is_mutable:
            self.operations.append((operation, args, kwargs, results))
        for x in results:
            self._own.setdefault(_address(x), x)  # kept alive, so that its address is not reused
        return result

    def _keep_what_is_written(self, operation: Any, args: Any, kwargs: Any) -> None:
        schema = operation._schema.arguments
        values = [*args, *(kwargs.get(a.name) for a in schema[len(args) :])]
        for argument, value in zip(schema, values, strict=True):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            for x in tree_leaves(value):
                if isinstance(x, Tensor) and _address(x) not in {*self._own, *self._before}:
                    whole = x.new_empty(0).set_(x.untyped_storage())
                    self._before[_address(x)] = whole, whole.clone()


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
