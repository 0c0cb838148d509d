"""Start processes, and collect the results of the scenarios on them."""

import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

REPOSITORY = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 30  # of a collective
PATIENCE_SECONDS = 600  # of all scenarios together, on a busy machine


def launch_forked(folder: str) -> None:
    """Run `tests/processes/forked.py` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.processes.forked", folder],
        cwd=REPOSITORY,
        # Autograd refuses to run in forks of a process that has used it, if a GPU is visible.
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    if done.returncode:
        raise AssertionError(f"{done.stdout[-3000:]}\n{done.stderr[-12000:]}")


def results(folder: Path, name: str, n: int) -> list[dict[str, Any] | None]:
    """Return what each process has saved, and None for a process that ended before."""
    paths = [folder / f"{name}-{rank}.pt" for rank in range(n)]
    return [torch.load(path, weights_only=False) if path.exists() else None for path in paths]


def begin() -> None:
    """Join the other processes at the address that the environment has."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_SECONDS))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
