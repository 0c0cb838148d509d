"""The SGD step on a float parameter in Triton. Twin: `kernels/reference/sgd_float.py`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .lion_float import BLOCK, N_WARPS
from .numerics import random_words


@triton.jit(do_not_specialize=["n", "seed", "step", "stream"])
def _sgd_float_kernel(
    parameter_ptr,  # [n] fp32 or bf16, modified
    gradient_ptr,  # [n] fp32, bf16 or fp16
    n,
    lr,
    shrink,  # lr * weight_decay
    gradient_sign,
    seed,
    step,
    stream,
    STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK + tl.zeros((1,), tl.int64)
    index = start[:, None] + tl.arange(0, BLOCK)[None, :]
    mask = index < n
    g = tl.load(gradient_ptr + index, mask=mask, other=0.0).to(tl.float32) * gradient_sign
    old = tl.load(parameter_ptr + index, mask=mask, other=0.0).to(tl.float32)
    change = old * shrink + g * lr
    value = old - change
    if STOCHASTIC:
        # BF16 is FP32 without its low 16 bits: the sum carries into the kept half with exactly the
        # probability of the part that is cut.
        words = random_words(tl.zeros((1, 1), tl.int64), start, BLOCK, seed, step, stream)
        bits = value.to(tl.int32, bitcast=True) + (words >> 16).to(tl.int32)
        rounded = (bits & -65536).to(tl.float32, bitcast=True)
        value = tl.where(change == 0, old, rounded)
    tl.store(parameter_ptr + index, value.to(parameter_ptr.dtype.element_ty), mask=mask)


def sgd_step_float_(
    parameter: Tensor,
    gradient: Tensor,
    *,
    lr: float,
    weight_decay: float,
    maximize: bool,
    stochastic: bool,
    seed: int,
    step: int,
    stream: int,
) -> None:
    # The kernel sees flat memory; a parameter in another order is rare and takes a copy.
    values = parameter.contiguous()
    n = parameter.numel()
    with torch.cuda.device_of(parameter):
        _sgd_float_kernel[(triton.cdiv(n, BLOCK),)](
            values, gradient.contiguous(), n, lr, lr * weight_decay, -1.0 if maximize else 1.0,
            seed, step, stream,
            STOCHASTIC=stochastic and parameter.dtype == torch.bfloat16, BLOCK=BLOCK,
            num_warps=N_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    if values is not parameter:
        parameter.copy_(values)
    # Autograd must see that a value changed which an earlier forward pass may have saved.
    torch.autograd.graph.increment_version(parameter)
