"""The work of one of several processes, whatever has started it."""

import gc
from pathlib import Path

import torch
import torch.distributed as dist

from tests.processes import accounts, bad_input, trainers, training
from tests.processes.launch import begin

NAMES = {2: "two", 3: "three", 4: "four"}


def do(folder: Path, runs: tuple[str, ...]) -> None:
    """Do runs such as `optimizer:stack`, and save their results to `FOLDER/NAME-RANK.pt`."""
    gc.freeze()  # each run collects garbage, and need not search all that was imported
    begin()
    rank, n = dist.get_rank(), dist.get_world_size()
    found = {}
    for run in runs:
        kind, name = run.split(":")
        if kind == "optimizer":
            found[run] = training.run(name, rank, n)
        elif kind == "account":
            found[run] = accounts.COUNTS[name](rank, n)
        elif kind == "bad":
            found[run] = bad_input.run(name, folder, rank, n)
        elif kind == "accelerated":
            found[run] = [
                trainers.accelerated(folder, name, n, resumes=resumes) for resumes in (False, True)
            ]
        elif kind == "evaluated":
            found[run] = trainers.evaluated(folder, n)
        else:
            found[run] = trainers.run(name, folder, n=n)
    torch.save(found, folder / f"{NAMES[n]}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
