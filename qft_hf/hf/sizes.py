"""Makes Accelerate's module sizes, which `infer_auto_device_map` uses, count stored bytes.

Accelerate multiplies the number of elements by the size of their dtype, and the dtype of an INT8
weight is the float type that it represents.
"""

from typing import Any

import torch
from torch import nn

from ..quant import QFTWeight


def counting_fields(
    compute: Any,
    model: nn.Module,
    dtype: Any = None,
    special_dtypes: Any = None,
    buffers_only: bool = False,  # noqa: FBT001, FBT002 Accelerate's
) -> Any:
    """Wrap `compute_module_sizes` to count INT8 weights by their stored fields."""
    weights = {n: p for n, p in model.named_parameters() if isinstance(p, QFTWeight)}
    if buffers_only or not weights:
        return compute(model, dtype, special_dtypes, buffers_only)
    codes = dict.fromkeys(weights, torch.int8)  # a byte each; scales and outliers come below
    sizes = compute(model, dtype, {**(special_dtypes or {}), **codes}, buffers_only)
    for name, weight in weights.items():
        parts = name.split(".")
        for end in range(len(parts) + 1):
            sizes[".".join(parts[:end])] += weight.nbytes - weight.numel()
    return sizes
