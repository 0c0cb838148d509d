"""What several tests of kernels need."""

import pytest
import torch


@pytest.fixture(params=[1, 3])
def n_threads(request):
    """Runs the test on one thread and on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
