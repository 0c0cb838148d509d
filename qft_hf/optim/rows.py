"""Flows on several processes: a gradient is complete when it is the mean over all of them.

Backward may complete gradients in another order on another process, for example if that skips a
layer, but collectives need the same order. So gradients are exchanged in an agreed order of
weights: each as soon as it and all before it are complete, and missing ones when the pass ends. The
order is the one in which process 0 completed them in the first pass.

While the gradient of one weight is in transit, backward computes the next. When the next one is
complete, the rows of the first are used (in release, the updated rows are sent), and then rows of
the next are sent. So rows of at most two weights are in transit, and a small transfer never waits
for a large one that began after it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..quant import QFTWeight
from ..quant.own_rows import OwnRows, OwnTiles
from .agreement import agree_on_settings, agree_on_values
from .flow import Flow, quantize_gradient_, refuse_sparse
from .processes import Exchange, Gathering, Processes
from .release import Release
from .stack import Stack

if TYPE_CHECKING:
    from .base import QFTOptimizer

SECOND_PASS = (
    "A gradient arrived for a step whose gradients the {n} processes have exchanged already. Run "
    "all backward passes of a step but the last under optimizer.accumulate(), or with Accelerate "
    "give the optimizer is_accumulating=qft_hf.hf.is_accumulating. Under checkpointing set "
    "use_reentrant=False: with True, backward passes are nested, and the end of a pass cannot be "
    "detected. If a backward pass failed half-way, resume from the last checkpoint."
)

OUT_OF_STEP = (
    "Process {rank} of {n} has given up a step half-way, while gradients or updated rows were "
    "exchanged, so what the processes exchange next would not belong together. Start all of them "
    "again, and resume from the last checkpoint. To skip a batch, skip it on all, before backward."
)

NOT_EXCHANGED = (
    "A weight of shape {shape} has a gradient that was set after the {n} processes had exchanged "
    "theirs: the weights of this process would differ from those of the others. Change gradients "
    "in a hook of the weight, weight.register_hook(...)."
)


@dataclass
class Pass:
    """One backward pass whose gradients are exchanged."""

    # fp64 `[n_weights]`: sums of squares of the mean gradients, of own rows during the pass and of
    # all rows afterwards.
    squares: Tensor
    # Ids of parameters whose gradient is complete on this process, in order.
    arrived: dict[int, None] = field(default_factory=dict)
    n_sent: int = 0  # weights whose exchange has begun
    in_transit: Exchange | None = None  # the exchange in transit, of one weight at most
    is_done: bool = False  # whether all gradients have been exchanged


class _MultiProcessFlow(Flow):
    """Common base of `RowsStack` and `RowsRelease`, listed before a flow of one process."""

    wants_tiles = False  # gradients are sent in INT8
    # Whether each gradient is clipped by its own norm, which is needed after its rows have arrived
    # and before they are used. Only this case needs one more collective per weight.
    _clips_by_own_norm = False

    def __init__(self, optimizer: "QFTOptimizer") -> None:
        super().__init__(optimizer)
        self.processes: Processes = optimizer.processes  # type: ignore[assignment]  # not None
        self._weights: list[Any] = []  # in the agreed order
        self._places: dict[int, int] = {}  # index of each in `_weights`, by its id
        self._is_agreed = False  # whether the order is that of a first pass
        self._pass: Pass | None = None
        self._gathering: Gathering | None = None

    def listens_to(self, parameter: Parameter) -> bool:
        """Return True: float gradients are exchanged too."""
        return True

    def __call__(self, parameter: Parameter) -> None:
        """Handle a gradient that is complete on this process."""
        if self._optimizer() is None:
            return
        with self.processes.failures.reporting():
            quantize_gradient_(parameter)
            refuse_sparse(parameter.grad)  # type: ignore[arg-type]  # complete, so not None
            if self._is_accumulating():
                self.complete(parameter)
            else:
                self._arrive(parameter)

    @torch.no_grad()
    def _arrive(self, parameter: Parameter) -> None:
        current = self._pass
        if current is None:
            current = self._begin()
            # Autograd calls it at the end of the pass, but not after an error.
            torch.autograd.Variable._execution_engine.queue_callback(self._end_pass)
        elif current.is_done or id(parameter) in current.arrived:
            raise RuntimeError(SECOND_PASS.format(n=self.processes.n))
        current.arrived[id(parameter)] = None
        weights = self._weights
        while current.n_sent < len(weights) and id(weights[current.n_sent]) in current.arrived:
            self._send_next(current)

    def _begin(self) -> Pass:
        optimizer, processes = self.optimizer, self.processes
        self._refuse_out_of_step()
        device = next(optimizer.parameters()).device
        if not processes.has_begun:
            processes.begin(device)
        trained = [p for p in optimizer.parameters() if p.requires_grad]
        weights = [p for p in trained if isinstance(p, QFTWeight)]
        if {id(weight) for weight in weights} != self._places.keys():
            agree_on_settings(optimizer)
            agree_on_values(optimizer)
            self._order(weights[::-1])
            self._is_agreed = False
        squares = torch.zeros(len(weights), dtype=torch.float64, device=device)
        self._pass = Pass(squares)
        return self._pass

    def _order(self, weights: list[Any]) -> None:
        self._weights = weights
        self._places = {id(weight): place for place, weight in enumerate(weights)}

    def _send_next(self, current: Pass) -> None:
        self._receive(current)
        weight = self._weights[current.n_sent]
        current.n_sent += 1
        current.in_transit = self.processes.send(weight)

    def _receive(self, current: Pass) -> None:
        """Wait for updated rows sent earlier, then use the gradient in transit."""
        exchange, current.in_transit = current.in_transit, None
        if exchange is None:
            return
        self._settle()
        weight = exchange.weight
        square = current.squares[self._places[id(weight)]]
        gradient = self.processes.receive(exchange, square)
        del exchange  # frees what was sent
        if gradient is None:
            return
        if super().wants_tiles:
            weight.grad = gradient
        else:
            weight.grad = own = gradient.quantized()
            del gradient  # frees what was received
            if self._clips_by_own_norm:
                own.square_sum = square.clone()
                self.processes.sum_(own.square_sum)
                square.zero_()
        self.complete(weight)

    @torch.no_grad()
    def _end_pass(self) -> None:
        current = self._pass
        if current is None:  # the step was given up
            return
        with self.processes.failures.reporting():
            while current.n_sent < len(self._weights):
                self._send_next(current)
            self._receive(current)
            self._settle()
            floats = [
                parameter
                for parameter in self.optimizer.parameters()
                if parameter.requires_grad and not isinstance(parameter, QFTWeight)
            ]
            self.processes.mean_(floats)
            for parameter in floats:
                if parameter.grad is not None:
                    self.complete(parameter)
            self.processes.sum_(current.squares)
            if not self._is_agreed:
                self._agree_on_order(current)
            current.is_done = True

    def _agree_on_order(self, current: Pass) -> None:
        """Adopt the order in which process 0 has completed gradients."""
        places = [self._places[number] for number in current.arrived if number in self._places]
        places += sorted(set(range(len(self._weights))) - set(places))
        agreed = self.processes.agreed(places, current.squares.device)
        self._order([self._weights[place] for place in agreed])
        self._is_agreed = True

    def _join(self) -> None:
        """Take part in the exchange even if this process has no gradient."""
        if self._pass is None:
            self._begin()
        elif not self._pass.is_done:  # a backward pass failed half-way
            self.processes.are_in_step = False
            self._refuse_out_of_step()
        if not self._pass.is_done:  # type: ignore[union-attr]  # begun above
            self._end_pass()

    def step(self) -> bool:
        """Do the step of the flow, with gradients that are means over all processes."""
        with self.processes.failures.reporting():
            self._join()
        is_taken = super().step()  # type: ignore[safe-super]  # a flow is next in the MRO
        self._pass = None
        return is_taken

    def _refuse_out_of_step(self) -> None:
        if not self.processes.are_in_step:
            raise RuntimeError(OUT_OF_STEP.format(rank=self.processes.rank, n=self.processes.n))

    def clear(self) -> None:
        """Give up a step that has begun; once the exchange has begun too, no other can follow."""
        if self._n_updated or (self._pass is not None and not self._pass.is_done):
            self.processes.are_in_step = False
        super().clear()
        self._pass = None
        self._gathering = None  # otherwise its rows would replace those of a checkpoint

    def _waiting(self) -> list[Parameter]:
        waiting = super()._waiting()
        for parameter in waiting:
            if isinstance(parameter, QFTWeight) and not isinstance(parameter.grad, OwnRows):
                raise RuntimeError(
                    NOT_EXCHANGED.format(shape=tuple(parameter.shape), n=self.processes.n)
                )
        return waiting

    def _update(self, parameter: Parameter, gradient: Tensor, factor: Tensor | None = None) -> Any:
        """Update the own rows and begin to send them to all processes."""
        with self.processes.failures.reporting():
            squares = super()._update(parameter, gradient, factor)
            if isinstance(gradient, OwnTiles):
                if squares is not None:
                    gradient.square_sum.copy_(squares.sum())
                squares = gradient.square_sum  # of all rows once the pass has ended
            begun = self.processes.gather(parameter)
            self._settle()
            self._gathering = begun
        return squares

    def _settle(self) -> None:
        """Wait for the updated rows that are in transit to this process."""
        begun, self._gathering = self._gathering, None
        if begun is not None:
            self.processes.finish(begun)


class RowsStack(_MultiProcessFlow, Stack):
    """`Stack` on several processes: the own rows of mean gradients wait for the step."""


class RowsRelease(_MultiProcessFlow, Release):
    """`Release` on several processes: own rows are used as soon as their mean is complete."""

    @property
    def _clips_by_own_norm(self) -> bool:  # type: ignore[override]
        return self.optimizer.clipping == "tensor"

    def _join(self) -> None:
        was_in_backward, self._is_in_backward = self._is_in_backward, True  # queues no callback
        super()._join()
        self._is_in_backward = was_in_backward

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        """Within this context, gradients are exchanged, measured and dropped."""
        with super()._measuring():
            yield
            self._join()
            self._pass = None
