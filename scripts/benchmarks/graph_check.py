"""Check that steps by CUDA graphs have the same bits as eager steps, and measure both.

    python scripts/benchmarks/graph_check.py --config llama-1b --layers 12
    python scripts/benchmarks/graph_check.py --device cpu    # the same path, with recorded graphs

In each mode, `QFTTrainer` trains the same model on the same batches of one sequence twice: eagerly
and with `cuda_graph=True`. Halfway a tensor moves, so that graphs are captured again. All weights,
losses and norms of the two runs must be equal, otherwise the script exits with 1. Times are medians
over the steps after the first captures, from the start of a step to the start of the next, so they
include everything that the Trainer does. They mean nothing on a CPU, where
`tests/recorded_graph.py` stands in for the graph.
"""

import gc
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, where common/ is
sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # the checkout, where tests/ is
from common import report
from common.command_line import chosen, command_line
from common.peak_memory import peak_bytes, reset_peak
from common.shapes import model_config

from qft_hf import QFTTrainer, QFTTrainingArguments

MODES: dict[str, dict[str, Any]] = {
    "stack": {"max_grad_norm": 1.0},
    "release": {"gradient": "release", "clipping": "previous", "max_grad_norm": 1.0},
    "stack, int8": {"max_grad_norm": 1.0, "matmul": "int8"},
    "release, int8": {"gradient": "release", "max_grad_norm": 0.0, "matmul": "int8"},
}
N_BEFORE = 5  # steps that are not timed: the eager ones and those that capture graphs


class _Clock(TrainerCallback):
    """Times at which the host began each step; the first timed step waits for the device."""

    def __init__(self) -> None:
        self.begun: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the time."""
        if args.device.type == "cuda" and len(self.begun) == N_BEFORE:
            torch.cuda.synchronize(args.device)
        self.begun.append(time.perf_counter())


class _Moves(TrainerCallback):
    """Moves one tensor of the optimizer's state, as loading a checkpoint moves all of them."""

    def on_step_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Replace the tensor by a copy, halfway through training."""
        if state.global_step == state.max_steps // 2:
            tensors = next(iter(optimizer.state.values()))
            name = next(name for name, tensor in tensors.items() if tensor.ndim)
            tensors[name] = tensors[name].clone()


def train(mode: dict[str, Any], options: Namespace, *, graphed: bool) -> dict[str, Any]:
    """Train, and return the weights, logs, seconds per step and peak bytes of the run."""
    device = torch.device(options.device)
    torch.manual_seed(0)
    config = model_config(options.config, options.layers)
    model = LlamaForCausalLM(config).to(getattr(torch, options.dtype))
    ids = torch.randint(config.vocab_size, (options.steps, options.sequence_length))
    with tempfile.TemporaryDirectory() as folder:
        args = QFTTrainingArguments(
            output_dir=folder, max_steps=options.steps, per_device_train_batch_size=1,
            learning_rate=1e-4, weight_decay=0.1, lr_scheduler_type="cosine", warmup_steps=2,
            logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True,
            use_cpu=device.type == "cpu", cuda_graph=graphed and device.type == "cuda", **mode,
        )  # fmt: skip
        data = [{"input_ids": row, "labels": row} for row in ids]
        clock = _Clock()
        callbacks = [clock, _Moves()]
        trainer = QFTTrainer(model=model, args=args, train_dataset=data, callbacks=callbacks)
        if graphed and device.type == "cpu":
            from tests.recorded_graph import RecordedGraph

            trainer.make_graph = RecordedGraph
        gc.collect()  # frees the previous run, whose trainer is in a reference cycle
        before = reset_peak(device)
        trainer.train()
    keys = ("loss", "grad_norm")
    logs = [{key: log[key] for key in keys} for log in trainer.state.log_history if "loss" in log]
    times = clock.begun[N_BEFORE:]
    return {
        "weights": {name: value.cpu() for name, value in trainer.model.state_dict().items()},
        "logs": logs,
        "seconds": statistics.median(b - a for a, b in pairwise(times)),
        "bytes": peak_bytes(device) - before,
    }


def compared(eager: dict[str, Any], graphed: dict[str, Any]) -> dict[str, float]:
    """Return times and memory of both runs, and counts of what differs between them."""
    ours, theirs = graphed["weights"], eager["weights"]
    different = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
    logs = [a != b for a, b in zip(eager["logs"], graphed["logs"], strict=True)]
    return {
        "eager, ms": 1e3 * eager["seconds"],
        "graph, ms": 1e3 * graphed["seconds"],
        "graph / eager": graphed["seconds"] / eager["seconds"],
        "eager peak, GB": eager["bytes"] / 1e9,
        "graph peak, GB": graphed["bytes"] / 1e9,
        "tensors that differ": len(different),
        "steps whose logs differ": sum(logs),
    }


def main() -> None:
    """Train twice in each mode, and write the report."""
    parser = command_line(
        __doc__, device="cuda", config="tiny", layers=None, sequence_length=512, steps=20,
        dtype="bfloat16", only=None,
    )  # fmt: skip
    options = parser.parse_args()
    if options.steps < N_BEFORE + 2:
        parser.error(f"--steps must be at least {N_BEFORE + 2}, got {options.steps}")
    figures: dict[str, dict[str, float]] = {}
    for name, mode in chosen(MODES, options.only).items():
        runs = [train(mode, options, graphed=graphed) for graphed in (False, True)]
        figures[name] = compared(*runs)
        report.write(options, {"modes": figures}, report.figures_table("mode", figures))
    report.finish(options, report.figures_table("mode", figures))
    different = ("tensors that differ", "steps whose logs differ")
    if any(row[name] for row in figures.values() for name in different):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
