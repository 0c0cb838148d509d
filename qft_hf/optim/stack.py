"""`Stack`: gradients wait for the step.

Source:
    Li et al. 2023, "QFT", section 3.4 (arXiv:2310.07147).
"""

from torch.nn import Parameter

from ..quant import QFTWeight
from .flow import Flow
from .norms import are_finite


class Stack(Flow):
    """Gradients wait for the step in INT8, so clipping is exact and a step can be refused."""

    def listens_to(self, parameter: Parameter) -> bool:
        """Return whether it is an INT8 weight: its gradient may be float and is then quantized."""
        return isinstance(parameter, QFTWeight)

    def step(self) -> bool:
        """Update every parameter that has a gradient.

        Raises:
            FloatingPointError: A gradient is not finite. Nothing was updated.
            RuntimeError: The previous step was interrupted half-way.
        """
        self._refuse_interrupted_step()
        waiting = self._waiting()
        if not are_finite(waiting, self.run_part):
            if self.optimizer.nonfinite == "raise":
                raise FloatingPointError(
                    "A gradient is NaN or infinite, so the step was not taken; weights and "
                    "optimizer state are unchanged. Lower the learning rate or look at the batch; "
                    "nonfinite='skip' drops such steps and counts them in skipped_steps."
                )
            return False
        if self.is_captured and self.optimizer.reads_live:
            self._n_updated = len(waiting)  # until the host has done its part, too
            self.run_part(
                "update",
                lambda: self._update_all(waiting),
                repeated=lambda: self._repeated(waiting),
            )
        else:
            self._update_all(waiting)
        return True

    def _repeated(self, waiting: list[Parameter]) -> None:
        """Do the host's part of `_update_all`."""
        for parameter in waiting:
            parameter.grad = None
        self.optimizer.updated(waiting)
        self._n_updated = 0
