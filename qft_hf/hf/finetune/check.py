"""A dry run of a config, which reports what the run would do without loading a model."""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ...memory import MemoryEstimate
from ...side import attach_side_network
from ..card_facts import parameters_of
from ..compatibility import format_with
from ..estimate import estimate_memory, estimate_side_memory, without_storage
from ..language_model import freeze_non_text_parts
from ..missing_model import explain_loading_errors
from ..optimizers import given_options, named_optimizer
from ..prepared_model import refuse_before_loading
from ..side_network import whole_description
from .data import DataCounts
from .data_preview import EXAMPLE, example_text
from .forecast import disk_bytes, n_steps, workload_of
from .loading import check_fit, require_weights
from .output_folder import nearest_folder, refuse_small_disk
from .packing import refuse_leaky_packing_family
from .parsing import RunArguments
from .preparation import read
from .side_tuning import base_form
from .task import LanguageTask


@dataclass(frozen=True, slots=True)
class Check:
    """What a run would read, write and need."""

    paths: dict[str, str]  # absolute paths of local files and folders that are read, by key
    output_dir: str  # absolute path
    checkpoint: str | None  # absolute path of the checkpoint to resume from; None: a fresh start
    architecture: str  # class of the model
    parameters: int
    trained_parameters: int
    method: str  # `full`, or `qst` for a side network
    train_data: DataCounts
    eval_data: DataCounts | None  # None if nothing is held out
    classes: list[str]  # names of the outputs in order; empty if no class is learned
    steps: int  # optimizer steps of the run
    steps_per_epoch: int
    packing: str  # whether examples share blocks, and if so, whether they are known to stay apart
    example: str  # the first example as text, with the learned part in brackets
    disk_bytes: int  # the most that the run has on the disk at one time
    free_bytes: int  # on that disk
    memory: MemoryEstimate | None  # by arithmetic
    no_estimate: str | None  # why `memory` is None

    def as_dict(self) -> dict[str, Any]:
        """Return all fields and the sums of the memory estimate."""
        return asdict(self) | (self.memory.sums if self.memory else {})

    @property
    def _trained(self) -> str:
        if self.method == "qst":
            return f"a side network of {self.trained_parameters:,} parameters"
        if self.trained_parameters == self.parameters:
            return "all of them, in INT8"
        return f"{self.trained_parameters:,} of them, in INT8"

    def __str__(self) -> str:
        """Return the findings, one per line, the example, and the memory table."""
        lines = [f"{key:<24}{path}" for key, path in self.paths.items()]
        classes = [f"{'classes':<24}{', '.join(self.classes)}"] if self.classes else []
        lines += [
            f"{'model':<24}{self.architecture}, {self.parameters:,} parameters",
            f"{'trained':<24}{self._trained}",
            f"{'training data':<24}{self.train_data}",
            f"{'evaluation data':<24}{self.eval_data or 'none'}",
            *classes,
            f"{'steps':<24}{self.steps:,}; an epoch has {self.steps_per_epoch:,}",
            f"{'packing':<24}{self.packing}",
            f"{'output_dir':<24}{self.output_dir}",
            f"{'starts from':<24}{self.checkpoint or 'the model: a fresh start'}",
            f"{'disk':<24}up to {self.disk_bytes / 1e9:.2f} GB of {self.free_bytes / 1e9:.1f} free",
            "",
            EXAMPLE,
            "",
            self.example,
            "",
            f"memory is not estimated: {self.no_estimate}"
            if self.memory is None
            else str(self.memory),
        ]
        return "\n".join(lines)


def check(arguments: RunArguments) -> Check:
    """Read what a run would read; load, write and train nothing. Raises what `prepare` raises."""
    checkpoint, start, data = read(arguments)
    training, task, config = arguments.training, data.task, start.config
    check_fit(config, arguments.model, task)
    place = start.model.model_name_or_path
    if Path(place).is_dir():
        require_weights(Path(place))
    if start.side is not None:
        whole_description(start.side.folder)  # refuses damage
    task.configure(config)
    how = {
        "dtype": getattr(torch, arguments.model.dtype),
        "trust_remote_code": arguments.model.trust_remote_code,
        "attn_implementation": arguments.model.attn_implementation,
    }
    make = task.model_class(config)
    with explain_loading_errors(place):
        model = without_storage(make, config, **how)
    freeze_non_text_parts(model, config)
    is_whole, work = arguments.method.side is None, workload_of(arguments)
    if not is_whole:
        work["base"] = base_form(arguments.method, start)
        attach_side_network(model, work["side"])
    if is_whole or named_optimizer(training) is not None:
        refuse_before_loading(model, training)
    packing = "none: examples are padded"
    if arguments.data.packing:
        packing = "in blocks; no example sees another"
        if not refuse_leaky_packing_family(make, config, training.device, **how):
            packing = "in blocks; whether examples see each other is checked when the run begins"
    memory = no_estimate = None
    if isinstance(task, LanguageTask):
        work["gradient_checkpointing"] = bool(training.gradient_checkpointing)
        try:
            if is_whole:
                form = format_with(model, training.format_fields)
                mode = given_options(training).get("gradient", "stack")
                memory = estimate_memory(model, config=form, gradient=mode, **work)
            else:
                memory = estimate_side_memory(config, **work)
        except ValueError as error:  # such as a configuration that lacks a size
            no_estimate = str(error)
    else:
        no_estimate = "the estimate is for models that learn next tokens"
    parameters, trained = parameters_of(model)
    n_examples = len(data.train.dataset)
    needed = disk_bytes(arguments, model, n_examples)
    output_dir = arguments.output_dir
    refuse_small_disk(output_dir, needed, overwrite=arguments.output.overwrite_output)
    steps, of_epoch = n_steps(training, n_examples)
    return Check(
        paths={
            key: str(Path(name).resolve())
            for key, name in arguments.inputs.items()
            if Path(name).exists()
        },
        output_dir=str(output_dir.resolve()),
        checkpoint=None if checkpoint is None else str(checkpoint.resolve()),
        architecture=type(model).__name__,
        parameters=parameters,
        trained_parameters=trained,
        method=arguments.method.method,
        train_data=data.train.counts,
        eval_data=data.evaluation.counts if data.evaluation else None,
        classes=list(task.names),
        steps=steps,
        steps_per_epoch=of_epoch,
        packing=packing,
        example=example_text(data),
        disk_bytes=needed,
        free_bytes=shutil.disk_usage(nearest_folder(output_dir)).free,
        memory=memory,
        no_estimate=no_estimate,
    )
