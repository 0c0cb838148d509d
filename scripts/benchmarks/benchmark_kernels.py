"""Speed of each operator on one device: nanoseconds per element, and bandwidth beside a copy.

The reference runs the same operators in the same process, as the baseline, and other optimizers
step on an FP32 weight of the same shape. On a GPU, times are of CUDA events around calls that do
not fit its cache; the copy is `torch.Tensor.copy_` of as many bytes. Products of INT8 codes are
timed beside PyTorch's: of INT8, which leaves INT32 without scales, of BF16 and of FP32. Products of
few tokens with a weight that is expanded on the way are timed beside expanding it first and beside
a float weight; on a GPU as a graph, because such a product takes less time than its launch. Whole
optimizer steps beside other optimizers: `benchmark_step.py` (CPU) and
`profile_memory.py` (GPU).
"""

import sys
import time
from collections.abc import Callable, Sequence
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
from qft_hf.kernels import reference
from qft_hf.kernels.backend import backend_for
from qft_hf.layout import STATE_GROUP_SIZE, momentum_shapes

LION = {
    "lr": 1e-5,
    "beta1": 0.9,
    "beta2": 0.99,
    "weight_decay": 0.1,
    "maximize": False,
    "stochastic": True,
    "seed": 1,
    "step": 1,
    "stream": 0,
}

N_TOKENS = 2048  # of an embedding
N_FLOATS = 65  # norms of a model of 32 layers
FEW_TOKENS = (1, 4, 16)
N_WEIGHTS = {"cuda": 8, "cpu": 1}  # multiplied in turn: together they do not fit a GPU's cache

TABLES = {  # of the report, and what a row of each is
    "operators": "operator",
    "products": "INT8 product",
    "few_tokens": "few tokens",
    "peers": "step of another optimizer",
}

# By name: elements, bytes that must move for each, and a call of a backend.
Operators = dict[str, tuple[int, float, Callable[[Any], object]]]
Product = tuple[Tensor, Tensor, Tensor, Tensor | None]  # two operands and their scales


def operators(
    rows: int, columns: int, group_size: int | None, device: torch.device, n_tokens: int = N_TOKENS
) -> Operators:
    """Each operator on one weight of this shape, one batch of tokens or one set of norms."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(scale: float, dtype: torch.dtype = torch.float32) -> Tensor:
        noise = torch.randn(rows, columns, generator=generator, device=device, dtype=torch.float32)
        return noise.mul_(scale).to(dtype)

    config = QFTConfig(group_size=group_size)
    weight = QFTWeight.from_float(normal(0.02, torch.bfloat16), config)
    momentum = kernels.quantize(normal(1e-3), group_size=STATE_GROUP_SIZE)
    gradient_bf16 = normal(3e-3, torch.bfloat16)
    gradient = kernels.quantize(gradient_bf16, group_size=STATE_GROUP_SIZE)
    total = kernels.quantize(gradient_bf16, group_size=STATE_GROUP_SIZE)
    outliers = {
        "outlier_values": weight.outlier_values,
        "outlier_columns": weight.outlier_columns,
    }
    factors = (normal(1.0)[:1].abs().view(-1, 1), normal(1.0)[:, :1].abs().contiguous())
    state = (*weight.fields().values(), *momentum, *gradient)
    sizes = {"group_size": group_size, "state_group_size": STATE_GROUP_SIZE}
    ids = torch.randint(rows, (n_tokens,), generator=generator, device=device)
    token_gradients = gradient_bf16[ids]
    floats = [
        [torch.full((columns,), value, dtype=dtype, device=device) for _ in range(N_FLOATS)]
        for value, dtype in ((1.0, torch.bfloat16), (0.0, torch.float32), (1e-3, torch.bfloat16))
    ]
    counters = {"steps": [1] * N_FLOATS, "streams": list(range(N_FLOATS))}
    common = {name: value for name, value in LION.items() if name not in ("step", "stream")}
    sgd, sgd_common = (
        {name: value for name, value in arguments.items() if not name.startswith("beta")}
        for arguments in (LION, common)
    )
    code_shape, scale_shape = momentum_shapes(rows, columns, 4)
    packed = (
        torch.zeros(code_shape, dtype=torch.uint8, device=device),
        torch.ones(scale_shape, device=device),
    )
    n = rows * columns
    return {
        "lion_step_": (n, 5, lambda backend: backend.lion_step_(*state, **sizes, **LION)),
        "lion_step_ 4-bit": (
            n,
            4,
            lambda backend: backend.lion_step_(*state[:4], *packed, *gradient, **sizes, **LION),
        ),
        "sgd_step_": (
            n,
            3,
            lambda backend: backend.sgd_step_(*state[:4], *gradient, **sizes, **sgd),
        ),
        "sgd_step_floats_": (
            N_FLOATS * columns,
            6,
            lambda backend: backend.sgd_step_floats_(
                floats[0], floats[2], **counters, **sgd_common
            ),
        ),
        "quantize_and_lion_step_": (
            n,
            6,
            lambda backend: backend.quantize_and_lion_step_(
                *state[:-2], gradient_bf16, **sizes, **LION
            ),
        ),
        "lion_step_floats_": (
            N_FLOATS * columns,
            14,
            lambda backend: backend.lion_step_floats_(*floats, **counters, **common),
        ),
        "dequantize rows": (
            n_tokens * columns,
            3,
            lambda backend: backend.dequantize(
                weight.codes,
                weight.scales,
                group_size,
                rows=ids,
                dtype=torch.bfloat16,
                **outliers,
            ),
        ),
        "embedding_gradient_": (
            n_tokens * columns,
            3,
            lambda backend: backend.embedding_gradient_(
                *total, ids, token_gradients, group_size=STATE_GROUP_SIZE, padding_idx=None
            ),
        ),
        "quantize": (n, 3, lambda backend: backend.quantize(gradient_bf16, STATE_GROUP_SIZE)),
        "dequantize": (
            n,
            3,
            lambda backend: backend.dequantize(
                weight.codes, weight.scales, group_size, dtype=torch.bfloat16, **outliers
            ),
        ),
        "dequantized_matmul": (
            n,
            1,
            lambda backend: backend.dequantized_matmul(
                gradient_bf16[:1], weight.codes, weight.scales, group_size, bias=None, **outliers
            ),
        ),
        "accumulate_": (
            n,
            3,
            lambda backend: backend.accumulate_(*total, *gradient, STATE_GROUP_SIZE),
        ),
        "squared_norm": (n, 1, lambda backend: backend.squared_norm(*gradient, STATE_GROUP_SIZE)),
        "column_absmax": (n, 2, lambda backend: backend.column_absmax(gradient_bf16)),
        "quantize_gradient": (
            n,
            6,
            lambda backend: backend.quantize_gradient(
                gradient_bf16, *factors, stochastic=True, seed=1
            ),
        ),
    }


def products(tokens: int, rows: int, columns: int, device: torch.device) -> dict[str, Product]:
    """The three products of a linear layer with a `[rows, columns]` weight."""
    generator = torch.Generator(device).manual_seed(0)
    x, w, g = (
        torch.randn(size, generator=generator, device=device)
        for size in ((tokens, columns), (rows, columns), (tokens, rows))
    )
    x_codes, x_scales = kernels.quantize(x, group_size=None)
    w_codes, w_scales = kernels.quantize(w, group_size=None)
    by_rows, by_columns = kernels.quantize_gradient(g, w_scales, x_scales, seed=1)
    return {
        "forward": (x_codes, w_codes.t(), x_scales, w_scales),
        "grad_x": (by_rows[0], w_codes, by_rows[1], None),
        "grad_w": (by_columns[0], x_codes, by_columns[1], None),
    }


def seconds(call: Callable[[], object], device: torch.device, n_calls: int) -> float:
    """The fastest of `n_calls` calls, after one that compiles."""
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
    """A step of another optimizer on one FP32 weight."""
    weight = torch.nn.Parameter(torch.randn(rows, columns, device=device) * 0.02)
    weight.grad = torch.randn(rows, columns, device=device) * 3e-3
    return seconds(make([weight]).step, device, n_calls)


def measure(
    rows: int, columns: int, group_size: int | None, device: torch.device, n_calls: int
) -> dict[str, Any]:
    """Figures of every operator for one shape of weight."""
    n = rows * columns
    source = torch.ones(n * 5 // 2, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.numel() / seconds(lambda: target.copy_(source), device, n_calls)
    backend = backend_for(device)
    figures: dict[str, Any] = {"copy_gigabytes_per_second": copy / 1e9, "operators": {}}
    for name, (n_elements, n_bytes, call) in operators(rows, columns, group_size, device).items():
        own = seconds(lambda call=call: call(backend), device, n_calls)
        slow = seconds(lambda call=call: call(reference), device, max(1, n_calls // 5))
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


def measure_product(product: Product, device: torch.device, n_calls: int) -> dict[str, float]:
    """Figures of one product; what the backend copies first counts."""
    a, b = product[:2]
    backend, options = backend_for(device), {"bias": None, "dtype": torch.bfloat16}
    own = seconds(lambda: backend.int8_matmul(*product, **options), device, n_calls)
    figures = {"tera_operations_per_second": 2 * a.numel() * b.shape[1] / own / 1e12}
    # On a CPU without VNNI it would take minutes.
    if device.type == "cuda" or torch.cpu._is_vnni_supported():
        in_order = b.t().contiguous().t()  # what it is fastest with
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
    """The time of `call(weight)`, of calls with all `weights` one after the other."""

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
    """Figures of products of few tokens, by number and dtype of these."""
    generator = torch.Generator(device).manual_seed(0)
    backend, config = backend_for(device), QFTConfig(group_size=group_size)
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
                return backend.dequantized_matmul(
                    x,
                    weight.codes,
                    weight.scales,
                    group_size,
                    outlier_values=weight.outlier_values,
                    outlier_columns=weight.outlier_columns,
                    bias=None,
                )

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
    """The figures of all shapes."""
    parts = []
    for shape, figures in shapes.items():
        parts.append(f"{shape}, copy {figures['copy_gigabytes_per_second']:.0f} GB/s")
        parts += [report.figures_table(what, figures[key]) for key, what in TABLES.items()]
    return "\n\n".join(parts)


def main() -> None:
    """Measure, and write the report after each shape."""
    parser = command_line(__doc__, device=default_device(), threads=1)
    parser.add_argument(
        "--shapes",
        nargs="+",
        metavar="RxC",
        help="weights (default: of a 7B model; of 135M on CPU)",
    )
    parser.add_argument("--tokens", type=int, help="rows of activations (default 4096; 512 on CPU)")
    parser.add_argument("--group_size", type=int, help="columns per weight scale (default: a row)")
    parser.add_argument("--calls", type=int, default=20, help="timed calls; the fastest counts")
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
