"""The AdamW step compiles for each supported GPU, without spills; no GPU is needed."""

import os

import pytest

pytest.importorskip("triton", reason="triton is not installed: Linux only")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled under TRITON_INTERPRET=1", allow_module_level=True)

from qft_hf.kernels.triton.adamw import _moments_kernel
from qft_hf.kernels.triton.tiling import tiling
from tests.offline.compiling import compile_kernel


@pytest.mark.parametrize("capability", [80, 86, 89, 90])
@pytest.mark.parametrize("columns", [4096, 11008])
def test_the_step_of_the_moments(columns, capability):
    types = {"seed": "i64"} | dict.fromkeys(("step", "stream", "first_row"), "i32")
    for name in _moments_kernel.arg_names:
        if name.endswith("_ptr"):
            types[name] = "*i8" if name.endswith("codes_ptr") else "*fp32"
        elif name.islower():
            types.setdefault(name, "fp32")
    types["root_codes_ptr"] = "*u8"
    tiles = tiling(columns, 256)

    compiled = compile_kernel(
        _moments_kernel,
        types=types,
        constants={"STOCHASTIC": True, **tiles.constants()},
        capability=capability,
        n_warps=tiles.n_warps,
    )

    assert compiled.stack_bytes == compiled.local_bytes == 0
    assert compiled.count("LDL|STL") == 0
    assert compiled.registers <= 128
    # Codes of three matrices come in 16 bytes a thread; two go so, and directions in four parts.
    assert compiled.count(r"LDG.*\.128") == 3
    assert compiled.count(r"STG.*\.128") == 6
    # What is fused, divisions and roots have made of themselves; they are correctly rounded.
    assert "fma.rn.f32" not in compiled.ptx
    assert "approx" not in compiled.ptx
    assert compiled.ptx.count("sqrt.rn.f32") == 3 * 16
