"""Faults on one process, and differences between processes; each case returns its outcome."""

import logging
import resource
import time
from collections.abc import Callable
from math import nan
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import LlamaForCausalLM, TrainerCallback
from transformers.distributed import DistributedConfig

from qft_hf import QFTAdamW, QFTConfig, QFTTrainer, quantize_model_
from qft_hf.optim.failures import LOOK_SECONDS
from qft_hf.side import QSTConfig, attach_side_network
from tests.models import tiny_llama
from tests.nn.small import SmallModel
from tests.optim.common import make_model, make_optimizer, model_tensors
from tests.processes import trainers, training


def outcome(act: Callable[[], Any]) -> str:
    """Return the type and the text of the error that `act` raises; empty without one."""
    try:
        act()
    except Exception as error:  # noqa: BLE001 it is what is looked for
        return f"{type(error).__name__}: {error}"
    return ""


def backward(model: SmallModel, rank: int, n: int, *, step: int = 0, factor: float = 1.0) -> None:
    (model.loss(training.shares(step, n)[rank]) * factor).backward()


def nan_on_one(rank: int, n: int, *, in_one_row: bool = False, **settings: Any) -> dict[str, Any]:
    """Do a second step with a NaN on the last process, and then a step without one.

    With `in_one_row`, only the mean on the process that owns the row has a NaN.
    """
    model = make_model(tied=False)
    optimizer = make_optimizer(model, **settings)
    backward(model, rank, n)
    optimizer.step()
    before = model_tensors(model)

    def step() -> None:
        if in_one_row and rank == n - 1:
            weight = model.blocks[0].up.weight
            factors = torch.ones(len(weight), 1)
            factors[0] = nan
            hook = weight.register_hook(lambda gradient: gradient * factors)
            backward(model, rank, n, step=1)
            hook.remove()
        else:
            backward(model, rank, n, step=1, factor=nan if rank == n - 1 and not in_one_row else 1)
        optimizer.step()

    text = outcome(step)
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
    for step in range(2):
        # In the second pass the others wait, and look for an error that has stopped this process.
        time.sleep(2 * LOOK_SECONDS * rank * step)
        backward(model, rank, n, step=step)
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
    """Reentrant checkpointing, whose inner passes end first: the head and the norm are frozen."""
    model = make_model(tied=False, reentrant=True)
    for frozen in (model.head, model.norm):
        frozen.requires_grad_(False)
    optimizer = make_optimizer(model)
    text = outcome(lambda: backward(model, rank, n))
    optimizer.zero_grad()
    return {"text": text, "weights": model_tensors(model)}


def skipped_batch(rank: int, n: int, **settings: Any) -> dict[str, Any]:
    """On the last process a backward pass runs out of memory, and is skipped by a loop's author."""
    model = make_model(tied=False)
    optimizer = make_optimizer(model, **settings)
    began = time.monotonic()
    text = ""
    for step in range(3):
        hook = None
        if rank == n - 1 and step == 1:
            hook = model.blocks[0].up.register_full_backward_hook(run_out_of_memory)
        try:
            backward(model, rank, n, step=step)
            optimizer.step()
        except torch.OutOfMemoryError:
            optimizer.zero_grad()
        except RuntimeError as error:
            text = f"{type(error).__name__}: {error}"
            break
        finally:
            if hook is not None:
                hook.remove()
    return {"text": text, "seconds": time.monotonic() - began}


def run_out_of_memory(*_: Any) -> None:
    raise torch.OutOfMemoryError("tried to allocate 20 MiB")


def sparse(rank: int, n: int) -> dict[str, Any]:
    table = nn.Embedding(7, 3, sparse=True)
    optimizer = make_optimizer(table)
    text = outcome(lambda: table(torch.arange(2)).sum().backward())
    optimizer.zero_grad()
    return {"text": text}


def no_consolidation(rank: int, n: int) -> dict[str, Any]:
    model = make_model(tied=False)
    optimizer = make_optimizer(model)
    backward(model, rank, n)
    optimizer.step()
    return {"text": outcome(optimizer.state_dict), "weights": model_tensors(model)}


def loaded_since(rank: int, n: int) -> dict[str, Any]:
    """Load a state after the consolidation, which is then of other values than the optimizer."""
    model = make_model(tied=False)
    optimizer = make_optimizer(model)
    backward(model, rank, n)
    optimizer.step()
    optimizer.consolidate()
    whole = optimizer.state_dict() if rank == 0 else None
    optimizer.load_state_dict(optimizer.processes.broadcast_from_first(whole))
    return {"text": outcome(optimizer.state_dict)}


def trainer_case(folder: Path, n: int, **changes: Any) -> dict[str, Any]:
    trainer = trainers.make("stack", folder / "bad", n=n, save_strategy="no", **changes)
    return {"text": outcome(trainer.train), "weights": model_tensors(trainer.model)}


def adapters(folder: Path, rank: int, n: int, **changes: Any) -> dict[str, Any]:
    """Train adapters on a frozen INT8 model by another optimizer, under DDP."""
    from peft import LoraConfig, get_peft_model  # takes seconds

    model = get_peft_model(
        quantize_model_(tiny_llama(seed=rank), QFTConfig()),
        LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    changes = {"save_strategy": "no", "model": model, "optim": "adamw_torch", **changes}
    trainer = trainers.make("stock", folder / "bad", n=n, **changes)
    return {"text": outcome(trainer.train), "weights": model_tensors(trainer.model)}


def side_network(folder: Path, rank: int, n: int, **changes: Any) -> dict[str, Any]:
    """Train a side network in float by another optimizer, under DDP."""
    model = quantize_model_(tiny_llama(seed=rank), QFTConfig())
    torch.manual_seed(rank)
    attach_side_network(model, QSTConfig(r=4))
    return trainer_case(folder, n, model=model, optim="adamw_torch", **changes)


class FullDisk(TrainerCallback):
    """On one process, no file can grow beyond 2,000 bytes from the saved step on."""

    def __init__(self, *, is_full: bool) -> None:
        self.is_full = is_full

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.is_full and state.global_step == trainers.SAVED_AT:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))


def full_disk(kind: str, folder: Path, rank: int, n: int) -> dict[str, Any]:
    """The first process, which writes the checkpoint, has no room for it."""
    trainer = trainers.make(
        kind, folder / f"full-{kind}", n=n, callbacks=[FullDisk(is_full=rank == 0)]
    )
    began = time.monotonic()
    text = outcome(trainer.train)
    seconds = time.monotonic() - began
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    ended = [folder / f"full-{kind}-has-ended-on-{process}" for process in range(n)]
    ended[rank].touch()
    while not all(path.exists() for path in ended):  # no later event may tell the other process
        time.sleep(0.1)
    return {
        "text": text, "seconds": seconds,
        "steps": trainer.state.global_step, "weights": model_tensors(trainer.model),
    }  # fmt: skip


def resumed_at_once(folder: Path, rank: int, n: int) -> dict[str, Any]:
    """Resume in the same processes after the backward pass of the last one has failed."""
    trainer = trainers.make("stock-release", folder / "at-once", n=n, trainer=QFTTrainer)
    passes: list[Tensor] = []

    def fail(gradient: Tensor) -> None:
        passes.append(gradient)
        if rank == n - 1 and len(passes) == trainers.SAVED_AT + 1:
            raise ValueError("the gradient is refused")

    weight = trainer.model.model.layers[0].mlp.up_proj.weight
    hook = weight.register_hook(fail)
    text = outcome(trainer.train)
    hook.remove()
    trainer.train(resume_from_checkpoint=True)
    return {"text": text, "weights": model_tensors(trainer.model)}


def other_batch(folder: Path, n: int) -> dict[str, Any]:
    """Continue from one process's checkpoint with half as many examples per step."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("qft_hf.hf.callback")
    logger.addHandler(handler)
    trainer = trainers.make(
        "stack", folder / "other-batch", n=n, per_device_train_batch_size=3, save_strategy="no"
    )
    checkpoint = folder / "stack-on-1" / f"checkpoint-{trainers.SAVED_AT}"
    trainer.train(resume_from_checkpoint=str(checkpoint))
    logger.removeHandler(handler)
    return {
        "text": "\n".join(said), "steps": trainer.state.global_step,
        "weights": model_tensors(trainer.model),
    }  # fmt: skip


def loaded_into_shards(folder: Path, n: int) -> dict[str, Any]:
    """Load an INT8 checkpoint in the way in which transformers has FSDP2 divide a model."""
    path = folder / "int8"
    quantize_model_(tiny_llama(), QFTConfig()).save_pretrained(path)  # the first process writes
    dist.barrier()
    sharded = DistributedConfig(fsdp_size=n)
    return {
        "text": outcome(lambda: LlamaForCausalLM.from_pretrained(path, distributed_config=sharded))
    }


def checkpointed(folder: Path, n: int, **kwargs: Any) -> dict[str, Any]:
    return refused(folder, n, gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs)


def refused(folder: Path, n: int, **settings: Any) -> dict[str, Any]:
    return {"text": outcome(lambda: trainers.make("stack", folder / "bad", n=n, **settings))}


def run(name: str, folder: Path, rank: int, n: int) -> dict[str, Any]:
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        "nan-stack": lambda: nan_on_one(rank, n),
        "nan-skip": lambda: nan_on_one(rank, n, nonfinite="skip"),
        "nan-release": lambda: nan_on_one(rank, n, gradient="release"),
        "nan-previous": lambda: nan_on_one(
            rank, n, gradient="release", clipping="previous", max_grad_norm=0.4
        ),
        "nan-tensor": lambda: nan_on_one(
            rank, n, in_one_row=True, gradient="release", clipping="tensor", max_grad_norm=0.4
        ),
        "nan-adamw": lambda: nan_on_one(
            rank, n, in_one_row=True, kind=QFTAdamW, gradient="release"
        ),
        "other-weights": lambda: other_weights(rank, n),
        "other-rate": lambda: other_rate(rank, n),
        "second-pass": lambda: second_pass(rank, n),
        "sparse": lambda: sparse(rank, n),
        "skipped-stack": lambda: skipped_batch(rank, n),
        "skipped-release": lambda: skipped_batch(rank, n, gradient="release"),
        "reentrant": lambda: reentrant(rank, n),
        "no-consolidation": lambda: no_consolidation(rank, n),
        "loaded-since": lambda: loaded_since(rank, n),
        "trainer-model": lambda: trainer_case(folder, n, model=tiny_llama(seed=rank)),
        "trainer-rate": lambda: trainer_case(folder, n, learning_rate=1e-3 * (rank + 1)),
        "trainer-data": lambda: trainer_case(folder, n, n_examples=36 + rank),
        "trainer-uneven": lambda: trainer_case(
            folder, n, n_examples=30, accelerator_config={"even_batches": False}
        ),
        "trainer-adapters": lambda: adapters(folder, rank, n),
        "trainer-adapters-data": lambda: adapters(folder, rank, n, n_examples=36 + rank),
        "trainer-side": lambda: side_network(folder, rank, n),
        "trainer-side-seed": lambda: side_network(folder, rank, n, seed=5 + rank),
        "trainer-full": lambda: full_disk("stack", folder, rank, n),
        "stock-full": lambda: full_disk("stock", folder, rank, n),
        "trainer-batch": lambda: other_batch(folder, n),
        "trainer-at-once": lambda: resumed_at_once(folder, rank, n),
        "shards": lambda: loaded_into_shards(folder, n),
        "trainer-sigterm": lambda: refused(folder, n, enable_jit_checkpoint=True),
        "trainer-reentrant": lambda: checkpointed(folder, n, use_reentrant=True),
        "trainer-reentrant-unsaid": lambda: checkpointed(folder, n, preserve_rng_state=False),
    }  # fmt: skip
    return cases[name]()


CASES = (
    "nan-stack", "nan-skip", "nan-release", "nan-previous", "nan-tensor", "nan-adamw",
    "other-weights", "other-rate",
    "second-pass", "sparse", "skipped-stack", "skipped-release", "no-consolidation",
    "loaded-since",
    "trainer-model", "trainer-rate", "trainer-data", "trainer-uneven",
    "trainer-adapters", "trainer-adapters-data", "trainer-side", "trainer-side-seed",
    "trainer-full", "stock-full", "trainer-batch", "trainer-at-once", "shards", "trainer-sigterm",
    "trainer-reentrant",
    "trainer-reentrant-unsaid", "reentrant",
)  # fmt: skip
