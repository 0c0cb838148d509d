"""`GradientHook`: how backward reaches the optimizer that a parameter obeys."""

import weakref
from collections.abc import Callable
from typing import Any

from torch.nn import Parameter


class GradientHook:
    """Calls a method of one optimizer with each parameter whose gradient backward has completed.

    A parameter obeys one optimizer, the one that was attached last: two would both use, and free,
    one gradient. The hook does not keep its optimizer alive; once that is gone it does nothing.

    Args:
        method: A bound method that takes a parameter.
    """

    def __init__(self, method: Callable[[Parameter], None]) -> None:
        self._method = weakref.WeakMethod(method)

    def __call__(self, parameter: Parameter) -> None:
        """What autograd calls."""
        method = self._method()
        if method is not None:
            method(parameter)

    def attach(self, parameter: Parameter) -> None:
        """Take the place of another optimizer's hook on `parameter`; hooks of others stay."""
        hooks = _hooks_of(parameter)
        for key, hook in list(hooks.items()):
            if isinstance(hook, GradientHook) and hook is not self:
                del hooks[key]
        if self not in hooks.values():
            parameter.register_post_accumulate_grad_hook(self)
        # `Module.to()` and `quantize_model_` replace the inside of a parameter: it still lists its
        # hooks then, but autograd does not call them. Setting the list again connects them.
        parameter._post_accumulate_grad_hooks = _hooks_of(parameter)

    def detach(self, parameter: Parameter) -> None:
        """Leave `parameter` alone from now on."""
        hooks = _hooks_of(parameter)
        for key, hook in list(hooks.items()):
            if hook is self:
                del hooks[key]


def _hooks_of(parameter: Parameter) -> dict[Any, Any]:
    return parameter._post_accumulate_grad_hooks or {}
