"""Fixtures that several tests of models share."""

import pytest
import torch


@pytest.fixture
def default_bf16():
    """Make BF16 the default dtype of PyTorch."""
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)
