"""Time and memory of an optimizer step of QFT and of its peers, on the shapes of SmolLM2-135M.

All optimizers step on the same random weights and gradients in one process, by default on one
thread. Machines differ and are noisy, so the report has the ratio of each time to the first row's.
"""

import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, where common/ is
from common import report
from common.command_line import command_line
from common.peak_memory import peak_bytes, reset_peak
from common.peers import MakeOptimizer, float_peers
from common.shapes import model_config

from qft_hf import QFTConfig, QFTLion, QFTWeight, quantize_model_
from qft_hf.kernels import backend
from qft_hf.quant import Int8Gradient

CPU = torch.device("cpu")


def build(layers: int) -> LlamaForCausalLM:
    """Return a float model with SmolLM2's shapes and random weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(model_config("smollm2-135m", layers))


def set_gradients(model: nn.Module) -> None:
    """Give every parameter a random gradient: INT8 for an INT8 weight, otherwise float."""
    for parameter in model.parameters():
        if isinstance(parameter, QFTWeight):
            gradient = Int8Gradient.zeros(parameter)
            gradient.set_rows_(slice(0, parameter.shape[0]), torch.randn(parameter.shape))
            parameter.grad = gradient
        else:
            parameter.grad = torch.randn_like(parameter)


def measure(model: nn.Module, optimizer: Optimizer, *, n_steps: int) -> dict[str, float]:
    """Return nanoseconds per parameter in the fastest step, and peak megabytes added by a step."""
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    set_gradients(model)
    optimizer.step()  # makes the state, compiles
    seconds, extra = [], []
    for _ in range(n_steps):
        set_gradients(model)
        start_bytes = reset_peak(CPU)
        start = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        extra.append(peak_bytes(CPU) - start_bytes)
    return {
        "ns_per_parameter": 1e9 * min(seconds) / n_parameters,
        "extra_megabytes": max(0, *extra) / 1e6,  # freed gradients can leave less than before
    }


def measure_qft(name: str, *, layers: int, n_steps: int) -> dict[str, float]:
    """Return the figures of the INT8 step with one backend."""
    model = quantize_model_(build(layers), QFTConfig())
    optimizer = QFTLion(model.parameters(), lr=1e-4, weight_decay=0.1)
    with backend.use(name):
        return measure(model, optimizer, n_steps=n_steps)


def measure_peer(make: MakeOptimizer, *, layers: int, n_steps: int) -> dict[str, float]:
    """Return the figures of a step of a float optimizer on FP32 weights and gradients."""
    model = build(layers)
    optimizer = make(list(model.parameters()))
    return measure(model, optimizer, n_steps=n_steps)


def main() -> None:
    """Measure all optimizers, and write the report after each."""
    options = command_line(__doc__, layers=30, steps=3, threads=1).parse_args()
    torch.set_num_threads(options.threads)
    sizes = {"layers": options.layers, "n_steps": options.steps}

    runs: dict[str, Callable[[], dict[str, float]]] = {
        "QFTLion, cpu backend": lambda: measure_qft("cpu", **sizes),
        "QFTLion, reference backend": lambda: measure_qft("reference", **sizes),
    }
    for name, make in float_peers().items():
        runs[name] = lambda make=make: measure_peer(make, **sizes)

    figures = {}
    for name, run in runs.items():
        print(f"== {name}", flush=True)
        figures[name] = run()
        first = next(iter(figures.values()))["ns_per_parameter"]
        figures[name]["ratio"] = figures[name]["ns_per_parameter"] / first
        text = report.figures_table("optimizer", figures)
        report.write(options, {"optimizers": figures}, text)
        gc.collect()
    report.finish(options, text)


if __name__ == "__main__":
    main()
