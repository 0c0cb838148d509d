"""How a process that fails tells the others, and why they stop.

It says so in the store of the launcher, and the others, while they wait for it, look there about
once a second. So they raise soon, and name the process and its error.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0  # how often a process that waits looks whether another has failed
_KEY = "failure"


class Failures:
    """What processes that failed have told.

    Args:
        rank: Number of this process.

    Attributes:
        store: A part of the launcher's store that no others use; None: nobody can be told yet.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.store: Any = None

    def first(self, *, patience: float = 0.0) -> str | None:
        """What the first process that failed has told; None: nobody has.

        Args:
            patience: How many seconds to wait for somebody to tell.
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
        """Tell the others that this process fails, if nobody has failed before."""
        if self.store is None or self.first() is not None:
            return
        with self._store_may_be_gone():
            self.store.compare_set(_KEY, "", self.text(error))

    def tell(self, error: BaseException) -> None:
        """`report`; or note at the error, if it is another's, what that one has reported."""
        told = self.first(patience=LOOK_SECONDS if isinstance(error, RuntimeError) else 0.0)
        if told is None:
            self.report(error)
        elif told not in str(error) and not told.startswith(f"Process {self.rank}:"):
            error.add_note(f"The first process that failed was another. {told}")

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Within, an exception is reported to the others."""
        try:
            yield
        except FloatingPointError:  # the mean of gradients is not finite on any of them
            raise
        except BaseException as error:
            self.report(error)
            raise

    def text(self, error: BaseException) -> str:
        """What this process tells of its error."""
        return f"Process {self.rank}: {type(error).__name__}: {error}"

    @contextmanager
    def _store_may_be_gone(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # with the process that held it
            logger.warning("The store of the processes cannot be reached: %s", error)
