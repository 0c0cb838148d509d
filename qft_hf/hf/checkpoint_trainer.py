"""`CheckpointTrainer`: the Trainer with checkpoints that are whole and resumes that are exact.

The stock Trainer writes a checkpoint file by file in place and resumes from the last folder. If
weights or momentum are missing from it, training continues with those of a fresh model.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from .atomic_writes import atomic_folder, recover_drafts
from .callback import QFTCallback
from .checkpoint import (
    check_momentum,
    check_weights,
    newest_whole_checkpoint,
    remove_old,
    require_whole,
    write_mark,
)
from .compatibility import unwrapped
from .json_object import json_object
from .processes import broadcast_from_first, first_process_writes, written_by_all

logger = logging.getLogger(__name__)

_ABSENT: Any = object()  # stands for `use_cache` in a configuration without it


class CheckpointTrainer(Trainer):
    """Writes checkpoints and models whole or not at all, and resumes exactly or not at all.

    Pushing to the Hub and removing old checkpoints, which can fail without harm, come last.
    """

    model: Any

    def __init__(
        self, model: nn.Module | None = None, args: TrainingArguments | None = None, **kwargs: Any
    ) -> None:
        self._draft: Path | None = None  # parent folder of the checkpoint being written
        # The Trainer turns `use_cache` off for training; a saved model gets its original value.
        self._use_cache = getattr(getattr(model, "config", None), "use_cache", _ABSENT)
        super().__init__(model=model, args=args, **kwargs)
        if self.args.hub_token is not None:
            self.args.hub_token = _Secret(self.args.hub_token)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, QFTCallback):
                callback.writes_in_place = False

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,  # noqa: FBT001 the Trainer's signature
        *args: Any,
        **kwargs: Any,
    ) -> TrainOutput:
        """Train, from the start or from a checkpoint.

        Args:
            resume_from_checkpoint: A folder, or True for the newest whole checkpoint in
                `output_dir`; newer ones that are not whole are skipped with a warning.
            *args: As in `Trainer.train`.
            **kwargs: As in `Trainer.train`.

        Raises:
            ValueError: The checkpoint is not whole, or of another model; nothing was trained.
        """
        output_dir = Path(str(self.args.output_dir))
        checkpoint: Path | None = None
        with first_process_writes() as is_first:
            if is_first:
                recover_drafts(output_dir)
                if resume_from_checkpoint is True:
                    checkpoint = newest_whole_checkpoint(output_dir)
                elif resume_from_checkpoint:
                    checkpoint = Path(resume_from_checkpoint)
                    require_whole(checkpoint)
        checkpoint = broadcast_from_first(checkpoint)
        steps_before = -1
        if checkpoint is not None:
            resume_from_checkpoint = str(checkpoint)
            # Now: training may remove it as an old one.
            steps_before = json_object(checkpoint / TRAINER_STATE_NAME)["global_step"]
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        if checkpoint is not None and output.global_step == steps_before:
            logger.warning(
                "%s is at step %d of %d: the run is finished, and no step was taken. To train on, "
                "raise max_steps or num_train_epochs",
                checkpoint, output.global_step, self.state.max_steps,
            )  # fmt: skip
            self._remove_old(output_dir, checkpoint)  # a run that was killed may not have done it
        return output

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        """Return the Trainer's sampler, with an order that a resumed run can repeat."""
        sampler = super()._get_train_sampler(*args, **kwargs)
        if isinstance(sampler, LengthGroupedSampler):
            seed = self.args.data_seed
            return _GroupedByLength(sampler, seed=self.args.seed if seed is None else seed)
        return sampler

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Take no step after the last, and draw the order of this epoch.

        The Trainer would train one more batch before it stops.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        call = signature(super()._run_epoch).bind(*args, **kwargs).arguments
        batches = getattr(call["train_dataloader"], "batch_sampler", None)
        sampler: Any = getattr(batches, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            # With `dispatch_batches`, Accelerate sets no epoch if it skips batches to resume.
            sampler.set_epoch(call["epoch"])
        super()._run_epoch(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        """Load weights, all of them or none."""
        self._check_weights(Path(resume_from_checkpoint))
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        except RuntimeError as error:
            if "loading state_dict" not in str(error):
                raise
            raise ValueError(
                f"{resume_from_checkpoint} is of another model, or in another format than the run "
                f"asks for. Undo the change, or start a new run. {error}"
            ) from error

    def _load_best_model(self) -> None:
        """Load the best weights, all of them or none."""
        self._check_weights(Path(str(self.state.best_model_checkpoint)))
        super()._load_best_model()

    def _check_weights(self, checkpoint: Path) -> None:
        # Another Trainer among the bases may save and load modules under names of its own.
        load: Any = super()._load_from_checkpoint
        is_transformers = load.__func__ is Trainer._load_from_checkpoint
        check_weights(self.model, checkpoint, names_differ=not is_transformers)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Issue none: `check_weights` has raised for all but the names of tied weights."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the momentum of all parameters, or raise."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            check_momentum(self.model, unwrapped(self.optimizer), Path(checkpoint))

    def _get_output_dir(self, trial: Any) -> str:
        """Return the folder of checkpoints; while one is being written, its draft's folder."""
        return super()._get_output_dir(trial) if self._draft is None else str(self._draft)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint whole or not at all; then push it, and remove old ones.

        Raises:
            OSError: The file system refused; an earlier checkpoint of this step is unchanged.
        """
        run_dir = self._get_output_dir(trial=trial)
        folder = os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        best = self.state.best_model_checkpoint
        with written_by_all(Path(folder)) as draft:
            self._draft = draft.parent
            try:
                with first_process_writes() as is_first:
                    # The Trainer finds no old checkpoints to remove in the draft's folder.
                    super()._save_checkpoint(model, trial)
                if self.state.best_model_checkpoint == str(draft):
                    best = folder
            finally:
                self._draft = None
                self.state.best_model_checkpoint = best
            if is_first:
                self.state.save_to_json(str(draft / TRAINER_STATE_NAME))
                write_mark(draft, self.model, unwrapped(self.optimizer))
        if self.args.push_to_hub:
            self._push_from_checkpoint(folder)
        self._remove_old(Path(run_dir), Path(folder))

    def _remove_old(self, run_dir: Path, newest: Path) -> None:
        """Remove checkpoints beyond `save_total_limit`, and neither the newest nor the best."""
        if self.args.should_save:
            keep = (newest, Path(self.state.best_model_checkpoint or newest))
            remove_old(run_dir, limit=self.args.save_total_limit, keep=keep)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """End training, and keep the checkpoints that `_save_checkpoint` has kept.

        With `save_total_limit=1` and a best checkpoint, the Trainer would remove everything else
        that is named `checkpoint-*`. Without the newest checkpoint, a finished run that is resumed
        would train on from the best one.
        """
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a whole checkpoint, never a draft: a failed push must not cost the checkpoint."""
        if self._draft is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:  # noqa: FBT001, FBT002 the Trainer's signature
        """Write the model; of an earlier model in the folder, all files are replaced or none.

        Args:
            output_dir: Folder; default: that of the run.
            _internal_call: True to skip the push to the Hub.
        """
        if self._draft is not None:
            super().save_model(output_dir, _internal_call=True)
            return
        if self.args.should_save:
            with atomic_folder(Path(str(output_dir or self.args.output_dir))) as draft:
                super().save_model(str(draft), _internal_call=True)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, *args: Any, **kwargs: Any) -> None:
        """Write weights, tokenizer, arguments, and the `use_cache` that the model came with."""
        with self._original_use_cache():
            super()._save(*args, **kwargs)

    @contextmanager
    def _original_use_cache(self) -> Iterator[None]:
        config: Any = getattr(self.model, "config", None)
        if config is None or self.model_init is not None:  # model_init makes a fresh model
            yield
            return
        in_training = getattr(config, "use_cache", _ABSENT)
        if self._use_cache is _ABSENT:
            vars(config).pop("use_cache", None)
        else:
            config.use_cache = self._use_cache
        try:
            yield
        finally:
            if in_training is not _ABSENT:
                config.use_cache = in_training


class _Secret(str):
    """A text that copies keep and pickles lose: the Trainer pushes its pickled arguments."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Secret":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


class _GroupedByLength(LengthGroupedSampler):
    """The Trainer's sampler, with an order that follows from seed and epoch alone.

    The Trainer's draws from PyTorch's random numbers, which a run that resumes in a later epoch
    has at another place.
    """

    def __init__(self, like: LengthGroupedSampler, *, seed: int) -> None:
        super().__init__(like.batch_size, lengths=like.lengths, generator=torch.Generator())
        self._seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of this epoch next; the Trainer calls this."""
        self.generator.manual_seed(self._seed + epoch)
