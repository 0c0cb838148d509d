"""Time and memory of one optimizer step on a model of SmolLM2-135M's shapes, beside its peers.

Every optimizer steps on the same random weights and gradients in one process, on one thread unless
asked otherwise. Times are ratios to the first row that ran: machines differ and are noisy.
"""

import argparse
import gc
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peers import MakeOptimizer, float_peers
from torch import nn
from torch.optim import Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from qft_hf import QFTConfig, QFTLion, QFTWeight, quantize_model_
from qft_hf.kernels.backend import backend_for
from qft_hf.quant import Int8Gradient

SMOLLM2_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


def build(layers: int) -> LlamaForCausalLM:
    """A float model of SmolLM2's shapes with random weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMOLLM2_135M, num_hidden_layers=layers))


def set_gradients(model: nn.Module) -> None:
    """Give every parameter a random gradient of its own kind."""
    for parameter in model.parameters():
        if isinstance(parameter, QFTWeight):
            gradient = Int8Gradient.zeros(*parameter.shape, dtype=parameter.dtype, device="cpu")
            gradient.set_rows_(slice(0, parameter.shape[0]), torch.randn(parameter.shape))
            parameter.grad = gradient
        else:
            parameter.grad = torch.randn_like(parameter)


def peak_bytes() -> int:
    """High-water mark of resident memory since the last `reset_peak`."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def reset_peak() -> int:
    """Set the high-water mark to what is resident now, and return that."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def measure(
    model: nn.Module, optimizer: Optimizer, *, n_steps: int, before: Callable[[], None]
) -> dict[str, float]:
    """Nanoseconds per parameter (fastest step) and peak bytes above what was there before it."""
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    before()
    optimizer.step()  # makes the state, compiles
    seconds, extra = [], []
    for _ in range(n_steps):
        before()
        gc.collect()
        start_bytes = reset_peak()
        start = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        extra.append(peak_bytes() - start_bytes)
    return {
        "ns_per_parameter": 1e9 * min(seconds) / n_parameters,
        "extra_megabytes": max(0, *extra) / 1e6,  # freed gradients can leave less than before
    }


def measure_qft(backend: str, *, layers: int, n_steps: int) -> dict[str, float]:
    """The INT8 step with one backend."""
    os.environ["QFT_BACKEND"] = backend
    backend_for.cache_clear()
    model = quantize_model_(build(layers), QFTConfig())
    optimizer = QFTLion(model.parameters(), lr=1e-4, weight_decay=0.1)
    return measure(model, optimizer, n_steps=n_steps, before=lambda: set_gradients(model))


def measure_peer(make: MakeOptimizer, *, layers: int, n_steps: int) -> dict[str, float]:
    """The step of a float optimizer on FP32 weights and gradients."""
    model = build(layers)
    optimizer = make(list(model.parameters()))
    return measure(model, optimizer, n_steps=n_steps, before=lambda: set_gradients(model))


def main() -> None:
    """Measure all, print a table, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=30, help="layers of the model (SmolLM2: 30)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each optimizer")
    parser.add_argument("--threads", type=int, default=1, help="threads (default 1)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sizes = {"layers": options.layers, "n_steps": options.steps}

    runs: dict[str, Callable[[], dict[str, float]]] = {
        "QFTLion, cpu backend": lambda: measure_qft("cpu", **sizes),
        "QFTLion, reference backend": lambda: measure_qft("reference", **sizes),
    }
    for name, make in float_peers().items():
        runs[name] = lambda make=make: measure_peer(make, **sizes)

    figures = {}
    print(f"{'optimizer':<30}{'ns/param':>10}{'ratio':>8}{'extra MB':>10}")
    for name, run in runs.items():
        figures[name] = run()
        first = next(iter(figures.values()))["ns_per_parameter"]
        nanoseconds = figures[name]["ns_per_parameter"]
        print(
            f"{name:<30}{nanoseconds:>10.2f}{nanoseconds / first:>8.2f}"
            f"{figures[name]['extra_megabytes']:>10.1f}",
            flush=True,
        )
        gc.collect()
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
