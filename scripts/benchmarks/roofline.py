"""Least time of each kernel on a GPU by its memory traffic and instructions; needs no GPU.

    python scripts/benchmarks/roofline.py

Instructions are counted in the machine code that Triton and ptxas generate for each architecture,
for rows of a length at which each thread passes through the kernel once. Rare branches are counted
as well, so the count is an upper bound. Bytes are those of the tensors. A kernel takes at least the
longer of two times: its bytes at the bandwidth of the data sheet, and its instructions at one per
scheduler and clock (four schedulers of 32 lanes per multiprocessor, boost clock). Latency,
occupancy and units that take more than one clock per instruction are ignored.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, where common/ is
sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # the checkout, where tests/ is
from benchmark_kernels import operators
from common import report
from common.command_line import command_line

from tests.offline.compiling import compile_launch, launches

LANES = 4 * 32  # thread instructions that a multiprocessor issues per clock, at most
SHAPE = 64, 4096  # no kernel depends on the number of rows
KERNELS = (
    "lion_step_", "lion_step_ 4-bit", "quantize_and_lion_step_", "adamw_step_", "step_weight_",
    "quantize", "dequantize", "accumulate_", "squared_norms",
)  # fmt: skip


class Device(NamedTuple):
    """Figures of NVIDIA's data sheets."""

    capability: int
    bytes_per_second: float
    multiprocessors: int
    clock_hz: float


DEVICES = {
    "A6000": Device(86, 768e9, 84, 1.80e9),
    "RTX 4090": Device(89, 1008e9, 128, 2.52e9),
    "RTX 5090": Device(120, 1792e9, 170, 2.41e9),
    "A100 80GB SXM": Device(80, 2039e9, 108, 1.41e9),
    "H100 SXM": Device(90, 3350e9, 132, 1.98e9),
}


def instructions(call: partial[Any], capability: int, n_elements: int) -> float:
    """Return the thread instructions per element, summed over all launches of an operator."""
    operator: Any = call.func
    options = {**operator._defaults, **call.keywords}
    total = 0.0
    for launch in launches(operator._implementations["triton"], *call.args, **options):
        cut = launch.constants.get("TILING")
        if cut is not None and cut.GROUP_TILES * cut.UNIT_TILES > 1:
            raise ValueError("A row of this many columns takes several tiles. Use fewer columns.")
        opcodes = compile_launch(launch, capability).opcodes
        n_threads = launch.grid[0] * 32 * launch.n_warps
        # The code ends with NOPs as padding.
        total += sum(not opcode.startswith("NOP") for opcode in opcodes) * n_threads / n_elements
    return total


def roofline(rows: int, columns: int) -> dict[str, dict[str, float]]:
    """Return the bytes, instructions and least nanoseconds per element, by kernel."""
    calls = operators(rows, columns, None, torch.device("cpu"), 1)
    found: dict[str, dict[str, float]] = {}
    for name in KERNELS:
        n_elements, n_bytes, call = calls[name]
        found[name] = {"bytes": n_bytes}
        for device, of in DEVICES.items():
            count = instructions(call, of.capability, n_elements)
            memory = n_bytes / of.bytes_per_second
            issue = count / (LANES * of.multiprocessors * of.clock_hz)
            found[name] |= {
                f"instructions, sm_{of.capability}": count,
                f"ns, {device}": 1e9 * max(memory, issue),
                f"of bandwidth, {device}": min(1.0, memory / issue),
            }
    return found


def main() -> None:
    """Compile the kernels, compute the bounds, and write the report."""
    options = command_line(__doc__).parse_args()
    figures = roofline(*SHAPE)
    table = report.figures_table("kernel", figures)
    report.write(options, {"kernels": figures}, table)
    report.finish(options, table)


if __name__ == "__main__":
    main()
