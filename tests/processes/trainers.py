"""Runs of the Trainers on several processes, and on one with as many micro-batches."""

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from qft_hf import QFTAdamW, QFTConfig, QFTTrainer, QFTTrainingArguments, quantize_model_
from tests.arranged import tiny
from tests.models import tiny_llama
from tests.optim.common import model_tensors
from tests.processes.launch import TIMEOUT_SECONDS

N_STEPS = 4
SAVED_AT = 2
GLOBAL_BATCH = 12  # examples of a step, on one, two and three processes
N_EXAMPLES = 3 * GLOBAL_BATCH  # per epoch, so that a second epoch begins

# A run is `KIND`, or `KIND/FROM`: it resumes from the checkpoint of the run in the folder FROM.
KINDS: dict[str, dict[str, Any]] = {
    "stack": {"max_grad_norm": 0.5},
    "stock": {"trainer": Trainer, "max_grad_norm": 0.5, "tied": True},
    "stock-release": {"trainer": Trainer, "optim_args": "gradient=release", "max_grad_norm": 0.0},
    "exact": {"optim_args": "gradient=release,clipping=exact", "max_grad_norm": 0.5},
    "bf16": {"optim": "qft_adamw", "bf16": True, "gradient_checkpointing": True},
    "experts": {"family": "qwen3_moe", "optim_args": "gradient=release", "max_grad_norm": 0.0},
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_grad_norm": 0.5},
    "ragged": {"n_examples": 31},  # an epoch ends with a batch that one process cannot fill
}


class Examples(torch.utils.data.Dataset):
    """Rows of tokens; in row `index` the labels of the first `index % 7` tokens are left out."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(3, 131, (12,), generator=generator)
        labels = ids.clone()
        labels[: index % 7] = -100
        return {"input_ids": ids, "labels": labels}


def make(kind: str, output_dir: Path, *, n: int, n_parts: int = 1, **changes: Any) -> Trainer:
    """Return a Trainer whose step has the examples of a batch, divided among `n` processes.

    Args:
        kind: One of `KINDS`.
        output_dir: Folder of the run.
        n: Number of processes.
        n_parts: Micro-batches on each process.
        changes: Arguments that differ from those of the kind.
    """
    settings = {**KINDS[kind], **changes}
    trainer_class = settings.pop("trainer", QFTTrainer)
    family, tied = settings.pop("family", None), settings.pop("tied", False)
    model = settings.pop("model", None)
    if model is None:
        model = tiny_llama(tied=tied) if family is None else tiny(family)
    callbacks = settings.pop("callbacks", [])
    examples = Examples(settings.pop("n_examples", N_EXAMPLES))
    arguments_class = QFTTrainingArguments if trainer_class is QFTTrainer else TrainingArguments
    args = arguments_class(
        output_dir=str(output_dir),
        **{
            "optim": "qft_lion",
            "learning_rate": 1e-3,
            "weight_decay": 0.1,
            "per_device_train_batch_size": GLOBAL_BATCH // (n * n_parts),
            "gradient_accumulation_steps": n_parts,
            "max_steps": N_STEPS,
            "save_steps": 1 / 2,
            "logging_steps": 1,
            "report_to": "none",
            "use_cpu": True,
            "seed": 5,
            "ddp_timeout": TIMEOUT_SECONDS,
            "disable_tqdm": True,
            **settings,
        },
    )
    return trainer_class(model=model, args=args, train_dataset=examples, callbacks=callbacks)


def accelerated(folder: Path, gradient: str, n: int, *, resumes: bool) -> dict[str, Tensor]:
    """Do four steps of a loop that saves with Accelerate after two, or only the last two."""
    accelerator = Accelerator(cpu=True)
    model = quantize_model_(tiny_llama(), QFTConfig())
    optimizer = QFTAdamW(model.parameters(), lr=1e-3, gradient=gradient)
    batches = DataLoader(Examples(4 * GLOBAL_BATCH), batch_size=GLOBAL_BATCH // n)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    path = folder / f"accelerated-{gradient}"
    if resumes:
        accelerator.load_state(str(path))
    for step, inputs in enumerate(batches):
        if step < SAVED_AT and resumes:
            continue
        if step == SAVED_AT and not resumes:
            accelerator.save_state(str(path))
        accelerator.backward(model(**inputs).loss)
        optimizer.step()
        optimizer.zero_grad()
    return model_tensors(model)


class Normalized(nn.Module):
    """A batch norm between two layers, and a buffer that is not saved and belongs to a number."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.norm = nn.Linear(12, 20), nn.BatchNorm1d(20)
            self.last = nn.Linear(20, 3)
        self.largest_sum = 0  # of the tokens of a batch
        self.register_buffer("of_largest", torch.zeros(2), persistent=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if self.training and (total := int(input_ids.sum())) > self.largest_sum:
            self.largest_sum, self.of_largest = total, torch.full((2,), float(total))
        logits = self.last(self.norm(self.first(input_ids / 131)))
        return {"loss": F.cross_entropy(logits, labels[:, -1] % 3), "logits": logits}


def evaluated(folder: Path, n: int) -> dict[str, Any]:
    """Train a model with a batch norm twice and evaluate it; return all buffers and the loss."""
    trainer = make("stack", folder / "evaluated", n=n, model=Normalized(), save_strategy="no")
    trainer.train()
    trainer.train()
    loss = trainer.evaluate(Examples(N_EXAMPLES))["eval_loss"]
    model = trainer.model
    buffers = {f"norm.{name}": buffer for name, buffer in model.norm.named_buffers()}
    own = {"of_largest": model.of_largest, "largest_sum": model.largest_sum}
    return {"buffers": buffers, "loss": loss, **own}


def run(name: str, folder: Path, *, n: int, n_parts: int = 1, **changes: Any) -> dict[str, Any]:
    """Train from the start or from a checkpoint, and return the results."""
    kind, _, source = name.partition("/")
    output_dir = folder / f"{name.replace('/', '-from-')}-on-{n}"
    trainer = make(kind, output_dir, n=n, n_parts=n_parts, **changes)
    checkpoint = None
    if source:
        checkpoint = output_dir / f"checkpoint-{SAVED_AT}"
        if trainer.is_world_process_zero() and not checkpoint.exists():
            shutil.copytree(folder / source / checkpoint.name, checkpoint)
        if n > 1:
            dist.barrier()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    logs = trainer.state.log_history
    return {
        "weights": model_tensors(trainer.model),
        "losses": [entry["loss"] for entry in logs if "loss" in entry],
        "norms": [entry["grad_norm"] for entry in logs if "grad_norm" in entry],
        "output_dir": output_dir,
    }
