"""Runs of the Trainers on several processes, and on one with as many micro-batches."""

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import Trainer, TrainingArguments

from qft_hf import QFTTrainer, QFTTrainingArguments
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
