"""Starts processes as a launcher does, and collects what scenarios on them have found."""

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 30  # of a collective
PATIENCE_SECONDS = 240  # of all scenarios together; to start takes some


def launch(
    *arguments: str, n: int, module: str = "tests.processes", check: bool = True
) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc-per-node n -m module arguments`, with a port of its own."""
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={n}",
        f"--master-port={free_port()}", "-m", module, *arguments,
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    if check and done.returncode:
        raise AssertionError(f"{done.stdout[-3000:]}\n{done.stderr[-12000:]}")
    return done


def results(folder: Path, n: int) -> list[dict[str, Any]]:
    """What each process has saved."""
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(n)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
