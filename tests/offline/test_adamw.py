"""The AdamW step compiles for each supported GPU, without spills; no GPU is needed."""

import os

import pytest

pytest.importorskip("triton", reason="triton is not installed: Linux only")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled under TRITON_INTERPRET=1", allow_module_level=True)

import torch

from qft_hf.kernels import AdamW, Moments, Quantized, Rounding, Weight
from qft_hf.kernels.triton.adamw import adamw_step_
from qft_hf.kernels.values import N_LIVE
from tests.offline.compiling import compile_launch, launches


def matrix(columns: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(64, columns, dtype=dtype, device="meta")


@pytest.mark.parametrize("capability", [80, 86, 90])
@pytest.mark.parametrize("is_live", [False, True], ids=["numbers", "live"])
@pytest.mark.parametrize("columns", [4096, 11008])
def test_the_step_of_the_moments(columns, is_live, capability):
    codes, scales = matrix(columns, torch.int8), matrix(columns // 256, torch.float32)
    weight = Weight.dense(Quantized(codes, matrix(1, torch.float32), None))
    moments = Moments(codes, scales, matrix(columns, torch.uint8), scales, 256)
    rule = AdamW(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)
    live = torch.empty(N_LIVE, dtype=torch.float64, device="meta") if is_live else None
    rounding = Rounding(seed=2**40 + 1, step=7, stream=3, live=live)

    of_moments, of_weight = launches(
        adamw_step_, weight, moments, Quantized(codes, scales, 256), rule=rule, rounding=rounding
    )
    for launch in (of_moments, of_weight):
        assert launch.types["live_ptr"] == ("*fp64" if is_live else "constexpr")
    compiled = compile_launch(of_moments, capability)

    assert compiled.stack_bytes == compiled.local_bytes == 0
    assert compiled.count("LDL|STL") == 0
    assert compiled.registers <= 128
    # A thread loads codes of three matrices by 16 bytes; it stores two so, and directions in four.
    assert compiled.count(r"LDG.*\.128") == 3
    assert compiled.count(r"STG.*\.128") == 6
    # Only divisions and roots contain fused operations; they are correctly rounded.
    assert "fma.rn.f32" not in compiled.ptx
    assert "approx" not in compiled.ptx
    assert compiled.ptx.count("sqrt.rn.f32") == 3 * 16
