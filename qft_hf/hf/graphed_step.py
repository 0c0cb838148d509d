"""The parts of a training step as CUDA graphs, replayed at every step.

With few tokens, a GPU finishes a kernel before the host has launched the next one. A graph holds
all kernels of a pass, with their numbers and the addresses of their tensors, and one call launches
them all. Host code between the kernels runs only once, during capture: each batch is copied to the
addresses of the captured one, and gradients are at the addresses of the captured ones. So clipping
and the update can be captured too, in graphs of their own: between them the host checks whether
gradients are finite.

Source:
    "CUDA Graphs" in PyTorch's notes on CUDA semantics, whole-network capture.
"""

import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor
from torch.nn import Parameter
from transformers import masking_utils

from ..optim import QFTOptimizer
from ..optim.capturable import CapturableSteps
from ..optim.flow import Flow, PassResult

logger = logging.getLogger(__name__)

T = TypeVar("T")

N_EAGER = 2  # passes of a kind before capture, which compile kernels and make states and plans

Batch = dict[str, Tensor]
Pass = Callable[[Batch], Tensor]  # forward and backward; returns the loss


class Graph:
    """The kernels that a function launches, to be launched again: a `torch.cuda.CUDAGraph`.

    The graphs of a run share a stream and, as they run in turn, memory.
    """

    def __init__(self, stream: torch.cuda.Stream, pool: "MemoryPool") -> None:
        self._stream, self._pool = stream, pool
        self._graph = torch.cuda.CUDAGraph()

    def run(self, function: Callable[[], T]) -> T:
        """Call the function on the stream of captures, not the main one, and capture nothing.

        Autograd reuses the stream of earlier passes, and no capture can begin on the main stream.
        """
        main = torch.cuda.current_stream()
        self._stream.wait_stream(main)
        with torch.cuda.stream(self._stream):
            result = function()
        main.wait_stream(self._stream)
        return result

    def capture(self, function: Callable[[], T]) -> T:
        """Call the function and record its kernels without running them: results are undefined.

        Other threads, such as one that pins batches, may go on.
        """
        with torch.cuda.graph(
            self._graph,
            pool=self._pool.handle_for(self),
            stream=self._stream,
            capture_error_mode="thread_local",
        ):
            return function()

    def replay(self) -> None:
        """Run the kernels on the current stream: the results of `capture` get their values."""
        self._graph.replay()


class MemoryPool:
    """The memory pool that graphs share.

    If all graphs of a pool are gone and a tensor of theirs is still alive, PyTorch accepts no new
    graph into that pool. So the next graph gets a new pool when all others are gone.
    """

    def __init__(self) -> None:
        self._graphs: WeakSet[Graph] = WeakSet()
        self._handle: Any = None

    def handle_for(self, graph: Graph) -> Any:
        """Return PyTorch's handle of the pool, for a graph that is about to be captured."""
        if not self._graphs:
            self._handle = torch.cuda.graph_pool_handle()
        self._graphs.add(graph)
        return self._handle


def cuda_graphs(device: torch.device) -> Callable[[], Graph]:
    """Return a function that makes the graphs of a run."""
    stream, pool = torch.cuda.Stream(device), MemoryPool()
    return lambda: Graph(stream, pool)


@dataclass
class _Captured:
    """The graph of a pass, and the tensors that it reads and writes."""

    graph: Graph
    before: list[Tensor | None]  # gradients of all parameters before the pass
    gradients: list[Tensor | None]  # gradients of all parameters after the pass
    result: PassResult  # everything else that the pass leaves on the host
    loss: Tensor
    # Graphs of the parts of the step that follow, and their results (a tensor or None), by name.
    parts: dict[Hashable, tuple[Graph, Any]] = field(default_factory=dict)


class GraphedStep:
    """Runs passes over batches of one shape as graphs: one for each kind of pass.

    After a replayed pass, gradients are at the same addresses as before. So clipping, and the
    update with gradients that wait, are replayed too: see `run_part`.

    The first passes of a kind run eagerly, and so does every batch of another form than the first,
    with one warning. After a replayed pass, gradients, norms and counters are the same as after an
    eager one, so later code need not distinguish the two.

    Args:
        optimizer: The optimizer of the parameters that get gradients.
        make_graph: Makes an empty graph.
    """

    def __init__(self, optimizer: QFTOptimizer, make_graph: Callable[[], Graph]) -> None:
        self.optimizer = optimizer
        if not optimizer.reads_live and optimizer.gradient == "release":
            raise ValueError(
                f"cuda_graph=True: {type(optimizer).__name__} does not read rate and step number "
                "from `live`, so a graph would repeat those of its capture. Set gradient='stack', "
                "or leave cuda_graph off."
            )
        self._steps = CapturableSteps(optimizer, self.run_part)
        if not optimizer.reads_live:
            logger.warning(
                "cuda_graph=True: updates by %s run without a graph, which would repeat their rate "
                "and step number. Passes and clipping run as graphs",
                type(optimizer).__name__,
            )
        self._parameters = list(optimizer.parameters())
        self._make_graph = make_graph
        self._eager = make_graph()
        self._inputs: Batch = {}  # tensors that graphs read batches from
        self._n_run: dict[Hashable, int] = {}  # eager passes by kind
        self._captured: dict[Hashable, _Captured] = {}
        self._latest: _Captured | None = None  # the last pass, if it was replayed
        self._repeated: list[Any] = []  # addresses and numbers that all graphs repeat
        self._has_warned = False

    def __call__(self, run: Pass, batch: dict[str, Any], *, kind: Hashable) -> Tensor:
        """Run one pass; return its loss and leave gradients in `.grad`.

        Args:
            run: The pass, which may be called with another batch of the same shape.
            batch: On the device. With values other than tensors, it runs eagerly.
            kind: Everything that determines what the pass does, except the batch and whether there
                are gradients of an earlier micro-batch.

        Raises:
            RuntimeError: The pass cannot be captured. Nothing was updated.
        """
        self._latest = None
        self._steps.write_numbers()
        if not self._takes(batch):
            return self._eager.run(lambda: run(batch))
        self._forget_what_has_moved()
        before = [parameter.grad for parameter in self._parameters]
        kind = (kind, all(gradient is None for gradient in before))
        captured = self._captured.get(kind)
        if captured is None:
            n_run = self._n_run[kind] = self._n_run.get(kind, 0) + 1
            if n_run <= N_EAGER:
                return self._eager.run(lambda: run(batch))
            captured = self._captured[kind] = self._capture_pass(run, before)
            self._replay(captured, batch)  # the capture ran the host code, and no kernel
        elif any(a is not b for a, b in zip(before, captured.before, strict=True)):
            return self._eager.run(lambda: run(batch))  # after a micro-batch that ran eagerly
        else:
            self._replay(captured, batch)
            self._steps.after_replay(captured.result)
            for parameter, gradient in zip(self._parameters, captured.gradients, strict=True):
                parameter.grad = gradient
        self._latest = captured
        return captured.loss.clone()

    def run_part(
        self,
        name: Hashable,
        part: Callable[[], T],
        *,
        repeated: Callable[[], None] | None = None,
    ) -> T:
        """Run a part of the step after a pass, as a graph if the pass was replayed; a `RunPart`.

        Raises:
            RuntimeError: The part cannot be captured. Nothing was updated.
        """
        captured = self._latest
        if repeated is not None:
            self._forget_what_has_moved()
        if captured is None or captured not in self._captured.values():
            return part()
        gradients = zip(self._parameters, captured.gradients, strict=True)
        if any(parameter.grad is not gradient for parameter, gradient in gradients):
            return part()  # other code has replaced them
        is_new = name not in captured.parts
        if is_new:
            graph = self._make_graph()
            result = self._capture(graph, part, "what follows the backward pass")
            captured.parts[name] = (graph, result)
        graph, result = captured.parts[name]
        graph.replay()  # a capture runs the host code, and no kernel
        if repeated is not None and not is_new:
            repeated()
        again: Any = None if result is None else result.clone()
        return again

    def end(self) -> None:
        """Let the optimizer step without graphs again."""
        self._steps.end()

    def _forget_what_has_moved(self) -> None:
        """Drop all graphs if the model was moved, a state was loaded, or an option changed."""
        repeated = self._steps.repeated()
        if self._repeated != repeated:
            self._captured.clear()
            self._n_run.clear()
            self._repeated = repeated

    def _takes(self, batch: dict[str, Any]) -> bool:
        """Return whether graphs can run the batch: it has no mask, and the form of the first."""
        if not all(isinstance(value, Tensor) for value in batch.values()):
            self._warn("has values other than tensors", batch)
            return False
        if "attention_mask" in batch:  # transformers drops one of ones: a check by the host
            self._warn("has an attention_mask, whose values decide which kernels run", batch)
            return False
        if not self._inputs:
            self._inputs = {name: value.clone() for name, value in batch.items()}
        if _form(batch) != _form(self._inputs):
            self._warn(f"differs from the first one, {_form(self._inputs)}", batch)
            return False
        return True

    def _warn(self, reason: str, batch: dict[str, Any]) -> None:
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "cuda_graph=True: a batch %s: %s. It runs without a graph, and so do all batches "
                "like it. Pack the data into rows of one length, without a mask",
                reason,
                _form(batch),
            )

    def _replay(self, captured: _Captured, batch: Batch) -> None:
        for name, value in batch.items():
            self._inputs[name].copy_(value, non_blocking=True)
        captured.graph.replay()

    def _capture_pass(self, run: Pass, before: list[Tensor | None]) -> _Captured:
        for parameter in self._parameters:
            _refuse_hooks(parameter)
        graph = self._make_graph()
        with _documents_as_in_eager_passes(self._inputs):
            loss = self._capture(graph, lambda: run(self._inputs), "this forward and backward pass")
        gradients = [parameter.grad for parameter in self._parameters]
        return _Captured(graph, before, gradients, self.optimizer.flow.pass_result(), loss)

    def _capture(self, graph: Graph, function: Callable[[], T], name: str) -> T:
        steps = [(state["step"], int(state["step"])) for state in self.optimizer.state.values()]
        try:
            return graph.capture(function)
        except BaseException as error:
            self.optimizer.zero_grad()
            for step, number in steps:
                step.fill_(number)
            if not isinstance(error, RuntimeError):
                raise
            raise RuntimeError(
                f"cuda_graph=True: {name} cannot be captured: the host has "
                f"to see values in between, or memory ran out ({error}). Leave "
                "cuda_graph off for this model, loss and data."
            ) from error


def _form(batch: dict[str, Any]) -> dict[str, Any]:
    return {
        name: (value.dtype, tuple(value.shape)) if isinstance(value, Tensor) else type(value)
        for name, value in batch.items()
    }


@contextmanager
def _documents_as_in_eager_passes(batch: Batch) -> Iterator[None]:
    """Have transformers treat rows without `position_ids` as one document each, without a mask.

    In an eager pass, transformers finds this by reading the positions that it has made. Where it
    cannot read them, it makes a mask, which leads to another attention kernel. Version 5.17 makes
    one whenever it detects that a graph is being captured.
    """
    known = {"find_packed_sequence_indices": lambda _: None, "is_tracing": lambda _=None: False}
    before = {name: getattr(masking_utils, name) for name in known}
    if "position_ids" not in batch:
        vars(masking_utils).update(known)
    try:
        yield
    finally:
        vars(masking_utils).update(before)


def _refuse_hooks(parameter: Parameter) -> None:
    hooks = [
        *(parameter._backward_hooks or {}).values(),
        *(parameter._post_accumulate_grad_hooks or {}).values(),
    ]
    if any(not isinstance(hook, Flow) for hook in hooks):
        raise ValueError(
            f"cuda_graph=True: a parameter of shape {tuple(parameter.shape)} has a hook for its "
            "gradient, which would be called at capture and never again. Remove the hook, or leave "
            "cuda_graph off."
        )
