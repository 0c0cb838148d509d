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

import sys
import time
from math import sqrt
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, where common/ is
from common import report
from common.command_line import chosen, command_line
from common.run_log import Run, RunLog, best_rate, matching
from common.trainers import asset_flags, compared_trainer

from qft_hf.memory import memory_ledger

# By name, the flags of `qft-hf finetune`.
WAYS = {
    "FP32 AdamW": [],
    "FP32 Lion": [],
    "QFT": [],
    "QFT, INT8 products": ["--matmul=int8"],
    "QFT, release": ["--gradient=release"],
    "QFT AdamW": ["--optim=qft_adamw"],
    "QFT AdamW, INT8 products": ["--optim=qft_adamw", "--matmul=int8"],
}
SAME_BITS = {"QFT, release": "QFT"}


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
    print(f"== {way}, rate {rate:g}, seed {seed}", flush=True)
    flags = ["--max_grad_norm=0", *flags, f"--learning_rate={rate}", f"--seed={seed}", *WAYS[way]]
    if way.startswith("QFT"):
        flags.append(f"--quantization_seed={seed}")
    trainer = compared_trainer(way, "boolq_minilm", flags)
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


def table(runs: list[Run], first_seed: int) -> str:
    """Return a table of the ways at their best rates, and one of the search for these rates.

    Ways are compared in pairs of runs with the same seed: it sets the head and the order of the
    data, which cause much of the variation between runs.
    """
    rows = []
    compared: dict[int, float] = {}  # accuracy of the first way by seed
    for way in dict.fromkeys(run["way"] for run in runs):
        rate = best_rate(runs, {"way": way, "seed": first_seed})
        found = matching(runs, {"way": way, "rate": rate})
        accuracies = {run["seed"]: 100 * run["accuracy"] for run in found}
        compared = compared or accuracies
        differences = [accuracies[seed] - compared[seed] for seed in accuracies if seed in compared]
        rows.append(
            [
                way,
                f"{rate:g}",
                len(found),
                f"{report.spread([*accuracies.values()], 1, of_mean=True)} %",
                None if accuracies is compared else report.spread(differences, 1, of_mean=True),
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


def main() -> None:
    """Do the runs that are missing, and write the report after each."""
    parser = command_line(
        __doc__, learning_rate=[1e-5, 3e-5, 1e-4], adamw_learning_rate=[1.5e-5, 5e-5, 1.5e-4],
        seeds=[0, 1, 2], threads=1, data=report.ROOT / "data", only=None,
    )  # fmt: skip
    options, flags = parser.parse_known_args()  # the others are flags of qft-hf finetune
    torch.set_num_threads(options.threads)
    first, *others = options.seeds
    log, runs = RunLog(options.output), []
    folders = asset_flags(options, "minilm", "boolq")

    def do(way: str, rate: float, seed: int) -> None:
        key = {"way": way, "rate": rate, "seed": seed, "flags": flags}
        runs.append(log.run(key, lambda: tune(way, rate, seed, [*folders, *flags])))
        report.write(options, {"runs": runs}, table(runs, first))

    def best(way: str) -> float:
        return best_rate(runs, {"way": way, "seed": first})

    ways = chosen(WAYS, options.only)
    repeated = {way for way in ways if SAME_BITS.get(way) in ways}
    for way in ways:
        rates = options.adamw_learning_rate if "AdamW" in way else options.learning_rate
        for rate in [best(SAME_BITS[way])] if way in repeated else rates:
            do(way, rate, first)
    for seed in others:
        for way in ways:
            if way not in repeated:
                do(way, best(way), seed)
    report.finish(options, table(runs, first))


if __name__ == "__main__":
    main()
