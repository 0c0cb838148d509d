"""Measure the host's cost of a training step on a GPU, on a machine without one.

Triton kernels are launched as on an H100 up to the call of the driver: a library that stands in for
NVIDIA's accepts launches and does nothing. Tensors are on the CPU and so small that arithmetic
costs nothing. The work of the host remains: Python, PyTorch's dispatch, and Triton's launch code.
Results are undefined memory, so the script says nothing about values.

Costs are in adds: CPU time divided by that of a `torch.add` of two small tensors. Both are minima
over many tries that alternate, so that slow and busy machines agree to about 5 %. Launches are
Triton's; torch operations are those that are not part of another one; device operations are
launches plus the torch operations that would start work on a GPU.

The milliseconds are a fit, 0.00215 for each add and 0.0184 for each device operation. It reproduces
to 10 % the host time of a step in four modes on one NVIDIA H100 80GB HBM3 with slow CPU cores (46,
113, 129 and 228 ms, 2026-11-28). An add is 1.3 to 2 us of dispatch on a CPU; a host that starts
kernels spends more on the start and less on Python.

    python scripts/benchmarks/host_cost.py
    python scripts/benchmarks/host_cost.py --profile release   # profile by Python function
    python scripts/benchmarks/host_cost.py --modes stack release --graph   # cost left by graphs
"""

import cProfile
import pstats
import sys
import tempfile
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, where common/ is
from common import report
from common.absent_gpu import CAPABILITY, MULTIPROCESSORS, AbsentGPU
from common.command_line import command_line

import qft_hf
from qft_hf.hf.compiled_layers import compile_layers_
from qft_hf.hf.graphed_step import N_EAGER, GraphedStep

MS_PER_ADD, MS_PER_DEVICE_OPERATION = 0.00215, 0.0184  # fitted, see above

MODES: dict[str, dict[str, Any] | None] = {
    "float": None,  # AdamW
    "stack": {},
    "release": {},
    "int8-stack": {"matmul": "int8"},
    "int8-release": {"matmul": "int8"},
}

# Operations that start nothing on a device, or only through other operations, which are counted.
NO_KERNEL = frozenset(
    """_local_scalar_dense _unsafe_view alias as_strided chunk contiguous detach detach_ empty
    empty_like empty_strided expand expand_as flatten is_nonzero item lift_fresh linear mT
    matmul movedim narrow new_empty numpy_T permute reshape resolve_conj resolve_neg result_type
    select set_ slice split squeeze t to transpose unbind unsqueeze view view_as""".split()
)

Step = dict[str, Callable[[], Any]]


def redirect() -> None:
    """Dispatch CPU tensors to the Triton kernels, as tensors on a GPU are.

    Only this function depends on internals of the package.
    """
    from qft_hf import kernels
    from qft_hf.kernels import backend
    from qft_hf.kernels.triton import int8_product
    from qft_hf.optim import norms, release, stack

    backend.OWN = (
        backend.Backend("triton", f"{kernels.__name__}.triton", ("cpu",), lambda device: None),
    )
    backend.backends.cache_clear()
    backend.forget()
    # Operators check values on CPUs only.
    for name in kernels.__all__:
        if isinstance(found := getattr(kernels, name), kernels.operators.Operator):
            found._check_values = None

    # The tile of a product depends on the device.
    choose_tile, device = int8_product.choose_tile, torch.device("cuda", 0)
    int8_product.choose_tile = lambda rows, columns, _, width=None: choose_tile(
        rows, columns, device, width
    )
    properties = SimpleNamespace(multi_processor_count=MULTIPROCESSORS)
    torch.cuda.get_device_capability = lambda device: divmod(CAPABILITY, 10)
    torch.cuda.get_device_properties = lambda device: properties

    norms.sum_in_order = torch.sum  # on a CPU it sums in parts, whatever the number of threads
    # Undefined gradients may be NaN, which would raise: the check is run, and its result ignored.
    total, are_finite = norms.total_square, norms.are_finite
    for module in (norms, release):
        module.total_square = lambda squares: total(squares).nan_to_num_(0.0, 0.0, 0.0)
    for module in (stack, release):
        module.are_finite = lambda *arguments: are_finite(*arguments) or True


def training_step(mode: str, options: Namespace) -> Step:
    """Return forward, backward and step of a Llama or Qwen3-MoE with narrow layers."""
    shape = {
        "hidden_size": options.hidden,
        "intermediate_size": 2 * options.hidden,
        "vocab_size": 128,
        "num_hidden_layers": options.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
    }
    config = LlamaConfig(**shape)
    if options.experts:
        width = options.hidden // 2
        experts = {"num_experts": options.experts, "moe_intermediate_size": width}
        config = Qwen3MoeConfig(**shape, **experts, num_experts_per_tok=2, head_dim=8)
    # In FP32: a CPU takes four times as long to start a product in BF16.
    model, settings = AutoModelForCausalLM.from_config(config).train(), MODES[mode]
    optimizer: torch.optim.Optimizer
    if settings is None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    else:
        model = qft_hf.quantize_model_(model, qft_hf.QFTConfig(**settings))
        gradient = mode.removeprefix("int8-")
        optimizer = qft_hf.QFTLion(model.parameters(), lr=1e-5, gradient=gradient)
    if options.compile:
        model.config.use_cache = False  # as in a Trainer: cache code would compile for each layer
        compile_layers_(model, {})
    ids = torch.randint(config.vocab_size, (1, options.sequence_length))
    losses: list[torch.Tensor] = []

    def forward() -> None:
        losses.append(model(input_ids=ids, labels=ids).loss)

    accelerator = Accelerator(cpu=True)

    def step() -> None:
        if options.clip:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    if options.graph and isinstance(optimizer, qft_hf.QFTOptimizer):
        graphed = GraphedStep(optimizer, _SilentGraph)

        def run(batch: dict[str, torch.Tensor]) -> torch.Tensor:
            loss: torch.Tensor = model(**batch).loss
            loss.backward()
            return loss.detach()

        batch = {"input_ids": ids, "labels": ids}
        parts = {"pass": lambda: graphed(run, batch, kind="all"), "step": step}
        for _ in range(N_EAGER + 2):  # the first creates states, the last is captured
            for part in parts.values():
                part()
        return parts
    return {"forward": forward, "backward": lambda: losses.pop().backward(), "step": step}


class _SilentGraph:
    """Stands in for a CUDA graph: a replay costs the host a single empty call."""

    def run(self, function: Callable[[], Any]) -> Any:
        return function()

    def capture(self, function: Callable[[], Any]) -> Any:
        return function()

    def replay(self) -> None:
        pass


def seconds(function: Callable[[], Any], repeats: int = 1) -> float:
    """Return the CPU time of one call."""
    begin = time.thread_time()
    for _ in range(repeats):
        function()
    return (time.thread_time() - begin) / repeats


def seconds_of_an_add() -> float:
    """Return the CPU time of one small `torch.add`, the unit of costs."""
    x = torch.ones(8, 8)
    return seconds(lambda: torch.add(x, x), 300)


def measure(parts: Step, gpu: AbsentGPU, rounds: int) -> dict[str, float]:
    """Return the cost of a step and its parts in adds, and the operations that the step starts."""
    for part in parts.values():  # Triton compiles
        part()
    tries = [(seconds_of_an_add(), *map(seconds, parts.values())) for _ in range(rounds)]
    add, *costs = (min(times) for times in zip(*tries, strict=True))
    figures = {name: cost / add for name, cost in zip(parts, costs, strict=True)}
    figures["adds"] = sum(figures.values())

    before = gpu.launches
    with torch.autograd.profiler.profile() as recorded:
        for part in parts.values():
            part()
    figures["launches"] = gpu.launches - before
    names = outer_operations(recorded)
    figures["torch_operations"] = names.total()
    starting = sum(count for name, count in names.items() if name not in NO_KERNEL)
    figures["device_operations"] = figures["launches"] + starting
    figures["H100_ms"] = (
        MS_PER_ADD * figures["adds"] + MS_PER_DEVICE_OPERATION * figures["device_operations"]
    )
    return figures


def outer_operations(recorded: torch.autograd.profiler.profile) -> Counter[str]:
    """Return counts of torch operations by name, without parts of one that starts something."""
    names: Counter[str] = Counter()
    for event in recorded.function_events:
        outer = event.cpu_parent
        while outer is not None and not _starts_something(outer.name):
            outer = outer.cpu_parent
        if event.name.startswith("aten::") and outer is None:
            names[event.name.removeprefix("aten::")] += 1
    return names


def _starts_something(name: str) -> bool:
    return name.startswith("aten::") and name.removeprefix("aten::") not in NO_KERNEL


def print_profile(parts: Step) -> None:
    """Print the time by Python function; backward runs in this thread to be included."""
    with torch.autograd.set_multithreading_enabled(mode=False), cProfile.Profile() as profiler:
        for _ in range(5):
            for part in parts.values():
                part()
    pstats.Stats(profiler).strip_dirs().sort_stats("tottime").print_stats(25)


def main() -> None:
    """Measure each mode, and write the report after each."""
    parser = command_line(__doc__, layers=12, hidden=32, sequence_length=32)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="modes")
    parser.add_argument("--profile", choices=MODES, help="measure and profile this mode only")
    parser.add_argument("--experts", type=int, default=0, help="experts per layer (default 0)")
    parser.add_argument("--graph", action="store_true", help="run passes and steps as CUDA graphs")
    parser.add_argument("--clip", action="store_true", help="clip gradients, as a Trainer does")
    parser.add_argument("--compile", action="store_true", help="compile layers by torch.compile")
    parser.add_argument("--rounds", type=int, default=40, help="tries of each mode (default 40)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # undefined memory must not slow arithmetic down
    gpu = AbsentGPU(Path(tempfile.gettempdir()) / f"qft_hf-absent-gpu-{triton.__version__}")
    redirect()

    figures: dict[str, dict[str, float]] = {}
    for mode in [options.profile] if options.profile else options.modes:
        parts = training_step(mode, options)
        figures[mode] = measure(parts, gpu, options.rounds)
        if options.profile:
            print_profile(parts)
        report.write(options, {"modes": figures}, report.figures_table("mode", figures))
    report.finish(options, report.figures_table("mode", figures))


if __name__ == "__main__":
    main()
