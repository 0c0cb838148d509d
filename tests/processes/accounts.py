"""What each of several processes holds and receives, counted where it is.

torchrun --nproc-per-node 2 -m tests.processes.accounts FOLDER
"""

import sys
import weakref
from dataclasses import astuple
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qft_hf import QFTConfig, QFTWeight, memory_ledger, quantize_model_
from qft_hf.hf.optimizers import OPTIMIZERS
from qft_hf.optim import processes
from qft_hf.optim.processes import Processes
from tests.models import tiny_llama
from tests.processes.launch import TIMEOUT_SECONDS

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
        ("stack", "qft_lion", 8), ("release", "qft_lion", 4), ("stack", "qft_adamw", 8)
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
    """The states at their largest, just before the second step; and the printed table."""
    model = model_of(UNEVEN)
    optimizer = optimizer_of(model, **way)
    backward(model, rank)
    optimizer.step()
    backward(model, rank)
    found = memory_ledger(model, optimizer)
    return {"rows": [astuple(row) for row in found.rows], "text": str(found)}


class Collectives:
    """Bytes that come in from other processes, while this is active; an all-reduce is a ring."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.received = 0.0

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
            return collective(tensor, *arguments, **options)

        return call


class UnderWay:
    """The most bytes of rows that are sent and received at one time, while this is active."""

    def __init__(self) -> None:
        self.bytes = self.most = 0

    def __enter__(self) -> "UnderWay":
        self._originals = (Processes.send, Processes.gather)
        Processes.send, Processes.gather = map(self._counted, self._originals)
        return self

    def __exit__(self, *_: object) -> None:
        Processes.send, Processes.gather = self._originals

    def _counted(self, begin: Any) -> Any:
        def call(*arguments: Any) -> Any:
            begun = begin(*arguments)
            for tensor in (begun.sent, begun.received):
                self.bytes += tensor.nbytes
                weakref.finalize(tensor, self._gone, tensor.nbytes)
            self.most = max(self.most, self.bytes)
            return begun

        return call

    def _gone(self, n_bytes: int) -> None:
        self.bytes -= n_bytes


def traffic(gradient: str, rank: int, n: int) -> dict[str, float]:
    """Of a step of real shapes, when the order of weights has been agreed."""
    model = model_of(REAL)
    optimizer = optimizer_of(model, gradient=gradient, optimizer="qft_lion", momentum_bits=8)
    backward(model, rank)
    optimizer.step()
    under_way = []
    for _ in range(3):
        with Collectives(n) as collectives, UnderWay() as rows:
            backward(model, rank)
            optimizer.step()
        under_way.append(rows.most)
    # The least: a thread of gloo may let go of a tensor some time after the work is done.
    return {"received": collectives.received, "under way": min(under_way)}


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


def main() -> None:
    """Count on this process of several."""
    folder = Path(sys.argv[1])
    for way in WAYS.values():  # who owns no rows would wait for the others to compile kernels
        ledger(way, rank=0)
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_SECONDS))
    rank, n = dist.get_rank(), dist.get_world_size()
    found: dict[str, Any] = {name: ledger(way, rank) for name, way in WAYS.items()}
    found |= {gradient: traffic(gradient, rank, n) for gradient in ("stack", "release")}
    found["mean"] = mean_gradient(rank)
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
