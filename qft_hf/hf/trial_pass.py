"""A forward pass before the one that counts: the same again, and without a trace."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def trial_pass(model: nn.Module) -> Iterator[None]:
    """Afterwards random states and buffers of `model` are what they were.

    So the next pass drops the same activations and masks the same positions, which some models
    choose by NumPy, and running statistics, as of a batch norm, count a batch once.
    """
    of_python, of_numpy = random.getstate(), np.random.get_state()
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
