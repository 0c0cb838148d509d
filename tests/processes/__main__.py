"""Do runs on this process of several, and save what each has come to.

torchrun --nproc-per-node 2 -m tests.processes FOLDER optimizer:stack trainer:release ...
"""

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tests.processes import bad_input, trainers, training
from tests.processes.launch import TIMEOUT_SECONDS


def main() -> None:
    """What each run has found is in `FOLDER/RANK.pt`."""
    folder, *runs = sys.argv[1:]
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_SECONDS))
    rank, n = dist.get_rank(), dist.get_world_size()
    found = {}
    for run in runs:
        kind, name = run.split(":")
        if kind == "optimizer":
            found[run] = training.run(name, rank, n)
        elif kind == "bad":
            found[run] = bad_input.run(name, Path(folder), rank, n)
        else:
            found[run] = trainers.run(name, Path(folder), n=n)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
