"""Files and folders that appear whole or not at all, whatever ends the process that writes them.

A draft is a fresh folder, private to its writer, beside the place of what is written. It passes
through three states, each begun by one rename:

    new      is being written; whatever happens, it is removed
    whole    is on the disk and counts; what stands in its place is moved into the draft
    moving   goes to its place, name by name; a model's config.json last, so that no folder has a
             config.json beside weights that are not its own

A draft is locked by its process. One that is not locked was left by a process that was killed:
whoever writes to the folder next, or resumes from it, finishes what counts and removes the rest.
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

# Rotation and `get_last_checkpoint` look for `checkpoint-*`; pushes to the Hub leave out `_*`.
PREFIX = "_qft-draft-"
NEW, WHOLE, MOVING = "new", "whole", "moving"
MODEL_FILES = (
    CONFIG_NAME,
    SAFE_WEIGHTS_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    "model-?????-of-?????.safetensors",
)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a place to write to; it becomes `path` when the block ends well.

    It takes the place of what is there; a link is replaced, not followed. On an error it is
    removed, and `path` is as it was.

    Args:
        path: File or folder to be. Its parent is created.

    Yields:
        The place in the draft: on the same file system, named as `path`, not there yet.
    """
    with drafted(path.parent) as draft:
        yield draft / path.name


@contextmanager
def drafted(folder: Path) -> Iterator[Path]:
    """Give an empty draft; when the block ends well, all that it holds takes its place in `folder`.

    On an error it is removed, and `folder` is as it was. Of a model, which has a `config.json`, all
    files are replaced: weights in other files would be taken for its own.

    Args:
        folder: Created if need be. Files of other names stay.

    Yields:
        The draft's folder, on the same file system.

    Raises:
        OSError: It cannot be created, or not be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        settle(folder)
        draft, lock = _create(folder)
    except OSError as error:
        reason = error.strerror or error
        raise type(error)(
            f"nothing can be written to {folder} ({reason}), and nothing was. Choose another "
            "folder, or have its owner let you write there."
        ) from error
    try:
        new = draft / NEW
        new.mkdir()
        try:
            yield new
            _sync_tree(new)
            os.rename(new, draft / WHOLE)
        except BaseException as error:
            error.add_note(
                f"What was being written to {folder} could not be written whole and was removed; "
                "everything there is as it was. If the disk is full, free some space."
            )
            raise
        _sync(draft)
    finally:
        try:
            _finish(draft)
        finally:
            os.close(lock)


def settle(folder: Path) -> None:
    """Finish or remove the drafts in `folder` whose process is gone. It may be absent."""
    for draft in sorted(folder.glob(f"{PREFIX}*")):
        lock = _locked(draft)
        if lock is None:
            continue
        try:
            logger.warning("%s was left by a process that was killed: settling it", draft)
            _finish(draft)
        finally:
            os.close(lock)


def unsettled(folder: Path) -> list[Path]:
    """Drafts in `folder` that hold something whole, which has not come to its place yet."""
    return [
        draft
        for draft in sorted(folder.glob(f"{PREFIX}*"))
        if not draft.is_symlink() and ((draft / WHOLE).exists() or (draft / MOVING).exists())
    ]


def _create(folder: Path) -> tuple[Path, int]:
    """Make a draft and lock it: its path and an open file descriptor."""
    while True:
        draft = Path(tempfile.mkdtemp(prefix=PREFIX, dir=folder))  # exclusive, mode 0700
        lock = _locked(draft, needed=False)
        # Another process may have taken it for a left one before it was locked.
        if lock is not None and draft.exists():
            return draft, lock


def _locked(draft: Path, *, needed: bool = True) -> int | None:
    """Lock a draft and return its open file descriptor; None if it is not ours to touch.

    Args:
        draft: The folder.
        needed: Whether a file system without locks counts as locked: nobody can tell then.
    """
    import fcntl  # Unix only

    try:  # not through a link
        descriptor = os.open(draft, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        if os.fstat(descriptor).st_uid == os.geteuid():  # else somebody put it there
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
    except OSError as error:
        if not needed and not isinstance(error, BlockingIOError):
            return descriptor
    os.close(descriptor)
    return None


def _finish(draft: Path) -> None:
    """Bring what counts to its place, and remove the draft."""
    try:
        if (draft / WHOLE).exists():
            _clear_places(draft)
            os.rename(draft / WHOLE, draft / MOVING)
        if (draft / MOVING).exists():
            _move_in(draft)
    finally:
        # If moving failed, what counts has to stay.
        if not (draft / WHOLE).exists() and not (draft / MOVING).exists():
            _remove(draft)


def _clear_places(draft: Path) -> None:
    """Move away what cannot be replaced by one rename: folders, and the files of a model."""
    folder, names = draft.parent, set(os.listdir(draft / WHOLE))
    away = Path(tempfile.mkdtemp(prefix="earlier-", dir=draft))
    in_place = {path.name: path for name in names if (path := folder / name).is_dir()}
    if CONFIG_NAME in names:
        in_place |= {path.name: path for pattern in MODEL_FILES for path in folder.glob(pattern)}
    for path in sorted(in_place.values(), key=lambda path: path.name != CONFIG_NAME):
        os.rename(path, away / path.name)


def _move_in(draft: Path) -> None:
    """Rename all that the draft holds to its place; done again, it goes on."""
    folder, moving = draft.parent, draft / MOVING
    for name in sorted(os.listdir(moving), key=lambda name: name == CONFIG_NAME):
        if (moving / name).is_dir() and os.path.lexists(folder / name):  # a link, or new since
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
    """Have everything in a folder on the disk, names included."""
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
        if error.errno != errno.EINVAL:  # a file system whose folders need none
            raise
    finally:
        os.close(descriptor)
