"""Fork two, three and four processes from this one, which has imported what they need.

There is no launcher that would end the others when one of them fails or is killed.

python -m tests.processes.forked FOLDER
"""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from tests.optim.common import model_tensors
from tests.processes import accounts, bad_input, trainers, training
from tests.processes.launch import begin, free_port
from tests.processes.work import do

ON_FOUR = ("optimizer:uneven", "optimizer:uneven-release")
ON_THREE = (
    *(f"optimizer:{name}-no-floats" for name in training.LONG),
    "optimizer:uneven",
    "optimizer:uneven-release",
    "trainer:stack",
)
ON_TWO = (
    *(f"optimizer:{name}" for name in training.SCENARIOS),
    *(f"trainer:{name}" for name in trainers.KINDS),
    *(f"trainer:stack/stack-on-{n}" for n in (1, 2, 3)),
    "trainer:stock/stock-on-2",
    "accelerated:stack",
    "accelerated:release",
    "evaluated:",
    *(f"account:{name}" for name in accounts.COUNTS),
    *(f"bad:{name}" for name in bad_input.CASES),
)
ENDS = ("failed", "killed")
FAILS_AT = 3  # the step after the one that is saved


class Failing(TrainerCallback):
    """Raises before a step of one process, or kills the process during the backward pass."""

    def __init__(self, *, is_killed: bool) -> None:
        self.is_killed = is_killed
        self.is_time = False

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        self.is_time = state.global_step == FAILS_AT - 1
        if self.is_time and not self.is_killed:
            raise ValueError("the tokens of this batch are out of range")
        if self.is_time:
            model.model.layers[0].mlp.up_proj.weight.register_hook(self.end)

    def end(self, gradient: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def fail(folder: Path) -> None:
    """Let the last process raise, and in another run be killed; save all errors and weights."""
    begin()
    rank, n = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for name in ENDS:
        failing = [Failing(is_killed=name == "killed")] if rank == n - 1 else []
        trainer = trainers.make("stack", folder / name, n=n, callbacks=failing)
        began, text = time.monotonic(), ""
        try:
            trainer.train()
        except Exception as error:  # noqa: BLE001 it is what is looked for
            text = f"{type(error).__name__}: {error}"
        found = {"text": text, "seconds": time.monotonic() - began}
        torch.save({**found, "weights": model_tensors(trainer.model)}, folder / f"{name}-{rank}.pt")
        others = [folder / f"failed-{other}.pt" for other in range(n)]
        while not all(path.exists() for path in others):  # no end of a process may tell the others
            time.sleep(0.1)


def forked(n: int, work: Callable[[], None]) -> list[int]:
    """Run `work` on `n` forked processes, and return the exit code of each."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    os.environ["WORLD_SIZE"] = os.environ["LOCAL_WORLD_SIZE"] = str(n)
    children = []
    for rank in range(n):
        child = os.fork()
        if child == 0:
            os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
            status = 1
            try:
                work()
                status = 0
            except BaseException:  # noqa: BLE001 it is told, and the fork must not go on
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)  # a group that has lost a member cannot shut down in order
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main() -> None:
    """Do all runs; those on two processes come last, as some resume from checkpoints of three."""
    folder = Path(sys.argv[1])
    accounts.compile_kernels()  # once, and before the processes meet: their forks have them then
    ends = [
        forked(4, lambda: do(folder, ON_FOUR)),
        forked(3, lambda: do(folder, ON_THREE)),
        forked(3, lambda: fail(folder)),
        forked(2, lambda: do(folder, ON_TWO)),
    ]
    if ends != [[0] * 4, [0] * 3, [0, 0, -signal.SIGKILL], [0] * 2]:
        raise SystemExit(f"processes have ended with {ends}")


if __name__ == "__main__":
    main()
