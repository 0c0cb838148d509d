"""Compile what a launch compiles, for a GPU that is absent, and read the machine code."""

import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from qft_hf.kernels.triton.launch import Constants, Launcher, Plan

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# triton prints SASS as "<control codes>\t[@predicate] OPCODE operands;"
OPCODE = re.compile(r"^[0-9-]+:\S*\t\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", re.MULTILINE)


@dataclass(frozen=True)
class Compiled:
    """A kernel's machine code and resources."""

    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    asm: Mapping[str, Any]  # "sass" is disassembled when it is read

    @property
    def ptx(self) -> str:
        """The code for NVIDIA's assembler."""
        return self.asm["ptx"]

    @cached_property
    def opcodes(self) -> list[str]:
        """The instructions of the machine code, without operands."""
        return OPCODE.findall(self.asm["sass"])

    def count(self, pattern: str) -> int:
        """Instructions whose opcode starts with a match of `pattern`."""
        return sum(bool(re.match(pattern, opcode)) for opcode in self.opcodes)


@dataclass(frozen=True)
class Launch:
    """A call of a kernel, with everything that Triton compiles it from.

    Attributes:
        kernel: A `triton.jit` function.
        grid: Programs along each axis.
        arguments: Positional arguments.
        options: Keyword arguments: constexpr arguments, warps and other options.
    """

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def packed(self, capability: int = 80, **changes: Any) -> tuple[Any, dict, dict, dict]:
        """Return options, types by name, constants and attributes, as Triton derives them."""
        backend = make_backend(target(capability))
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        options = {**self.options, **changes}
        bound, specialization, others = bind(*self.arguments, **options)
        return self.kernel._pack_args(backend, options, bound, specialization, others)

    @property
    def types(self) -> dict[str, str]:
        """The type of each argument, such as `"*i8"`, `"fp32"` or `"constexpr"`."""
        return self.packed()[1]

    @property
    def constants(self) -> dict[str, Any]:
        """The constexpr arguments."""
        return {name: self.options[name] for name in self.kernel.arg_names if name in self.options}

    @property
    def n_warps(self) -> int:
        """Warps of one program."""
        return self.options["num_warps"]


def target(capability: int) -> GPUTarget:
    """An NVIDIA GPU of compute capability 8.0 as 80, and so on."""
    return GPUTarget("cuda", capability, 32)


def launches(operator: Callable[..., Any], *arguments: Any, **options: Any) -> list[Launch]:
    """Return what an operator of the Triton backend would launch, without launching it.

    Tensors may be on the meta device: nothing is read, and pointers are multiples of 16, like those
    that PyTorch allocates.
    """
    found = []

    def launch(self: Launcher, grid: tuple[int, ...], constants: Constants, *given: Any) -> None:
        found.append(Launch(self._kernel, grid, given, constants.values))

    def launch_plan(self: Plan, *given: Any) -> None:
        self._launcher(self._grid, self._constants, *self._before, *given, *self._after)

    with patch.object(Launcher, "__call__", launch), patch.object(Plan, "__call__", launch_plan):
        operator(*arguments, **options)
    return found


def compile_launch(launch: Launch, capability: int, **changes: Any) -> Compiled:
    """Compile for `sm_<capability>`; `changes` are options that the launch does not set."""
    options, types, constants, attributes = launch.packed(capability, **changes)
    compiled = triton.compile(
        ASTSource(fn=launch.kernel, signature=types, constexprs=constants, attrs=attributes),
        target=target(capability),
        options=options.__dict__,
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return Compiled(
        registers=usage["REG"],
        stack_bytes=usage["STACK"],
        local_bytes=usage["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        asm=compiled.asm,
    )
