"""Several processes under the Trainer and Accelerate; `optim/processes.py` is how they train.

A model whose INT8 weights are trained is not wrapped: `DistributedDataParallel` would exchange
float gradients, and there the optimizer exchanges them all. One process writes checkpoints; before,
the optimizer brings the state of all rows there. A process that leaves the training with an error
tells the others.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerState, TrainingArguments

from ..optim import QFTOptimizer
from ..optim.processes import SEVERAL_GPUS, Processes
from ..quant import QFTWeight
from ..side import side_network_of
from .drafts import written_whole
from .ours import unwrapped
from .wrapping import wrap_

# Of the arguments: what each process has for itself.
_OWN = {"local_rank", "logging_dir", "run_name", "disable_tqdm", "log_level", "log_level_replica"}


def install_processes() -> None:
    """Wrap what Accelerate does to a model, and what the Trainer saves. Idempotent."""
    wrap_(Accelerator, "prepare_model", _unwrapped_model)
    wrap_(Trainer, "_save_checkpoint", _consolidating)
    wrap_(Trainer, "train", _telling)


def _unwrapped_model(prepare: Any) -> Any:
    def prepare_model(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        int8 = {
            name: parameter
            for name, parameter in model.named_parameters(remove_duplicate=False)
            if isinstance(parameter, QFTWeight)
        }
        if not int8 and side_network_of(model) is None:
            return prepare(self, model, *args, **kwargs)
        if int8:
            refuse_distribution(self.distributed_type)
        if any(parameter.requires_grad for parameter in int8.values()):
            kwargs["evaluation_mode"] = True  # no wrapper: all else is done in this mode too
            return prepare(self, model, *args, **kwargs)
        if self.num_processes > 1 and not kwargs.get("evaluation_mode"):
            _forget_evaluation(self, model)
        # Frozen ones, as under adapters, are beyond the wrapper: only the start is shared.
        known = getattr(model, "_ddp_params_and_buffers_to_ignore", [])
        model._ddp_params_and_buffers_to_ignore = [*known, *int8]
        prepared = prepare(self, model, *args, **kwargs)
        processes = Processes.found()
        if processes is not None:
            processes.begin(self.device)
            processes.broadcast_(p for p in model.parameters() if isinstance(p, QFTWeight))
        return prepared

    return prepare_model


def _forget_evaluation(accelerator: Accelerator, model: Any) -> None:
    """Have a model that was scored before training prepared anew, and so wrapped.

    Accelerate prepares a model once, and for `evaluate()` without `DistributedDataParallel`: each
    process would then train by the gradients of its own examples alone.
    """
    if vars(model).pop("_is_accelerate_prepared", False):
        accelerator._models = [known for known in accelerator._models if known is not model]
        if (forward := vars(model).pop("_original_forward", None)) is not None:  # under autocast
            model.forward = forward


def refuse_distribution(kind: Any) -> None:
    """Raise for a way to distribute a model that INT8 weights cannot go.

    Args:
        kind: One of `accelerate.utils.DistributedType`.

    Raises:
        ValueError: Names what does the like.
    """
    refused = {
        DistributedType.FSDP: "FSDP shards float parameters and gathers them layer by layer",
        DistributedType.DEEPSPEED: "DeepSpeed partitions float parameters",
        DistributedType.MEGATRON_LM: "Megatron-LM splits float weights",
    }
    if kind in refused:
        raise ValueError(f"{refused[kind]}, and cannot hold INT8 weights. {SEVERAL_GPUS}")


def _consolidating(save: Any) -> Any:
    def _save_checkpoint(self: Any, *args: Any, **kwargs: Any) -> None:
        optimizer = unwrapped(self.optimizer)
        if not isinstance(optimizer, QFTOptimizer):
            save(self, *args, **kwargs)
            return
        optimizer.consolidate()
        with by_first():  # who writes little waits, and learns of a disk that is full
            save(self, *args, **kwargs)

    return _save_checkpoint


def _telling(train: Any) -> Any:
    def telling(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return train(self, *args, **kwargs)
        except BaseException as error:
            processes = getattr(unwrapped(self.optimizer), "processes", None)
            if processes is not None:
                processes.failures.tell(error)
            raise

    return telling


def start_together(
    optimizer: Optimizer,
    model: nn.Module,
    args: TrainingArguments,
    state: TrainerState,
    train_dataloader: Any,
) -> None:
    """Raise unless all processes run the same; then give all of them the model of process 0.

    Under an optimizer of others `DistributedDataParallel` has given it to them.

    Raises:
        ValueError: Arguments, data or models are of different sizes or kinds.
    """
    ours = optimizer if isinstance(optimizer, QFTOptimizer) else None
    processes = Processes.found() if ours is None else ours.processes
    if processes is None:
        return
    facts = {name: value for name, value in args.to_dict().items() if name not in _OWN}
    facts["the number of steps"] = (state.global_step, state.max_steps)
    facts["the number of training examples"] = _length(getattr(train_dataloader, "dataset", None))
    facts["the number of batches in an epoch"] = _length(train_dataloader)
    for number, group in enumerate(optimizer.param_groups):
        facts[f"parameters in group {number}"] = len(group["params"])
        facts[f"the learning rate of group {number}"] = float(group["lr"])
    device = optimizer.param_groups[0]["params"][0].device
    processes.begin(device, timeout=timedelta(seconds=args.ddp_timeout))
    processes.agree(facts, "Give all processes the same arguments and the same data.")
    if ours is None:
        return
    ours.broadcast()
    trained = {id(parameter) for parameter in ours.parameters()}
    processes.broadcast_(p for p in model.parameters() if id(p) not in trained)
    processes.broadcast_(model.buffers())


def _length(sized: Any) -> int | None:
    try:
        return len(sized)
    except TypeError:  # of a stream nobody knows
        return None


@contextmanager
def by_first() -> Iterator[bool]:
    """Give whether this is process 0; what is raised on one within is raised on all."""
    processes = Processes.found()
    if processes is None:
        yield True
        return
    with processes.together():
        yield processes.rank == 0


def of_first(value: Any) -> Any:
    """The value that process 0 has, which can be pickled."""
    processes = Processes.found()
    return value if processes is None else processes.of_first(value)


@contextmanager
def written_by_all(path: Path) -> Iterator[Path]:
    """`written_whole`, of a draft that all processes write into.

    Process 0 makes the draft and brings it to its place. Whatever fails on one process is raised on
    all, when they have come to the end of the block.
    """
    processes = Processes.found()
    if processes is None:
        with written_whole(path) as draft:
            yield draft
        return
    with processes.together(), ExitStack() as stack:
        own = None
        with processes.together():
            if processes.rank == 0:
                own = stack.enter_context(written_whole(path))
        draft = processes.of_first(own)
        with processes.together():
            yield draft
