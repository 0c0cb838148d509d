"""Files and folders that are there whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a place beside `path` to write to; it becomes `path` when the block ends well.

    On an error it is removed, and whatever was at `path` is still there. A folder can only take the
    place of nothing or of an empty folder.

    Args:
        path: File or folder to be. Its parent is created.

    Yields:
        The temporary path: on the same file system, not there yet.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield draft
        os.replace(draft, path)
    except BaseException:
        if draft.is_dir():
            shutil.rmtree(draft)
        else:
            draft.unlink(missing_ok=True)
        raise
