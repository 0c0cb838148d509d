"""Settings that all tests share, made before torch or transformers is imported."""

import gc
import json
import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched at test time
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: threads only get in each other's way


@pytest.fixture(scope="module", autouse=True)
def _no_search_for_garbage_in_what_stays():
    """Exclude imported objects from garbage collection.

    Every training run ends with a collection, which would visit a million objects of modules. This
    runs again for each test file, since earlier files have imported more modules.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def refused(capsys):
    """Return a function that runs a command of `qft-hf` which must refuse, and returns its text.

    `status` of the process: 2 if argparse refuses the command line.
    """
    from qft_hf_cli import main

    def run(*words, status=1):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([*map(str, words)])
        assert stopped.value.code == status
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return said

    return run


@pytest.fixture
def result_of(capsys):
    """Return a function that runs a command of `qft-hf` with `--json`, and returns the result."""
    from qft_hf_cli import main

    def run(*words):
        capsys.readouterr()
        main([*map(str, words), "--json"])
        return json.loads(capsys.readouterr().out)  # which has nothing else

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with tests that take a minute each, so that at the end no process waits for one."""
    items.sort(key=lambda item: item.path.parent.name not in ("device", "processes", "scripts"))


def pytest_sessionfinish() -> None:
    gc.unfreeze()
