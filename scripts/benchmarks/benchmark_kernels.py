"""Speed of each operator on one device: nanoseconds per element, and bandwidth relative to a copy.

The baseline of an operator is its reference in the same process; other optimizers are timed on an
FP32 weight of the same shape. On a GPU, each call is timed by CUDA events; by default the tensors
of most operators exceed its cache. The copy is `torch.Tensor.copy_` of as many bytes as a Lion step
moves. Products of INT8 codes are compared with PyTorch's products of INT8 (to INT32, without
scales), BF16 and FP32. Products of few tokens with an INT8 weight are compared with dequantizing it
first and with a float weight; on a GPU they run as a graph, because such a product takes less time
than its launch. For whole optimizer steps compared with other optimizers, see `benchmark_step.py`
(CPU) and `profile_memory.py` (GPU).
"""

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, where common/ is
from common import report
from common.command_line import command_line, default_device
from common.peers import MakeOptimizer, float_peers
from common.shapes import MATRICES

from qft_hf import QFTConfig, QFTWeight, kernels
from qft_hf.kernels import backend
from qft_hf.kernels.operators import Operator
from qft_hf.layout import (
    NIBBLE_GROUP_SIZE,
    STATE_GROUP_SIZE,
    momentum_shapes,
    outliers_per_row,
)

OPERATORS = {
    name: found for name in kernels.__all__ if isinstance(found := getattr(kernels, name), Operator)
}
RULE = kernels.Lion(lr=1e-5, beta1=0.9, beta2=0.99, weight_decay=0.1)
ADAMW = kernels.AdamW(lr=1e-5, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)
ROUNDING = kernels.Rounding(seed=1, step=1, stream=0)

N_TOKENS = 2048  # looked up in an embedding
FEWEST_TOKENS = 32  # smallest number of tokens that is multiplied in INT8
N_FLOATS = 65  # number of norms in a model of 32 layers
FEW_TOKENS = (1, 4, 16)
N_WEIGHTS = {"cuda": 8, "cpu": 1}  # multiplied in turn; together they exceed a GPU's cache

TABLES = {  # tables of the report, with the heading of their row names
    "operators": "operator",
    "products": "INT8 product",
    "few_tokens": "few tokens",
    "peers": "step of another optimizer",
}

# By name: number of elements, bytes that must move per element, and a call. Products of codes are
# in `products`.
Calls = dict[str, tuple[int, float, partial[object]]]


def operators(
    rows: int, columns: int, group_size: int | None, device: torch.device, n_tokens: int = N_TOKENS
) -> Calls:
    """Return calls of each operator on a weight of this shape, a batch of tokens or norms."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(scale: float, dtype: torch.dtype = torch.float32) -> Tensor:
        noise = torch.randn(rows, columns, generator=generator, device=device, dtype=torch.float32)
        return noise.mul_(scale).to(dtype)

    groups = {"group_size": STATE_GROUP_SIZE}

    def coded(x: Tensor) -> kernels.Quantized:
        return kernels.Quantized(
            *kernels.quantize(x, group_size=STATE_GROUP_SIZE), STATE_GROUP_SIZE
        )

    bf16 = {"dtype": torch.bfloat16}
    weight = QFTWeight.from_float(normal(0.02, **bf16), QFTConfig(group_size=group_size)).stored
    direction, momentum, floats = normal(1.0), coded(normal(1e-3)), normal(3e-3, **bf16)
    gradient, total = coded(floats), coded(floats)
    code_shape, scale_shape = momentum_shapes(rows, columns, 4)
    nibbles = kernels.Quantized(
        torch.zeros(code_shape, dtype=torch.uint8, device=device),
        torch.ones(scale_shape, device=device),
        NIBBLE_GROUP_SIZE,
        bits=4,
    )
    roots = torch.zeros_like(momentum.codes, dtype=torch.uint8)
    moments = kernels.Moments(
        coded(direction).codes, momentum.scales.clone(), roots, torch.ones_like(momentum.scales),
        STATE_GROUP_SIZE,
    )  # fmt: skip
    spec = QFTConfig(matmul="int8")
    int8_weight = QFTWeight.from_float(normal(0.02, **bf16), spec).stored
    chosen = {"n_outliers": outliers_per_row(columns, spec.outlier_fraction)}
    few = floats[:FEWEST_TOKENS]
    layer_input = kernels.Input(*kernels.quantize_input(few, **chosen))
    factors = direction[:1].abs().view(-1, 1), direction[:, :1].abs().contiguous()
    ids = torch.randint(rows, (n_tokens,), generator=generator, device=device)
    norms, norm_momenta, norm_gradients = (
        [torch.full((columns,), value, dtype=dtype, device=device) for _ in range(N_FLOATS)]
        for value, dtype in ((1.0, torch.bfloat16), (0.0, torch.float32), (1e-3, torch.bfloat16))
    )
    step = {"rule": RULE, "rounding": ROUNDING}
    rate = {"lr": RULE.lr, "weight_decay": RULE.weight_decay}
    of_each = {"roundings": kernels.Roundings(1, [1] * N_FLOATS, list(range(N_FLOATS)))}
    n, n_norms, n_rows = rows * columns, N_FLOATS * columns, n_tokens * columns
    found = {
        "lion_step_": (n, 5, [weight, momentum, gradient], step),
        "lion_step_ 4-bit": (n, 4, [weight, nibbles, gradient], step),
        "quantize_and_lion_step_": (n, 6, [weight, momentum, floats], groups | step),
        "adamw_step_": (
            n, 7, [weight, moments, gradient], {"rule": ADAMW, "rounding": ROUNDING}
        ),
        "step_weight_": (n, 6, [weight, direction], rate | {"rounding": ROUNDING}),
        "step_floats_": (n_norms, 6, [norms, norm_gradients], rate | of_each),
        "lion_step_floats_": (
            n_norms, 14, [norms, norm_momenta, norm_gradients], of_each | {"rule": RULE}
        ),
        "dequantize rows": (n_rows, 3, [weight], bf16 | {"rows": ids}),
        "embedding_gradient_": (n_rows, 3, [total, ids, floats[ids]], {}),
        "quantize": (n, 3, [floats], groups),
        "dequantize": (n, 3, [weight], bf16),
        "dequantized_matmul": (n, 1, [floats[:1], weight], {}),
        "accumulate_": (n, 3, [total, gradient], {}),
        "squared_norms": (n, 1, [gradient], {}),
        "quantize_input": (n, 3, [floats], chosen),
        "int8_linear": (n, 1, [layer_input, few, int8_weight], bf16),
        "outlier_products": (n, 2, [floats, *factors], {}),
        "quantize_gradient": (n, 6, [floats, *factors], {"seed": 1}),
    }  # fmt: skip
    return {
        name: (n_elements, n_bytes, partial(OPERATORS[name.split()[0]], *arguments, **options))
        for name, (n_elements, n_bytes, arguments, options) in found.items()
    }


def products(
    tokens: int, rows: int, columns: int, device: torch.device
) -> dict[str, partial[object]]:
    """Return the products of a linear layer with a `[rows, columns]` weight, to BF16 or INT8."""
    generator = torch.Generator(device).manual_seed(0)
    x, w, g = (
        torch.randn(size, generator=generator, device=device)
        for size in ((tokens, columns), (rows, columns), (tokens, rows))
    )
    x_codes, x_scales = kernels.quantize(x, group_size=None)
    w_codes, w_scales = kernels.quantize(w, group_size=None)
    by_row, row_scales, by_column, column_scales = kernels.quantize_gradient(
        g, w_scales, x_scales, seed=1
    )
    product = partial(kernels.int8_matmul, dtype=torch.bfloat16)
    of_weight = by_column, x_codes, column_scales
    return {
        "forward": partial(product, x_codes, w_codes.t(), x_scales, w_scales),
        "grad_x": partial(product, by_row, w_codes, row_scales, None),
        "grad_w": partial(product, *of_weight, None),
        "grad_w, quantized": partial(
            kernels.requantized_matmul, *of_weight, group_size=STATE_GROUP_SIZE
        ),
    }


def seconds(call: Callable[[], object], device: torch.device, n_calls: int) -> float:
    """Return the time of the fastest of `n_calls` calls, after one that compiles."""
    call()
    times = []
    for _ in range(n_calls):
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            torch.cuda.synchronize(device)
            times.append(start.elapsed_time(stop) / 1e3)
        else:
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
    return min(times)


def peer_seconds(
    make: MakeOptimizer, rows: int, columns: int, device: torch.device, n_calls: int
) -> float:
    """Return the time of a step of another optimizer on one FP32 weight."""
    weight = torch.nn.Parameter(torch.randn(rows, columns, device=device) * 0.02)
    weight.grad = torch.randn(rows, columns, device=device) * 3e-3
    return seconds(make([weight]).step, device, n_calls)


def measure(
    rows: int, columns: int, group_size: int | None, device: torch.device, n_calls: int
) -> dict[str, Any]:
    """Return the figures of every operator for one shape of weight."""
    n = rows * columns
    source = torch.ones(n * 5 // 2, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.numel() / seconds(lambda: target.copy_(source), device, n_calls)
    figures: dict[str, Any] = {"copy_gigabytes_per_second": copy / 1e9, "operators": {}}
    for name, (n_elements, n_bytes, call) in operators(rows, columns, group_size, device).items():
        own = seconds(call, device, n_calls)
        with backend.use("reference"):
            slow = seconds(call, device, max(1, n_calls // 5))
        figures["operators"][name] = {
            "ns_per_parameter": 1e9 * own / n_elements,
            "gigabytes_per_second": n_bytes * n_elements / own / 1e9,
            "percent_of_copy": 100 * n_bytes * n_elements / own / copy,
            "times_faster_than_reference": slow / own,
        }
    step = figures["operators"]["lion_step_"]["ns_per_parameter"]
    figures["peers"] = {}
    for name, make in float_peers().items():
        nanoseconds = 1e9 * peer_seconds(make, rows, columns, device, n_calls) / n
        figures["peers"][name] = {
            "ns_per_parameter": nanoseconds,
            "times_lion_step": nanoseconds / step,
        }
    return figures


def measure_product(
    product: partial[object], device: torch.device, n_calls: int
) -> dict[str, float]:
    """Return the figures of one product, including any copies that the backend makes first."""
    a, b = product.args[:2]
    own = seconds(product, device, n_calls)
    figures = {"tera_operations_per_second": 2 * a.numel() * b.shape[1] / own / 1e12}
    # On a CPU without VNNI, `torch._int_mm` would take minutes.
    if device.type == "cuda" or torch.cpu._is_vnni_supported():
        in_order = b.t().contiguous().t()  # the memory order with which it is fastest
        vendor = seconds(lambda: torch._int_mm(a, in_order), device, n_calls)
        figures["percent_of_int_mm"] = 100 * vendor / own
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        left, right = a.to(dtype), b.to(dtype)
        floats = seconds(lambda left=left, right=right: left @ right, device, n_calls)
        figures[f"times_faster_than_{name}"] = floats / own
    return figures


def seconds_of_each(
    call: Callable[[Any], object], weights: Sequence[Any], device: torch.device, n_calls: int
) -> float:
    """Return the mean time of `call(weight)` over all `weights`, called one after the other."""

    def all_calls() -> None:
        for weight in weights:
            call(weight)

    replay: Callable[[], object] = all_calls
    if device.type == "cuda":
        all_calls()
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            all_calls()
        replay = graph.replay
    return seconds(replay, device, n_calls) / len(weights)


def measure_few_tokens(
    rows: int, columns: int, group_size: int | None, device: torch.device, n_calls: int
) -> dict[str, dict[str, float]]:
    """Return the figures of products of few tokens, by number and dtype of the tokens."""
    generator = torch.Generator(device).manual_seed(0)
    config = QFTConfig(group_size=group_size)
    figures = {}
    for dtype in (torch.bfloat16, torch.float32):
        floats = [
            torch.randn(rows, columns, generator=generator, device=device, dtype=dtype)
            for _ in range(N_WEIGHTS[device.type])
        ]
        weights = [QFTWeight.from_float(weight, config) for weight in floats]
        for n_tokens in FEW_TOKENS:
            x = torch.randn(n_tokens, columns, generator=generator, device=device, dtype=dtype)

            def multiply(weight: QFTWeight, x: Tensor = x) -> Tensor:
                return kernels.dequantized_matmul(x, weight.stored)

            def expand(weight: QFTWeight, x: Tensor = x) -> Tensor:
                return F.linear(x, weight.dequantize())

            def multiply_floats(weight: Tensor, x: Tensor = x) -> Tensor:
                return F.linear(x, weight)

            own = seconds_of_each(multiply, weights, device, n_calls)
            slow = seconds_of_each(expand, weights, device, max(1, n_calls // 5))
            plain = seconds_of_each(multiply_floats, floats, device, n_calls)
            figures[f"{n_tokens} {str(dtype).removeprefix('torch.')}"] = {
                "microseconds": 1e6 * own,
                "gigabytes_of_codes_per_second": rows * columns / own / 1e9,
                "times_faster_than_expanding": slow / own,
                "times_faster_than_float_weight": plain / own,
            }
    return figures


def tables(shapes: dict[str, Any]) -> str:
    """Return the tables of all shapes."""
    parts = []
    for shape, figures in shapes.items():
        parts.append(f"{shape}, copy {figures['copy_gigabytes_per_second']:.0f} GB/s")
        parts += [report.figures_table(what, figures[key]) for key, what in TABLES.items()]
    return "\n\n".join(parts)


def main() -> None:
    """Measure each shape, and write the report after each."""
    parser = command_line(__doc__, device=default_device(), threads=1)
    parser.add_argument(
        "--shapes",
        nargs="+",
        metavar="RxC",
        help="shapes of weights (default: of a 7B model; on a CPU of a 135M one)",
    )
    parser.add_argument("--tokens", type=int, help="rows of activations (default 4096; 512 on CPU)")
    parser.add_argument("--group_size", type=int, help="columns per weight scale (default: all)")
    parser.add_argument("--calls", type=int, default=20, help="timed calls; the fastest is used")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    shapes, tokens = MATRICES[device.type]
    options.shapes, options.tokens = options.shapes or shapes, options.tokens or tokens

    figures = {}
    for shape in options.shapes:
        print(f"== {shape}", flush=True)
        rows, columns = map(int, shape.split("x"))
        figures[shape] = measure(rows, columns, options.group_size, device, options.calls)
        figures[shape]["products"] = {
            name: measure_product(product, device, options.calls)
            for name, product in products(options.tokens, rows, columns, device).items()
        }
        figures[shape]["few_tokens"] = measure_few_tokens(
            rows, columns, options.group_size, device, options.calls
        )
        report.write(options, {"shapes": figures}, tables(figures))
    report.finish(options, tables(figures))


if __name__ == "__main__":
    main()
