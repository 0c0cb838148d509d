"""Time of a whole training step: AdamW in FP32 and bf16, QFT, FlashOptim, torchao's INT8 training.

    python scripts/benchmarks/benchmark_training.py               # small, on a CPU
    python scripts/benchmarks/benchmark_training.py --device cuda --config llama-1b \\
        --batch_size 1 --sequence_length 512 2048 8192
    python scripts/benchmarks/benchmark_training.py --compile --only bf16 QFT

All ways use the same model and the same batch, and take turns: one step of each, round after round,
so that other load on the machine affects all alike. Reported are the times of forward, backward and
optimizer in the step of median length, and the ratio of the whole step to AdamW's. On a GPU,
PyTorch's profiler adds how long the device was busy in one more step, and with how many operations;
a step that takes much longer than that waits for the host. Absolute times mean little on a machine
that others use, and the ratios hold for this device only. If matplotlib is installed, the report
has a picture, `steps.png`, of the first sequence length.
"""

import argparse
import ctypes
import importlib.util
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.optim import Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, where common/ is
from common import bars, report
from common.command_line import chosen, command_line
from common.peers import MakeOptimizer, flash_peers
from common.shapes import model_config

from qft_hf import QFTConfig, QFTLion, quantize_model_
from qft_hf.hf.compiled_layers import compile_layers_
from qft_hf.nn import int8

PHASES = ("forward", "backward", "step")
FP32_ADAMW, AUTOCAST_ADAMW, BF16_ADAMW = "FP32 AdamW", "bf16 autocast AdamW", "bf16 AdamW"
BASELINES = (FP32_ADAMW, AUTOCAST_ADAMW, BF16_ADAMW)

# By sequence length and way: seconds of each phase, and the work of the device.
Figures = dict[int, dict[str, dict[str, float]]]


@dataclass
class Way:
    """A model and its optimizer."""

    model: nn.Module
    optimizer: Optimizer
    autocast: bool = False


def adamw(model: nn.Module, *, autocast: bool = False) -> Way:
    """Return AdamW with weights and states of the model's dtype."""
    return Way(model, torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True), autocast)


def qft(model: nn.Module, dtype: torch.dtype, gradient: str = "stack", **config) -> Way:
    """Return Lion with INT8 weights, gradients and momentum; activations are of `dtype`."""
    model = quantize_model_(model.to(dtype), QFTConfig(**config))
    return Way(model, QFTLion(model.parameters(), lr=1e-5, weight_decay=0.1, gradient=gradient))


def torchao_mixed(model: nn.Module, dtype: torch.dtype) -> Way:
    """Return torchao's mixed precision: float weights that are quantized for each product."""
    from torchao import quantize_
    from torchao.prototype.quantized_training import int8_mixed_precision_training

    model = model.to(dtype)
    quantize_(model, int8_mixed_precision_training(), filter_fn=_is_inner_linear)
    return Way(model, torch.optim.AdamW(model.parameters(), lr=1e-5))


def torchao_quantized(model: nn.Module, dtype: torch.dtype) -> Way:
    """Return torchao's INT8 weights, with the optimizer that torchao has for them."""
    from torchao import quantize_
    from torchao.optim import _AdamW
    from torchao.prototype.quantized_training import int8_weight_only_quantized_training

    model = model.to(dtype)
    quantize_(model, int8_weight_only_quantized_training(), filter_fn=_is_inner_linear)
    return Way(model, _AdamW(model.parameters(), lr=1e-5))


def _flash(model: nn.Module, make: MakeOptimizer) -> Way:
    model = model.to(torch.bfloat16)
    return Way(model, make(list(model.parameters())))


def _is_inner_linear(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and "lm_head" not in name


def ways(dtype: torch.dtype) -> dict[str, Callable[[nn.Module], Way]]:
    """Return, by name, the function that makes each way from a float model."""
    made: dict[str, Callable[[nn.Module], Way]] = {
        FP32_ADAMW: adamw,
        AUTOCAST_ADAMW: lambda model: adamw(model, autocast=True),
        BF16_ADAMW: lambda model: adamw(model.to(torch.bfloat16)),
        "QFT, dequantize": lambda model: qft(model, dtype),
        "QFT release, dequantize": lambda model: qft(model, dtype, "release"),
        "QFT, int8": lambda model: qft(model, dtype, matmul="int8"),
        "QFT release, int8": lambda model: qft(model, dtype, "release", matmul="int8"),
        "QFT, int8, no outlier columns": lambda model: qft(
            model, dtype, matmul="int8", outlier_fraction=0.0
        ),
    }
    for name, make in flash_peers().items():
        made[name] = lambda model, make=make: _flash(model, make)
    if importlib.util.find_spec("torchao"):
        made["torchao INT8 mixed precision"] = lambda model: torchao_mixed(model, dtype)
        made["torchao INT8 quantized"] = lambda model: torchao_quantized(model, dtype)
    else:
        print("torchao is not installed, so it is not measured: pip install torchao")
    return made


def step(way: Way, ids: Tensor, clock: Callable[[], float]) -> dict[str, float]:
    """Take one training step, and return the seconds of each phase by `clock`."""
    device = ids.device

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock()

    times = [now()]
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=way.autocast):
        loss = way.model(input_ids=ids, labels=ids).loss
    times.append(now())
    loss.backward()
    times.append(now())
    way.optimizer.step()
    way.optimizer.zero_grad()
    times.append(now())
    return {phase: times[i + 1] - times[i] for i, phase in enumerate(PHASES)}


def measure(config: LlamaConfig, options: argparse.Namespace) -> Figures:
    """Return the median step by sequence length, way and phase; print which peers cannot run.

    Args:
        config: Configuration of the model.
        options: The command line.
    """
    device = torch.device(options.device)
    clock = time.process_time if options.cpu_time else time.perf_counter
    torch.manual_seed(0)
    batches = {
        length: torch.randint(config.vocab_size, (options.batch_size, length), device=device)
        for length in options.sequence_length
    }
    made: dict[str, Way] = {}
    for name, make in chosen(ways(getattr(torch, options.dtype)), options.only).items():
        torch.manual_seed(0)
        with device:
            model = LlamaForCausalLM(config).train()
        if options.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        way = make(model)
        if options.compile:
            compile_layers_(way.model, {})
        try:
            step(way, next(iter(batches.values())), clock)  # creates the states, and compiles
        except (RuntimeError, NotImplementedError, TypeError) as error:
            if name.startswith(("QFT", *BASELINES)):  # these must run; a peer may fail
                raise
            print(f"{name} does not run on {device}, so it is not measured: {error}")
            continue
        made[name] = way
    figures: Figures = {}
    for length, ids in batches.items():
        seconds: dict[str, list[dict[str, float]]] = {name: [] for name in made}
        for way in made.values():
            step(way, ids, clock)  # compiles and fills caches for this size
        for number in range(options.steps):
            for name, way in made.items():
                seconds[name].append(step(way, ids, clock))
            print(f"length {length}, round {number + 1} of {options.steps}", flush=True)
        figures[length] = {name: _median_step(steps) for name, steps in seconds.items()}
        if device.type == "cuda":
            for name, way in made.items():
                with torch.profiler.profile() as recorded:
                    step(way, ids, clock)
                figures[length][name] |= device_work(recorded.events())
    return figures


def device_work(events: Iterable[FunctionEvent]) -> dict[str, float]:
    """Return the seconds of device work in recorded events, and its number of operations."""
    work = [
        event.time_range.elapsed_us()
        for event in events
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    return {"device_busy": sum(work) / 1e6, "device_operations": len(work)}


def _median_step(steps: list[dict[str, float]]) -> dict[str, float]:
    """Return the step of median length: unlike medians of phases, its phases add up."""
    wholes = [step | {"whole": sum(step.values())} for step in steps]
    return sorted(wholes, key=lambda step: step["whole"])[(len(wholes) - 1) // 2]


def table(figures: dict[str, dict[str, float]]) -> str:
    """Return a table of milliseconds, ratios, and the work of the device."""
    rows = {}
    for name, way in figures.items():
        row = {f"{phase}, ms": 1e3 * way[phase] for phase in PHASES}
        for base in BASELINES:
            if base in figures:
                row[f"of {base}"] = way["whole"] / figures[base]["whole"]
        if "device_busy" in way:
            row["device busy, ms"] = 1e3 * way["device_busy"]
            row["device operations"] = way["device_operations"]
        rows[name] = row
    return report.figures_table("way", rows)


def keep_freed_memory() -> None:
    """Make the C library keep freed memory, as PyTorch does on GPUs, instead of returning it.

    Memory that was returned is mapped again page by page. This takes up to half of a step, varies
    at random and affects every way, so it would hide the differences between them.
    """
    trim_threshold, mmap_max = -1, -4  # from glibc's malloc.h
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        print("This C library has no mallopt: times include mapping freed memory again.")
        return
    library.mallopt(trim_threshold, -1)  # never trim; large models free more than any threshold
    library.mallopt(mmap_max, 0)


def main() -> None:
    """Measure all ways, and write the report with a picture."""
    parser = command_line(
        __doc__, device="cpu", config="smollm2-135m", layers=None, batch_size=2,
        sequence_length=[256], steps=5, threads=1, only=None, dtype=None,
    )  # fmt: skip
    parser.add_argument(
        "--cpu_time",
        action="store_true",
        help="CPU seconds of one thread instead of wall time, for a CPU shared with other programs",
    )
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument(
        "--compile", action="store_true", help="compile the layers of all ways, one by one"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    device = torch.device(options.device)
    has_bf16 = device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()
    options.dtype = options.dtype or ("bfloat16" if has_bf16 else "float32")
    config = model_config(options.config, options.layers)
    config.use_cache = False  # as in a Trainer
    if device.type == "cpu" and not options.layers:
        config.num_hidden_layers = min(4, config.num_hidden_layers)
    if options.cpu_time and (device.type != "cpu" or options.threads != 1):
        parser.error("--cpu_time needs --device cpu and one thread")
    if options.batch_size * min(options.sequence_length) < int8.MIN_TOKENS:
        parser.error(f"INT8 products need {int8.MIN_TOKENS} tokens or more in a batch")

    figures = measure(config, options)
    clock = "CPU time" if options.cpu_time else "wall time"
    titles = {
        length: f"{options.config}, {config.num_hidden_layers} layers, {options.batch_size} x "
        f"{length} tokens, {clock}"
        for length in figures
    }
    text = "\n\n".join(f"{titles[length]}\n\n{table(ways)}" for length, ways in figures.items())
    report.write(options, {"layers": config.num_hidden_layers, "median_seconds": figures}, text)
    if importlib.util.find_spec("matplotlib"):
        length, found = next(iter(figures.items()))
        first, whole = next((name, way["whole"]) for name, way in found.items())
        shares = {n: {p: way[p] / whole for p in PHASES} for n, way in found.items()}
        title = f"{titles[length]}\n{report.device_name(device)}"
        unit = f"time of a training step, {first} = 1"
        bars.draw(shares, options.output / "steps.png", title=title, unit=unit)
    else:
        print("matplotlib is not installed, so there is no picture: pip install matplotlib")
    report.finish(options, text)


if __name__ == "__main__":
    main()
