"""Settings that every test shares, made before torch or transformers is imported."""

import gc
import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched at test time
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: threads only get in each other's way


@pytest.fixture(scope="module", autouse=True)
def _no_search_for_garbage_in_what_stays():
    """Every training run ends with such a search, which would visit a million objects of modules.

    Each file of tests begins so, as earlier ones have imported more.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()
