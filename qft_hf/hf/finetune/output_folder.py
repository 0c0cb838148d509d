"""The folder a run writes to: refused if it holds another run, unless that was asked for."""

import shutil
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..checkpoint import newest_whole_checkpoint, require_whole
from ..drafts import unsettled
from .arguments import EXPORT_DTYPES

SUMMARY = "summary.json"
LOSS_CURVE = "loss_curve.png"

# Any of these says that a run wrote here: what it ends with, and what it leaves when it is stopped.
_TRACES = (
    SUMMARY,
    LOSS_CURVE,
    "config.json",
    "training_args.bin",
    "*.safetensors",
    *EXPORT_DTYPES,
    f"{PREFIX_CHECKPOINT_DIR}-*",
)


def checkpoint_to_resume(resume_from_checkpoint: str | None, output_dir: Path) -> Path | None:
    """Return the checkpoint that a run goes on from, None for a fresh start.

    Args:
        resume_from_checkpoint: A folder, "true" for the newest whole checkpoint in `output_dir`, or
            None.
        output_dir: Of the run.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It is not whole, or none in `output_dir` is; the text names what is missing.
    """
    if resume_from_checkpoint is None or resume_from_checkpoint.lower() == "false":
        return None
    if resume_from_checkpoint.lower() != "true":
        checkpoint = Path(resume_from_checkpoint)
        if not checkpoint.is_dir():
            raise FileNotFoundError(
                f"no checkpoint folder {checkpoint} to resume from. Set resume_from_checkpoint "
                f"to a folder {PREFIX_CHECKPOINT_DIR}-<step>, or to true for the newest whole one "
                "in output_dir."
            )
        require_whole(checkpoint)
        return checkpoint
    newest = newest_whole_checkpoint(output_dir)
    if newest is None:
        raise FileNotFoundError(
            f"resume_from_checkpoint is true, but {output_dir} holds no {PREFIX_CHECKPOINT_DIR}-"
            "<step> folder. Correct output_dir, or leave resume_from_checkpoint out to start anew."
        )
    return newest


def refuse_other_run(output_dir: Path, *, checkpoint: Path | None, overwrite: bool) -> None:
    """Raise if writing to the folder would destroy a run. Changes nothing.

    Args:
        output_dir: May be absent.
        checkpoint: What the run goes on from; one in `output_dir` makes it the same run.
        overwrite: The run there may be replaced.

    Raises:
        FileExistsError: It holds a run that would be lost.
        ValueError: Both resuming and replacing were asked for.
    """
    resumes_here = checkpoint is not None and checkpoint.resolve().parent == output_dir.resolve()
    if resumes_here and overwrite:
        raise ValueError(
            "resume_from_checkpoint continues the run in output_dir and overwrite_output replaces "
            "it. Set one of them."
        )
    traces = _traces(output_dir)
    if traces and not overwrite and not resumes_here:
        raise FileExistsError(
            f"{output_dir} already holds a run ({', '.join(path.name for path in traces[:3])}). "
            "Choose another output_dir, set resume_from_checkpoint to true to continue it, or set "
            "overwrite_output to true to replace it."
        )


def clear_run(output_dir: Path) -> None:
    """Remove what a run wrote. Other files in the folder stay."""
    for trace in _traces(output_dir):
        if trace.is_dir() and not trace.is_symlink():
            shutil.rmtree(trace)
        else:
            trace.unlink()


def _traces(output_dir: Path) -> list[Path]:
    found = sorted(path for pattern in _TRACES for path in output_dir.glob(pattern))
    return found + unsettled(output_dir)
