"""One fine-tuning run: refuse what cannot work, load, train, score before and after, report."""

import json
import logging
import time
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import (
    PreTrainedConfig,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import IntervalStrategy
from transformers.utils.logging import disable_progress_bar

from ...side import side_network_of
from ..base import form_of, require_bitsandbytes
from ..card import hyperparameters_of, optimizer_of, parameters_of
from ..drafts import written_whole
from ..peak_memory import PeakMemory
from ..processes import by_first, of_first
from ..trainer import QFTTrainer
from .data import TaskData, prepare_data
from .evidence import show
from .export import export_checkpoint
from .forecast import disk_bytes, n_steps
from .loading import load_model, load_tokenizer
from .loss_curve import draw_loss_curve
from .output_folder import (
    EVIDENCE,
    LOSS_CURVE,
    SUMMARY,
    checkpoint_to_resume,
    claim,
    clear_run,
    refuse_inputs_inside,
    refuse_other_run,
    refuse_small_disk,
    refuse_unwritable,
)
from .packing import refuse_crossing
from .parsing import RunArguments
from .paths import inputs
from .run_card import license_of, write_run_card
from .side_tuning import base_config, base_form, load_side_model, side_checkpoint
from .summary import Origin, RunSummary, versions

logger = logging.getLogger(__name__)

LOGS = 50  # in a run, where nothing else was asked for


class StepClock(TrainerCallback):
    """Seconds spent in training steps, and the steps and tokens before the first of them."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.steps_before = 0
        self.tokens_before = 0
        self._began = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note where a resumed run goes on."""
        self.steps_before = state.global_step
        self.tokens_before = state.num_input_tokens_seen

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start."""
        self._began = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop."""
        self.seconds += time.perf_counter() - self._began


@dataclass(frozen=True, slots=True)
class Run:
    """A run that is loaded and checked, and not yet trained."""

    arguments: RunArguments
    checkpoint: Path | None  # resumed from
    data: TaskData
    trainer: QFTTrainer
    clock: StepClock
    started: float  # time.monotonic()


def finetune(arguments: RunArguments) -> RunSummary:
    """Do a whole run: prepare it and train."""
    return train(prepare(arguments))


def prepare(arguments: RunArguments) -> Run:
    """Check the output folder, load data and model, and see that the disk has room. Writes nothing.

    To resume, it first finishes or removes what a killed process has left in the folder.

    Raises:
        FileExistsError: The output folder already holds a run.
        FileNotFoundError: A data file, template or checkpoint is not there.
        OSError: The output folder cannot be written to, or the disk has no room for the run.
        ValueError: The arguments, the data and the model do not go together.
    """
    started = time.monotonic()
    checkpoint, config, data = read(arguments)
    training, tokenizer = arguments.training, data.task.tokenizer
    model: Any
    if arguments.method.side is None:
        model = load_model(
            arguments.model,
            training.quantization_config,
            config,
            data.task,
            max_length=arguments.data.max_length,
        )
    else:
        model = load_side_model(
            arguments.model,
            arguments.method,
            config,
            data.task,
            max_length=arguments.data.max_length,
        )
    if arguments.data.packing:
        refuse_crossing(model)
    if training.include_num_input_tokens_seen == "no":  # the summary reports them
        # Blocks have no mask to count by, and no padding but in the last batch of an epoch.
        training.include_num_input_tokens_seen = "all" if arguments.data.packing else "non_padding"
    if training.device.type == "cpu":
        # It speeds up copies to a GPU, and warns where there is none.
        training.dataloader_pin_memory = False
    refuse_small_disk(
        arguments.output_dir,
        disk_bytes(arguments, model, len(data.train.dataset)),
        overwrite=arguments.output.overwrite_output,
    )
    clock = StepClock()
    trainer = QFTTrainer(
        model=model,
        args=training,
        train_dataset=data.train.dataset,
        eval_dataset=None if data.evaluation is None else data.evaluation.dataset,
        data_collator=data.task.collator,
        processing_class=tokenizer,
        compute_metrics=data.task.scoring.compute_metrics,
        preprocess_logits_for_metrics=data.task.scoring.preprocess_logits,
        callbacks=[clock],
    )
    return Run(arguments, checkpoint, data, trainer, clock, started)


def read(arguments: RunArguments) -> tuple[Path | None, PreTrainedConfig, TaskData]:
    """Check the output folder, and read all but the weights of the model. Writes nothing.

    Where nothing says how often to log, it is 50 times in a run.

    Returns:
        checkpoint: What the run goes on from; None for a fresh start.
        config: The model's.
        data: Ready for the Trainer.

    Raises:
        FileExistsError: As `prepare`.
        FileNotFoundError: Likewise.
        OSError: The output folder cannot be written to.
        ValueError: As `prepare`.
    """
    training = arguments.training
    if training.process_index > 0:  # the first one says it
        logging.getLogger("qft_hf").setLevel(logging.ERROR)
        disable_progress_bar()
    with by_first() as is_first:
        checkpoint = _check_output(arguments) if is_first else None
    checkpoint = of_first(checkpoint)
    _check_evaluation(arguments)
    set_seed(training.seed)
    tokenizer = load_tokenizer(arguments.model)
    config = base_config(arguments.model)
    if arguments.method.side is not None:
        _require_base(arguments, config)
    elif side_checkpoint(arguments.model.model_name_or_path) is not None:
        raise ValueError(
            f"{arguments.model.model_name_or_path} holds a side network, and method 'full' trains "
            "every parameter of a model. Set method to qst, or name the base."
        )
    with training.main_process_first(desc="reading the data"):
        data = prepare_data(arguments.data, tokenizer, config, seed=training.seed)
    if "logging_steps" not in arguments.given:
        steps, _ = n_steps(training, len(data.train.dataset))
        training.logging_steps = ceil(steps / LOGS)
    return checkpoint, config, data


def train(run: Run) -> RunSummary:
    """Write what the run was told, then score, train, score, and write checkpoint and report.

    The scores before training are those of the model that was loaded, also when resuming.
    """
    trainer, output = run.trainer, run.arguments.output
    output_dir = run.arguments.output_dir
    with by_first() as is_first:
        if is_first:
            if output.overwrite_output:
                clear_run(output_dir)
            claim(output_dir, run.arguments.told)
            show(run.data, output_dir / EVIDENCE)
    before = _scores(run)
    trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
    after = _scores_of_last_step(run) or _scores(run)
    if before is not None:  # train() has started the log anew
        start = {"epoch": 0.0, "step": 0} | {f"eval_{name}": s for name, s in before.items()}
        trainer.state.log_history.insert(0, start)
    is_reported = of_first(_is_reported_already(run))
    if is_reported:
        logger.warning(
            "%s holds what this finished run came to, and it stays as it is; no step was taken",
            output_dir,
        )
    else:
        _write_model(run)
    summary = _summarize(run, before, after)
    with by_first() as is_first:
        if is_first:
            _report(run, summary, is_reported=is_reported)
    return summary


def _report(run: Run, summary: RunSummary, *, is_reported: bool) -> None:
    """Write report, export and model card; what an earlier process has reported stays."""
    output, output_dir = run.arguments.output, run.arguments.output_dir
    if not is_reported:
        _write_report(run, summary)
    if output.export_dtype is not None:
        export_checkpoint(
            output_dir,
            output_dir / output.export_dtype,
            dtype=getattr(torch, output.export_dtype),
            replace=True,  # one of this run, before it was resumed
        )
    if output.export_dtype is not None or not is_reported:
        write_run_card(output_dir, **_licence(run))


def _licence(run: Run) -> dict[str, Any]:
    """Return the license of the model that was tuned, as its own card says, and warn without."""
    license = license_of(run.arguments.model.model_name_or_path)
    if license is None:
        logger.warning(
            "the model card names no licence, because that of the model is not known. Give it by "
            "`qft-hf card %s --license apache-2.0`, or what it is",
            run.arguments.output_dir,
        )
    return {"license": license}


def _is_reported_already(run: Run) -> bool:
    """Whether no step was taken, and an earlier process has reported on the same last step."""
    if run.trainer.state.global_step > run.clock.steps_before:
        return False
    try:
        text = (run.arguments.output_dir / SUMMARY).read_text(encoding="utf-8")
        return bool(json.loads(text)["steps"] == run.trainer.state.global_step)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write_model(run: Run) -> None:
    """Write checkpoint and log."""
    with by_first() as is_first:
        run.trainer.save_model()
        if is_first:
            with written_whole(run.arguments.output_dir / TRAINER_STATE_NAME) as draft:
                run.trainer.state.save_to_json(str(draft))


def _write_report(run: Run, summary: RunSummary) -> None:
    """Write loss curve and summary; the summary last, so that it tells that all is there."""
    output_dir = run.arguments.output_dir
    draw_loss_curve(
        run.trainer.state.log_history,
        output_dir / LOSS_CURVE,
        title=summary.title,
    )
    summary.write(output_dir / SUMMARY)


def _check_output(arguments: RunArguments) -> Path | None:
    """Refuse what would destroy something; return the checkpoint to resume from."""
    output_dir = arguments.output_dir
    refuse_unwritable(output_dir)
    refuse_inputs_inside(output_dir, _inputs(arguments))
    checkpoint = checkpoint_to_resume(arguments.training.resume_from_checkpoint, output_dir)
    refuse_other_run(output_dir, checkpoint=checkpoint, overwrite=arguments.output.overwrite_output)
    return checkpoint


def paths_read(arguments: RunArguments) -> dict[str, str]:
    """Return whole paths of what is read from this machine, by the key that names it."""
    return {
        key: str(Path(name).resolve())
        for key, name in _inputs(arguments).items()
        if Path(name).exists()
    }


def _inputs(arguments: RunArguments) -> dict[str, str]:
    return inputs(vars(arguments.model) | vars(arguments.data))


def _require_base(arguments: RunArguments, config: PreTrainedConfig) -> None:
    """Raise if the base of a side network cannot be stored as asked for."""
    form = base_form(arguments.method, config, arguments.model.model_name_or_path)
    if form == "nf4":
        require_bitsandbytes()


def _check_evaluation(arguments: RunArguments) -> None:
    data, training = arguments.data, arguments.training
    has_data = data.eval_data is not None or data.eval_fraction is not None
    if not has_data and (training.do_eval or training.eval_strategy != "no"):
        strategy = IntervalStrategy(training.eval_strategy).value
        raise ValueError(
            f"evaluation is asked for (eval_strategy={strategy!r}), but nothing is held out. "
            "Set eval_data or eval_fraction, or eval_strategy to 'no'."
        )


def _scores(run: Run) -> dict[str, float] | None:
    """Return loss and metrics on the evaluation data, None if there is none."""
    if run.data.evaluation is None:
        return None
    return _named_scores(run, run.trainer.evaluate())


def _scores_of_last_step(run: Run) -> dict[str, float] | None:
    """Return the scores that the Trainer itself took of the final weights, None if it did not."""
    state = run.trainer.state
    logged = [entry for entry in state.log_history if "eval_loss" in entry]
    if run.trainer.args.load_best_model_at_end or not logged:
        return None
    return _named_scores(run, logged[-1]) if logged[-1]["step"] == state.global_step else None


def _named_scores(run: Run, metrics: dict[str, Any]) -> dict[str, float]:
    return {name: metrics[f"eval_{name}"] for name in run.data.task.scoring.names}


def _summarize(
    run: Run, before: dict[str, float] | None, after: dict[str, float] | None
) -> RunSummary:
    state, ledger = run.trainer.state, run.trainer.ledger
    model: Any = run.trainer.model
    parameters, trained = parameters_of(model)
    tokens_since_resume = state.num_input_tokens_seen - run.clock.tokens_before
    peaks: list[PeakMemory] = gather_object([PeakMemory.measured(run.trainer.args.device)])
    return RunSummary(
        model=run.arguments.model.model_name_or_path,
        origin=Origin.of(run.arguments.model.model_name_or_path, run.arguments.data.train_data),
        architecture=type(model).__name__,
        task=run.arguments.data.task,
        parameters=parameters,
        trained_parameters=trained,
        side=_side_of(model),
        optimizer=optimizer_of(run.trainer),
        hyperparameters=hyperparameters_of(run.trainer),
        steps=state.global_step,
        before=before,
        after=after,
        trained_tokens=state.num_input_tokens_seen,
        train_seconds=run.clock.seconds,
        tokens_per_second=tokens_since_resume / run.clock.seconds if run.clock.seconds else 0.0,
        wall_seconds=time.monotonic() - run.started,
        peak_memory=max(peaks, key=lambda peak: peak.bytes),
        peak_bytes=[peak.bytes for peak in peaks],
        state_bytes={row.state: row.bytes for row in ledger.rows} if ledger else {},
        bytes_per_parameter=ledger.bytes_per_parameter if ledger else 0.0,
        percent_of_fp32_adam=ledger.percent_of_fp32_adam if ledger else 0.0,
        sampled=run.trainer.health.journey(),
        train_data=run.data.train.counts,
        eval_data=run.data.evaluation.counts if run.data.evaluation else None,
        versions=versions(),
    )


def _side_of(model: Any) -> dict[str, Any] | None:
    """Return the configuration of a side network and how its base is stored; None without one."""
    network = side_network_of(model)
    if network is None:
        return None
    return {**asdict(network.config), "base": form_of(model.config)}
