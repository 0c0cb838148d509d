"""A trial pass before the pass of a step, with the same random numbers and without side effects."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from transformers import Trainer


@contextmanager
def trial_pass(model: nn.Module, trainer: Trainer) -> Iterator[None]:
    """Restore random numbers, the buffers of `model`, and the counts of `trainer` after the block.

    The next pass then drops the same activations and masks the same positions, for which some
    models use NumPy. Running statistics, such as a batch norm's, and counts, such as TRL's of
    tokens and steps, count a batch once: the latter are attributes of a trainer that are numbers.
    """
    of_python, of_numpy = random.getstate(), np.random.get_state()
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    counts = {
        name: value for name, value in vars(trainer).items() if isinstance(value, int | float)
    }
    # Without this list, PyTorch saves the states of all GPUs of the machine, and warns.
    gpus = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(gpus):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        vars(trainer).update(counts)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
