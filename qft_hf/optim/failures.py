"""How a process that fails tells the others why, so that they stop.

It writes a report to the store of the launcher. While the others wait for it, they check the store
about once a second, so they soon raise an error that names the process and its error.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0  # interval at which a waiting process checks whether another has failed
_KEY = "failure"


class ProcessesDiffer(ValueError):
    """Processes that must have the same values have different ones; all of them raise it."""


class Failures:
    """Reports of processes that failed.

    Args:
        rank: Number of this process.

    Attributes:
        store: A part of the launcher's store that nothing else uses; None: reports are not
            possible yet.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.store: Any = None

    def first(self, *, patience: float = 0.0) -> str | None:
        """Return the report of the first process that failed; None if there is none.

        Args:
            patience: How many seconds to wait for a report.
        """
        deadline = time.monotonic() + patience
        with self._store_may_be_gone():
            while self.store is not None:
                if self.store.check([_KEY]):
                    return str(self.store.get(_KEY).decode())
                if time.monotonic() >= deadline:
                    break
                time.sleep(0.05)
        return None

    def report(self, error: BaseException) -> None:
        """Report to the others that this process fails, unless there is a report already."""
        if self.store is None or self.first() is not None:
            return
        with self._store_may_be_gone():
            self.store.compare_set(_KEY, "", self.text(error))

    def tell(self, error: BaseException) -> None:
        """Report the error; if another process has reported first, add its report as a note."""
        told = self.first(patience=LOOK_SECONDS if isinstance(error, RuntimeError) else 0.0)
        if told is None:
            self.report(error)
        elif told not in str(error) and not told.startswith(f"Process {self.rank}:"):
            error.add_note(f"Another process failed first. {told}")

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Within this context, an exception is reported to processes that do not raise it too."""
        try:
            yield
        except (FloatingPointError, ProcessesDiffer):  # the first is about means, which all share
            raise
        except BaseException as error:
            self.report(error)
            raise

    def text(self, error: BaseException) -> str:
        """Return the report of this process about its error."""
        return f"Process {self.rank}: {type(error).__name__}: {error}"

    @contextmanager
    def _store_may_be_gone(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # the process that held it has ended
            logger.warning("The store of the processes cannot be reached: %s", error)
