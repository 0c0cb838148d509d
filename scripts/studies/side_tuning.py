"""Cost and loss of a side network, compared with QLoRA, LoRA on INT8 and full fine-tuning.

    python scripts/fetch_demo.py smollm2 chitchat minilm boolq       # models and data, once
    python scripts/studies/side_tuning.py
    python scripts/studies/side_tuning.py --only dialogues/QLoRA dialogues/QST --seeds 0

All ways train on the same batches, in the same order for the same seed. First all ways of a task
are built and measured on one batch: bytes that autograd saves for backward, the ledger just before
a step, and CPU seconds per step, with steps in turns so that load on the machine affects all alike.
Then each way is trained at each of its learning rates with the first seed, and with the other seeds
at the rate with the lowest held-out loss; `--measure` skips the training. Finished work is a line
in `runs.jsonl` of the output folder and is not repeated, so the study can be stopped at any time.
"""

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup, set_seed

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, where common/ is
from common import report
from common.command_line import chosen, command_line
from common.run_log import Run, RunLog, best_rate, matching

from qft_hf import QFTConfig, QFTLion, QFTWeight, memory_ledger
from qft_hf.hf.base import base_format
from qft_hf.hf.card_facts import parameters_of
from qft_hf.hf.estimate import without_storage
from qft_hf.hf.finetune import parse_arguments
from qft_hf.hf.finetune.data import TaskData, prepare_data
from qft_hf.hf.finetune.evaluate import scores
from qft_hf.hf.finetune.loading import load_config, load_model, load_tokenizer
from qft_hf.side import QSTConfig, attach_side_network

MAX_GRAD_NORM = 1.0
WARMUP = 0.06  # share of all steps
TIMED = 3  # timed steps of each way, of which the median is reported
LORA_RANK = 16


@dataclass(frozen=True)
class Task:
    """A model and the data that it is trained on.

    Attributes:
        flags: Flags of `qft-hf finetune`.
        steps: Training steps.
        batch_size: Examples per step.
        score: Name of the score in the table, in addition to the loss.
        rates: Learning rates to try: of Lion on all weights ("full"), of AdamW on adapters ("lora")
            and on side networks ("side").
    """

    flags: dict[str, Any]
    steps: int
    batch_size: int
    score: str
    rates: dict[str, tuple[float, ...]]


_BOOLQ = {
    "task": "classification",
    "train_data": "data/boolq/train.jsonl",
    "eval_data": "data/boolq/eval.jsonl",
    "text_field": "question",
    "text_pair_field": "passage",
    "max_length": 64,
    "max_eval_rows": 400,
}
BOOLQ_RATES = {"full": (2e-5, 5e-5, 1e-4), "lora": (3e-4, 1e-3, 3e-3), "side": (3e-4, 1e-3, 3e-3)}
TASKS = {
    "boolq-minilm": Task(
        {**_BOOLQ, "model_name_or_path": "data/minilm"},
        steps=300,
        batch_size=8,
        score="accuracy",
        rates=BOOLQ_RATES,
    ),
    "boolq-smollm2": Task(
        {**_BOOLQ, "model_name_or_path": "data/smollm2", "max_eval_rows": 100},
        steps=20,
        batch_size=4,
        score="accuracy",
        rates=BOOLQ_RATES,
    ),
    "dialogues": Task(
        {
            "model_name_or_path": "data/smollm2",
            "train_data": "data/chitchat/train.jsonl",
            "max_train_rows": 1000,
            "eval_data": "data/chitchat/eval.jsonl",
            "max_eval_rows": 64,
            "max_length": 64,
        },
        steps=120,
        batch_size=2,
        score="loss",
        rates={"full": (2e-5, 5e-5, 1e-4), "lora": (3e-4, 1e-3, 3e-3), "side": (1e-3, 2e-3, 5e-3)},
    ),
}


class Bench:
    """The data of one task, and a loader of its models."""

    def __init__(self, task: Task) -> None:
        self.task = task
        flags = {
            **task.flags,
            "output_dir": "unused",
            "use_cpu": "true",
            "disable_tqdm": "true",
            "per_device_eval_batch_size": 16,
        }
        self.arguments = parse_arguments([f"--{name}={value}" for name, value in flags.items()])
        tokenizer = load_tokenizer(self.arguments.model)
        config = load_config(self.arguments.model)
        self.data: TaskData = prepare_data(self.arguments.data, tokenizer, config, seed=0)

    def load(self, base: str, seed: int, *, is_frozen: bool = True) -> Any:
        """Return the model in the format `base`; if it is frozen, a new head stays float."""
        set_seed(seed)
        config = load_config(self.arguments.model)
        self.data.task.configure(config)
        skeleton = without_storage(self.data.task.model_class(config), config)
        heads = [n for n, _ in skeleton.named_children() if n in ("classifier", "score")]
        form = QFTConfig(seed=seed, modules_to_not_convert=heads if is_frozen else [])
        quantization = base_format(base, skeleton, config=form)
        return load_model(self.arguments.model, quantization, config, self.data.task)

    def batches(self, seed: int) -> Iterator[dict[str, Tensor]]:
        """Yield batches of training data endlessly, in the order that `seed` determines."""
        loader: Any = DataLoader(
            self.data.train.dataset,  # type: ignore[arg-type]
            batch_size=self.task.batch_size,
            shuffle=True,
            drop_last=True,
            generator=torch.Generator().manual_seed(seed),
            collate_fn=self.data.task.collator,
        )
        while True:
            yield from loader

    def scores(self, model: Any) -> dict[str, float]:
        """Return the scores on held-out data, as `qft-hf evaluate` computes them."""
        return scores(model, self.data, self.arguments.training)


Build = Callable[[Bench, int, float], tuple[Any, Any]]  # (bench, seed, rate) to model, optimizer


class Way(NamedTuple):
    """How a model and its optimizer are built, and which of `Task.rates` are tried."""

    build: Build
    rates: str


def full(bench: Bench, seed: int, rate: float) -> tuple[Any, Any]:
    """Build a model with all parameters trained in INT8 by Lion."""
    model = bench.load("int8", seed, is_frozen=False)
    return model, QFTLion(model.parameters(), lr=rate, seed=seed)


def lora(base: str) -> Way:
    """Return the way of adapters on every linear layer of a frozen base; QLoRA if it is NF4."""

    def build(bench: Bench, seed: int, rate: float) -> tuple[Any, Any]:
        config = LoraConfig(
            r=LORA_RANK,
            lora_alpha=2 * LORA_RANK,
            target_modules="all-linear",  # except the heads
            task_type="SEQ_CLS" if bench.task.score == "accuracy" else "CAUSAL_LM",
        )
        model = get_peft_model(bench.load(base, seed), config)
        return model, adamw(model, rate)

    return Way(build, "lora")


def side(base: str, downsample: str) -> Way:
    """Return the way of a side network on a frozen base."""

    def build(bench: Bench, seed: int, rate: float) -> tuple[Any, Any]:
        model = bench.load(base, seed)
        set_seed(seed)
        model = attach_side_network(model, QSTConfig(downsample=downsample))
        return model, adamw(model, rate)

    return Way(build, "side")


def adamw(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """Return AdamW for all parameters that are trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=rate, weight_decay=0.01)


WAYS: dict[str, Way] = {
    "QST, NF4 base": side("nf4", "adapter"),
    "QLoRA": lora("nf4"),
    "QST, INT8 base": side("int8", "adapter"),
    "LoRA on INT8": lora("int8"),
    "QST, float base": side("float", "adapter"),
    "full QFT": Way(full, "full"),
    "QST, float base, linear": side("float", "linear"),
    "QST, float base, mean": side("float", "mean"),
    "QST, float base, max": side("float", "max"),
}


def step(model: Any, optimizer: Any, batch: dict[str, Tensor]) -> float:
    """Take one step, and return its loss."""
    optimizer.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    trained = [p for p in model.parameters() if p.grad is not None]
    torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
    optimizer.step()
    return loss.item()


def kept_bytes(model: Any, batch: dict[str, Tensor]) -> int:
    """Return the bytes that autograd saves for backward, without parameters and buffers."""
    own = {tensor.untyped_storage().data_ptr() for tensor in stored(model)}
    kept: dict[int, Tensor] = {}  # by address; while they are alive, no address is reused

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, QFTWeight):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def stored(model: nn.Module) -> Iterator[Tensor]:
    """Yield parameters and buffers with a storage of their own, and the state of NF4 weights."""
    for tensor in (*model.parameters(), *model.buffers()):
        if not isinstance(tensor, QFTWeight):
            yield tensor
        state = getattr(tensor, "quant_state", None)
        while state is not None:
            yield from (value for value in vars(state).values() if isinstance(value, Tensor))
            state = getattr(state, "state2", None)


def measured(bench: Bench, ways: dict[str, Way]) -> dict[str, dict[str, Any]]:
    """Return bytes and times of all ways, which are in memory at the same time."""
    batch = next(bench.batches(0))
    built, found = {}, {}
    for name, way in ways.items():
        model, optimizer = way.build(bench, 0, bench.task.rates[way.rates][0])
        model.train()
        _, n_trained = parameters_of(model)
        step(model, optimizer, batch)
        kept = kept_bytes(model, batch)
        optimizer.zero_grad()
        model(**batch).loss.backward()  # before the second step, gradients and states exist
        ledger = memory_ledger(model, optimizer).total_bytes
        found[name] = {"trained": n_trained, "kept_bytes": kept, "ledger_bytes": ledger}
        built[name] = (model, optimizer)
    times: dict[str, list[float]] = {name: [] for name in built}
    for _ in range(TIMED):
        for name, (model, optimizer) in built.items():
            began = time.process_time()
            step(model, optimizer, batch)
            times[name].append(time.process_time() - began)
    for name, seconds in times.items():
        found[name]["cpu_seconds"] = statistics.median(seconds)
    return found


def trained(
    bench: Bench, build: Build, seed: int, rate: float, say: Callable[[str], None]
) -> dict[str, float]:
    """Train one model, and return its scores."""
    model, optimizer = build(bench, seed, rate)
    steps = bench.task.steps
    schedule = get_cosine_schedule_with_warmup(optimizer, ceil(WARMUP * steps), steps)
    batches = bench.batches(seed)
    model.train()
    for number in range(steps):
        loss = step(model, optimizer, next(batches))
        schedule.step()
        if (number + 1) % 10 == 0:
            say(f"step {number + 1} of {steps}, loss {loss:.3f}")
    return bench.scores(model)


def measurements(runs: list[Run], task: str) -> dict[str, dict[str, Any]]:
    """Return the bytes and times of all ways of a task that were measured."""
    found: dict[str, dict[str, Any]] = {}
    for run in matching(runs, {"task": task}):
        found |= run.get("measured", {})
    return found


def tables(runs: list[Run], first_seed: int) -> str:
    """Return for each task a table of its ways, and one of the search for their learning rates."""
    head = ["way", "rate", "seeds", "loss, held out", "score", "trained", "kept for backward, MB"]
    head += ["ledger, MB", "CPU seconds a step"]
    parts = []
    for name, task in TASKS.items():
        rows = []
        for way, found in measurements(runs, name).items():
            key = {"task": name, "way": way}
            rate = best_rate(runs, key | {"seed": first_seed})
            scores = [run["scores"] for run in matching(runs, key | {"rate": rate})]
            cells = [report.spread([s[n] for s in scores], 4) for n in ("loss", task.score)]
            rows.append(
                [
                    way,
                    report.number(rate, 5),
                    len(scores),
                    *cells,
                    f"{found['trained']:,}",
                    f"{found['kept_bytes'] / 1e6:.1f}",
                    f"{found['ledger_bytes'] / 1e6:.1f}",
                    f"{found['cpu_seconds']:.2f}",
                ]
            )
        if rows:
            head[4] = task.score
            parts.append(f"{name}\n\n{report.table(head, rows)}")
        searched = matching(runs, {"task": name, "seed": first_seed})
        search = [
            [run["way"], f"{run['rate']:g}", *(f"{s:.4f}" for s in run["scores"].values())]
            for run in searched
        ]
        if search:
            columns = ["way", "rate", *searched[0]["scores"]]
            parts.append(f"{name}, all rates, seed {first_seed}\n\n{report.table(columns, search)}")
    return "\n\n".join(parts)


def main() -> None:
    """Do the selected measurements and runs that are missing; write the report after each."""
    parser = command_line(__doc__, seeds=[0, 1, 2], only=None, threads=1)
    parser.add_argument("--measure", action="store_true", help="do not train")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    log = RunLog(options.output)
    began = time.perf_counter()
    first_seed = options.seeds[0]

    def say(*words: object) -> None:
        print(f"{time.perf_counter() - began:6.0f} s ", *words, flush=True)

    benches: dict[str, tuple[Bench, dict[str, Way]]] = {}
    for name, task in TASKS.items():
        found = chosen({f"{name}/{way}": build for way, build in WAYS.items()}, options.only)
        ways = {place.partition("/")[2]: build for place, build in found.items()}
        if ways:
            benches[name] = (Bench(task), ways)
    for name, (bench, ways) in benches.items():
        known = measurements(log.runs, name)
        if missing := {label: way for label, way in ways.items() if label not in known}:
            log.add({"task": name, "measured": measured(bench, missing)})
            say("measured", log.runs[-1])
            report.write(options, {"runs": log.runs}, tables(log.runs, first_seed))
            gc.collect()
    for seed in [] if options.measure else options.seeds:
        for name, (bench, ways) in benches.items():
            for label, way in ways.items():
                key = {"task": name, "way": label}
                best = best_rate(log.runs, key | {"seed": first_seed})
                for rate in bench.task.rates[way.rates] if seed == first_seed else [best]:
                    run = key | {"rate": rate, "seed": seed}
                    train = partial(trained, bench, way.build, seed, rate, partial(say, run))
                    say("finished", log.run(run, lambda train=train: {"scores": train()}))
                    report.write(options, {"runs": log.runs}, tables(log.runs, first_seed))
    report.finish(options, tables(log.runs, first_seed))


if __name__ == "__main__":
    main()
