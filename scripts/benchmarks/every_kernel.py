"""One call of each kernel, small enough for the slowness of compute-sanitizer.

compute-sanitizer python scripts/benchmarks/every_kernel.py cuda
"""

import sys

import torch

from qft_hf import kernels

device = sys.argv[1]
x = torch.randn(5, 577, device=device)
n = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "seed": 1, "step": 1}
for size in (None, 100, 64):
    w = kernels.quantize(x, group_size=size)
    columns = torch.tensor([0, 5, 576], dtype=torch.int16, device=device).repeat(5, 1)
    values = torch.ones(5, 3, device=device)
    w[0].scatter_(1, columns.long(), 0)
    m, g = (kernels.quantize(x * 0.1, group_size=256) for _ in range(2))
    kernels.accumulate_(*g, *m, group_size=256)
    kernels.squared_norm(*g, group_size=256)
    kernels.lion_step_(
        *w, values, columns, *m, *g, group_size=size, state_group_size=256, stream=0, **n
    )
    # Two ids that are no rows; on a CPU they raise.
    ids = torch.tensor([4, 0, 4, *([5, -1] if device == "cuda" else [1, 4])], device=device)
    kernels.dequantize(
        *w, rows=ids, group_size=size, outlier_values=values, outlier_columns=columns
    )
    kernels.embedding_gradient_(*g, ids, x, group_size=256)
    kernels.quantize_and_lion_step_(
        *w, values, columns, *m, x, group_size=size, state_group_size=256, stream=0, **n
    )
    packed = (
        torch.zeros(5, 289, dtype=torch.uint8, device=device),
        torch.ones(5, 10, device=device),
    )
    kernels.lion_step_(
        *w, values, columns, *packed, *g, group_size=size, state_group_size=256, stream=0, **n
    )
    sgd = {name: value for name, value in n.items() if not name.startswith("beta")}
    kernels.sgd_step_(
        *w, values, columns, *g, group_size=size, state_group_size=256, stream=0, **sgd
    )
    kernels.dequantize(
        *w, group_size=size, outlier_values=values, outlier_columns=columns, dtype=torch.bfloat16
    )
    for tokens in (x[:1], x, x[:1].half(), x.half()):
        kernels.dequantized_matmul(
            tokens.contiguous(),
            *w,
            group_size=size,
            outlier_values=values,
            outlier_columns=columns,
            bias=x[:, 0].contiguous(),
        )
for size in (5, 577):
    w, y = kernels.quantize(x, group_size=None), torch.randn(size, 577, device=device)
    a = kernels.quantize(y, group_size=None)
    g = kernels.int8_matmul(a[0], w[0].t(), a[1], w[1], dtype=torch.float32)
    by_rows, by_columns = kernels.quantize_gradient(g, w[1], a[1], seed=1)
    kernels.int8_matmul(by_rows[0], w[0], by_rows[1], None, dtype=torch.bfloat16)
    kernels.int8_matmul(by_columns[0], a[0], by_columns[1], None, dtype=torch.bfloat16)
    given = {"columns": torch.tensor([1], device=device), "values": y.new_ones(len(w[0]), 1)}
    kernels.requantized_matmul(by_columns[0], a[0], by_columns[1], **given, group_size=256)
sizes = (1001, 7, 1024)
p, g = ([torch.ones(s, device=device, dtype=torch.bfloat16) for s in sizes] for _ in range(2))
m = [torch.zeros(s, device=device) for s in sizes]
del n["step"], sgd["step"]
kernels.lion_step_floats_(p, m, g, steps=[1, 2, 3], streams=[0, 1, 2], **n)
kernels.sgd_step_floats_(p, g, steps=[1, 2, 3], streams=[0, 1, 2], **sgd)
if device == "cuda":
    torch.cuda.synchronize()
