"""A trial pass before the pass of a step, with the same random numbers and without side effects."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def trial_pass(model: nn.Module) -> Iterator[None]:
    """Restore the states of random numbers and the buffers of `model` after the block.

    The next pass then drops the same activations and masks the same positions, for which some
    models use NumPy, and running statistics, such as a batch norm's, count a batch once.
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
