"""What several tests of models set up."""

import pytest
import torch


@pytest.fixture
def default_bf16():
    """PyTorch makes BF16 tensors where no dtype is asked for."""
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)
