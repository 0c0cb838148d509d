"""Checks and prepares the output folder of a run.

A run replaces files without asking, so it must know that a run wrote them. A file or folder that
has a name that a run writes, but is not known to come from a run, is foreign and refused.
"""

import fnmatch
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..atomic_writes import MODEL_FILES, pending_drafts
from ..card import CARD, is_card
from ..checkpoint import MARK, SAMPLE_NAME, STATE_FILES, newest_whole_checkpoint, require_whole
from ..config import QUANT_METHOD
from ..json_object import json_object
from ..remote_code import code_files
from ..run_files import RUN_CONFIG, SUMMARY, recorded_settings
from ..side_network import CONFIG_NAME, WEIGHTS_NAME
from .arguments import EXPORT_DTYPES

logger = logging.getLogger(__name__)

LOSS_CURVE = "loss_curve.png"
DATA_PREVIEW = "data.txt"
CHECKPOINTS = f"{PREFIX_CHECKPOINT_DIR}-*"

_MODEL = (
    *MODEL_FILES,
    CONFIG_NAME,
    WEIGHTS_NAME,
    TRAINING_ARGS_NAME,
    "generation_config.json",
    # Files of tokenizers of all kinds.
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer*.json",
    "tokenizer.model",
    "vocab.*",
)
_IN_CHECKPOINT = (*_MODEL, *STATE_FILES, "scaler.pt", "rng_state_*.pth", SAMPLE_NAME, CARD, MARK)
# Names of the files and folders that a run writes. They show that a run wrote here, whether it has
# finished or was stopped.
_WRITTEN = (
    *_MODEL,
    *EXPORT_DTYPES,
    CHECKPOINTS,
    SUMMARY,
    LOSS_CURVE,
    RUN_CONFIG,
    DATA_PREVIEW,
    CARD,
    TRAINER_STATE_NAME,
)
_SHOWN = 3  # most names in an error


def checkpoint_to_resume(resume_from_checkpoint: str | None, output_dir: Path) -> Path | None:
    """Return the checkpoint that a run resumes from, None for a fresh start.

    Args:
        resume_from_checkpoint: A folder; "true" for the newest complete checkpoint in `output_dir`;
            "false" or None.
        output_dir: Output folder of the run.

    Raises:
        FileNotFoundError: The checkpoint does not exist.
        ValueError: It, or every one in `output_dir`, is incomplete; the text names what is missing.
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
            "<step> folder. Correct output_dir, or leave resume_from_checkpoint out to start "
            "again; overwrite_output replaces what a run without a checkpoint has left."
        )
    return newest


def refuse_other_run(output_dir: Path, *, checkpoint: Path | None, overwrite: bool) -> None:
    """Raise if writing to the folder would destroy something. Changes nothing.

    Args:
        output_dir: Output folder; may be absent.
        checkpoint: Checkpoint to resume from; one in `output_dir` makes it the same run.
        overwrite: Whether a run in the folder may be replaced.

    Raises:
        FileExistsError: The folder holds a run that would be lost, or foreign files.
        ValueError: Both resuming and replacing were asked for.
    """
    resumes_here = checkpoint is not None and checkpoint.resolve().parent == output_dir.resolve()
    if resumes_here and overwrite:
        raise ValueError(
            "resume_from_checkpoint continues the run in output_dir and overwrite_output replaces "
            "it. Set one of them."
        )
    written = _written(output_dir)
    foreign = [
        str(path.relative_to(output_dir))
        for path in _foreign(output_dir, written, is_run=resumes_here or _is_run(output_dir))
        # A user who resumes here knows that the checkpoints are from this run, even without a mark.
        if not (resumes_here and path.match(CHECKPOINTS))
    ]
    if foreign:
        raise FileExistsError(
            f"{output_dir} holds {', '.join(foreign[:_SHOWN])}, which no run of qft_hf is known to "
            "have written as it is now, and which this run would replace. Choose another "
            "output_dir, or move them away: overwrite_output replaces only runs."
        )
    if written and not overwrite and not resumes_here:
        drafted = (path for draft in written for path in draft.glob("*/*"))
        has_checkpoint = any(path.match(CHECKPOINTS) for path in (*written, *drafted))
        resume = "set resume_from_checkpoint to true to continue it, " if has_checkpoint else ""
        raise FileExistsError(
            f"{output_dir} already holds a run "
            f"({', '.join(path.name for path in written[:_SHOWN])}). Choose another output_dir, "
            f"{resume}or set overwrite_output to true to replace it."
        )


@contextmanager
def sole_run(output_dir: Path) -> Iterator[None]:
    """Keep other runs out of the folder, which is created, until the block or the process ends.

    Raises:
        FileExistsError: Another process is training in the folder.
    """
    import fcntl  # Unix only

    output_dir.mkdir(parents=True, exist_ok=True)
    folder = os.open(output_dir, os.O_RDONLY)
    with ExitStack() as held:
        held.callback(os.close, folder)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Closing is not enough: processes that load data have copies of `folder`.
            held.callback(fcntl.flock, folder, fcntl.LOCK_UN)
        except BlockingIOError as error:
            raise FileExistsError(
                f"another process is training in {output_dir}. Wait until it has ended, stop it, "
                "or choose another output_dir."
            ) from error
        except OSError as error:
            logger.warning(
                "%s cannot be locked (%s), so a second run in it would not be refused",
                output_dir, error,
            )  # fmt: skip
        yield


def refuse_inputs_inside(output_dir: Path, inputs: Mapping[str, str]) -> None:
    """Raise ValueError if an input of a run is at a place where the run would replace it.

    Args:
        output_dir: Output folder of the run.
        inputs: Names of what is read, by key of the config. Names that are not paths are skipped.
    """
    home = output_dir.resolve()
    for key, name in inputs.items():
        path = Path(name)
        if not path.exists():
            continue
        place = path.resolve()
        if place == home:
            raise ValueError(
                f"output_dir is the folder of {key} itself, {name}. Choose another one, so that "
                "the run does not replace its input."
            )
        if place.is_relative_to(home) and _is_written(place.relative_to(home).parts[0]):
            raise ValueError(
                f"{key}={name} is inside output_dir ({output_dir}), where a run replaces files of "
                "that name. Choose another output_dir, or copy the input to another place first."
            )


def refuse_unwritable(output_dir: Path) -> None:
    """Raise OSError if the folder cannot be created or written to. Changes nothing."""
    try:
        str(output_dir).encode()
    except UnicodeEncodeError as error:
        raise OSError(
            f"output_dir is {str(output_dir)!r}, which is not a name in UTF-8, and no checkpoint "
            "can be written there. Choose another output_dir."
        ) from error
    nearest = nearest_folder(output_dir)
    above = (output_dir, *output_dir.parents)
    found = [f"{at} is a broken link" for at in above if at.is_symlink() and not at.exists()]
    if found or not nearest.is_dir():
        found = found or [f"{nearest} is a file"]
        raise NotADirectoryError(
            f"output_dir is {output_dir}, and {found[0]}. Choose another output_dir."
        )
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(
            f"output_dir is {output_dir}, and nothing can be written to {nearest}. Choose another "
            "output_dir, or change its permissions."
        )


def nearest_folder(output_dir: Path) -> Path:
    """Return the folder, or the nearest existing one above it."""
    path = output_dir.resolve()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def refuse_small_disk(output_dir: Path, needed_bytes: int, *, overwrite: bool) -> None:
    """Raise OSError if what a run will write does not fit on the disk. Changes nothing.

    Args:
        output_dir: Output folder; may be absent.
        needed_bytes: Most bytes that the run has on the disk at one time.
        overwrite: Whether the run in the folder is removed first. Checkpoints of a resumed run
            count as free space in any case, because `needed_bytes` includes them.
    """
    free = shutil.disk_usage(nearest_folder(output_dir)).free
    there = _written(output_dir) if overwrite else list(output_dir.glob(CHECKPOINTS))
    free += sum(path.lstat().st_size for top in there for path in (top, *top.rglob("*")))
    if needed_bytes > free:
        raise OSError(
            f"the run will write up to {needed_bytes / 1e9:.3g} GB into {output_dir}, and "
            f"{free / 1e9:.3g} GB are free there. Choose an output_dir on a larger disk, or write "
            "less: save_total_limit, save_strategy=no, no export_dtype."
        )


def clear_run(output_dir: Path) -> None:
    """Remove the files and folders that a run wrote. Other files in the folder stay."""
    for path in _written(output_dir):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def clear_earlier_export(output_dir: Path, export_dtype: str | None) -> None:
    """Remove the export of a resumed run, unless one in the same dtype will replace it."""
    earlier = recorded_settings(output_dir).get("export_dtype")
    if earlier not in EXPORT_DTYPES or earlier == export_dtype:
        return
    if (folder := output_dir / earlier).is_dir():
        logger.warning(
            "%s, the export from before the run was resumed, is removed: export_dtype is %s now, "
            "was %s",
            folder, export_dtype or "not set", earlier,
        )  # fmt: skip
        _remove(folder)


def _is_written(name: str) -> bool:
    """Whether a run writes files or folders of this name."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _WRITTEN)


def _written(output_dir: Path) -> list[Path]:
    """Return the files and folders with names that a run writes, and drafts of them."""
    there = sorted(output_dir.iterdir()) if output_dir.is_dir() else []
    return [path for path in there if _is_written(path.name)] + pending_drafts(output_dir)


def _foreign(output_dir: Path, written: list[Path], *, is_run: bool) -> Iterator[Path]:
    """Yield the paths of `written`, or in them, that are not known to come from a run."""
    drafts = pending_drafts(output_dir)
    config = output_dir / "config.json"
    for path in written:
        if path in drafts:
            continue
        if path.name == CARD:
            known = is_card(path)
        elif path.match(CHECKPOINTS):
            known = path.is_symlink() or (path / MARK).is_file()
        elif path.name in EXPORT_DTYPES:
            known = path.name == recorded_settings(output_dir).get("export_dtype")
        elif any(path.match(pattern) for pattern in MODEL_FILES):
            known = is_run and (not config.is_file() or _is_int8(config))
        else:
            known = is_run
        if not known:
            yield path
        elif path.is_dir() and not path.is_symlink():
            yield from _strange_files(path)


def _strange_files(folder: Path) -> Iterator[Path]:
    """Yield the files in a checkpoint or an export that no run writes there."""
    known = code_files(folder)
    for path in sorted(folder.iterdir()):
        if path not in known and not any(path.match(pattern) for pattern in _IN_CHECKPOINT):
            yield path


def _is_run(output_dir: Path) -> bool:
    """Whether the folder holds a run's config, its summary or a checkpoint with a mark."""
    return (
        (output_dir / RUN_CONFIG).is_file()
        or "qft_hf" in _object_in(output_dir / SUMMARY, "versions")
        or any((path / MARK).is_file() for path in output_dir.glob(CHECKPOINTS))
    )


def _is_int8(config: Path) -> bool:
    quantization = _object_in(config, "quantization_config")
    return bool(quantization.get("quant_method") == QUANT_METHOD)


def _object_in(path: Path, name: str) -> dict[str, Any]:
    """Return the object of this name in a JSON file, an empty one if it is absent or damaged."""
    try:
        found = json_object(path).get(name)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
