"""The operators on a fixed backend, whichever one the device would choose."""

from collections.abc import Callable
from typing import Any

from qft_hf import kernels
from qft_hf.kernels import backend


class Backend:
    """`Backend("cpu").quantize(...)` is `kernels.quantize(...)` under `backend.use("cpu")`."""

    def __init__(self, name: str) -> None:
        self.name = self.__name__ = name  # pytest names cases by the latter

    def __getattr__(self, operator: str) -> Callable[..., Any]:
        run = getattr(kernels, operator)

        def on_this_backend(*arguments: Any, **options: Any) -> Any:
            with backend.use(self.name):
                return run(*arguments, **options)

        return on_this_backend

    def __repr__(self) -> str:
        return self.name


reference, cpu, triton = Backend("reference"), Backend("cpu"), Backend("triton")
