"""Checks that a checkpoint has everything that a run needs to resume from it exactly.

A checkpoint is whole if every file that a resume reads exists and can be read. A checkpoint written
by `QFTTrainer`, or by the stock Trainer with one of our optimizers, also has a mark: sizes and
checksums of those files, and the parameters that have no optimizer state yet. Without a mark, only
the contents of the files are checked.
"""

import json
import logging
import shutil
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xxhash
from torch import nn
from transformers import PreTrainedConfig, TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from ..side import side_network_of
from .atomic_writes import atomic_path, recover_drafts
from .json_object import json_object
from .saved_names import names_by_saved_name
from .side_network import CONFIG_NAME as SIDE_CONFIG_NAME
from .side_network import WEIGHTS_NAME as SIDE_WEIGHTS_NAME
from .tensor_files import DAMAGED, damaged, memory, tensor_names

logger = logging.getLogger(__name__)

MARK = "qft_checkpoint.json"
SAMPLE_NAME = "qft_sample.pt"  # values before training, which figures of a resumed run refer to
RNG_STATE_NAME = "rng_state.pth"
RNG_STATES = "rng_state_*.pth"
STATE_FILES = (TRAINER_STATE_NAME, OPTIMIZER_NAME, SCHEDULER_NAME, RNG_STATE_NAME)
# Each of these files is, or indexes, a complete set of weights.
WEIGHTS = (
    SAFE_WEIGHTS_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    SIDE_WEIGHTS_NAME,
)
# As the Trainer reads these files.
READERS: dict[str, Any] = {
    CONFIG_NAME: PreTrainedConfig.from_json_file,
    TRAINER_STATE_NAME: TrainerState.load_from_json,
}

SHOWN = 5  # most names in an error that may concern every tensor of a model
CHUNK_BYTES = 1 << 20  # fits in a core's cache


def newest_whole_checkpoint(folder: Path) -> Path | None:
    """Return the whole checkpoint with the most steps in `folder`; log those that are skipped.

    Drafts that a killed process has left there are finished or removed first.

    Returns:
        The checkpoint's folder; None if there is no checkpoint at all.

    Raises:
        ValueError: There are checkpoints, and none of them is whole.
    """
    recover_drafts(folder)
    damaged: list[str] = []
    for checkpoint in reversed(_checkpoints(folder)):
        if not (found := faults(checkpoint)):
            say = logger.warning if damaged else logger.info
            say("Resuming from %s, the newest checkpoint that is whole", checkpoint)
            return checkpoint
        logger.warning("%s is not whole and is skipped: %s", checkpoint, "; ".join(found))
        damaged.append(f"- {checkpoint.name}: {'; '.join(found)}")
    if damaged:
        listed = "\n".join(damaged)
        raise ValueError(
            f"None of the {len(damaged)} checkpoints in {folder} is whole:\n{listed}\nCopy one "
            "again, or start a new run in another output_dir, without resume_from_checkpoint. Its "
            "model can be the folder of a checkpoint whose weights are undamaged."
        )
    return None


def require_whole(checkpoint: Path) -> None:
    """Raise ValueError unless a run can go on from this checkpoint exactly."""
    if found := faults(checkpoint):
        raise ValueError(
            f"{checkpoint} is not whole: {'; '.join(found)}. Copy it again, name an earlier one, "
            "or set resume_from_checkpoint=True for the newest whole one. To go on from its "
            "weights alone, start a new run with this folder as its model."
        )


def faults(checkpoint: Path) -> list[str]:
    """Return what is missing or damaged, with names of files; nothing if it is whole."""
    if not checkpoint.is_dir():
        return ["there is no such folder"]
    found: list[str] = []
    names, saved = {*_state_files(checkpoint)}, {}
    if (checkpoint / CONFIG_NAME).is_file():  # not compared: users may edit it
        names.add(CONFIG_NAME)
    try:
        names |= {*weight_files(checkpoint)}
        saved = read_mark(checkpoint)["files"]
    except ValueError as error:
        found.append(str(error))
    for name in sorted(names | saved.keys()):
        path = checkpoint / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif name not in saved:
            found += _unreadable(path)
        elif _digest(path, crc32=_is_crc32(saved[name])) != saved[name]:
            found.append(f"{name} is not what was saved")
    return found


def write_mark(checkpoint: Path, model: nn.Module, optimizer: Any) -> None:
    """Write sizes and checksums of the files that a resume reads; the last file of a checkpoint.

    Args:
        checkpoint: Folder with all files of the checkpoint; `MARK` is added.
        model: The model, for the names of parameters.
        optimizer: Its optimizer, which may have no state yet for some parameters.
    """
    names = [*weight_files(checkpoint), *_state_files(checkpoint), SCALER_NAME, SAMPLE_NAME]
    mark = {
        "files": {
            name: _digest(checkpoint / name) for name in names if (checkpoint / name).is_file()
        },
        "without_state": sorted(parameters_without_state(model, optimizer)),
    }
    with atomic_path(checkpoint / MARK) as draft:
        draft.write_text(json.dumps(mark, indent=2) + "\n", encoding="utf-8")


def _state_files(checkpoint: Path) -> list[str]:
    """Return the files other than weights that a resume reads; each process has its RNG state."""
    of_each = [path.name for path in checkpoint.glob(RNG_STATES)]
    return [name for name in STATE_FILES if name != RNG_STATE_NAME or not of_each] + of_each


def read_mark(checkpoint: Path) -> dict[str, Any]:
    """Return what `write_mark` wrote; without a mark, `files` is empty.

    Raises:
        ValueError: The mark cannot be read, or its `files` is not a dictionary.
    """
    path = checkpoint / MARK
    mark = json_object(path) if path.is_file() else {}
    if not isinstance(mark.setdefault("files", {}), dict):
        raise ValueError(f"{MARK} lists no files")
    return mark


def weight_files(checkpoint: Path) -> list[str]:
    """Return the names of the files that hold the weights, with the index of shards.

    Raises:
        ValueError: There are none, there are two sets, or the index and its shards do not match.
    """
    sets = [name for name in WEIGHTS if (checkpoint / name).is_file()]
    if len(sets) > 1:
        raise ValueError(
            f"{' and '.join(sets)} are two sets of weights, and only one can belong to this run: "
            "remove the other"
        )
    if not sets or sets[0] in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        raise ValueError(f"{SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME} is missing")
    if sets == [SAFE_WEIGHTS_NAME]:
        return sets
    if sets == [SIDE_WEIGHTS_NAME]:
        return [SIDE_WEIGHTS_NAME, SIDE_CONFIG_NAME]
    index = json_object(checkpoint / SAFE_WEIGHTS_INDEX_NAME).get("weight_map")
    if not isinstance(index, dict) or {type(name) for name in index.values()} != {str}:
        raise ValueError(f"{SAFE_WEIGHTS_INDEX_NAME} has no weight_map")
    shards = sorted(set(index.values()))
    for shard in shards:
        if Path(shard).name != shard or not (checkpoint / shard).is_file():
            raise ValueError(f"{shard} is missing")
        held = set(tensor_names([checkpoint / shard]))
        if held != (listed := {name for name, file in index.items() if file == shard}):
            raise ValueError(
                f"{shard} holds other tensors than {SAFE_WEIGHTS_INDEX_NAME} says, such as "
                f"{min(held ^ listed)}: it is a misplaced shard or belongs to another run"
            )
    return [SAFE_WEIGHTS_INDEX_NAME, *shards]


def remove_old(folder: Path, *, limit: int | None, keep: Iterable[Path]) -> None:
    """Remove the checkpoints that were written first, until `limit` are left.

    `rotate_checkpoints` of transformers keeps the folder with the newest modification time, which
    may be an old checkpoint if clocks differ. It also counts everything named `checkpoint-*`, such
    as a copy that was set aside. A checkpoint that cannot be removed stays, with a warning.

    Args:
        folder: Folder of the run.
        limit: Number of checkpoints that may stay; None or 0 for any number.
        keep: Checkpoints that are never removed, in `folder` or elsewhere.
    """
    if not limit or limit < 0:
        return
    checkpoints, kept = _checkpoints(folder), {path.absolute() for path in keep}
    old = [path for path in checkpoints if path.absolute() not in kept]
    old.sort(key=_written)
    n_others = max(0, limit - (len(checkpoints) - len(old)))
    for path in old[: len(old) - n_others]:
        try:
            shutil.rmtree(path)
        except OSError as error:
            logger.warning(
                "save_total_limit=%d: the old checkpoint %s cannot be removed (%s), so there are "
                "more checkpoints than the limit. Remove it by hand to free its space",
                limit,
                path,
                error,
            )


def check_weights(model: nn.Module, checkpoint: Path, *, names_differ: bool = False) -> None:
    """Raise ValueError unless a checkpoint has exactly the tensors of a model, all undamaged.

    Args:
        model: Not modified. The checkpoint may omit a tensor that is tied to another.
        checkpoint: The folder.
        names_differ: Whether the checkpoint has other tensor names than the model, which the code
            that loads it translates. Only damage is checked then.
    """
    if side_network_of(model) is not None:
        return  # `load_side_network` checks its weights
    try:
        files = [checkpoint / name for name in weight_files(checkpoint)]
        saved, found = set(tensor_names(files)), damaged(files)
    except ValueError as error:
        raise ValueError(f"No weights can be loaded from {checkpoint}: {error}") from error
    if found:
        raise ValueError(f"No weights can be loaded from {checkpoint}: {_some(found)}. {DAMAGED}")
    if names_differ:
        return
    own_names = names_by_saved_name(model)
    saved = {own_names.get(name, name) for name in saved}
    state = model.state_dict()
    loaded = {memory(state[name]) for name in state.keys() & saved}
    never_saved = set(getattr(model, "_keys_to_ignore_on_save", None) or [])
    missing = [
        name
        for name, tensor in state.items()
        if name not in saved and name not in never_saved and memory(tensor) not in loaded
    ]
    for names, problem in (
        (missing, "are missing from it, and would keep the values of the model as it was built"),
        (sorted(saved - state.keys()), "are in it and not in the model"),
    ):
        if names:
            raise ValueError(
                f"{checkpoint} does not belong to this {type(model).__name__}: {_some(names)} "
                f"{problem}. Load a complete checkpoint of this model and this QFTConfig, or undo "
                "what changed since it was saved."
            )


def check_momentum(model: nn.Module, optimizer: Any, checkpoint: Path) -> None:
    """Raise ValueError if a parameter lost the optimizer state that it had in the checkpoint.

    Args:
        model: The model, for the names of parameters.
        optimizer: The optimizer, after its state was loaded.
        checkpoint: The checkpoint that the state was loaded from.
    """
    known = set(read_mark(checkpoint).get("without_state", ()))
    lost = [name for name in parameters_without_state(model, optimizer) if name not in known]
    if lost:
        raise ValueError(
            f"{OPTIMIZER_NAME} of {checkpoint} has no state for {_some(lost)}, which would go on "
            "with fresh momentum. Resume from another checkpoint, or start a new run with this "
            "folder as its model."
        )


def parameters_without_state(model: nn.Module, optimizer: Any) -> list[str]:
    """Return the names of the parameters that the optimizer has never updated."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        names.get(id(parameter), "a parameter outside of the model")
        for group in optimizer.param_groups
        for parameter in group["params"]
        if not optimizer.state.get(parameter)
    ]


def _checkpoints(folder: Path) -> list[Path]:
    """Return the folders that `get_last_checkpoint` recognizes, sorted by number of steps."""
    steps = {
        int(step): path
        for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (step := path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")).isdecimal()
        and path.is_dir()
    }
    return [steps[step] for step in sorted(steps)]


def _written(checkpoint: Path) -> float:
    """Return when a checkpoint was written, in seconds; 0, to sort first, if its removal had begun.

    The folder's own time changes when a file in it is added or removed.
    """
    try:
        return (checkpoint / TRAINER_STATE_NAME).stat().st_mtime
    except OSError:
        return 0.0


def _unreadable(path: Path) -> list[str]:
    """Return what is wrong with the contents of a file that no mark lists."""
    try:
        if path.suffix == ".safetensors":
            return damaged([path])
        if path.suffix != ".json":  # by torch.save: a zip archive with a checksum for each tensor
            with zipfile.ZipFile(path) as archive:
                bad = archive.testzip()
            return [] if bad is None else [f"{path.name} is damaged at {bad}"]
        content = json_object(path)
    except ValueError as error:
        return [str(error)]
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        return [f"{path.name} cannot be read ({error})"]
    if path.name == TRAINER_STATE_NAME:
        if type(step := content.get("global_step")) is not int or step < 0:
            return [f"{path.name} has no global_step"]
    try:
        if path.name in READERS:
            READERS[path.name](str(path))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        return [f"{path.name} cannot be read ({error})"]
    return []


def _is_crc32(noted: Any) -> bool:
    """Return whether a mark was written by version 0.2.0, whose checksums are numbers."""
    return isinstance(noted, list) and all(isinstance(part, int) for part in noted)


def _digest(path: Path, *, crc32: bool = False) -> list[int | str]:
    """Return size in bytes and XXH3 or CRC-32; XXH3 takes no longer than reading the file."""
    size, xxh3, crc = 0, xxhash.xxh3_64(), 0
    buffer = memoryview(bytearray(CHUNK_BYTES))  # reused: allocating one per chunk takes longer
    with path.open("rb", buffering=0) as file:
        while n_bytes := file.readinto(buffer):
            size += n_bytes
            chunk = buffer[:n_bytes]
            if crc32:
                crc = zlib.crc32(chunk, crc)
            else:
                xxh3.update(chunk)
    return [size, crc if crc32 else xxh3.hexdigest()]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
