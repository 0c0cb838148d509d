"""Fixtures and hooks that kernel tests share."""

import os

import pytest
import torch


@pytest.fixture(params=[1, 3])
def n_threads(request):
    """Run the test on one thread and on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def pytest_collection_modifyitems(config, items):
    """Keep the first, middle and last case of a test on emulated PTX: a launch takes seconds."""
    if "QFT_PTX" not in os.environ:
        return
    by_test: dict[str, list] = {}
    for item in items:
        by_test.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = {
        id(cases[place])
        for cases in by_test.values()
        for place in (0, len(cases) // 2, len(cases) - 1)
    }
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = [item for item in items if id(item) in kept]
