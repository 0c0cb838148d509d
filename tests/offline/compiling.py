"""Compile a Triton kernel for a GPU that is not there, and read what came out."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

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
    opcodes: list[str]
    ptx: str

    def count(self, pattern: str) -> int:
        """Instructions whose opcode starts with a match of `pattern`."""
        return sum(bool(re.match(pattern, opcode)) for opcode in self.opcodes)


def compile_kernel(
    kernel: Any,
    *,
    types: dict[str, str],
    constants: dict[str, Any],
    capability: int,
    n_warps: int,
    n_stages: int = 3,
    aligned: tuple[str, ...] = (),
    enable_fp_fusion: bool = False,
) -> Compiled:
    """Compile for `sm_<capability>`.

    Args:
        kernel: A `triton.jit` function.
        types: Type of each argument that is not constexpr, such as `"*i8"` or `"fp32"`. Pointers
            are multiples of 16, as PyTorch allocates.
        constants: The constexpr arguments.
        capability: 80, 86, 89 or 90.
        n_warps: Warps of one program.
        n_stages: Steps of a loop in flight.
        aligned: Integer arguments that are multiples of 16.
        enable_fp_fusion: Allow fused multiply-add.
    """
    names = kernel.arg_names
    assert {*types, *constants} == set(names)
    multiples = [
        i for i, name in enumerate(names) if types.get(name, "").startswith("*") or name in aligned
    ]
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in multiples},
    )
    options = {
        "num_warps": n_warps,
        "num_stages": n_stages,
        "enable_fp_fusion": enable_fp_fusion,
    }
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
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
        opcodes=OPCODE.findall(compiled.asm["sass"]),
        ptx=compiled.asm["ptx"],
    )
