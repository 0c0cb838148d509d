"""The callback in every Trainer; it acts on runs with our optimizers or with INT8 weights."""

import logging
import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..optim.release import ACCUMULATION_IS_FORBIDDEN
from ..side import side_network_of
from .checkpoint import write_mark
from .compatibility import (
    has_quantized_weights,
    ours,
    refuse_foreign_optimizer,
    refuse_optimizer,
)
from .compiled_layers import compile_layers_, disable_accelerate_compile
from .liger import refuse_experts
from .optimizers import (
    connect_to_trainer_,
    named_optimizer,
    note_on_default_rate,
    refuse_conflicting_options,
    refuse_retries,
)
from .prepared_model import prepare_model_
from .processes import first_process_writes, start_together

logger = logging.getLogger(__name__)

SAVED = "qft_hf"  # key in a checkpoint's trainer_state.json, next to the states of callbacks


class QFTCallback(TrainerCallback):
    """Converts a float model when the Trainer is built, and checks the optimizer when it trains.

    Because the model is converted this early, resuming loads a checkpoint into INT8 weights.

    Attributes:
        writes_in_place: Whether a checkpoint is visible before it is whole; not with `QFTTrainer`.
        compiler: Options of `torch.compile` for layers; empty if they are not compiled.
        max_grad_norm: That of the arguments at the start of a run with released gradients.
    """

    writes_in_place = True

    def __init__(self) -> None:
        self.compiler: dict[str, Any] = {}
        self.max_grad_norm: float | None = None

    def on_init_end(
        self, args: Any, *_: Any, model: Any = None, optimizer: Any = None, **__: Any
    ) -> None:
        """Prepare the model of a run with one of our optimizers, or raise if that cannot work."""
        if args.n_gpu > 1 and side_network_of(model) is not None:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible and the Trainer would copy the model to each by "
                "nn.DataParallel, which side networks do not support. Set CUDA_VISIBLE_DEVICES to "
                "one GPU before Python starts."
            )
        if named_optimizer(args) is not None and model is not None:
            refuse_optimizer(optimizer, args)
            prepare_model_(model, args)
            self.compiler = disable_accelerate_compile(args)
        if args.use_liger_kernel and model is not None:
            refuse_experts(args, model)

    def on_train_begin(
        self, args: Any, state: Any, *_: Any, model: Any = None, optimizer: Any = None, **more: Any
    ) -> None:
        """Refuse INT8 weights with another optimizer, and options that the optimizer ignores.

        Several processes check that their arguments and data agree, and then share one model.
        """
        inner = ours(optimizer)
        before: dict[str, Any] = {}
        if model is not None:
            refuse_foreign_optimizer(model, optimizer)
            if inner is not None or side_network_of(model) or has_quantized_weights(model):
                start_together(optimizer, model, args, state, more.get("train_dataloader"))
                before = _record(args, state)
        if inner is None:
            return
        refuse_conflicting_options(
            args, inner, resumed_from=before if state.global_step > 0 else None
        )
        if note := note_on_default_rate(args):
            logger.warning(note)
        if self.writes_in_place and getattr(args, "cuda_graph", False):
            raise ValueError(
                "cuda_graph=True was set, and transformers.Trainer captures no graphs. Use "
                "qft_hf.QFTTrainer, or leave cuda_graph off."
            )
        if self.writes_in_place and args.save_strategy != "no":
            logger.warning(
                "transformers.Trainer writes checkpoints in place: a run that is killed while it "
                "saves leaves a broken one, and resume_from_checkpoint=True does not check it. "
                "QFTTrainer writes whole checkpoints, and resumes from the newest whole one"
            )
        if self.compiler and model is not None:
            compile_layers_(model, self.compiler)
        if inner.gradient != "release":
            return
        refuse_retries(args)
        connect_to_trainer_(inner, args)
        self.max_grad_norm = args.max_grad_norm
        if args.gradient_accumulation_steps > 1:
            if inner.accumulation == "forbid":
                raise ValueError(ACCUMULATION_IS_FORBIDDEN)
            logger.warning(
                "gradient=release with %d micro-batches a step: their INT8 gradients are kept "
                "until the last one, about 1 byte for each parameter, as gradient=stack does",
                args.gradient_accumulation_steps,
            )

    def on_pre_optimizer_step(self, args: Any, *_: Any, optimizer: Any = None, **__: Any) -> None:
        """Refuse a `max_grad_norm` that was changed after released gradients were clipped."""
        inner = ours(optimizer)
        if inner is None or inner.gradient != "release":
            return
        if args.max_grad_norm != self.max_grad_norm:
            raise ValueError(
                f"max_grad_norm of the arguments was {self.max_grad_norm} at the start of the run "
                f"and is {args.max_grad_norm} now. With gradient='release' backward has clipped by "
                "the first. Change optimizer.max_grad_norm instead, before backward; or use "
                "gradient='stack'."
            )

    def on_log(
        self, args: Any, state: Any, *_: Any, logs: Any = None, optimizer: Any = None, **__: Any
    ) -> None:
        """Log the true global norm: the Trainer's omits the gradients that were released.

        Reporters, and callbacks that were passed to the Trainer, run after this one. An override of
        `Trainer.log` that reads the logs before it calls `super().log` sees the Trainer's norm.
        """
        inner = ours(optimizer)
        released = None if inner is None else inner.released_norm
        if released is not None and logs is not None and "grad_norm" in logs:
            norm = math.hypot(logs["grad_norm"], released.item())
            logs["grad_norm"] = state.log_history[-1]["grad_norm"] = norm

    def on_save(
        self, args: Any, state: Any, *_: Any, model: Any = None, optimizer: Any = None, **__: Any
    ) -> None:
        """Mark a checkpoint that the stock Trainer wrote, so that later damage is detected."""
        inner = ours(optimizer)
        checkpoint = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if self.writes_in_place and inner is not None and model is not None:
            with first_process_writes() as is_first:
                if is_first and checkpoint.is_dir():  # a hyperparameter search uses another folder
                    write_mark(checkpoint, model, inner)

    def on_train_end(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
        """Ensure that backward passes after the training update no weights."""
        if (inner := ours(optimizer)) is not None:
            inner.eval()


def _record(args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
    """Record hyperparameters of the run in `state`; return the record of the run it resumes.

    Warn if the resumed run had another number of examples per step.
    """
    found = state.train_batch_size if args.auto_find_batch_size else None
    batch_size = found or args.train_batch_size
    n_examples = batch_size * args.gradient_accumulation_steps * args.world_size
    saved: Any = state.stateful_callbacks  # a dictionary, saved with the state
    noted = saved.get(SAVED, {})
    given = {name: getattr(args, name) for name in ("learning_rate", "weight_decay")}
    saved[SAVED] = {**given, **noted, "examples_per_step": n_examples}
    before = noted.get("examples_per_step", n_examples)
    if before != n_examples and state.is_world_process_zero:
        logger.warning(
            "The run resumes from step %d with %d examples per step, and had %d before. It sees "
            "other examples than without the change, and its results differ. To avoid that, "
            "processes (%d) times per_device_train_batch_size (%d) times "
            "gradient_accumulation_steps (%d) must be %d",
            state.global_step,
            n_examples,
            before,
            args.world_size,
            batch_size,
            args.gradient_accumulation_steps,
            before,
        )
    return noted
