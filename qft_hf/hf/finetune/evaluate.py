"""A checkpoint scored on held-out data, INT8 or float, without training anything."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments

from ..wording import score_text
from .arguments import DataArguments, MethodArguments
from .data import DataCounts, TaskData, prepare_data
from .loading import load_model, load_tokenizer
from .output_folder import told
from .parsing import RunArguments
from .run_trainer import take_means_for_means_
from .side_tuning import base_config, load_side_model, side_checkpoint


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores of a model.

    Attributes:
        model: Its folder or name.
        scores: By name: the loss and what the task is scored by.
        data: What became of the rows.
    """

    model: str
    scores: dict[str, float]
    data: DataCounts

    def __str__(self) -> str:
        """Return a line for each score, and one for the data."""
        lines = [f"{name:<18}{score_text(score)}" for name, score in self.scores.items()]
        return "\n".join([*lines, f"{'evaluation data':<18}{self.data}"])


def evaluate_checkpoint(arguments: RunArguments) -> Evaluation:
    """Score a model on the evaluation data of its arguments.

    A float checkpoint is scored as it is, an INT8 one as INT8, and a side network on its base.

    Raises:
        FileNotFoundError: A data file or the model is not there.
        ValueError: Nothing is held out, or data and model do not go together.
    """
    training = arguments.training
    tokenizer = load_tokenizer(arguments.model)
    config = base_config(arguments.model)
    data = prepare_data(_data_of(arguments), tokenizer, config, seed=training.seed)
    if data.evaluation is None:
        raise ValueError("nothing is held out to evaluate on. Set eval_data or eval_fraction.")
    length = arguments.data.max_length
    if side_checkpoint(arguments.model.model_name_or_path) is None:
        model = load_model(arguments.model, None, config, data.task, max_length=length)
    else:
        # What the run was told of its base and side network is in the folder.
        method = MethodArguments(method="qst")
        model = load_side_model(arguments.model, method, config, data.task, max_length=length)
    found = scores(model, data, training)
    return Evaluation(arguments.model.model_name_or_path, found, data.evaluation.counts)


def _data_of(arguments: RunArguments) -> DataArguments:
    """Return which data are read: of a finished run, which knows its classes, none to train on."""
    data = arguments.data
    if data.eval_data is None or not told(Path(arguments.model.model_name_or_path)):
        return data
    return replace(
        data,
        train_data=data.eval_data,
        train_split=data.eval_split,
        train_config=data.eval_config,
        train_weights=None,
        max_train_rows=data.max_eval_rows,
    )


def scores(model: Any, data: TaskData, training: TrainingArguments) -> dict[str, float]:
    """Return the scores of a model on data that are held out, by name.

    Args:
        model: Moved to the device of `training`.
        data: Has held-out data.
        training: Says where, how many at a time, and whether under bf16 autocast.
    """
    if data.evaluation is None:
        raise ValueError("nothing is held out to evaluate on. Set eval_data or eval_fraction.")
    task = data.task
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
            eval_dataset=data.evaluation.dataset,
            data_collator=task.collator,
            processing_class=task.tokenizer,
            compute_metrics=task.scoring.compute_metrics,
            preprocess_logits_for_metrics=task.scoring.preprocess_logits,
        )
        take_means_for_means_(trainer)
        metrics: dict[str, Any] = trainer.evaluate()
    return {name: metrics[f"eval_{name}"] for name in task.scoring.names}
