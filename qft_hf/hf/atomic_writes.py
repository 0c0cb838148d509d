"""Files and folders that appear whole or not at all, whatever ends the process that writes them.

A draft is a fresh folder, private to its writer, in the folder that is written to. It passes
through three states; one rename leads from each to the next:

    new      its contents are being written; if the process ends now, they are removed
    whole    all contents are on the disk; files they replace are being moved into the draft
    moving   contents are moved to their place, name by name; a model's config.json last, so that
             no folder has a config.json with weights of another model

A draft is locked by its process. An unlocked draft was left by a process that was killed: the next
process that writes to the folder, or resumes from it, finishes whole contents and removes the rest.
"""

import errno
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

logger = logging.getLogger(__name__)

# Rotation and `get_last_checkpoint` look for `checkpoint-*`; pushes to the Hub skip `_*`.
PREFIX = "_qft-draft-"
NEW, WHOLE, MOVING = "new", "whole", "moving"
MODEL_FILES = (
    CONFIG_NAME,
    SAFE_WEIGHTS_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    "model-?????-of-?????.safetensors",
)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a path in a draft, which is moved to `path` when the block ends without an error.

    It replaces an existing file or folder; a link is replaced, not followed. On an error the draft
    is removed, and `path` does not change.

    Args:
        path: File or folder to write. Its parent is created.

    Yields:
        A path on the same file system, with the name of `path`. It does not exist yet.
    """
    with atomic_folder(path.parent) as draft:
        yield draft / path.name


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty draft; its contents move to `folder` when the block ends without an error.

    On an error they are removed, and `folder` does not change. A model, which has a `config.json`,
    replaces all files of an earlier one: weights in other files would be loaded as its own.

    Args:
        folder: Created if necessary. Files with other names stay.

    Yields:
        The draft's folder, on the same file system.

    Raises:
        OSError: `folder` cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        recover_drafts(folder)
        draft, lock = _create(folder)
    except OSError as error:
        reason = error.strerror or error
        raise type(error)(
            f"nothing can be written to {folder} ({reason}), and nothing was. Choose another "
            "folder, or ask its owner for permission to write."
        ) from error
    try:
        new = draft / NEW
        new.mkdir()
        try:
            yield new
            _sync_tree(new)
            os.rename(new, draft / WHOLE)
        except BaseException as error:
            if PREFIX not in str(folder):  # else this is part of another draft, which says it
                error.add_note(
                    f"Writing to {folder} did not finish, and its incomplete files were removed; "
                    "everything there is as it was. If the disk is full, free some space."
                )
            raise
        _sync(draft)
    finally:
        try:
            _finish(draft)
        finally:
            os.close(lock)


def recover_drafts(folder: Path) -> None:
    """Finish or remove the drafts in `folder` whose process is gone. `folder` may be missing."""
    for draft in sorted(folder.glob(f"{PREFIX}*")):
        lock = _locked(draft)
        if lock is None:
            continue
        try:
            logger.warning("%s was left by a killed process: finishing or removing it", draft)
            _finish(draft)
        finally:
            os.close(lock)


def pending_drafts(folder: Path) -> list[Path]:
    """Return the drafts in `folder` with whole contents that are not all in their place yet."""
    return [
        draft
        for draft in sorted(folder.glob(f"{PREFIX}*"))
        if not draft.is_symlink() and ((draft / WHOLE).exists() or (draft / MOVING).exists())
    ]


def _create(folder: Path) -> tuple[Path, int]:
    """Make and lock a draft; return its path and an open file descriptor."""
    while True:
        draft = Path(tempfile.mkdtemp(prefix=PREFIX, dir=folder))  # exclusive, mode 0700
        lock = _locked(draft, needed=False)
        # Before it was locked, another process may have settled it as an abandoned draft.
        if lock is not None and draft.exists():
            return draft, lock


def _locked(draft: Path, *, needed: bool = True) -> int | None:
    """Lock a draft and return its open file descriptor; None if it belongs to another process.

    Args:
        draft: The folder.
        needed: Whether a draft counts as locked on a file system that does not support locks.
    """
    import fcntl  # Unix only

    try:  # without following a link
        descriptor = os.open(draft, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        if os.fstat(descriptor).st_uid == os.geteuid():  # otherwise it is another user's
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
    except OSError as error:
        if not needed and not isinstance(error, BlockingIOError):
            return descriptor
    os.close(descriptor)
    return None


def _finish(draft: Path) -> None:
    """Move whole contents to their place, and remove the draft."""
    try:
        if (draft / WHOLE).exists():
            _clear_places(draft)
            os.rename(draft / WHOLE, draft / MOVING)
        if (draft / MOVING).exists():
            _move_in(draft)
    finally:
        # If moving failed, whole contents have to stay.
        if not (draft / WHOLE).exists() and not (draft / MOVING).exists():
            _remove(draft)


def _clear_places(draft: Path) -> None:
    """Move folders and files of a model, which one rename cannot replace, into the draft."""
    folder, names = draft.parent, set(os.listdir(draft / WHOLE))
    away = Path(tempfile.mkdtemp(prefix="earlier-", dir=draft))
    in_place = {path.name: path for name in names if (path := folder / name).is_dir()}
    if CONFIG_NAME in names:
        in_place |= {path.name: path for pattern in MODEL_FILES for path in folder.glob(pattern)}
    for path in sorted(in_place.values(), key=lambda path: path.name != CONFIG_NAME):
        os.rename(path, away / path.name)


def _move_in(draft: Path) -> None:
    """Rename all contents to their place; a second call continues an interrupted one."""
    folder, moving = draft.parent, draft / MOVING
    for name in sorted(os.listdir(moving), key=lambda name: name == CONFIG_NAME):
        if (moving / name).is_dir() and os.path.lexists(folder / name):  # a link, or a new folder
            os.rename(folder / name, Path(tempfile.mkdtemp(prefix="earlier-", dir=draft)) / name)
        os.replace(moving / name, folder / name)
    _sync(folder)
    moving.rmdir()


def _remove(draft: Path) -> None:
    try:
        shutil.rmtree(draft)
    except OSError as error:
        logger.warning("%s could not be removed and stays: %s", draft, error)


def _sync_tree(folder: Path) -> None:
    """Flush everything in a folder to the disk, including names."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            if not (path := Path(root) / name).is_symlink():
                _sync(path)
        _sync(Path(root))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot sync folders
            raise
    finally:
        os.close(descriptor)
