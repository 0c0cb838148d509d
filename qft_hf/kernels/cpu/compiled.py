"""The folder in which numba keeps compiled kernels for later processes."""

import logging
import os
import tempfile

from numba.core import config
from numba.core.caching import FunctionCache

logger = logging.getLogger(__name__)

VARIABLE = "NUMBA_CACHE_DIR"
_folders: list[tempfile.TemporaryDirectory[str]] = []  # removed when the process ends


def find_place() -> None:
    """Let numba use a temporary folder if it may write neither in this package nor at home.

    It raises otherwise, as in a container whose user owns neither of the two.
    """
    try:
        FunctionCache(find_place)  # looks for a place, and writes nothing that stays
    except RuntimeError:
        _folders.append(tempfile.TemporaryDirectory(prefix="qft_hf-"))
        os.environ[VARIABLE] = config.CACHE_DIR = _folders[-1].name
        logger.warning(
            "compiled kernels can be kept neither in %s nor in the home folder, so each process "
            "compiles them again. Set %s to a folder that may be written",
            os.path.dirname(__file__),
            VARIABLE,
        )
