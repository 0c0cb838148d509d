"""Accuracy of a model on yes/no questions (BoolQ), tuned in FP32 and in INT8.

    python scripts/fetch_demo.py minilm smollm2 boolq
    python scripts/studies/boolq.py                          # the config `boolq_minilm`: hours
    python scripts/studies/boolq.py --max_train_rows 2000    # with any flags of qft-hf finetune
    python scripts/studies/boolq.py --model_name_or_path data/smollm2   # another model

Every way is tuned at each of its learning rates with the first seed. The rate with the lowest
held-out loss is then run with the other seeds; a seed sets the initial head, dropout and the order
of the data. Nothing is clipped, so `release` has the same bits as `stack`: it is run once, with the
first seed at the best rate of `stack`.

A finished run is a line in `runs.jsonl` of the output folder and is not repeated, so the study can
be stopped at any time and started again. Times are CPU times of the process, which other programs
on the machine affect little.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, where common/ is
from common import report
from common.command_line import chosen, command_line
from common.float_trainer import float_trainer

from qft_hf.hf.finetune import RunArguments, parse_arguments, prepare
from qft_hf.memory import memory_ledger

Run = dict[str, Any]  # way, rate, seed and flags, followed by the results
FIXED = [
    "--eval_strategy=no",  # scored once, at the end
    "--save_strategy=no",
    "--overwrite_output",
    "--max_grad_norm=0",
]
MAKE: dict[str, Callable[[RunArguments], Trainer]] = {
    "FP32 AdamW": lambda arguments: float_trainer(arguments, "AdamW"),
    "FP32 Lion": lambda arguments: float_trainer(arguments, "Lion"),
    "QFT": lambda arguments: prepare(arguments).trainer,
    "QFT, INT8 products": lambda arguments: prepare(arguments).trainer,
    "QFT, release": lambda arguments: prepare(arguments).trainer,
    "QFT AdamW": lambda arguments: prepare(arguments).trainer,
    "QFT AdamW, INT8 products": lambda arguments: prepare(arguments).trainer,
}
SAME_BITS = {"QFT, release": "QFT"}
FLAGS = {
    "QFT, INT8 products": ["--matmul=int8"],
    "QFT, release": ["--gradient=release"],
    "QFT AdamW": ["--optim=qft_adamw"],
    "QFT AdamW, INT8 products": ["--optim=qft_adamw", "--matmul=int8"],
}


class Measured(TrainerCallback):
    """Records bytes of states before the second step, when all exist, and CPU seconds of steps."""

    def __init__(self) -> None:
        self.state_bytes = 0
        self.seconds = 0.0
        self._began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start timing."""
        self._began = time.process_time()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the bytes of all states."""
        if state.global_step == 1:
            self.state_bytes = memory_ledger(kwargs["model"], kwargs["optimizer"]).total_bytes

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop timing."""
        self.seconds += time.process_time() - self._began


def tune(way: str, rate: float, seed: int, flags: list[str]) -> Run:
    """Train and score once, and return the results."""
    flags = [*flags, f"--learning_rate={rate}", f"--seed={seed}", *FLAGS.get(way, [])]
    if way.startswith("QFT"):
        flags.append(f"--quantization_seed={seed}")
    trainer = MAKE[way](parse_arguments(["boolq_minilm", *FIXED, *flags]))
    measured = Measured()
    trainer.add_callback(measured)
    trainer.train()
    scores = trainer.evaluate()
    labels = np.asarray(trainer.eval_dataset["labels"])
    return {
        "accuracy": scores["eval_accuracy"],
        "loss": scores["eval_loss"],
        "training_loss": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "steps": trainer.state.global_step,
        "cpu_seconds": measured.seconds,
        "state_bytes": measured.state_bytes,
        "held_out": len(labels),
        "majority": float(np.bincount(labels).max() / len(labels)),
    }


def best_rate(runs: Iterable[Run], way: str, seed: int) -> float:
    """Return the learning rate at which a way has the lowest loss with a seed."""
    tried = [run for run in runs if run["way"] == way and run["seed"] == seed]
    return min(tried, key=lambda run: run["loss"])["rate"]


def table(runs: list[Run], first_seed: int) -> str:
    """Return a table of the ways at their best rates, and one of the search for these rates.

    Ways are compared in pairs of runs with the same seed: it sets the head and the order of the
    data, which cause much of the variation between runs.
    """
    rows = []
    compared: dict[int, float] = {}  # accuracy of the first way by seed
    for way in dict.fromkeys(run["way"] for run in runs):
        rate = best_rate(runs, way, first_seed)
        found = [run for run in runs if run["way"] == way and run["rate"] == rate]
        accuracies = {run["seed"]: 100 * run["accuracy"] for run in found}
        compared = compared or accuracies
        differences = [accuracies[seed] - compared[seed] for seed in accuracies if seed in compared]
        rows.append(
            [
                way,
                f"{rate:g}",
                len(found),
                f"{_with_error([*accuracies.values()])} %",
                "" if accuracies is compared else _with_error(differences),
                f"{mean(run['loss'] for run in found):.4f}",
                f"{mean(run['state_bytes'] for run in found) / 1e6:.0f} MB",
                f"{mean(run['cpu_seconds'] / run['steps'] for run in found):.2f} s",
            ]
        )
    head = [
        "way",
        "rate",
        "seeds",
        "accuracy",
        f"less {runs[0]['way']} with the same seeds",
        "loss",
        "states",
        "CPU time of a step",
    ]
    first = runs[0]
    error = 100 * sqrt(first["majority"] * (1 - first["majority"]) / first["held_out"])
    search = [
        [run["way"], f"{run['rate']:g}", f"{100 * run['accuracy']:.1f} %", f"{run['loss']:.4f}"]
        for run in runs
        if run["seed"] == first_seed
    ]
    return (
        f"{first['steps']:,} steps. {100 * first['majority']:.1f} % of {first['held_out']:,} "
        "held-out questions are of one class; an accuracy on a sample of this size has a "
        f"standard error of {error:.1f} points.\n\n"
        f"{report.table(head, rows)}\n\nAll rates, seed {first_seed}:\n\n"
        f"{report.table(['way', 'rate', 'accuracy', 'loss'], search)}"
    )


def _with_error(values: list[float]) -> str:
    """Return the mean and, of several values, its standard error."""
    if len(values) < 2:
        return f"{mean(values):.1f}" if values else ""
    return f"{mean(values):.1f} +- {stdev(values) / sqrt(len(values)):.1f}"


def main() -> None:
    """Do the runs that are missing, and write the report after each."""
    parser = command_line(
        __doc__, learning_rate=[1e-5, 3e-5, 1e-4], seeds=[0, 1, 2], threads=1,
        data=report.ROOT / "data", only=None,
    )  # fmt: skip
    parser.add_argument(
        "--adamw_learning_rate", type=float, nargs="+", default=[1.5e-5, 5e-5, 1.5e-4],
        help="learning rates of AdamW (default 1.5e-05 5e-05 0.00015)",
    )  # fmt: skip
    options, flags = parser.parse_known_args()  # the others are flags of qft-hf finetune
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "runs.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    runs: list[Run] = []
    folders = [
        f"--model_name_or_path={options.data / 'minilm'}",
        f"--train_data={options.data / 'boolq' / 'train.jsonl'}",
        f"--eval_data={options.data / 'boolq' / 'eval.jsonl'}",
        f"--output_dir={options.output / 'trainer'}",
    ]

    def do(way: str, rate: float, seed: int) -> None:
        key = {"way": way, "rate": rate, "seed": seed, "flags": flags}
        run = next((run for run in done if key.items() <= run.items()), None)
        if run is None:
            print(f"== {way}, rate {rate:g}, seed {seed}", flush=True)
            run = key | tune(way, rate, seed, [*folders, *flags])
            with path.open("a") as file:
                file.write(f"{json.dumps(run)}\n")
        runs.append(run)
        report.write(options, {"runs": runs}, table(runs, options.seeds[0]))

    ways = chosen(MAKE, options.only)
    repeated = {way for way in ways if SAME_BITS.get(way) in ways}
    first, *others = options.seeds
    for way in ways:
        rates = options.adamw_learning_rate if "AdamW" in way else options.learning_rate
        for rate in [best_rate(runs, SAME_BITS[way], first)] if way in repeated else rates:
            do(way, rate, first)
    for seed in others:
        for way in ways:
            if way not in repeated:
                do(way, best_rate(runs, way, first), seed)
    report.finish(options, table(runs, options.seeds[0]))


if __name__ == "__main__":
    main()
