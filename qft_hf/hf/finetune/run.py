"""Carries out a prepared fine-tuning run: score, train, score again, and report."""

import logging
import shlex
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from ...side import side_network_of
from ..atomic_writes import atomic_path
from ..base import stored_format
from ..card_facts import hyperparameters_of, optimizer_of, parameters_of
from ..json_object import json_object
from ..peak_memory import PeakMemory
from ..processes import broadcast_from_first, first_process_writes
from ..run_files import SUMMARY, record_settings
from ..wording import loss_unit
from .data_preview import show
from .export import export_checkpoint
from .loss_curve import draw_loss_curve
from .output_folder import (
    DATA_PREVIEW,
    LOSS_CURVE,
    clear_earlier_export,
    clear_run,
    refuse_other_run,
    sole_run,
)
from .parsing import RunArguments
from .preparation import Run, prepare
from .run_card import facts_of_card, license_of, write_run_card
from .summary import Origin, RunSummary, versions

logger = logging.getLogger(__name__)


def finetune(arguments: RunArguments) -> RunSummary:
    """Do a complete run: prepare it and train."""
    return train(prepare(arguments))


def train(run: Run) -> RunSummary:
    """Write the settings of the run; score, train and score again; write checkpoint and report.

    The scores before training are those of the model that was loaded, also when resuming.

    Raises:
        FileExistsError: Another process is training in the output folder.
    """
    with ExitStack() as held:
        with first_process_writes() as is_first:
            if is_first:
                held.enter_context(sole_run(run.arguments.output_dir))
        return _train(run)


def _train(run: Run) -> RunSummary:
    trainer, output_dir = run.trainer, run.arguments.output_dir
    if run.checkpoint is not None and run.checkpoint.resolve().parent == output_dir.resolve():
        trainer.add_callback(_WriteSettingsWhenAccepted(run))
    else:
        _write_settings(run)
    before = _scores(run)
    trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
    if trainer.state.global_step < trainer.state.max_steps:  # as on SIGTERM
        logger.warning(
            "training was stopped at step %d of %d; to go on from the checkpoint, set "
            "resume_from_checkpoint to true",
            trainer.state.global_step, trainer.state.max_steps,
        )  # fmt: skip
    after = _scores_of_last_step(run) or _scores(run)
    if before is not None:  # train() has cleared the log
        start = {"epoch": 0.0, "step": 0} | {f"eval_{name}": s for name, s in before.items()}
        trainer.state.log_history.insert(0, start)
    is_reported = broadcast_from_first(_is_reported_already(run))
    if is_reported:
        logger.warning(
            "%s already holds the results of this finished run, which are kept; no step was taken",
            output_dir,
        )
    told = facts_of_card(output_dir)  # now: the files of a side network have a card of their own
    if not is_reported:
        _write_model(run)
    summary = _summarize(run, before, after)
    with first_process_writes() as is_first:
        if is_first:
            _report(run, summary, told, is_reported=is_reported)
    if run.trainer.args.push_to_hub:
        _push(run)
    return summary


def _push(run: Run) -> None:
    """Push the finished folder to the Hub; raise ValueError if the Hub does not accept it."""
    output_dir, name = run.arguments.output_dir, run.trainer.hub_model_id
    with first_process_writes():
        try:
            run.trainer.push_to_hub()
        except Exception as error:  # errors of the network, the Hub and its library
            raise ValueError(
                f"the run is finished and complete in {output_dir}, but the Hub did not accept "
                f"it: {error}. Push it with `hf upload {name} {shlex.quote(str(output_dir))} . "
                "--exclude 'checkpoint-*'`."
            ) from error


class _WriteSettingsWhenAccepted(TrainerCallback):
    """Writes the settings when the checkpoint is accepted; otherwise `run.yaml` stays as it is."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_train_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Write the settings of the run; those of a finished run stay, for they led to it."""
        is_finished = state.global_step >= state.max_steps
        if not is_finished or self.run.arguments.output.export_dtype is not None:
            _write_settings(self.run)


def _write_settings(run: Run) -> None:
    """Write the settings of the run, and a preview of what it is about to learn."""
    output_dir, overwrite = run.arguments.output_dir, run.arguments.output.overwrite_output
    with first_process_writes() as is_first:
        if is_first:
            # Another run may have begun in the folder since it was checked.
            refuse_other_run(output_dir, checkpoint=run.checkpoint, overwrite=overwrite)
            if overwrite:
                clear_run(output_dir)
            clear_earlier_export(output_dir, run.arguments.output.export_dtype)
            record_settings(output_dir, run.arguments.settings)
            show(run.data, output_dir / DATA_PREVIEW)


def _report(run: Run, summary: RunSummary, told: Mapping[str, Any], *, is_reported: bool) -> None:
    """Write report, export and model card; the report of an earlier process stays.

    Args:
        run: The run, whose steps are done.
        summary: Its numbers.
        told: What the user has added to an earlier card of the run.
        is_reported: Whether an earlier process has reported on the same steps.
    """
    output, output_dir = run.arguments.output, run.arguments.output_dir
    if not is_reported:
        history = run.trainer.state.log_history
        unit = loss_unit([summary.task])
        draw_loss_curve(history, output_dir / LOSS_CURVE, title=summary.title, unit=unit)
        summary.write(output_dir / SUMMARY)  # last: it marks the report as complete
    if output.export_dtype is not None:
        export_checkpoint(
            output_dir,
            output_dir / output.export_dtype,
            dtype=getattr(torch, output.export_dtype),
            replace=True,  # an export of this run from before it was resumed
            trust_remote_code=run.arguments.model.trust_remote_code,
        )
    if output.export_dtype is not None or not is_reported:
        known = told if "license" in told else {**told, "license": _license(run)}
        write_run_card(output_dir, known)


def _license(run: Run) -> str | None:
    """Return the license on the card of the model that was tuned; warn if it names none."""
    license = license_of(run.arguments.model.model_name_or_path)
    if license is None:
        logger.warning(
            "the model card names no license, because that of the model is not known. Set it, for "
            "example with `qft-hf card %s --license apache-2.0`",
            shlex.quote(str(run.arguments.output_dir)),
        )
    return license


def _is_reported_already(run: Run) -> bool:
    """Whether no step was taken, and an earlier process has reported on the same last step."""
    if run.trainer.state.global_step > run.clock.steps_before:
        return False
    try:
        reported = json_object(run.arguments.output_dir / SUMMARY).get("steps")
    except ValueError:
        return False
    return bool(reported == run.trainer.state.global_step)


def _write_model(run: Run) -> None:
    """Write the model and the state of the Trainer, which has the log."""
    with first_process_writes() as is_first:
        run.trainer.save_model(_internal_call=True)  # does not push: `_push` does it at the end
        if is_first:
            with atomic_path(run.arguments.output_dir / TRAINER_STATE_NAME) as draft:
                run.trainer.state.save_to_json(str(draft))


def _scores(run: Run) -> dict[str, float] | None:
    """Return loss and metrics on the evaluation data, None if there is none."""
    if run.data.evaluation is None:
        return None
    return run.data.task.scoring.of(run.trainer.evaluate())


def _scores_of_last_step(run: Run) -> dict[str, float] | None:
    """Return the Trainer's own scores of the final weights, None if it has not evaluated them."""
    state = run.trainer.state
    logged = [entry for entry in state.log_history if "eval_loss" in entry]
    if run.trainer.args.load_best_model_at_end or not logged:
        return None
    is_of_last = logged[-1]["step"] == state.global_step
    return run.data.task.scoring.of(logged[-1]) if is_of_last else None


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
        origin=Origin.of(run.arguments.model.model_name_or_path, run.arguments.data),
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
        sampled=run.trainer.health.sample_changes(),
        train_data=run.data.train.counts,
        eval_data=run.data.evaluation.counts if run.data.evaluation else None,
        versions=versions(),
    )


def _side_of(model: Any) -> dict[str, Any] | None:
    """Return the configuration of a side network and how its base is stored; None without one."""
    network = side_network_of(model)
    if network is None:
        return None
    return {**asdict(network.config), "base": stored_format(model.config)}
