"""What goes wrong on one process, or is not the same on all: each case returns what it came to."""

from collections.abc import Callable
from math import nan
from pathlib import Path
from typing import Any

import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig

from qft_hf import QFTConfig, quantize_model_
from tests.models import tiny_llama
from tests.nn.small import SmallModel
from tests.optim.common import make_model, make_optimizer, model_tensors
from tests.processes import trainers, training


def outcome(act: Callable[[], Any]) -> str:
    """The kind and the text of the error of an act; empty without one."""
    try:
        act()
    except (ValueError, RuntimeError, ArithmeticError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def backward(model: SmallModel, rank: int, n: int, *, step: int = 0, factor: float = 1.0) -> None:
    (model.loss(training.shares(step, n)[rank]) * factor).backward()


def nan_on_one(rank: int, n: int, **settings: Any) -> dict[str, Any]:
    """The second step has a NaN on the last process; then a step that has none."""
    model = make_model(tied=False)
    optimizer = make_optimizer(model, **settings)
    backward(model, rank, n)
    optimizer.step()
    before = model_tensors(model)
    backward(model, rank, n, step=1, factor=nan if rank == n - 1 else 1.0)
    text = outcome(optimizer.step)
    after = model_tensors(model)
    optimizer.zero_grad()
    backward(model, rank, n, step=2)
    optimizer.step()
    return {
        "text": text, "skipped": optimizer.skipped_steps, "before": before, "after": after,
        "weights": model_tensors(model),
    }  # fmt: skip


def other_weights(rank: int, n: int) -> dict[str, Any]:
    model = make_model(tied=False, seed=rank)
    optimizer = make_optimizer(model)
    refused = outcome(lambda: backward(model, rank, n))
    optimizer.zero_grad()
    optimizer.broadcast()
    backward(model, rank, n)
    optimizer.step()
    return {"text": refused, "weights": model_tensors(model)}


def other_rate(rank: int, n: int) -> dict[str, Any]:
    model = make_model(tied=False)
    optimizer = make_optimizer(model, lr=1e-3 * (rank + 1))
    text = outcome(lambda: backward(model, rank, n))
    optimizer.zero_grad()
    return {"text": text, "weights": model_tensors(model)}


def second_pass(rank: int, n: int) -> dict[str, Any]:
    model = make_model(tied=False)
    optimizer = make_optimizer(model)
    backward(model, rank, n)
    text = outcome(lambda: backward(model, rank, n, step=1))
    optimizer.zero_grad()
    return {"text": text, "weights": model_tensors(model)}


def reentrant(rank: int, n: int) -> dict[str, Any]:
    """Checkpointing whose inner passes end before the outer: the head and the norm are frozen."""
    model = make_model(tied=False, reentrant=True)
    for frozen in (model.head, model.norm):
        frozen.requires_grad_(False)
    optimizer = make_optimizer(model)
    text = outcome(lambda: backward(model, rank, n))
    optimizer.zero_grad()
    return {"text": text, "weights": model_tensors(model)}


def no_consolidation(rank: int, n: int) -> dict[str, Any]:
    model = make_model(tied=False)
    optimizer = make_optimizer(model)
    backward(model, rank, n)
    optimizer.step()
    return {"text": outcome(optimizer.state_dict), "weights": model_tensors(model)}


def trainer_case(folder: Path, n: int, **changes: Any) -> dict[str, Any]:
    trainer = trainers.make("stack", folder / "bad", n=n, save_strategy="no", **changes)
    return {"text": outcome(trainer.train), "weights": model_tensors(trainer.model)}


def adapters(folder: Path, rank: int, n: int) -> dict[str, Any]:
    """Adapters on a frozen INT8 model, which another optimizer trains under DDP."""
    model = get_peft_model(
        quantize_model_(tiny_llama(seed=rank), QFTConfig()),
        LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    trainer = trainers.make(
        "stock", folder / "bad", n=n, save_strategy="no", model=model, optim="adamw_torch"
    )
    return {"text": outcome(trainer.train), "weights": model_tensors(trainer.model)}


def loaded_into_shards(folder: Path, n: int) -> dict[str, Any]:
    """An INT8 checkpoint, by the way on which transformers has FSDP2 divide a model."""
    path = folder / "int8"
    quantize_model_(tiny_llama(), QFTConfig()).save_pretrained(path)  # the first process writes
    dist.barrier()
    sharded = DistributedConfig(fsdp_size=n)
    return {
        "text": outcome(lambda: LlamaForCausalLM.from_pretrained(path, distributed_config=sharded))
    }


def run(name: str, folder: Path, rank: int, n: int) -> dict[str, Any]:
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        "nan-stack": lambda: nan_on_one(rank, n),
        "nan-skip": lambda: nan_on_one(rank, n, nonfinite="skip"),
        "nan-release": lambda: nan_on_one(rank, n, gradient="release"),
        "nan-tensor": lambda: nan_on_one(
            rank, n, gradient="release", clipping="previous", max_grad_norm=0.4
        ),
        "other-weights": lambda: other_weights(rank, n),
        "other-rate": lambda: other_rate(rank, n),
        "second-pass": lambda: second_pass(rank, n),
        "reentrant": lambda: reentrant(rank, n),
        "no-consolidation": lambda: no_consolidation(rank, n),
        "trainer-model": lambda: trainer_case(folder, n, model=tiny_llama(seed=rank)),
        "trainer-rate": lambda: trainer_case(folder, n, learning_rate=1e-3 * (rank + 1)),
        "trainer-data": lambda: trainer_case(folder, n, n_examples=36 + rank),
        "trainer-adapters": lambda: adapters(folder, rank, n),
        "shards": lambda: loaded_into_shards(folder, n),
        "trainer-reentrant": lambda: {
            "text": outcome(
                lambda: trainers.make(
                    "stack", folder / "bad", n=n, gradient_checkpointing=True,
                    gradient_checkpointing_kwargs={"use_reentrant": True},
                )
            )
        },
    }  # fmt: skip
    return cases[name]()


CASES = (
    "nan-stack", "nan-skip", "nan-release", "nan-tensor", "other-weights", "other-rate",
    "second-pass", "no-consolidation", "trainer-model", "trainer-rate", "trainer-data",
    "trainer-adapters",
    "shards", "trainer-reentrant", "reentrant",
)  # fmt: skip
