"""Time of a whole training step: FP32 and bf16 AdamW, QFT, and torchao's INT8 training beside it.

    python scripts/benchmark_training.py                                  # small, on a CPU
    python scripts/benchmark_training.py --device cuda --config llama-1b --batch 2 --sequence 2048

Every way has the same model and the same batch, and all take turns: one step of each, round after
round, so that what else the machine does falls on all alike. Reported are forward, backward and
optimizer step of the step of median length, and the whole against AdamW. Absolute times mean
little on a machine that others use; the ratios hold for this device only. Writes `figures.json`,
`table.md` and, where matplotlib is installed, `steps.png`.
"""

import argparse
import ctypes
import importlib.util
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from benchmark_step import SMOLLM2_135M
from profile_memory import CONFIGS
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from qft_hf import QFTConfig, QFTLion, quantize_model_
from qft_hf.nn import int8

PHASES = ("forward", "backward", "step")
COLORS = {"forward": "#2e86ab", "backward": "#7f8fa6", "step": "#c0392b"}
FP32_ADAMW, BF16_ADAMW = "FP32 AdamW", "bf16 autocast AdamW"


@dataclass
class Way:
    """A model and its optimizer."""

    model: nn.Module
    optimizer: Optimizer
    autocast: bool = False


def adamw(model: nn.Module, *, autocast: bool) -> Way:
    """FP32 weights and states."""
    return Way(model, torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True), autocast)


def qft(model: nn.Module, dtype: torch.dtype, **config) -> Way:
    """INT8 weights, gradients and momentum; activations of `dtype`."""
    model = quantize_model_(model.to(dtype), QFTConfig(**config))
    return Way(model, QFTLion(model.parameters(), lr=1e-5, weight_decay=0.1))


def torchao_mixed(model: nn.Module, dtype: torch.dtype) -> Way:
    """Float weights, quantized for each product."""
    from torchao import quantize_
    from torchao.prototype.quantized_training import int8_mixed_precision_training

    model = model.to(dtype)
    quantize_(model, int8_mixed_precision_training(), filter_fn=_is_inner_linear)
    return Way(model, torch.optim.AdamW(model.parameters(), lr=1e-5))


def torchao_quantized(model: nn.Module, dtype: torch.dtype) -> Way:
    """INT8 weights, with the optimizer that torchao has for them."""
    from torchao import quantize_
    from torchao.optim import _AdamW
    from torchao.prototype.quantized_training import int8_weight_only_quantized_training

    model = model.to(dtype)
    quantize_(model, int8_weight_only_quantized_training(), filter_fn=_is_inner_linear)
    return Way(model, _AdamW(model.parameters(), lr=1e-5))


def _is_inner_linear(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and "lm_head" not in name


def ways(dtype: torch.dtype) -> dict[str, Callable[[nn.Module], Way]]:
    """How each way is made of the float model."""
    made: dict[str, Callable[[nn.Module], Way]] = {
        FP32_ADAMW: lambda model: adamw(model, autocast=False),
        BF16_ADAMW: lambda model: adamw(model, autocast=True),
        "QFT, dequantize": lambda model: qft(model, dtype),
        "QFT, int8": lambda model: qft(model, dtype, matmul="int8"),
        "QFT, int8, no critical columns": lambda model: qft(
            model, dtype, matmul="int8", outlier_fraction=0.0
        ),
    }
    if importlib.util.find_spec("torchao"):
        made["torchao INT8 mixed precision"] = lambda model: torchao_mixed(model, dtype)
        made["torchao INT8 quantized"] = lambda model: torchao_quantized(model, dtype)
    else:
        print("torchao is not installed and not measured: pip install torchao")
    return made


def step(way: Way, ids: Tensor, clock: Callable[[], float]) -> dict[str, float]:
    """Seconds of each phase of one training step, by `clock`."""
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


def measure(config: LlamaConfig, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds of the median step, by way and phase. Peers that cannot run here are named.

    Args:
        config: Of the model.
        options: The command line.
    """
    device = torch.device(options.device)
    torch.manual_seed(0)
    ids = torch.randint(config.vocab_size, (options.batch, options.sequence), device=device)
    clock = time.process_time if options.cpu_time else time.perf_counter
    made: dict[str, Way] = {}
    for name, make in ways(getattr(torch, options.dtype)).items():
        if options.only and not any(word in name for word in options.only):
            continue
        torch.manual_seed(0)
        with device:
            model = LlamaForCausalLM(config).train()
        if options.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        way = make(model)
        try:
            step(way, ids, clock)  # makes the states, compiles
        except (RuntimeError, NotImplementedError, TypeError) as error:
            if not name.startswith("torchao"):  # a peer may not run here; our own ways must
                raise
            print(f"{name} does not run on {device} and is not measured: {error}")
            continue
        made[name] = way
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in made}
    for number in range(options.steps):
        for name, way in made.items():
            seconds[name].append(step(way, ids, clock))
        print(f"round {number + 1} of {options.steps}", flush=True)
    return {name: _median_step(steps) for name, steps in seconds.items()}


def _median_step(steps: list[dict[str, float]]) -> dict[str, float]:
    """The step of median length, so that its phases add up."""
    wholes = [step | {"whole": sum(step.values())} for step in steps]
    return sorted(wholes, key=lambda step: step["whole"])[(len(wholes) - 1) // 2]


def table(figures: dict[str, dict[str, float]]) -> str:
    """Milliseconds and ratios as a Markdown table."""
    lines = [
        "| way | forward, ms | backward, ms | step, ms | whole, ms | of FP32 AdamW "
        "| of bf16 AdamW |",
        "|" + " --- |" * 7,
    ]
    for name, way in figures.items():
        cells = [f"{1e3 * way[phase]:.0f}" for phase in (*PHASES, "whole")]
        cells += [
            f"{way['whole'] / figures[base]['whole']:.2f}" if base in figures else ""
            for base in (FP32_ADAMW, BF16_ADAMW)
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(figures: dict[str, dict[str, float]], path: Path, *, title: str) -> None:
    """The phases of each way as stacked bars, against the first way's whole step.

    Bars of more than four times the median are cut; their numbers say how long they are.
    """
    from matplotlib.figure import Figure  # the only need for it; GPU machines may lack it

    figure = Figure(figsize=(8, 1.2 + 0.5 * len(figures)), layout="constrained")
    axes = figure.add_subplot()
    names = list(figures)[::-1]
    unit = next(iter(figures.values()))["whole"]
    left = [0.0] * len(names)
    for phase in PHASES:
        widths = [figures[name][phase] / unit for name in names]
        axes.barh(names, widths, left=left, color=COLORS[phase], label=phase, height=0.6)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    limit = min(max(left), 4 * median(left))
    for place, end in enumerate(left):
        at = (min(end, limit), place)
        axes.annotate(f"{end:.2f}", at, (4, 0), textcoords="offset points", va="center")
    axes.set(title=title, xlabel=f"time of a training step, {next(iter(figures))} = 1")
    axes.set_xlim(0, 1.1 * limit)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=150)


def keep_freed_memory() -> None:
    """Have the C library keep what is freed, as PyTorch does on GPUs, and not return it.

    Returned blocks are mapped again page by page, which takes up to half of a step, by chance and
    for every way: it would hide what is compared.
    """
    trim_threshold, mmap_max = -1, -4  # from glibc's malloc.h
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        print("This C library has no mallopt: times include mapping memory again and again.")
        return
    library.mallopt(trim_threshold, -1)  # never; any number would be below what large models free
    library.mallopt(mmap_max, 0)


def device_name(device: torch.device) -> str:
    """What ran, and whether it multiplies INT8 and BF16 natively."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "CPU")
    vnni = "with" if torch.cpu._is_vnni_supported() else "without"
    bf16 = "with" if torch.cpu._is_avx512_bf16_supported() else "without"
    threads = torch.get_num_threads()
    return f"{model} {vnni} AVX512-VNNI and {bf16} AVX512-BF16, {threads} thread(s)"


def main() -> None:
    """Measure, and write figures, table and picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    configs = {"smollm2-135m": SMOLLM2_135M | {"num_hidden_layers": 30}} | CONFIGS
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--config", choices=configs, default="smollm2-135m")
    parser.add_argument("--layers", type=int, help="of the model; on a CPU 4 unless given")
    parser.add_argument("--batch", type=int, default=2, help="sequences (default 2)")
    parser.add_argument("--sequence", type=int, default=256, help="tokens of each (default 256)")
    parser.add_argument("--steps", type=int, default=5, help="rounds that are timed (default 5)")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU (default 1)")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="CPU seconds of one thread instead of wall time, for a CPU that others use too",
    )
    parser.add_argument(
        "--dtype", help="of INT8 models: float32 on a CPU without BF16, else bfloat16"
    )
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="ways whose name has one of them")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark_training"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    device = torch.device(options.device)
    has_bf16 = device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()
    options.dtype = options.dtype or ("bfloat16" if has_bf16 else "float32")
    config = LlamaConfig(**configs[options.config])
    if options.layers or device.type == "cpu":
        config.num_hidden_layers = options.layers or min(4, config.num_hidden_layers)
    if options.cpu_time and (device.type != "cpu" or options.threads != 1):
        parser.error("--cpu-time needs --device cpu and one thread")
    if options.batch * options.sequence < int8.MIN_TOKENS:
        parser.error(f"INT8 products need {int8.MIN_TOKENS} tokens or more in a batch")

    figures = measure(config, options)
    name = device_name(device)
    tokens = options.batch * options.sequence
    clock = "CPU time" if options.cpu_time else "wall time"
    title = f"{options.config}, {config.num_hidden_layers} layers, {tokens} tokens, {clock}\n{name}"
    options.output.mkdir(parents=True, exist_ok=True)
    result = {
        "device": name,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "settings": {key: str(value) for key, value in vars(options).items()},
        "layers": config.num_hidden_layers,
        "median_seconds": figures,
    }
    (options.output / "figures.json").write_text(json.dumps(result, indent=2) + "\n")
    text = f"{title}\n\n{table(figures)}\n"
    (options.output / "table.md").write_text(text)
    if importlib.util.find_spec("matplotlib"):
        draw(figures, options.output / "steps.png", title=title)
    else:
        print("matplotlib is not installed and there is no picture: pip install matplotlib")
    print(f"\n{text}\nwritten to {options.output}")


if __name__ == "__main__":
    main()
