"""Prepares a run: refuses what cannot work, and loads the rest. Nothing is written here."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset
from transformers import TrainingArguments, get_scheduler, set_seed
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.trainer_utils import IntervalStrategy
from transformers.utils.logging import disable_progress_bar

from ..base import require_bitsandbytes
from ..config import refuse_other_method
from ..liger import refuse_without_gpu
from ..processes import broadcast_from_first, first_process_writes
from ..wording import and_more, counted
from .arguments import MethodArguments
from .data import TASKS, TaskData, prepare_data
from .evaluation import ERRORS
from .forecast import disk_bytes, n_steps
from .loading import load_model, load_tokenizer
from .output_folder import (
    checkpoint_to_resume,
    refuse_inputs_inside,
    refuse_other_run,
    refuse_small_disk,
    refuse_unwritable,
    sole_run,
)
from .packing import refuse_leaky_packing
from .parsing import RunArguments
from .run_trainer import RunTrainer
from .side_tuning import Start, base_form, load_side_model, start_of
from .step_clock import StepClock

logger = logging.getLogger(__name__)

# Arguments that the Trainer ignores by default, and the ones that change that.
_SWITCHES = {
    "eval_steps": ("eval_strategy",),
    "eval_delay": ("eval_strategy",),
    "gradient_checkpointing_kwargs": ("gradient_checkpointing", "activation_checkpointing"),
    "activation_checkpointing_kwargs": ("activation_checkpointing", "gradient_checkpointing"),
    "liger_kernel_config": ("use_liger_kernel",),
}

LOGS = 50  # log entries of a run, unless logging_steps is set


@dataclass(frozen=True, slots=True)
class Run:
    """A run that is loaded and checked, but not yet trained."""

    arguments: RunArguments
    checkpoint: Path | None  # to resume from
    data: TaskData
    trainer: RunTrainer
    clock: StepClock
    started: float  # time.monotonic()


def prepare(arguments: RunArguments) -> Run:
    """Check the output folder, load data and model, and check the disk space. Writes nothing.

    When resuming, it first finishes or removes the drafts that a killed process left in the folder.

    Raises:
        FileExistsError: The output folder already holds a run.
        FileNotFoundError: A model, data file, template or checkpoint does not exist.
        OSError: The output folder cannot be written to, or the disk has no space for the run.
        ValueError: The arguments, the data and the model do not fit together.
    """
    started, training = time.monotonic(), arguments.training
    refuse_without_gpu(training)
    checkpoint, start, data = read(arguments)
    if arguments.method.side is not None:
        model = load_side_model(start, arguments.method, data.task)
    else:
        form = training.quantization_config
        model = load_model(start.model, form, start.config, data.task)
        if arguments.data.packing:
            refuse_leaky_packing(model)
    training.include_num_input_tokens_seen = "non_padding"  # for the log and the summary
    if training.device.type == "cpu":
        # Pinned memory speeds up copies to a GPU, and causes a warning without one.
        training.dataloader_pin_memory = False
    refuse_small_disk(
        arguments.output_dir,
        disk_bytes(arguments, model, len(data.train.dataset)),
        overwrite=arguments.output.overwrite_output,
    )
    clock = StepClock()
    with first_process_writes():  # process 0 creates a repository on the Hub; all raise if it fails
        trainer = RunTrainer(model=model, args=training, callbacks=[clock], **data.of_trainer)
    return Run(arguments, checkpoint, data, trainer, clock, started)


def read(arguments: RunArguments) -> tuple[Path | None, Start, TaskData]:
    """Check the output folder, and read everything except the model's weights. Writes nothing.

    If `logging_steps` is not given, it is set to log `LOGS` times in a run. Raises what `prepare`
    raises.

    Returns:
        checkpoint: Checkpoint to resume from; None for a fresh start.
        start: What the run starts from.
        data: Data, ready for the Trainer.
    """
    training = arguments.training
    if training.process_index > 0:  # only process 0 logs and shows progress
        logging.getLogger("qft_hf").setLevel(logging.ERROR)
        disable_progress_bar()
    with first_process_writes() as is_first:
        checkpoint = _check_output(arguments) if is_first else None
    checkpoint = broadcast_from_first(checkpoint)
    _check_effects(arguments.given)
    _check_evaluation(arguments)
    _check_reporters(training)
    _check_schedule(training)
    _check_loader(training)
    set_seed(training.seed)
    start = start_of(arguments.model)
    tokenizer = load_tokenizer(arguments.model)
    _check_start(start, arguments.method)
    # Refuses other models before reading the data takes minutes.
    TASKS[arguments.data.task].model_class(start.config)
    with training.main_process_first(desc="reading the data"):
        data = prepare_data(arguments.data, tokenizer, start.config, seed=training.seed)
    for source, n_rows in data.shared.items():
        logger.warning(
            "%s of %s are both in train_data and in eval_data, so the scores will measure what is "
            "memorized. Name each file once, and hold out rows by eval_fraction",
            counted(n_rows, "row"),
            source,
        )
    if data.unlearned:
        logger.warning(
            "the evaluation data have the class %s, which no training example has, so the run "
            "cannot teach it. If it is another spelling of a class, correct the labels",
            and_more(data.unlearned),
        )
    steps, _ = n_steps(training, len(data.train.dataset))
    if "logging_steps" not in arguments.given:
        training.logging_steps = ceil(steps / LOGS)
    if training.eval_strategy == "steps" and (training.eval_steps or 0) > steps:
        logger.warning(
            "eval_steps is %d and the run has %s, so the model is scored before and after it and "
            "not in between. For that, set eval_steps",
            training.eval_steps,
            counted(steps, "step"),
        )
    return checkpoint, start, data


def _check_output(arguments: RunArguments) -> Path | None:
    """Raise if the run would destroy something; return the checkpoint to resume from."""
    output_dir = arguments.output_dir
    refuse_unwritable(output_dir)
    refuse_inputs_inside(output_dir, arguments.inputs)
    checkpoint = checkpoint_to_resume(arguments.training.resume_from_checkpoint, output_dir)
    refuse_other_run(output_dir, checkpoint=checkpoint, overwrite=arguments.output.overwrite_output)
    if output_dir.is_dir():
        with sole_run(output_dir):  # so that a second run ends before it loads anything
            pass
    return checkpoint


def _check_start(start: Start, method: MethodArguments) -> None:
    """Raise for a model or a side network with which the method cannot begin."""
    side = start.side
    if side is not None and method.side is None:
        raise ValueError(
            f"{side.folder} holds a side network, but method 'full' trains every parameter of a "
            "model. Set method to qst, or name the base."
        )
    if side is not None and method.asks_for_another(side.config):
        raise ValueError(
            f"{method.side} was asked for, but {side.folder} holds {side.config}. Leave side_r, "
            "side_downsample and side_rank out, or name the base to start a new side network."
        )
    if method.side is None:
        refuse_other_method(start.config)
    elif base_form(method, start) == "nf4":
        require_bitsandbytes()


def _check_effects(given: Mapping[str, Any]) -> None:
    """Raise for a setting that would be ignored."""
    if given.get("do_train") is False:
        raise ValueError(
            "do_train is false, and this command trains. Leave it out; `qft-hf evaluate` scores a "
            "model without training."
        )
    if given.get("do_predict"):
        raise ValueError(
            "do_predict is true, and this command writes no predictions. Leave it out."
        )
    for name, switches in _SWITCHES.items():
        if name in given and given.keys().isdisjoint(switches):
            raise ValueError(
                f"{name} has no effect unless {' or '.join(switches)} is set. Set that, too, or "
                f"leave {name} out."
            )


def _check_reporters(training: TrainingArguments) -> None:
    """Raise for a reporter for which the Trainer would fail, but only after loading everything."""
    known = get_available_reporting_integrations()
    # These two may work without being listed.
    for name in {*(training.report_to or [])} - {*known, "azure_ml", "flyte"}:
        raise ValueError(
            f"report_to is {name!r}, which is not installed or not known. Install it, leave it "
            f"out, or use one that is installed: {', '.join(known) or 'none'}."
        )


def _check_schedule(training: TrainingArguments) -> None:
    """Raise for a schedule for which the Trainer would fail, but only after loading everything."""
    kind: Any = training.lr_scheduler_type
    settings: Any = training.lr_scheduler_kwargs or {}
    try:
        get_scheduler(
            kind,
            SGD([torch.zeros(1)], lr=training.learning_rate),
            num_warmup_steps=1,
            num_training_steps=3,
            scheduler_specific_kwargs=dict(settings),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"lr_scheduler_type {kind.value!r} does not accept lr_scheduler_kwargs {settings}: "
            f"{error}. Correct one of them."
        ) from error


def _check_loader(training: TrainingArguments) -> None:
    """Raise for a data loader for which the Trainer would fail, but only after loading everything.

    The names of its settings are those of PyTorch after `dataloader_`.
    """
    names = ("num_workers", "persistent_workers", "prefetch_factor", "multiprocessing_context")
    settings: dict[str, Any] = {
        name: getattr(training, f"dataloader_{name}", None) for name in names
    }
    try:
        DataLoader(TensorDataset(torch.zeros(1)), **settings)
    except ValueError as error:
        raise ValueError(
            f"the dataloader_* settings do not fit together: {str(error).rstrip('.')}. Set "
            "dataloader_num_workers to 1 or more, or leave the others out."
        ) from error


def _check_evaluation(arguments: RunArguments) -> None:
    data, training = arguments.data, arguments.training
    names = TASKS[data.task].scoring.names
    keeps_best = training.load_best_model_at_end or training.save_strategy == "best"
    if keeps_best and training.metric_for_best_model is None:
        raise ValueError(
            "save_strategy 'best' needs metric_for_best_model, one of the scores of task "
            f"{data.task!r}: {', '.join(names)}. Set it."
        )
    if keeps_best and training.eval_strategy == "no":
        raise ValueError(
            "save_strategy 'best' and load_best_model_at_end compare evaluations during training, "
            "and eval_strategy is 'no'. Set it to steps or epoch, or leave them out."
        )
    if training.metric_for_best_model is not None:
        best = training.metric_for_best_model.removeprefix("eval_")
        if best not in names:
            raise ValueError(
                f"metric_for_best_model is {best!r}, but the scores of task {data.task!r} are "
                f"{', '.join(names)}. Set one of them."
            )
        if "greater_is_better" not in arguments.given:  # the Trainer: true for all but losses
            training.greater_is_better = best not in ERRORS
    if training.label_smoothing_factor and data.task in ("regression", "multi_label"):
        raise ValueError(
            "label_smoothing_factor needs labels of one class among several, which task "
            f"{data.task!r} does not have. Leave it out."
        )
    has_data = data.eval_data is not None or data.eval_fraction is not None
    asked = training.do_eval or training.eval_on_start or training.eval_strategy != "no"
    if asked and not has_data:
        strategy = IntervalStrategy(training.eval_strategy).value
        raise ValueError(
            f"evaluation is asked for (eval_strategy={strategy!r}), but nothing is held out. "
            "Set eval_data or eval_fraction, or eval_strategy to 'no'."
        )
