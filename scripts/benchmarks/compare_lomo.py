"""Compare the Trainer's `optim="lomo"` with `optim="qft_lion"` in the same run, on a CPU.

    python scripts/benchmarks/compare_lomo.py               # SmolLM2-135M, a few minutes
    python scripts/benchmarks/compare_lomo.py --layers 4    # its first layers only: quick

Every cell of the table is measured by this script, on a real model and real dialogues, which are
downloaded if they are missing. Needs the package `lomo-optim`: pip install lomo-optim
"""

import gc
import hashlib
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, where common/ is
from common import report
from common.command_line import command_line

from qft_hf import QFTTrainer, memory_ledger
from qft_hf.quant import Int8Tensor, TiledGradient

WINDOW = 4  # micro-batches per step
STEPS = 2  # in the uninterrupted run; the resumed run starts after the first


@dataclass(frozen=True)
class Candidate:
    """One way to train.

    Attributes:
        optim_args: The Trainer's `optim_args`.
        clipping: Further `optim_args` that clipping by norm needs.
        learning_rate: For LOMO and `qft_sgd` a learning rate of SGD, otherwise one of Lion.
    """

    optim: str
    learning_rate: float
    optim_args: str = ""
    clipping: str = ""
    trainer: type[Trainer] = Trainer


SGD_RATE, LION_RATE = 1e-2, 1e-4
CANDIDATES = {
    "lomo": Candidate("lomo", SGD_RATE),
    "qft_lion, stack": Candidate("qft_lion", LION_RATE),
    "qft_lion, release": Candidate(
        "qft_lion", LION_RATE, "gradient=release", "clipping=exact", QFTTrainer
    ),
    "qft_sgd, release": Candidate(
        "qft_sgd", SGD_RATE, "gradient=release", "clipping=exact", QFTTrainer
    ),
}


def stored(tensor: Tensor) -> Iterable[Tensor]:
    """Return the plain tensors that hold a tensor's values."""
    return tensor.fields().values() if isinstance(tensor, Int8Tensor) else (tensor,)


def n_bytes(tensor: Tensor) -> int:
    """Return the bytes that hold a tensor; those of the largest tile if it is computed by tiles."""
    if isinstance(tensor, TiledGradient):
        largest = max(len(range(*rows.indices(tensor.shape[0]))) for rows in tensor.rows)
        return largest * tensor.shape[1] * tensor.dtype.itemsize
    return sum(part.nbytes for part in stored(tensor))


def fingerprint(model: nn.Module, optimizer: Any = None) -> str:
    """Return a hash of the bits of all weights and of the optimizer's tensors."""
    states = {} if optimizer is None else optimizer.state_dict()["state"]
    tensors = list(model.parameters())
    for key in sorted(states):
        tensors += [v for _, v in sorted(states[key].items()) if isinstance(v, Tensor)]
    digest = hashlib.blake2b()
    for tensor in tensors:
        for part in stored(tensor.detach()):
            digest.update(part.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@dataclass
class Watch(TrainerCallback):
    """Observes a run from outside, in the same way for every optimizer.

    Attributes:
        progress: Bar that counts micro-batches.
        peak_gradient_bytes: Peak of the gradients in `.grad` and the one just computed, together.
        kept_gradient_bytes: Peak of the gradients in `.grad` between two micro-batches.
        updates: Number of micro-batches of the first step that changed the weights.
        after_first_step: Fingerprint of weights and optimizer.
        states: Bytes by kind after the last step.
    """

    progress: tqdm
    peak_gradient_bytes: int = 0
    kept_gradient_bytes: int = 0
    updates: int = 0
    after_first_step: str = ""
    states: dict[str, int] = field(default_factory=dict)
    _before: str = ""

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:  # noqa: D102
        self._before = fingerprint(model)
        self._parameters = list(model.parameters())
        # The nodes that receive gradients. With a hook on the parameter, release would compute
        # whole gradients instead of tiles.
        self._nodes = [get_gradient_edge(parameter).node for parameter in self._parameters]
        for node in self._nodes:
            node.register_prehook(self._look)

    def _look(self, gradients: tuple[Tensor, ...]) -> None:
        held = [p.grad for p in self._parameters if p.grad is not None]
        n_alive = sum(n_bytes(gradient) for gradient in (*gradients, *held))
        self.peak_gradient_bytes = max(self.peak_gradient_bytes, n_alive)

    def _micro_batch(self, state: Any, model: nn.Module, n_before: int) -> None:
        self.progress.update()
        if state.global_step == n_before:
            now = fingerprint(model)
            self.updates += now != self._before
            self._before = now

    def on_substep_end(self, args, state, control, model=None, **kwargs) -> None:  # noqa: D102
        held = sum(n_bytes(p.grad) for p in model.parameters() if p.grad is not None)
        self.kept_gradient_bytes = max(self.kept_gradient_bytes, held)
        self._micro_batch(state, model, 0)

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs) -> None:  # noqa: D102
        self._micro_batch(state, model, 1)
        if state.global_step == 1:
            self.after_first_step = fingerprint(model, optimizer)
        self.states = {row.state: row.bytes for row in memory_ledger(model, optimizer).rows}


@dataclass(frozen=True)
class Setting:
    """The model, data, output folder and progress bar that all contestants share."""

    load: Callable[[], nn.Module]
    examples: list[dict[str, Tensor]]
    folder: Path
    progress: tqdm

    def run(
        self, candidate: Candidate, *, resume: str | None = None, **overrides: Any
    ) -> tuple[Trainer, Watch]:
        """Train, and return the trainer and the callback that observed it."""
        watch = Watch(self.progress)
        arguments = {
            "optim": candidate.optim,
            "optim_args": candidate.optim_args or None,
            "learning_rate": candidate.learning_rate,
            "max_steps": STEPS,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": WINDOW,
            "max_grad_norm": 0,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.0,
            "save_strategy": "no",
            "logging_steps": 1,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 1,
        }
        trainer = candidate.trainer(
            model=self.load(),
            args=TrainingArguments(str(self.folder), **arguments | overrides),
            train_dataset=self.examples,
            callbacks=[watch],
        )
        with redirect_stdout(StringIO()):  # hides the logs; the table has the figures that matter
            trainer.train(resume_from_checkpoint=resume)
        gc.collect()
        return trainer, watch


def first_norm(trainer: Trainer) -> float:
    """Return the `grad_norm` that the Trainer logged for the first step."""
    return next(row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row)


def true_norm(setting: Setting) -> float:
    """Return the global gradient norm of the first step, by PyTorch's SGD on the float model."""
    trainer, _ = setting.run(Candidate("sgd", 0.0), max_steps=1)
    return first_norm(trainer)


def measure(candidate: Candidate, setting: Setting, norm: float) -> dict[str, Any]:
    """Return all figures of one candidate; `norm` is the gradient norm of the first step."""
    straight, watch = setting.run(candidate, save_strategy="steps", save_steps=1)
    end = fingerprint(straight.model, straight.optimizer)
    logged = first_norm(straight)
    del straight

    checkpoint = setting.folder / "checkpoint-1"
    resumed, _ = setting.run(candidate, resume=str(checkpoint))
    resumed_end = fingerprint(resumed.model, resumed.optimizer)
    del resumed

    with_clipping = ",".join(filter(None, (candidate.optim_args, candidate.clipping)))
    clipped_candidate = replace(candidate, optim_args=with_clipping)
    _, clipped = setting.run(clipped_candidate, max_steps=1, max_grad_norm=norm / 4)
    _, single = setting.run(candidate, max_steps=1, gradient_accumulation_steps=1)
    return {
        "states_bytes": watch.states,
        "peak_gradient_bytes": single.peak_gradient_bytes,
        "kept_gradient_bytes": watch.kept_gradient_bytes,
        "updates_per_window": watch.updates,
        "max_grad_norm_has_an_effect": clipped.after_first_step != watch.after_first_step,
        "logged_grad_norm": logged,
        "resume_is_bit_exact": end == resumed_end,
    }


def table(figures: dict[str, Any]) -> str:
    """Return a table with one column for each candidate."""
    results = figures["contestants"]
    kinds = list(dict.fromkeys(kind for row in results.values() for kind in row["states_bytes"]))

    def megabytes(n_bytes: int) -> str:
        return f"{n_bytes / 1e6:.1f} MB"

    def yes(value: bool) -> str:  # noqa: FBT001
        return "yes" if value else "**no**"

    def total(row: dict[str, Any]) -> int:
        return sum(row["states_bytes"].values())

    cells: dict[str, Callable[[dict[str, Any]], object]] = {
        kind: lambda row, kind=kind: megabytes(row["states_bytes"].get(kind, 0)) for kind in kinds
    }
    norm = f"logged `grad_norm` (of the float model: {figures['true_grad_norm']:.3f})"
    cells |= {
        "states in all": lambda row: megabytes(total(row)),
        "bytes per parameter": lambda row: f"{total(row) / figures['n_parameters']:.2f}",
        "gradients alive at most, one micro-batch a step": lambda row: megabytes(
            row["peak_gradient_bytes"]
        ),
        f"gradients kept between {WINDOW} micro-batches": lambda row: megabytes(
            row["kept_gradient_bytes"]
        ),
        f"weight updates in {WINDOW} micro-batches": lambda row: row["updates_per_window"],
        "`max_grad_norm` has an effect": lambda row: yes(row["max_grad_norm_has_an_effect"]),
        norm: lambda row: f"{row['logged_grad_norm']:.3f}",
        "resume is bit-exact": lambda row: yes(row["resume_is_bit_exact"]),
    }
    rows = [[name, *map(cell, results.values())] for name, cell in cells.items()]
    return report.table(["", *results], rows)


def compare(
    load: Callable[[], nn.Module], examples: list[dict[str, Tensor]], folder: Path
) -> dict[str, Any]:
    """Measure every candidate on the same model and data; `folder` is for checkpoints."""
    n_parameters = sum(p.numel() for p in load().parameters())
    per_candidate = WINDOW * STEPS + WINDOW * (STEPS - 1) + WINDOW + 1
    total = WINDOW + per_candidate * len(CANDIDATES)
    with tqdm(total=total, unit="micro-batch") as progress:
        setting = Setting(load, examples, folder, progress)
        norm = true_norm(setting)
        results = {}
        for name, candidate in CANDIDATES.items():
            progress.set_description(name)
            results[name] = measure(candidate, setting, norm)
    return {"n_parameters": n_parameters, "true_grad_norm": norm, "contestants": results}


def main() -> None:
    """Fetch missing assets, compare, and write the report."""
    # FP32 by default, because bfloat16 is very slow on CPUs without bf16 units.
    parser = command_line(__doc__, layers=None, sequence_length=32, dtype="float32")
    options = parser.parse_args()
    if importlib.util.find_spec("lomo_optim") is None:
        parser.error("the package lomo-optim is not installed: pip install lomo-optim")
    from fetch_demo import fetch

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, dialogues = (fetch(name, report.ROOT / "data") for name in ("smollm2", "chitchat"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    with (dialogues / "train.jsonl").open() as file:
        rows = [json.loads(next(file)) for _ in range(WINDOW * STEPS)]
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    encoded = [tokenizer(text, return_tensors="pt").input_ids[0] for text in texts]
    examples = [{"input_ids": ids[: options.sequence_length]} for ids in encoded]
    examples = [{**example, "labels": example["input_ids"]} for example in examples]
    overrides = {} if options.layers is None else {"num_hidden_layers": options.layers}

    with tempfile.TemporaryDirectory() as folder:
        figures = compare(
            lambda: AutoModelForCausalLM.from_pretrained(model, dtype=options.dtype, **overrides),
            examples,
            Path(folder),
        )
    text = (
        f"{figures['n_parameters'] / 1e6:.1f} M parameters, {options.dtype} where not INT8, "
        f"lr {SGD_RATE:g} (SGD) and {LION_RATE:g} (Lion)\n\n{table(figures)}"
    )
    report.write(options, figures, text)
    report.finish(options, text)


if __name__ == "__main__":
    main()
