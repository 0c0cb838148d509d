"""Several processes train one model: each holds all weights, and owns a block of rows of each.

On n processes, block k of `ceil(rows / n)` rows of every INT8 weight belongs to process k. Only
process k computes the mean of the block's gradient over all processes, keeps its optimizer state
and updates it. Once a step, for each weight:

1. every process sends each owner that owner's rows of its gradient, as INT8 codes with scales
   (`send`, `receive`); codes are sent without a copy;
2. the owner adds them up in FP32 in the order of processes, divides by n, and updates its rows;
   random numbers are counted by the row in the whole weight, so the step is that of one process;
3. every process sends its updated rows to all: codes, scales and the values of outliers (`gather`).

Float parameters are small: every process gets the mean of their gradients, and all make the same
update. So after each step the weights are equal on all processes, bit for bit.

Bytes that each of n processes holds and receives, per parameter of large matrices:

    weights                              1.061
    gradients that wait for the step     1.016 / n; none in release
    gradients of earlier micro-batches   1.016, in both modes
    optimizer state of Lion              1.016 / n
    received per step, in 1. and 3.      (1.016 + 1.041) (n - 1) / n

All communication uses `torch.distributed`; the launcher starts the processes and chooses the
backend. Tensors are sent as bytes, except in sums, because not every backend supports every dtype.
Collectives have their own process group, and the same order on all processes (`rows.py`).

Source:
    Rajbhandari et al. 2020, "ZeRO" (arXiv:1910.02054), stage 2: gradients and optimizer state are
    divided, weights are not. ZeRO sums gradients in float while it sends them; here each is
    rounded to INT8 once before it is sent, and once more if accumulation rounds it too.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from .. import kernels
from ..layout import STATE_GROUP_SIZE, n_groups, rows_of_process
from ..quant import QFTWeight, quantized
from ..quant.own_rows import OwnTiles
from .failures import LOOK_SECONDS, Failures, ProcessesDiffer
from .state import StateFormat

HEADER_BYTES = 4  # before the scales of a gradient: whether the sender has one

# PyTorch 2.13 renamed it and warns about the old name.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

STOPS = "Process {rank} stops because another has failed. {failure}"
SEVERAL_GPUS = (
    "On several GPUs start a process for each, as `accelerate launch --multi_gpu --num_processes "
    "4 ...` does: each holds all INT8 weights, and a part of gradients and optimizer state."
)

_n_groups = 0  # process groups that `begin` has made; the same on all processes


@dataclass(slots=True)
class Transfer:
    """Bytes in transit."""

    sent: Tensor  # uint8, kept until it has arrived
    received: Tensor  # uint8 `[n_processes, bytes]`: from each process
    work: Any  # handle of the collective, to wait for


@dataclass(slots=True)
class Exchange:
    """Gradient rows of one weight in transit to their owners."""

    weight: Any
    is_used: bool  # whether the weight has a gradient on this process
    scales: Transfer  # behind a header, which holds `is_used` of the sender
    codes: Transfer  # sent without a copy


@dataclass(slots=True)
class Gathering:
    """Updated rows of one weight in transit to all processes."""

    fields: list[Tensor]
    rows: Transfer


class Processes:
    """This process as one of those that train one model.

    Attributes:
        rank: Number of this process.
        n: Number of processes.
        failures: Reports of processes that failed.
        are_in_step: Whether all have begun the same collectives, as far as this process knows.
    """

    def __init__(self) -> None:
        self.rank, self.n = dist.get_rank(), dist.get_world_size()
        self._group: Any = None
        self._timeout = timedelta()
        self._host_waits = True  # for collectives; on a GPU only its stream waits
        self.failures = Failures(self.rank)
        self.are_in_step = True

    @classmethod
    def found(cls) -> "Processes | None":
        """Return the processes that the launcher has started; None if this is the only one."""
        is_one_of_several = (
            dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        )
        return cls() if is_one_of_several else None

    # --- together

    def begin(self, device: torch.device, *, timeout: timedelta | None = None) -> None:
        """Make a process group of our own, because other collectives may run at the same time.

        Args:
            device: Where the parameters are.
            timeout: How long to wait for another process; None: that of the default group.
        """
        global _n_groups
        self._host_waits = device.type == "cpu"
        world: Any = dist.group.WORLD
        self._timeout = timeout or world._get_backend(device).options._timeout
        _n_groups += 1
        store = dist.distributed_c10d._get_default_store()
        self.failures.store = dist.distributed_c10d.PrefixStore(f"qft_hf/{_n_groups}", store)
        self._group = dist.new_group(timeout=self._timeout)
        self.are_in_step = True

    @property
    def has_begun(self) -> bool:
        """Whether `begin` was called."""
        return self._group is not None

    def agree(self, values: dict[str, Any], advice: str) -> None:
        """Raise, on all processes, unless they all have the same values.

        Args:
            values: Values by name, which can be pickled and compared.
            advice: What the user can do about a difference.

        Raises:
            ProcessesDiffer: They do. The text names the first differences.
        """
        everyones: list[Any] = [None] * self.n
        dist.all_gather_object(everyones, values, group=self._group)
        first, differences = everyones[0], []
        for rank, others in enumerate(everyones):
            for name in first.keys() | others.keys():
                one, other = (of.get(name, "nothing") for of in (first, others))
                if one != other:
                    differences.append(f"{name} is {one} on process 0 and {other} on {rank}")
        if differences:
            more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
            raise ProcessesDiffer(
                f"The {self.n} processes differ: {'; '.join(sorted(differences)[:3])}{more}. "
                + advice
            )

    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        """Copy the values of process 0 to all processes, INT8 weights in their stored form."""
        for tensor in tensors:
            if isinstance(tensor, QFTWeight):
                self.broadcast_(tensor.stored.tensors)
                tensor.fields_changed()
                continue
            flat = tensor.detach().reshape(-1).contiguous()
            self.wait(dist.broadcast(flat.view(torch.uint8), 0, group=self._group, async_op=True))
            if flat.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(flat.view(tensor.shape))

    def agreed(self, numbers: list[int], device: torch.device) -> list[int]:
        """Return the numbers of process 0; every process must pass as many."""
        tensor = torch.tensor(numbers, dtype=torch.int64, device=device)
        self.broadcast_([tensor])
        numbers = tensor.tolist()
        return numbers

    def broadcast_from_first(self, value: Any) -> Any:
        """Return the value of process 0, which must be picklable."""
        values = [value]
        dist.broadcast_object_list(values, 0, group=self._group)
        return values[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Within this context, an error on one process is raised on all when they reach its end.

        Raises:
            RuntimeError: Another process has failed within the context.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:  # noqa: BLE001 raised below
            failure = error
        told = None if failure is None else self.failures.text(failure)
        everyones: list[str | None] = [None] * self.n
        dist.all_gather_object(everyones, told, group=self._group)
        if failure is not None:
            raise failure
        for text in everyones:
            if text is not None:
                raise RuntimeError(STOPS.format(rank=self.rank, failure=text))

    def sum_(self, values: Tensor) -> None:
        """Add up the values of all processes in place."""
        self.wait(dist.all_reduce(values, group=self._group, async_op=True))

    def wait(self, work: Any) -> None:
        """Wait for a collective; on a GPU only the stream waits, and the host continues.

        Raises:
            RuntimeError: Another process has failed, has ended, or has not joined the collective
                within the timeout of the process group.
        """
        if not self._host_waits:
            work.wait()
            return
        deadline = time.monotonic() + self._timeout.total_seconds()
        while True:
            try:
                work.wait(timedelta(seconds=LOOK_SECONDS))
                return
            except RuntimeError as error:
                is_over = work.is_completed() or time.monotonic() > deadline
                failure = self.failures.first(patience=2 * LOOK_SECONDS if is_over else 0.0)
                if failure is not None:
                    raise RuntimeError(STOPS.format(rank=self.rank, failure=failure)) from error
                if is_over:
                    raise RuntimeError(
                        f"Process {self.rank} stops because another has ended, or has not reached "
                        f"the same point within {self._timeout}: its own output says why. The "
                        "model may be between two steps: resume from the last checkpoint."
                    ) from error

    # --- rows

    def block(self, n_rows: int) -> int:
        """Return the number of rows of a block; the last blocks may be shorter or empty."""
        return rows_of_process(n_rows, 0, self.n).stop

    def own_rows(self, weight: Any) -> slice:
        """Return the rows of the matrix of a `QFTWeight` that this process owns."""
        return rows_of_process(weight.arrangement.matrix_shape[0], self.rank, self.n)

    def own_format(self, wanted: StateFormat, parameter: Tensor) -> StateFormat:
        """Return the form of the state that this process keeps: of own rows, if INT8."""
        if not isinstance(parameter, QFTWeight):
            return wanted
        own = self.own_rows(parameter)
        n_own = own.stop - own.start
        return {
            name: form._replace(shape=(n_own, *form.shape[1:])) for name, form in wanted.items()
        }

    def own_state(self, whole: dict[str, Tensor], parameter: Tensor) -> dict[str, Tensor]:
        """Return the part of a whole state that this process keeps, in the form of `own_format`."""
        if not isinstance(parameter, QFTWeight):
            return whole
        own = self.own_rows(parameter)
        return {
            name: tensor[own].clone() if tensor.ndim else tensor for name, tensor in whole.items()
        }

    def send(self, weight: Any) -> Exchange:
        """Begin to send each process its rows of the gradient in `.grad`, which becomes None."""
        n_rows, columns = weight.arrangement.matrix_shape
        given, weight.grad = weight.grad, None
        if given is None:
            codes = torch.zeros(n_rows, columns, dtype=torch.int8, device=weight.device)
            scales = torch.zeros(n_rows, n_groups(columns, STATE_GROUP_SIZE), device=weight.device)
        else:
            codes, scales = quantized(given, weight).stored.tensors
        is_used = torch.full(
            (HEADER_BYTES,), given is not None, dtype=torch.uint8, device=weight.device
        )
        blocks = [rows_of_process(n_rows, rank, self.n) for rank in range(self.n)]
        of_scales = [torch.cat([is_used, _flat(bytes_of(scales[rows]))]) for rows in blocks]
        return Exchange(
            weight,
            given is not None,
            scales=self._exchange(torch.cat(of_scales), [len(part) for part in of_scales]),
            codes=self._exchange(
                _flat(bytes_of(codes)), [(rows.stop - rows.start) * columns for rows in blocks]
            ),
        )

    def _exchange(self, sent: Tensor, sizes: list[int]) -> Transfer:
        """Begin to send each process its part of `sent`, where the parts are in process order."""
        own = sizes[self.rank]
        received = sent.new_empty(self.n, own)
        work = dist.all_to_all_single(
            received.view(-1), sent, [own] * self.n, sizes, group=self._group, async_op=True
        )
        return Transfer(sent, received, work)

    def receive(self, exchange: Exchange, square: Tensor) -> OwnTiles | None:
        """Return the mean of the gradients that `send` has sent; None if no process had one.

        Args:
            exchange: What `send` returned.
            square: fp64 scalar of 0, later set to the sum of squares of the own rows.
        """
        for transfer in (exchange.scales, exchange.codes):
            self.wait(transfer.work)
        weight, received = exchange.weight, exchange.scales.received
        # Only a process without a gradient has to check the others, which waits for the GPU.
        if not exchange.is_used and not bool(received[:, 0].any()):
            return None
        own = self.own_rows(weight)
        n_own, columns = own.stop - own.start, weight.arrangement.columns
        scales = received[:, HEADER_BYTES:].contiguous().view(torch.float32)
        scales = scales.view(self.n, n_own, n_groups(columns, STATE_GROUP_SIZE))
        codes = exchange.codes.received.view(torch.int8).view(self.n, n_own, columns)
        n = scales.new_full((1,), self.n)  # for a number, CUDA multiplies by its reciprocal

        def mean(rows: slice) -> Tensor:
            total, *others = (
                kernels.Quantized(codes_of_one[rows], scales_of_one[rows], STATE_GROUP_SIZE)
                for codes_of_one, scales_of_one in zip(codes, scales, strict=True)
            )
            values = _values(total)
            for other in others:
                values += _values(other)
            return values.div_(n)

        return OwnTiles(mean, own_rows=own, square_sum=square, like=weight)

    def mean_(self, parameters: list[Parameter]) -> None:
        """Put the mean of float gradients over all processes into `.grad`, by one collective.

        A parameter that has no gradient on any process still has none afterwards.
        """
        if not parameters:
            return
        has = [parameter.grad is not None for parameter in parameters]
        flags = torch.tensor(has, dtype=torch.float32, device=parameters[0].device)
        parts = [
            torch.zeros_like(parameter, dtype=torch.float32).flatten()
            if parameter.grad is None
            else parameter.grad.to(torch.float32).flatten()
            for parameter in parameters
        ]
        bucket = torch.cat([flags, *parts])
        self.sum_(bucket)
        sums = bucket.split([len(parameters), *map(len, parts)])
        used = has if all(has) else [count > 0 for count in sums[0].tolist()]
        n = bucket.new_full((1,), self.n)
        for parameter, total, is_used in zip(parameters, sums[1:], used, strict=True):
            if is_used:
                parameter.grad = total.div_(n).view(parameter.shape).to(parameter.dtype)

    def gather(self, weight: Any) -> Gathering:
        """Begin to send the own rows of a weight to all; `finish` stores those of the others."""
        n_rows = weight.arrangement.matrix_shape[0]
        own, block = self.own_rows(weight), self.block(n_rows)
        n_own = own.stop - own.start
        # Outlier columns do not change.
        fields = [weight.codes, weight.scales, weight.outlier_values]
        parts = []
        for field in map(bytes_of, fields):
            padding = field.new_zeros((block - n_own) * field.shape[1])
            parts += [_flat(field[own]), padding]
        sent = torch.cat(parts)
        received = torch.empty(self.n, len(sent), dtype=torch.uint8, device=weight.device)
        work = _all_gather(received.view(-1), sent, group=self._group, async_op=True)
        return Gathering(fields, Transfer(sent, received, work))

    def finish(self, gathering: Gathering) -> None:
        """Wait for the rows of all processes and copy them into the weight."""
        self.wait(gathering.rows.work)
        begin = 0
        for field in map(bytes_of, gathering.fields):
            n_rows, width = field.shape  # width is 0 without outliers
            block = self.block(n_rows)
            end = begin + block * width
            rows = gathering.rows.received[:, begin:end].reshape(self.n * block, width)
            field.copy_(rows[:n_rows])
            begin = end

    def whole(self, rows: Tensor, n_rows: int) -> Tensor | None:
        """Gather the rows of a state tensor on the host of process 0; return None on the others.

        Args:
            rows: The own rows, `[n_own, ...]`.
            n_rows: Number of rows of all processes together.
        """
        block = self.block(n_rows)
        padded = rows.new_zeros(block, *rows.shape[1:])
        padded[: len(rows)] = rows
        sent = _flat(bytes_of(padded))
        received = sent.new_empty(self.n, len(sent)) if self.rank == 0 else None
        parts = None if received is None else list(received)
        self.wait(dist.gather(sent, parts, 0, group=self._group, async_op=True))
        if received is None:
            return None
        whole = received.view(-1).view(rows.dtype).view(self.n * block, *rows.shape[1:])
        return whole[:n_rows].cpu()


def _values(rows: kernels.Quantized) -> Tensor:
    return kernels.dequantize(kernels.Weight.dense(rows), dtype=torch.float32)


def bytes_of(matrix: Tensor) -> Tensor:
    """Return a contiguous matrix as uint8 `[rows, bytes]`, in the same memory."""
    return matrix.contiguous().view(torch.uint8)


def _flat(matrix: Tensor) -> Tensor:
    return matrix.reshape(-1)
