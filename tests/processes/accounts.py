"""What each of several processes holds and receives, counted where it is."""

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

# One word: two matrices of one row, of which the second process owns none; others have 75 rows.
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
        ("stack", "qft_lion", 8), ("release", "qft_lion", 4), ("stack", "qft_adamw", 8),
        ("release", "qft_adamw", 8),
    )
}  # fmt: skip


def model_of(sizes: dict[str, Any]) -> Any:
    return quantize_model_(tiny_llama(**sizes), QFTConfig())


def optimizer_of(model: Any, *, gradient: str, optimizer: str, momentum_bits: int) -> Any:
    bits = {"momentum_bits": momentum_bits} if optimizer == "qft_lion" else {}
    make = OPTIMIZERS[optimizer].optimizer_class
    return make(model.parameters(), lr=1e-3, gradient=gradient, **bits)


def backward(model: Any, rank: int, rows: int = 1) -> None:
    ids = share(rank, rows) % model.config.vocab_size
    model(input_ids=ids, labels=ids).loss.backward()


def share(rank: int, rows: int) -> Tensor:
    """What a process sees: as many words as all others."""
    return torch.randint(2**31, (rows, 32), generator=torch.Generator().manual_seed(rank))


def ledger(way: dict[str, Any], rank: int) -> dict[str, Any]:
    """The states at their largest, just before the second step; and the printed table.

    Also the collectives of that backward pass and step.
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
    """Calls, and bytes that come in from others, while this is active; an all-reduce is a ring."""

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
    """What is alive of rows that are sent and received at one time, while this is active.

    Attributes:
        most: Bytes.
        most_weights: How many weights they are of.
        copied: Bytes of gradients that were not sent from where they lie.
    """

    def __init__(self) -> None:
        self.bytes = self.most = self.most_weights = self.copied = 0
        self.tensors: Counter[int] = Counter()  # alive, by the identity of their weight

    def __enter__(self) -> "UnderWay":
        self._originals = (Processes.send, Processes.gather)
        Processes.send = lambda *arguments: self._send(*arguments)
        Processes.gather = lambda *arguments: self._gather(*arguments)
        return self

    def __exit__(self, *_: object) -> None:
        Processes.send, Processes.gather = self._originals

    def _send(self, processes: Processes, weight: Any) -> Any:
        codes = weight.grad.codes.data_ptr()
        begun = self._originals[0](processes, weight)
        self.copied += 0 if begun.codes.sent.data_ptr() == codes else begun.codes.sent.nbytes
        self._count(weight, begun.scales, begun.codes)
        return begun

    def _gather(self, processes: Processes, weight: Any) -> Any:
        begun = self._originals[1](processes, weight)
        self._count(weight, begun.rows)
        return begun

    def _count(self, weight: Any, *transfers: Transfer) -> None:
        for transfer in transfers:
            for tensor in (transfer.sent, transfer.received):
                self.bytes += tensor.nbytes
                self.tensors[id(weight)] += 1
                weakref.finalize(tensor, self._gone, id(weight), tensor.nbytes)
        self.most = max(self.most, self.bytes)
        self.most_weights = max(self.most_weights, sum(n > 0 for n in self.tensors.values()))

    def _gone(self, weight: int, n_bytes: int) -> None:
        self.bytes -= n_bytes
        self.tensors[weight] -= 1


def traffic(gradient: str, rank: int, n: int) -> dict[str, float]:
    """Of a step of real shapes, when the order of weights has been agreed."""
    model = model_of(REAL)
    optimizer = optimizer_of(model, gradient=gradient, optimizer="qft_lion", momentum_bits=8)
    backward(model, rank)
    optimizer.step()
    counts = []
    for _ in range(3):
        with Collectives(n) as collectives, UnderWay() as rows:
            backward(model, rank)
            in_backward = rows.most
            optimizer.step()
        counts.append((in_backward, rows.most_weights, rows.copied))
    # The least: a thread of gloo may let go of a tensor some time after the work is done.
    under_way, weights, copied = map(min, zip(*counts, strict=True))
    return {
        "received": collectives.received, "under way": under_way, "weights": weights,
        "copied": copied,
    }  # fmt: skip


def mean_gradient(rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Codes and scales of the own rows of the mean over all processes."""
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
    """While a process that owns no rows need not wait for those that do."""
    for way in WAYS.values():
        ledger(way, rank=0)


COUNTS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    **{name: lambda rank, n, way=way: ledger(way, rank) for name, way in WAYS.items()},
    "traffic of stack": partial(traffic, "stack"),
    "traffic of release": partial(traffic, "release"),
    "mean": lambda rank, n: mean_gradient(rank),
}
