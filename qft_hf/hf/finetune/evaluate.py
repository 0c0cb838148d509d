"""Scores a checkpoint, INT8 or float, on held-out data, without training anything."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments

from ..json_object import json_object
from ..run_files import SUMMARY, recorded_settings
from ..wording import counted, score_text
from .arguments import DataArguments, MethodArguments, ModelArguments
from .data import TASKS, DataCounts, TaskData, prepare_data
from .loading import load_model, load_tokenizer
from .parsing import RunArguments
from .run_trainer import average_batch_mean_losses_
from .side_tuning import load_side_model, start_of


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores of a model."""

    model: str  # folder or name
    scores: dict[str, float]  # the loss and the metrics of the task, by name
    data: DataCounts  # of the evaluation rows

    def __str__(self) -> str:
        """Return a line for each score, and one for the data."""
        lines = [f"{name:<18}{score_text(score)}" for name, score in self.scores.items()]
        return "\n".join([*lines, f"{'evaluation data':<18}{self.data}"])


def evaluate_checkpoint(arguments: RunArguments) -> Evaluation:
    """Score a model on the evaluation data that its arguments name.

    A float checkpoint is scored in float, an INT8 one in INT8, and a side network with its base.

    Raises:
        FileNotFoundError: A data file or the model does not exist.
        ValueError: Nothing is held out, the rows that the run held out cannot be drawn again, or
            the data do not fit the model.
    """
    training, model_arguments = arguments.training, _model_of(arguments)
    start = start_of(model_arguments)
    TASKS[arguments.data.task].model_class(start.config)  # refuses others before the data are read
    tokenizer = load_tokenizer(model_arguments)
    data = prepare_data(_data_of(arguments), tokenizer, start.config, seed=training.seed)
    if data.evaluation is None:
        raise ValueError("nothing is held out to evaluate on. Name rows with --eval_data.")
    _refuse_learned_rows(arguments, data)
    if start.side is None:
        model = load_model(start.model, None, start.config, data.task)
    else:  # its folder holds the settings of the base and of the side network
        model = load_side_model(start, MethodArguments(method="qst"), data.task)
    found = scores(model, data, training)
    return Evaluation(arguments.model.model_name_or_path, found, data.evaluation.counts)


def _model_of(arguments: RunArguments) -> ModelArguments:
    """Return which model to load: a run is scored with the tokenizer and template that it saved.

    The tokenizer and template that its settings name may have changed since.
    """
    recorded = recorded_settings(Path(arguments.model.model_name_or_path))
    saved: dict[str, Any] = {
        key: None
        for key in ("tokenizer_name_or_path", "chat_template", "new_tokens")
        if recorded.get(key) == arguments.settings.get(key)
    }
    return replace(arguments.model, **saved)


def _data_of(arguments: RunArguments) -> DataArguments:
    """Return the data to read, without training data if there are none or they are not needed.

    A finished run knows its classes without them. Without a run, `qft-hf evaluate` passes the data
    to evaluate on as training data, too.
    """
    data = arguments.data
    is_run = bool(recorded_settings(Path(arguments.model.model_name_or_path)))
    if data.eval_data is None or not (is_run or data.train_data == data.eval_data):
        return data
    return replace(
        data,
        train_data=data.eval_data,
        train_split=data.eval_split,
        train_config=data.eval_config,
        train_weights=None,
        max_train_rows=data.max_eval_rows,
    )


def _refuse_learned_rows(arguments: RunArguments, data: TaskData) -> None:
    """Raise if `eval_fraction` draws rows of a run's data that the run has not held out."""
    folder = Path(arguments.model.model_name_or_path)
    try:
        before = json_object(folder / SUMMARY)
        parts = [part for part in (before["train_data"], before["eval_data"]) if part is not None]
        n_before = sum(part["rows"] for part in parts)
        held_out = parts[-1]["held_out"]
    except (ValueError, KeyError, TypeError):
        return  # not a finished run
    counts = [part.counts for part in (data.train, data.evaluation) if part is not None]
    its_data = recorded_settings(folder).get("train_data")
    is_its_data = arguments.settings.get("train_data") == its_data
    if counts[-1].held_out in (None, held_out) or not is_its_data:
        return
    if held_out is None:
        raise ValueError(
            f"{folder} has learned all rows of its train_data, so eval_fraction would score rows "
            "that it has learned. Leave it out, or name other rows with --eval_data."
        )
    n_rows = sum(count.rows for count in counts)
    raise ValueError(
        f"the rows that {folder} held out cannot be drawn again, so rows that it has learned would "
        f"be scored: its data, eval_fraction or seed changed ({counted(n_before, 'row')} then, "
        f"{n_rows:,} now). Restore them, after which --max_eval_rows takes fewer of its held-out "
        "rows, or name other rows with --eval_data."
    )


def scores(model: Any, data: TaskData, training: TrainingArguments) -> dict[str, float]:
    """Return the scores of a model on held-out data, by name.

    Args:
        model: The model; it is moved to the device of `training`.
        data: Has held-out data.
        training: Gives the device, the batch size, and whether bf16 autocast is used.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                folder,
                per_device_eval_batch_size=training.per_device_eval_batch_size,
                bf16=training.bf16,
                label_smoothing_factor=training.label_smoothing_factor,
                use_cpu=training.use_cpu,
                disable_tqdm=training.disable_tqdm,
                dataloader_pin_memory=training.device.type != "cpu",
                report_to="none",
            ),
            **data.of_trainer,
        )
        average_batch_mean_losses_(trainer)
        return data.task.scoring.of(trainer.evaluate())
