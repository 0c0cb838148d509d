"""The parts of a training step as CUDA graphs, replayed at every step.

With few tokens a GPU is done with a kernel before the host has started the next. A graph holds all
kernels of a pass, with their numbers and the addresses of their tensors, and one call starts them
all. What the host does between them it does once, while the graph is captured: batches are copied
to where the captured one was, and gradients lie where the captured ones were. So clipping and the
update can be captured too, in graphs of their own: between them the host looks whether gradients
are finite.

Source:
    "CUDA Graphs" in PyTorch's notes on CUDA semantics, whole-network capture.
"""

import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor
from torch.nn import Parameter
from transformers import masking_utils

from ..optim import QFTOptimizer
from ..optim.capturable import CapturableSteps
from ..optim.flow import Flow, Left

logger = logging.getLogger(__name__)

T = TypeVar("T")

N_EAGER = 2  # passes of a kind before it is captured: kernels are compiled, states and plans made

Batch = dict[str, Tensor]
Pass = Callable[[Batch], Tensor]  # forward and backward; returns the loss


class Graph(Protocol):
    """What a pass starts on the device, to be started again."""

    def run(self, function: Callable[[], T]) -> T:
        """Call the function as `capture` would, on the same stream, and capture nothing."""
        ...

    def capture(self, function: Callable[[], T]) -> T:
        """Call the function and hold what it starts, which does not run: results are undefined."""
        ...

    def replay(self) -> None:
        """Run what is held: the results of `capture` get their values."""
        ...


class CudaGraph:
    """`torch.cuda.CUDAGraph`; all of a run share a stream and, since they run in turn, memory."""

    def __init__(self, stream: torch.cuda.Stream, pool: "MemoryPool") -> None:
        self._stream, self._pool = stream, pool
        self._graph = torch.cuda.CUDAGraph()

    def run(self, function: Callable[[], T]) -> T:
        """Beside the main stream, on which a capture could not begin: autograd keeps streams."""
        main = torch.cuda.current_stream()
        self._stream.wait_stream(main)
        with torch.cuda.stream(self._stream):
            result = function()
        main.wait_stream(self._stream)
        return result

    def capture(self, function: Callable[[], T]) -> T:
        """Other threads may go on, such as one that pins the memory of batches."""
        with torch.cuda.graph(
            self._graph,
            pool=self._pool.handle_for(self),
            stream=self._stream,
            capture_error_mode="thread_local",
        ):
            return function()

    def replay(self) -> None:
        """On the current stream."""
        self._graph.replay()


class MemoryPool:
    """The memory pool that graphs share.

    PyTorch takes no more graphs into a pool whose last graph is gone, as long as any tensor of
    those is left. So graphs that come after all others have gone get another.
    """

    def __init__(self) -> None:
        self._graphs: WeakSet[CudaGraph] = WeakSet()
        self._handle: Any = None

    def handle_for(self, graph: CudaGraph) -> Any:
        """PyTorch's handle of the pool, for a graph that is about to be captured."""
        if not self._graphs:
            self._handle = torch.cuda.graph_pool_handle()
        self._graphs.add(graph)
        return self._handle


def cuda_graphs(device: torch.device) -> Callable[[], Graph]:
    """What makes the graphs of a run."""
    stream, pool = torch.cuda.Stream(device), MemoryPool()
    return lambda: CudaGraph(stream, pool)


class _Part(NamedTuple):
    """A graph of what follows a pass, and its result."""

    graph: Graph
    result: Any  # a tensor or None


@dataclass
class _Captured:
    """A graph, and the tensors that lie where it reads and writes.

    Attributes:
        graph: Of one pass.
        before: Gradients of all parameters before the pass.
        gradients: And after it.
        left: What else it has left on the host.
        loss: Of the pass.
        parts: What was captured of the gradients' way from there, by name.
    """

    graph: Graph
    before: list[Tensor | None]
    gradients: list[Tensor | None]
    left: Left
    loss: Tensor
    parts: dict[Hashable, _Part] = field(default_factory=dict)


class GraphedStep:
    """Runs passes over batches of one shape by graphs: one for each kind of pass.

    What comes after a pass that was replayed, clipping and the update of gradients that wait, finds
    them where they were before, and is replayed too: `run_part`.

    The first passes of a kind run eagerly, and so does every batch that is unlike the first one,
    which is said once. Gradients, norms and counters are after a pass what they would be after an
    eager one, so all that comes after it need not know.

    Args:
        optimizer: Of the parameters that get gradients.
        make_graph: Makes an empty graph.
    """

    def __init__(self, optimizer: QFTOptimizer, make_graph: Callable[[], Graph]) -> None:
        self.optimizer = optimizer
        if not optimizer.reads_live and optimizer.gradient == "release":
            raise ValueError(
                f"cuda_graph=True: a graph would repeat the rate of {type(optimizer).__name__} and "
                "the number of its step, which does not read them from `live`. Take "
                "gradient='stack', or leave cuda_graph off."
            )
        self._steps = CapturableSteps(optimizer, self.run_part)
        if not optimizer.reads_live:
            logger.warning(
                "cuda_graph=True: updates by %s run without a graph, which would repeat their rate "
                "and the number of their step. Passes and clipping have graphs",
                type(optimizer).__name__,
            )
        self._parameters = list(optimizer.parameters())
        self._make_graph = make_graph
        self._eager = make_graph()
        self._inputs: Batch = {}  # where graphs read a batch
        self._n_run: dict[Hashable, int] = {}  # eager passes by kind
        self._captured: dict[Hashable, _Captured] = {}
        self._latest: _Captured | None = None  # the last pass, if it was replayed
        self._repeated: list[Any] = []  # by all graphs
        self._has_warned = False

    def __call__(self, run: Pass, batch: dict[str, Any], *, kind: Hashable) -> Tensor:
        """One pass; returns its loss and leaves gradients in `.grad`.

        Args:
            run: The pass, which may be called with another batch of the same shape.
            batch: On the device. Other values than tensors cannot be captured.
            kind: All that decides what the pass does, beside the batch and whether gradients of
                an earlier micro-batch are there.

        Raises:
            RuntimeError: The pass does what cannot be captured. Nothing was updated.
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
            self._replay(captured, batch)  # capturing did what the host does, and only that
        elif any(a is not b for a, b in zip(before, captured.before, strict=True)):
            return self._eager.run(lambda: run(batch))  # after a micro-batch that ran eagerly
        else:
            self._replay(captured, batch)
            self._steps.replayed(captured.left)
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
        """Run a part of what follows a pass, by a graph if that was replayed; a `RunPart`.

        Raises:
            RuntimeError: The part does what cannot be captured. Nothing was updated.
        """
        captured = self._latest
        if repeated is not None:
            self._forget_what_has_moved()
        if captured is None or captured not in self._captured.values():
            return part()
        gradients = zip(self._parameters, captured.gradients, strict=True)
        if any(parameter.grad is not gradient for parameter, gradient in gradients):
            return part()  # somebody has put others in their place
        found = captured.parts.get(name)
        if found is None:
            graph = self._make_graph()
            result = self._capture(graph, part, "what follows the backward pass")
            found = captured.parts[name] = _Part(graph, result)
            found.graph.replay()  # capturing did what the host does, and only that
        else:
            found.graph.replay()
            if repeated is not None:
                repeated()
        again: Any = None if found.result is None else found.result.clone()
        return again

    def end(self) -> None:
        """Let the optimizer step without graphs again."""
        self._steps.end()

    def _forget_what_has_moved(self) -> None:
        """Drop all graphs if somebody has moved the model, or loaded a state."""
        repeated = self._steps.repeated()
        if self._repeated != repeated:
            self._captured.clear()
            self._n_run.clear()
            self._repeated = repeated

    def _takes(self, batch: dict[str, Any]) -> bool:
        """Whether the batch has the form of the first one."""
        if not all(isinstance(value, Tensor) for value in batch.values()):
            self._warn("has values that are no tensors", batch)
            return False
        if "attention_mask" in batch:  # transformers leaves it out where all is 1: the host looks
            self._warn("has an attention_mask, and what it holds decides what runs", batch)
            return False
        if not self._inputs:
            self._inputs = {name: value.clone() for name, value in batch.items()}
        if _form(batch) != _form(self._inputs):
            self._warn(f"is unlike the first one, {_form(self._inputs)}", batch)
            return False
        return True

    def _warn(self, reason: str, batch: dict[str, Any]) -> None:
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "cuda_graph=True: a batch %s: %s. It runs without a graph, and so does every one "
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
        return _Captured(graph, before, gradients, self._steps.left(), loss)

    def _capture(self, graph: Graph, function: Callable[[], T], name: str) -> T:
        steps = [(state["step"], int(state["step"])) for state in self.optimizer.state.values()]
        try:
            return graph.capture(function)
        except RuntimeError as error:
            self.optimizer.zero_grad()
            for step, number in steps:
                step.fill_(number)
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
    """Rows without `position_ids` are one document each, and attention needs no mask.

    transformers finds so by a look at the positions that it has made, and makes a mask, which takes
    another kernel, where it may not look. Of its versions 5.17 makes one whenever it sees that
    a graph is captured.
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
            "gradient, which would be called once and never again. Remove the hook, or leave "
            "cuda_graph off."
        )
