"""Kernel launches: by Triton's JIT the first time, from a table of this module after that.

`jit[grid](...)` determines at each launch which compiled kernel its arguments select, and checks
every global number of the source. That costs the host as much as 10 to 30 small PyTorch operations,
and a step launches hundreds of kernels. A `Launcher` checks only the properties that a kernel is
compiled for, and a `Plan` only those of arguments that change from one launch to the next.
"""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

ALIGNED = 16  # Triton specializes for addresses and integers that are multiples of it
INT32, INT64 = 2**31, 2**63  # the first numbers that do not fit


class Constants:
    """Constexpr arguments and compile options (`num_warps`, ...) by name, as part of a key.

    Create them once per shape, in a cached function: creating them takes longer than a launch.
    Multiplications and additions are never fused: the reference rounds them one by one.
    """

    __slots__ = ("_hash", "_key", "values")

    def __init__(self, **values: Any) -> None:
        self.values = {**values, "enable_fp_fusion": False}
        # The key has types: 1, 1.0 and True are equal, but kernels compiled for them differ.
        self._key = tuple((name, type(value), value) for name, value in values.items())
        self._hash = hash(self._key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constants) and self._key == other._key


class _Compiled(NamedTuple):
    """A compiled kernel, and what its launches need."""

    run: Any  # Triton's launcher of this kernel
    function: int  # the driver's handle
    metadata: Any  # warps, shared memory
    constants: tuple[Any, ...]  # in the order of the kernel's arguments
    kernel: Any  # kept alive: its destructor unloads the function


class Launcher:
    """Launches one `triton.jit` function whose constexpr arguments come after all others."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[Hashable, _Compiled] = {}
        self._is_interpreted = not isinstance(kernel, JITFunction)
        if self._is_interpreted:  # nothing is ever compiled
            return
        n_arguments = len(kernel.params) - len(kernel.constexprs)
        if any(parameter.is_constexpr for parameter in kernel.params[:n_arguments]):
            raise ValueError(
                f"The constexpr arguments of {kernel.__name__} must come after all others: a "
                "launch passes them last. Reorder its parameters."
            )
        self._constant_names = [parameter.name for parameter in kernel.params[n_arguments:]]
        self._is_specialized = [
            not parameter.do_not_specialize for parameter in kernel.params[:n_arguments]
        ]

    def __call__(self, grid: tuple[int, ...], constants: Constants, *arguments: Any) -> None:
        """Launch on the current stream of the device of the first argument.

        Args:
            grid: Programs along one to three axes.
            constants: The constexpr arguments, in any order, and compile options.
            arguments: All other arguments, in the kernel's order. The first is a tensor.
        """
        if self._is_interpreted:
            self._kernel[grid](*arguments, **constants.values)
            return
        device, active = arguments[0].get_device(), driver.active
        if active.get_current_device() != device >= 0:
            with torch.cuda.device(device):
                self(grid, constants, *arguments)
            return
        key = (device, constants, specialization(arguments, self._is_specialized))
        compiled = self._compiled.get(key)
        if compiled is None or needs_triton_launch():
            kernel = self._kernel[grid](*arguments, **constants.values)
            if kernel is not None and not needs_triton_launch():  # None: a compiler hook refused
                values = tuple(constants.values[name] for name in self._constant_names)
                self._compiled[key] = _Compiled(
                    kernel.run, kernel.function, kernel.packed_metadata, values, kernel
                )
            return
        run, function, metadata, values, _ = compiled
        run(
            *(*grid, 1, 1)[:3], active.get_current_stream(device), function, metadata,
            None, None, None, *arguments, *values,
        )  # fmt: skip


class Plan:
    """A launch with some arguments left open, and the others the same over many launches.

    It holds the bound tensors and reads their addresses at each launch. It assumes that they stay
    on their device and keep their alignment. So a plan belongs to the owner of these tensors, which
    drops it when it replaces one of them, and copies of the owner do not get it.

    Args:
        launcher: Launches the kernel.
        grid: Programs along one to three axes.
        constants: The constexpr arguments and compile options.
        arguments: All other arguments, in the kernel's order, with `...` for each that is passed at
            the launch. The `...` must be consecutive and cannot be first.
    """

    def __init__(
        self, launcher: Launcher, grid: tuple[int, ...], constants: Constants, *arguments: Any
    ) -> None:
        places = [i for i, argument in enumerate(arguments) if argument is ...]
        if not places or places != list(range(places[0], places[0] + len(places))):
            raise ValueError(
                "The arguments that a plan leaves open (`...`) must be consecutive, got positions "
                f"{places}. Bind fewer, or reorder the kernel's parameters."
            )
        if places[0] == 0:
            raise ValueError("Bind a tensor as the first argument of a plan: it sets the device.")
        first, end = places[0], places[-1] + 1
        self._launcher, self._grid, self._constants = launcher, grid, constants
        self._before, self._after = arguments[:first], arguments[end:]
        self._device = self._before[0].get_device()
        self._compiled: dict[Hashable, _Compiled] = {}
        if not launcher._is_interpreted:
            self._is_specialized = launcher._is_specialized[first:end]
            self._dimensions = (*grid, 1, 1)[:3]

    def __call__(self, *arguments: Any) -> None:
        """Launch with these values of the open arguments."""
        launcher, before, after = self._launcher, self._before, self._after
        if launcher._is_interpreted:
            launcher(self._grid, self._constants, *before, *arguments, *after)
            return
        device, active = self._device, driver.active
        key = specialization(arguments, self._is_specialized)
        compiled = self._compiled.get(key)
        if compiled is None or active.get_current_device() != device >= 0 or needs_triton_launch():
            arguments = (*before, *arguments, *after)
            launcher(self._grid, self._constants, *arguments)
            whole = specialization(arguments, launcher._is_specialized)
            compiled = launcher._compiled.get((device, self._constants, whole))
            if compiled is not None:
                self._compiled[key] = compiled
            return
        run, function, metadata, values, _ = compiled
        run(
            *self._dimensions, active.get_current_stream(device), function, metadata,
            None, None, None, *before, *arguments, *after, *values,
        )  # fmt: skip

    def __reduce__(self) -> Any:
        raise TypeError(
            "A plan is bound to its tensors and cannot be copied or saved with their owner. Leave "
            "it out, and make one for the copy when that is first used."
        )


def specialization(arguments: Sequence[Any], is_specialized: Sequence[bool]) -> Hashable:
    """Return the properties of arguments, other than constexpr, that Triton compiles a kernel for.

    Args:
        arguments: In the kernel's order.
        is_specialized: False for arguments that the kernel lists in `do_not_specialize`.
    """
    key: list[Any] = []
    for argument, is_special in zip(arguments, is_specialized, strict=True):
        kind = type(argument)
        if kind is float or argument is None:
            key.append(kind)
        elif kind is int:
            width = 32 if -INT32 <= argument < INT32 else 64 if argument < INT64 else "unsigned"
            if is_special:
                key.append(1 if argument == 1 else (width, argument % ALIGNED == 0))
            else:
                key.append(width)
        else:
            key.append(argument.dtype)
            key.append(argument.data_ptr() % ALIGNED == 0)
    return tuple(key)


def needs_triton_launch() -> bool:
    """Whether Triton's JIT must launch: for hooks of profilers, debugging or other passes."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        getattr(enter, "calls", enter)  # a chain of hooks, or one hook, or None
        or getattr(leave, "calls", leave)
        or runtime.debug
        or runtime.add_stages_inspection_hook
        or knobs.compilation.instrumentation_mode
    )
