"""What a config ends at if it is tuned in FP32, in INT8 and by LoRA, with several seeds.

    python scripts/fetch_demo.py smollm2 chitchat minilm boolq    # models and data, once
    python scripts/studies/quality.py boolq_minilm    # accuracy on yes/no questions: hours
    python scripts/studies/quality.py demo            # loss on dialogues
    python scripts/studies/quality.py demo --max_steps 200    # with any flags of qft-hf finetune

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
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, where common/ is
from common import report
from common.command_line import chosen, command_line
from common.run_log import Run, RunLog, best_rate, matching
from common.trainers import asset_flags, compared_trainer

from qft_hf.memory import memory_ledger


class Way(NamedTuple):
    """A way to tune: the option with the rates to try, and flags of `qft-hf finetune`."""

    rates: str
    flags: tuple[str, ...] = ()


LION, ADAMW, LORA = "learning_rate", "adamw_learning_rate", "lora_learning_rate"
WAYS = {
    "FP32 AdamW": Way(ADAMW),
    "FP32 Lion": Way(LION),
    "LoRA": Way(LORA, ("--dtype=bfloat16",)),  # of the frozen weights; adapters are FP32
    "QFT": Way(LION),
    "QFT, INT8 products": Way(LION, ("--matmul=int8",)),
    "QFT, release": Way(LION, ("--gradient=release",)),
    "QFT AdamW": Way(ADAMW, ("--optim=qft_adamw",)),
    "QFT AdamW, INT8 products": Way(ADAMW, ("--optim=qft_adamw", "--matmul=int8")),
}
SAME_BITS = {"QFT, release": "QFT"}
# By shipped config, the fetched model and data that it uses.
ASSETS = {"demo": ("smollm2", "chitchat"), "boolq_minilm": ("minilm", "boolq")}


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


def tune(config: str, way: str, rate: float, seed: int, flags: list[str]) -> Run:
    """Train and score once, and return the results."""
    print(f"== {way}, rate {rate:g}, seed {seed}", flush=True)
    flags = [
        "--max_grad_norm=0",
        *flags,
        f"--learning_rate={rate}",
        f"--seed={seed}",
        *WAYS[way].flags,
    ]
    if way.startswith("QFT"):
        flags.append(f"--quantization_seed={seed}")
    trainer = compared_trainer(way, config, flags)
    with torch.random.fork_rng():  # the order of the data stays that of a run without it
        before = trainer.evaluate()["eval_loss"]
    measured = Measured()
    trainer.add_callback(measured)
    trainer.train()
    scores = trainer.evaluate()
    run = {
        "loss_before": before,
        "loss": scores["eval_loss"],
        "training_loss": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "steps": trainer.state.global_step,
        "cpu_seconds": measured.seconds,
        "state_bytes": measured.state_bytes,
        "held_out": len(trainer.eval_dataset),
    }
    if "eval_accuracy" in scores:
        labels = np.asarray(trainer.eval_dataset["labels"])
        run["accuracy"] = scores["eval_accuracy"]
        run["majority"] = float(np.bincount(labels).max() / len(labels))
    return run


@dataclass
class Score:
    """A result of a run, as its column shows it."""

    name: str
    digits: int
    unit: str = ""
    factor: float = 1  # from the run's value to the unit

    def of(self, run: Run) -> float:
        """Return the value of a run, in the unit."""
        return self.factor * float(run[self.name])

    def mean(self, values: list[float]) -> str:
        """Return a cell with the mean of runs, and its standard error if there are several."""
        return f"{report.spread(values, self.digits, of_mean=True)}{self.unit}"


LOSS = Score("loss", 4)
ACCURACY = Score("accuracy", 1, " %", 100)


def table(runs: list[Run], first_seed: int) -> str:
    """Return a table of the ways at their best rates, and one of the search for these rates.

    Ways are compared in pairs of runs with the same seed: it sets the head and the order of the
    data, which cause much of the variation between runs.
    """
    first = runs[0]
    scores = [ACCURACY, LOSS] if "accuracy" in first else [LOSS]
    rows = []
    baseline: list[Run] = []  # runs of the first way
    for way in dict.fromkeys(run["way"] for run in runs):
        rate = best_rate(runs, {"way": way, "seed": first_seed})
        found = matching(runs, {"way": way, "rate": rate})
        baseline = baseline or found
        pairs = [(run, same) for run in found for same in matching(baseline, {"seed": run["seed"]})]
        cells: list[object] = []
        for score in scores:
            differences = [score.of(run) - score.of(same) for run, same in pairs]
            cells.append(score.mean([score.of(run) for run in found]))
            cells.append(
                None
                if found is baseline
                else report.spread(differences, score.digits, of_mean=True)
            )
        rows.append(
            [
                way,
                f"{rate:g}",
                len(found),
                *cells,
                f"{mean(run['state_bytes'] for run in found) / 1e6:.0f} MB",
                f"{mean(run['cpu_seconds'] / run['steps'] for run in found):.2f} s",
            ]
        )
    difference = f"less {first['way']} with the same seeds"
    columns = [column for score in scores for column in (score.name, difference)]
    head = ["way", "rate", "seeds", *columns, "states", "CPU time of a step"]
    search = [
        [run["way"], f"{run['rate']:g}", *(score.mean([score.of(run)]) for score in scores)]
        for run in runs
        if run["seed"] == first_seed
    ]
    text = f"{first['steps']:,} steps. "
    if "accuracy" in first:
        error = 100 * sqrt(first["majority"] * (1 - first["majority"]) / first["held_out"])
        text += (
            f"{100 * first['majority']:.1f} % of {first['held_out']:,} held-out questions are of "
            "one class; an accuracy on a sample of this size has a standard error of "
            f"{error:.1f} points."
        )
    else:
        before = {run["way"]: f"{run['way']} {run['loss_before']:.4f}" for run in runs}
        text += f"Loss before on {first['held_out']:,} held-out rows: {', '.join(before.values())}."
    return (
        f"{text}\n\n{report.table(head, rows)}\n\nAll rates, seed {first_seed}:\n\n"
        f"{report.table(['way', 'rate', *(score.name for score in scores)], search)}"
    )


def main() -> None:
    """Do the runs that are missing, and write the report after each."""
    parser = command_line(
        __doc__, learning_rate=[1e-5, 3e-5, 1e-4], adamw_learning_rate=[1.5e-5, 5e-5, 1.5e-4],
        lora_learning_rate=[3e-4, 1e-3, 3e-3], seeds=[0, 1, 2], threads=1,
        data=report.ROOT / "data", only=None,
    )  # fmt: skip
    parser.add_argument("tuned_config", choices=ASSETS, metavar="CONFIG", help=" or ".join(ASSETS))
    options, flags = parser.parse_known_args()  # the others are flags of qft-hf finetune
    torch.set_num_threads(options.threads)
    config = options.tuned_config
    first, *others = options.seeds
    log, runs = RunLog(options.output), []
    folders = asset_flags(options, *ASSETS[config])

    def do(way: str, rate: float, seed: int) -> None:
        key = {"config": config, "way": way, "rate": rate, "seed": seed, "flags": flags}
        runs.append(log.run(key, lambda: tune(config, way, rate, seed, [*folders, *flags])))
        report.write(options, {"runs": runs}, table(runs, first))

    def best(way: str) -> float:
        return best_rate(runs, {"way": way, "seed": first})

    ways = chosen(WAYS, options.only)
    repeated = {way for way in ways if SAME_BITS.get(way) in ways}
    for way, (rates, _) in ways.items():
        for rate in [best(SAME_BITS[way])] if way in repeated else getattr(options, rates):
            do(way, rate, first)
    for seed in others:
        for way in ways:
            if way not in repeated:
                do(way, best(way), seed)
    report.finish(options, table(runs, first))


if __name__ == "__main__":
    main()
