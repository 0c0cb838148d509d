"""Several processes under the Trainer and Accelerate; `optim/processes.py` is how they train.

A model whose INT8 weights are trained is not wrapped in `DistributedDataParallel`, which would
exchange float gradients: the optimizer exchanges all gradients instead. One process writes
checkpoints; before that, the optimizer collects the state of all rows on it. A process that leaves
the training with an error reports it to the others.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerState, TrainingArguments

from ..optim.processes import SEVERAL_GPUS, Processes
from ..quant import QFTWeight
from ..side import side_network_of
from .atomic_writes import atomic_path
from .compatibility import has_quantized_weights, ours

# Arguments that may differ between processes.
_OWN = {"local_rank", "logging_dir", "run_name", "disable_tqdm", "log_level", "log_level_replica"}


def without_other_distribution(prepare: Any, self: Any, *objects: Any, **kwargs: Any) -> Any:
    """Refuse INT8 weights where another library would divide the model."""
    # Accelerate prepares models for DeepSpeed, Megatron-LM and FSDP2 without `prepare_model`.
    for model in objects:
        if isinstance(model, nn.Module) and has_quantized_weights(model):
            refuse_distribution(self.distributed_type)
    return prepare(self, *objects, **kwargs)


def leaving_unwrapped(prepare: Any, self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    """Keep a model whose INT8 weights are trained out of `DistributedDataParallel`."""
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
        kwargs["evaluation_mode"] = True  # changes nothing except that no wrapper is added
        return prepare(self, model, *args, **kwargs)
    if self.num_processes > 1 and not kwargs.get("evaluation_mode"):
        _forget_evaluation(self, model)
    # The wrapper ignores frozen INT8 weights, as under adapters: they are broadcast once.
    known = getattr(model, "_ddp_params_and_buffers_to_ignore", [])
    model._ddp_params_and_buffers_to_ignore = [*known, *int8]
    prepared = prepare(self, model, *args, **kwargs)
    processes = Processes.found()
    if processes is not None:
        processes.begin(self.device)
        processes.broadcast_(p for p in model.parameters() if isinstance(p, QFTWeight))
    return prepared


def _forget_evaluation(accelerator: Accelerator, model: Any) -> None:
    """Have a model that was evaluated before training prepared again, and so wrapped.

    Accelerate prepares a model only once, and for `evaluate()` without `DistributedDataParallel`:
    each process would then train on the gradients of its own examples alone.
    """
    if vars(model).pop("_is_accelerate_prepared", False):
        accelerator._models = [known for known in accelerator._models if known is not model]
        if (forward := vars(model).pop("_original_forward", None)) is not None:  # under autocast
            model.forward = forward


def refuse_distribution(kind: Any, *, advice: str = "") -> None:
    """Raise ValueError for a way to distribute a model that does not support INT8 weights.

    Args:
        kind: One of `accelerate.utils.DistributedType`.
        advice: What to do, in addition to starting several processes.
    """
    refused = {
        DistributedType.FSDP: "FSDP shards float parameters and gathers them layer by layer",
        DistributedType.DEEPSPEED: "DeepSpeed partitions float parameters",
        DistributedType.MEGATRON_LM: "Megatron-LM splits float weights",
    }
    if kind in refused:
        known = f"{refused[kind]}, and cannot hold INT8 weights."
        raise ValueError(" ".join(filter(None, (known, advice, SEVERAL_GPUS))))


def consolidating_state(save: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    """Collect the state of all rows before one process writes it."""
    optimizer = ours(self.optimizer)
    if optimizer is None:
        save(self, *args, **kwargs)
        return
    optimizer.consolidate()
    with first_process_writes():  # the others wait, and fail too if writing fails
        save(self, *args, **kwargs)


def consolidating_states(save: Any, self: Accelerator, *args: Any, **kwargs: Any) -> Any:
    """Make `save_state` collect the states of all rows; process 0 alone has them and saves them."""
    optimizers = self._optimizers
    divided = [inner for inner in map(ours, optimizers) if inner is not None and inner.processes]
    for inner in divided:
        inner.consolidate()
    if not self.is_main_process:
        self._optimizers = [one for one in optimizers if ours(one) not in divided]
    try:
        return save(self, *args, **kwargs)
    finally:
        self._optimizers = optimizers


def sharing_buffers(evaluate: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Evaluate on all processes with the buffers of process 0, which are those of checkpoints.

    In training each process updates its own, such as the running means of a batch norm.
    """
    optimizer = ours(self.optimizer)
    if optimizer is not None and optimizer.processes is not None and optimizer.processes.has_begun:
        optimizer.processes.broadcast_(_saved_buffers(self.model))
    return evaluate(self, *args, **kwargs)


def _saved_buffers(model: nn.Module) -> Iterator[Tensor]:
    """Yield the buffers that checkpoints have.

    Any other may belong to a number that its module keeps: the frequencies of a dynamic RoPE belong
    to the longest sequence so far, and a table of positions may be as long.
    """
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield buffer


def reporting_failures(train: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Report the error of a process to the others."""
    try:
        return train(self, *args, **kwargs)
    except BaseException as error:
        optimizer = ours(self.optimizer)
        if optimizer is not None and optimizer.processes is not None:
            optimizer.processes.failures.tell(error)
        raise


def start_together(
    optimizer: Optimizer,
    model: nn.Module,
    args: TrainingArguments,
    state: TrainerState,
    train_dataloader: Any,
) -> None:
    """Raise ValueError unless all processes run the same; then broadcast the model of process 0.

    With another library's optimizer, `DistributedDataParallel` has broadcast it already.
    """
    inner = ours(optimizer)
    processes = Processes.found() if inner is None else inner.processes
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
    advice = "Give all processes the same arguments and the same data."
    accelerator: Any = args.accelerator_config
    if not accelerator.even_batches:
        advice += " Leave even_batches=False out of accelerator_config: it may give them different "
        advice += "numbers of batches."
    processes.agree(facts, advice)
    if inner is None:
        return
    inner.broadcast()
    trained = {id(parameter) for parameter in inner.parameters()}
    processes.broadcast_(p for p in model.parameters() if id(p) not in trained)
    processes.broadcast_(_saved_buffers(model))


def _length(sized: Any) -> int | None:
    try:
        return len(sized)
    except TypeError:  # the length of a data stream is unknown
        return None


@contextmanager
def first_process_writes() -> Iterator[bool]:
    """Yield whether this is process 0; an error in the block on one process is raised on all."""
    processes = Processes.found()
    if processes is None:
        yield True
        return
    with processes.together():
        yield processes.rank == 0


def broadcast_from_first(value: Any) -> Any:
    """Return the value that process 0 has, which must be picklable."""
    processes = Processes.found()
    return value if processes is None else processes.broadcast_from_first(value)


@contextmanager
def written_by_all(path: Path) -> Iterator[Path]:
    """Like `atomic_path`, with a draft that all processes write into.

    Process 0 creates the draft and moves it to its place. An error on one process is raised on all,
    when they have reached the end of the block.
    """
    processes = Processes.found()
    if processes is None:
        with atomic_path(path) as draft:
            yield draft
        return
    with processes.together(), ExitStack() as stack:
        own = None
        with processes.together():
            if processes.rank == 0:
                own = stack.enter_context(atomic_path(path))
        draft = processes.broadcast_from_first(own)
        with processes.together():
            yield draft
