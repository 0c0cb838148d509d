"""Interrupt backward passes, steps and the loading of a state between any two instructions.

A signal is raised at a random instruction of the package, as Ctrl-C would be. Afterwards the model
must be as before, as after the whole step, or marked, which makes the next batch fail until
`zero_grad()` is called. A state must be the loaded one or the one before.
"""

import copy
import inspect
import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import qft_hf
from qft_hf import QFTSGD, QFTAdamW, QFTLion
from tests.optim.test_release import batches, everything, loss_of, make_optimizer, network

PACKAGE = str(Path(qft_hf.__file__).parent)
GOOD = {"as before", "whole", "refused"}
SETTINGS: list[tuple[Any, dict[str, Any]]] = [
    (kind, settings)
    for kind in (QFTLion, QFTAdamW, QFTSGD)
    for settings in (
        {"gradient": "stack"},
        {"gradient": "release"},
        {"gradient": "release", "clipping": "previous", "max_grad_norm": 0.1},
        {"gradient": "release", "clipping": "tensor", "max_grad_norm": 0.1},
    )
]


class Interrupter:
    """Counts the instructions of the package, and raises the signal at the n-th one."""

    def __init__(self, n: int | None = None) -> None:
        self.n, self.counted = n, 0

    def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            self.counted += 1
            if self.counted == self.n:
                signal.raise_signal(signal.SIGINT)
        return self

    def run(self, work: Callable[[], object]) -> bool:
        """Do some work and return whether it was interrupted."""
        # A process that was started in the background may ignore the signal.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        inspect.currentframe().f_trace_opcodes = True  # otherwise Python 3.12 counts none
        sys.settrace(self)
        try:
            work()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
            signal.signal(signal.SIGINT, before)
        return False


def interrupted_steps(n: int, seed: int) -> Iterator[dict]:
    """Interrupt the second of three batches, `n` times."""
    chance = random.Random(seed)
    runs = [(*setting, is_tied) for setting in SETTINGS for is_tied in (True, False)]
    known: dict[int, tuple[int, list, list]] = {}
    for number in range(n):
        run = number % len(runs)
        if run not in known:
            known[run] = *_run(*runs[run], [0, 1, 2])[:2], _run(*runs[run], [0, 2])[1]
        count, whole, skipped = known[run]
        at = chance.randrange(1, count)
        _, now, refusal = _run(*runs[run], [0, 1, 2], at)
        outcome = "accepted half a step"
        if refusal:
            outcome = "refused" if "between two steps" in refusal else f"raw: {refusal}"
        elif _equal(now, whole):
            outcome = "whole"
        elif _equal(now, skipped):
            outcome = "as before"
        kind, settings, _ = runs[run]
        label = f"{kind.__name__} {settings['gradient']} {settings.get('clipping', '')}".strip()
        yield {"campaign": "interrupts", "kind": label, "outcome": outcome,
               "detail": f"instruction {at} of {count}"}  # fmt: skip


def interrupted_loads(n: int, seed: int) -> Iterator[dict]:
    """Interrupt `load_state_dict` of an optimizer that has trained further, `n` times.

    Every third interrupt is in the last twentieth of it, in part after the state was replaced.
    """
    chance = random.Random(seed)
    for number in range(n):
        kind, settings = SETTINGS[number % len(SETTINGS)]
        model, data = network(), batches(3)
        optimizer = make_optimizer(model, kind=kind, **settings)
        told = []
        for batch in data:
            told.append(copy.deepcopy(optimizer.state_dict()))
            loss_of(model, batch).backward()
            optimizer.step()
        before = everything(model, optimizer)
        other = copy.deepcopy((model, optimizer))
        counter = Interrupter()
        counter.run(lambda other=other, told=told: other[1].load_state_dict(told[2]))
        is_late = number // len(SETTINGS) % 3 == 2
        at = chance.randrange(counter.counted * 19 // 20 if is_late else 1, counter.counted)
        Interrupter(at).run(lambda old=optimizer, told=told: old.load_state_dict(told[2]))
        now, outcome = everything(model, optimizer), "accepted half a state"
        if _equal(now, before):
            outcome = "as before"
        elif _equal(now, everything(*other)):
            outcome = "whole"
        yield {"campaign": "interrupts", "kind": f"{kind.__name__}.load_state_dict",
               "outcome": outcome, "detail": f"instruction {at} of {counter.counted}"}  # fmt: skip


def _run(
    kind: Any, settings: dict, is_tied: bool, numbers: list[int], at: int | None = None
) -> tuple[int, list, str]:
    """Train on some batches, and count the instructions of the second one.

    Returns:
        The number of instructions, the final tensors, and why the last batch was refused.
    """
    model, data = network(is_tied=is_tied), batches(3)
    optimizer = make_optimizer(model, kind=kind, **settings)

    def batch(number: int) -> None:
        loss_of(model, data[number]).backward()
        optimizer.step()

    batch(numbers[0])
    interrupter, refusal = Interrupter(at), ""
    if interrupter.run(lambda: batch(numbers[1])) != (at is not None):
        raise RuntimeError(
            f"No interrupt at {at}: {interrupter.counted} instructions were counted."
        )
    model.zero_grad()  # not the optimizer's, which would give up the step
    try:
        for number in numbers[2:]:
            batch(number)
    except RuntimeError as error:
        refusal = str(error)
    return interrupter.counted, everything(model, optimizer), refusal


def _equal(one: list, other: list) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))
