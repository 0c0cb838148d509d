"""Calls of every kernel, small enough for the slowness of compute-sanitizer.

    compute-sanitizer python scripts/benchmarks/every_kernel.py cuda

The calls are those of the kernel benchmark at odd sizes, with what it has not: ids that are no
rows, several tokens, and the product that is quantized again.
"""

import sys

import torch
from benchmark_kernels import operators, products

from qft_hf import kernels
from qft_hf.kernels.backend import backend_for

device = torch.device(sys.argv[1])
backend = backend_for(device)
x = torch.randn(5, 577, device=device)
columns = torch.tensor([0, 5, 576], dtype=torch.int16, device=device).repeat(5, 1)
outliers = {"outlier_values": torch.ones(5, 3, device=device), "outlier_columns": columns}
# Two ids that are no rows; on a CPU they raise.
ids = torch.tensor([4, 0, 4, *([5, -1] if device.type == "cuda" else [1, 4])], device=device)
for size in (None, 100, 64):
    for _, _, call in operators(*x.shape, size, device, len(ids)).values():
        call(backend)
    weight = kernels.quantize(x, group_size=size)
    weight[0].scatter_(1, columns.long(), 0)
    kernels.dequantize(*weight, rows=ids, group_size=size, **outliers)
    for tokens in (x[:1], x, x[:1].half(), x.half()):
        options = {"group_size": size, "bias": x[:, 0].contiguous(), **outliers}
        kernels.dequantized_matmul(tokens.contiguous(), *weight, **options)
gradient = kernels.quantize(x, group_size=256)
kernels.embedding_gradient_(*gradient, ids, x, group_size=256)
for n_tokens in (5, 577):
    made = products(n_tokens, *x.shape, device)
    for product in made.values():
        for dtype in (torch.float32, torch.bfloat16):
            backend.int8_matmul(*product, bias=None, dtype=dtype)
    left, right, scales, _ = made["grad_w"]
    given = {"columns": torch.tensor([1], device=device), "values": x.new_ones(5, 1)}
    kernels.requantized_matmul(left, right, scales, **given, group_size=256)
if device.type == "cuda":
    torch.cuda.synchronize()
