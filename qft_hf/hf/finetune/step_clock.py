"""Measures how long the steps of a run take."""

import time
from typing import Any

from transformers import TrainerCallback


class StepClock(TrainerCallback):
    """Measures seconds in training steps, and notes the steps and tokens before a resume."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.steps_before = 0
        self.tokens_before = 0
        self._began = 0.0

    def on_train_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Note the steps and tokens that a resumed run has already done."""
        self.steps_before = state.global_step
        self.tokens_before = state.num_input_tokens_seen

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop the clock."""
        self.seconds += time.perf_counter() - self._began
