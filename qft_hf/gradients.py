"""`GradientStack`: the order in which gradients wait between backward and step."""

from collections.abc import Iterator

from torch import Tensor
from torch.nn import Parameter


class GradientStack:
    """Last-in-first-out record of the parameters whose `.grad` waits for the step.

    The gradients themselves stay in `.grad`, where accumulation and clipping find them; the stack
    holds the order. Backward pushes a parameter when its gradient is complete; the step pops it,
    which hands the gradient over and frees `.grad`, so memory falls while the step runs. Push and
    pop take constant time.

    Source:
        Li et al. 2023, "QFT", section 3.4 (arXiv:2310.07147).
    """

    def __init__(self) -> None:
        # A dictionary is an ordered set: accumulating pushes the same parameter again.
        self._waiting: dict[int, Parameter] = {}

    def __len__(self) -> int:
        """Parameters with a waiting gradient."""
        return sum(parameter.grad is not None for parameter in self._waiting.values())

    def push(self, parameter: Parameter) -> None:
        """Put `parameter` on top, unless it already waits."""
        self._waiting.setdefault(id(parameter), parameter)

    def pop(self) -> tuple[Parameter, Tensor]:
        """Take the newest parameter off, with its gradient; its `.grad` becomes None.

        An entry whose gradient was dropped meanwhile, as `model.zero_grad()` does, is passed over.

        Raises:
            IndexError: No gradient waits.
        """
        while self._waiting:
            _, parameter = self._waiting.popitem()
            gradient = parameter.grad
            if gradient is not None:
                parameter.grad = None
                return parameter, gradient
        raise IndexError("The gradient stack is empty: no backward pass since the last step.")

    def drain(self) -> Iterator[tuple[Parameter, Tensor]]:
        """Pop until nothing waits."""
        while True:
            try:
                yield self.pop()
            except IndexError:
                return

    def clear(self) -> None:
        """Forget all entries; gradients stay where they are."""
        self._waiting.clear()
