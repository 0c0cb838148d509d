"""Call every kernel on shapes small enough for compute-sanitizer, which is slow.

    compute-sanitizer python scripts/benchmarks/every_kernel.py cuda

The calls are those of the kernel benchmark at odd sizes. Added are cases that it does not have:
ids that are out of range, several tokens, FP32 products, and products with outlier columns.
"""

import sys

import torch
from benchmark_kernels import operators, products

from qft_hf import kernels

device = torch.device(sys.argv[1])
x = torch.randn(5, 577, device=device)
columns = torch.tensor([0, 5, 576], dtype=torch.int16, device=device).repeat(5, 1)
# Two ids that are out of range; on a CPU they would raise.
ids = torch.tensor([4, 0, 4, *([5, -1] if device.type == "cuda" else [1, 4])], device=device)
for size in (None, 100, 64):
    for _, _, call in operators(*x.shape, size, device, len(ids)).values():
        call()
    codes, scales = kernels.quantize(x, group_size=size)
    codes.scatter_(1, columns.long(), 0)
    weight = kernels.Weight(codes, scales, torch.ones(5, 3, device=device), columns, size)
    kernels.dequantize(weight, rows=ids)
    for tokens in (x[:1], x, x[:1].half(), x.half()):
        kernels.dequantized_matmul(tokens.contiguous(), weight, bias=x[:, 0].contiguous())
gradient = kernels.Quantized(*kernels.quantize(x, group_size=256), 256)
kernels.embedding_gradient_(gradient, ids, x)
for n_tokens in (5, 577):
    made = products(n_tokens, *x.shape, device)
    for call in made.values():
        call()
    left, right, scales, _ = made["grad_w"].args
    kernels.int8_matmul(left, right, scales, None, dtype=torch.float32)
    given = {"columns": torch.tensor([1], device=device), "values": x.new_ones(5, 1)}
    kernels.requantized_matmul(left, right, scales, **given, group_size=256)
if device.type == "cuda":
    torch.cuda.synchronize()
