"""Count, on each of several processes, what it holds and receives."""

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import astuple
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qft_hf import QFTConfig, QFTWeight, memory_ledger, quantize_model_
from qft_hf.hf.optimizers import OPTIMIZERS
from qft_hf.optim import processes
from qft_hf.optim.processes import Processes, Transfer
from tests.models import tiny_llama

# One word: two matrices have one row, and the second process owns none; others have 75 rows.
UNEVEN: dict[str, Any] = {"vocab_size": 1, "bos_token_id": 0, "eos_token_id": 0}
# Layers of SmolLM2-135M, and a part of its vocabulary.
REAL: dict[str, Any] = {
    "vocab_size": 2048, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
    "num_key_value_heads": 3,
}  # fmt: skip

BROAD: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 256}

WAYS = {
    f"{gradient}, {optimizer}, {bits}": {
        "gradient": gradient, "optimizer": optimizer, "momentum_bits": bits,
    }
    for gradient, optimizer, bits in (
        ("stack", "qft_lion", 8), ("release", "qft_lion", 4), ("stack", "qft_adamw", None),
        ("release", "qft_adamw", None),
    )
}  # fmt: skip


def model_of(sizes: dict[str, Any]) -> Any:
    return quantize_model_(tiny_llama(**sizes), QFTConfig())


def optimizer_of(model: Any, *, gradient: str, optimizer: str, momentum_bits: int | None) -> Any:
    bits = {"momentum_bits": momentum_bits} if momentum_bits else {}
    make = OPTIMIZERS[optimizer].optimizer_class
    return make(model.parameters(), lr=1e-3, gradient=gradient, **bits)


def backward(model: Any, rank: int, rows: int = 1) -> None:
    ids = share(rank, rows) % model.config.vocab_size
    model(input_ids=ids, labels=ids).loss.backward()


def share(rank: int, rows: int) -> Tensor:
    """Return the tokens of one process, as many as every other process has."""
    return torch.randint(2**31, (rows, 32), generator=torch.Generator().manual_seed(rank))


def ledger(way: dict[str, Any], rank: int) -> dict[str, Any]:
    """Return the ledger, and its text, just before the second step, when states are largest.

    Also return the calls of collectives during that backward pass and step.
    """
    model = model_of(UNEVEN)
    optimizer = optimizer_of(model, **way)
    backward(model, rank)
    optimizer.step()
    with Collectives(n=2) as collectives:
        backward(model, rank)
        found = memory_ledger(model, optimizer)
        optimizer.step()
    return {
        "rows": [astuple(row) for row in found.rows], "text": str(found),
        "calls": dict(collectives.calls),
    }  # fmt: skip


class Collectives:
    """Counts calls and bytes received from others while active; an all-reduce counts as a ring."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.received = 0.0
        self.calls: Counter[str] = Counter()

    def __enter__(self) -> "Collectives":
        self._originals = (dist.all_to_all_single, processes._all_gather, dist.all_reduce)
        of_others = (self.n - 1) / self.n
        dist.all_to_all_single = self._counted(dist.all_to_all_single, of_others)
        processes._all_gather = self._counted(processes._all_gather, of_others)
        dist.all_reduce = self._counted(dist.all_reduce, 2 * of_others)
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_to_all_single, processes._all_gather, dist.all_reduce = self._originals

    def _counted(self, collective: Any, share: float) -> Any:
        def call(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
            self.received += share * tensor.nbytes
            self.calls[collective.__name__] += 1
            return collective(tensor, *arguments, **options)

        return call


class UnderWay:
    """Records rows that are being sent and received, while active.

    Attributes:
        most: The largest number of bytes that were alive at one time.
        copied: Bytes of gradients that were not sent from where they are stored.
        events: Transfers in the order in which they began and ended, with the identity of a weight.
    """

    METHODS = ("send", "receive", "gather", "finish")

    def __init__(self) -> None:
        self.bytes = self.most = self.copied = 0
        self.events: list[tuple[str, int]] = []
        self._gathered: dict[int, int] = {}  # ids of weights, by the id of a gathering in transit

    def __enter__(self) -> "UnderWay":
        self._originals = {name: getattr(Processes, name) for name in self.METHODS}
        for name in self.METHODS:
            method = getattr(self, f"_{name}")
            setattr(Processes, name, lambda *arguments, method=method: method(*arguments))
        return self

    def __exit__(self, *_: object) -> None:
        for name, original in self._originals.items():
            setattr(Processes, name, original)

    @property
    def most_weights(self) -> int:
        """The largest number of weights whose rows are in transit at one time."""
        in_transit: set[tuple[str, int]] = set()
        most = 0
        for event, weight in self.events:
            if event in ("sent", "gathered"):
                in_transit.add((event, weight))
            elif event in ("received", "finished"):
                in_transit.remove(("sent" if event == "received" else "gathered", weight))
            most = max(most, len({weight for _, weight in in_transit}))
        return most

    def made(self, weight: int, gradient: Tensor) -> None:
        """Record, as a hook, that backward has computed the gradient of a weight."""
        self.events.append(("made", weight))

    def _send(self, processes: Processes, weight: Any) -> Any:
        codes = weight.grad.codes.data_ptr()
        begun = self._originals["send"](processes, weight)
        self.events.append(("sent", id(weight)))
        self.copied += 0 if begun.codes.sent.data_ptr() == codes else begun.codes.sent.nbytes
        self._count(begun.scales, begun.codes)
        return begun

    def _receive(self, processes: Processes, exchange: Any, square: Tensor) -> Any:
        self.events.append(("received", id(exchange.weight)))
        return self._originals["receive"](processes, exchange, square)

    def _gather(self, processes: Processes, weight: Any) -> Any:
        begun = self._originals["gather"](processes, weight)
        self.events.append(("gathered", id(weight)))
        self._gathered[id(begun)] = id(weight)
        self._count(begun.rows)
        return begun

    def _finish(self, processes: Processes, gathering: Any) -> None:
        self._originals["finish"](processes, gathering)
        self.events.append(("finished", self._gathered.pop(id(gathering))))

    def _count(self, *transfers: Transfer) -> None:
        for transfer in transfers:
            for tensor in (transfer.sent, transfer.received):
                self.bytes += tensor.nbytes
                weakref.finalize(tensor, self._gone, tensor.nbytes)
        self.most = max(self.most, self.bytes)

    def _gone(self, n_bytes: int) -> None:
        self.bytes -= n_bytes


def traffic(gradient: str, rank: int, n: int) -> dict[str, Any]:
    """Count one step with real shapes, after the processes have agreed on the order of weights."""
    model = model_of(REAL)
    optimizer = optimizer_of(model, gradient=gradient, optimizer="qft_lion", momentum_bits=8)
    backward(model, rank)
    optimizer.step()
    in_backward = []
    weights = [p for p in model.parameters() if isinstance(p, QFTWeight)]
    for _ in range(5):
        with Collectives(n) as collectives, UnderWay() as rows:
            hooks = [weight.register_hook(partial(rows.made, id(weight))) for weight in weights]
            backward(model, rank)
            for hook in hooks:
                hook.remove()
            in_backward.append(rows.most)
            optimizer.step()
    return {
        "received": collectives.received, "weights": rows.most_weights, "copied": rows.copied,
        # The minimum, as a thread of gloo may free a tensor some time after the work is done.
        "in transit": min(in_backward), "events": rows.events,
    }  # fmt: skip


def mean_gradient(rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return codes and scales of the own rows of the mean gradient over all processes."""
    model = model_of(BROAD)
    optimizer = optimizer_of(model, gradient="stack", optimizer="qft_lion", momentum_bits=8)
    backward(model, rank, rows=8)
    gradients = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if isinstance(parameter, QFTWeight)
    }
    found = {name: (*gradient.fields().values(),) for name, gradient in gradients.items()}
    optimizer.zero_grad()
    return found


def compile_kernels() -> None:
    """Compile before the processes meet, so that one without rows does not wait for the others."""
    for way in WAYS.values():
        ledger(way, rank=0)


COUNTS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    **{name: lambda rank, n, way=way: ledger(way, rank) for name, way in WAYS.items()},
    "traffic of stack": partial(traffic, "stack"),
    "traffic of release": partial(traffic, "release"),
    "mean": lambda rank, n: mean_gradient(rank),
}
