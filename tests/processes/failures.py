"""A process that fails, and one that is killed, without a launcher that would end the others.

RANK=0 WORLD_SIZE=2 ... python -m tests.processes.failures FOLDER
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from tests.optim.common import model_tensors
from tests.processes import trainers

FAILS_AT = 3  # the step after the one that is saved


class Failing(TrainerCallback):
    """On one process something happens before a step."""

    def __init__(self, rank: int, *, is_killed: bool) -> None:
        self.rank = rank
        self.is_killed = is_killed

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.rank != 1 or state.global_step != FAILS_AT - 1:
            return
        if self.is_killed:
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("the tokens of this batch are out of range")


def main() -> None:
    """The error, how long it took, and the weights afterwards, of both."""
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    for is_killed in (False, True):
        name = "killed" if is_killed else "failed"
        trainer = trainers.make(
            "stack", folder / name, n=2, callbacks=[Failing(rank, is_killed=is_killed)]
        )
        began, text = time.monotonic(), ""
        try:
            trainer.train()
        except Exception as error:  # noqa: BLE001 it is what is looked for
            text = f"{type(error).__name__}: {error}"
        found = {"text": text, "seconds": time.monotonic() - began}
        torch.save({**found, "weights": model_tensors(trainer.model)}, folder / f"{name}-{rank}.pt")
        other = folder / f"{name}-{1 - rank}.pt"
        while not is_killed and not other.exists():  # it must not be this one's end that tells
            time.sleep(0.1)
    os._exit(0)  # the group has lost a member and cannot be taken down in order


if __name__ == "__main__":
    main()
