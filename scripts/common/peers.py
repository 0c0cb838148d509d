"""The other optimizers that benchmarks compare with, the same in every script."""

import importlib.util
from collections.abc import Callable

import torch
from torch import nn
from torch.optim import Optimizer

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]


def float_peers() -> dict[str, MakeOptimizer]:
    """Return optimizers for FP32 weights by name; print which are left out as not installed."""
    peers: dict[str, MakeOptimizer] = {
        "torch AdamW fused, FP32": lambda p: torch.optim.AdamW(p, lr=1e-4, fused=True)
    }
    if importlib.util.find_spec("bitsandbytes"):
        import bitsandbytes

        peers["bitsandbytes Lion8bit, FP32"] = lambda p: bitsandbytes.optim.Lion8bit(
            p, lr=1e-4, weight_decay=0.1
        )
    else:
        print("bitsandbytes is not installed, so it is not measured: pip install bitsandbytes")
    return peers


def flash_peers() -> dict[str, MakeOptimizer]:
    """Return FlashOptim's optimizers for bf16 weights by name; they run on a GPU only."""
    if not torch.cuda.is_available():
        print("FlashOptim runs on a GPU only, so it is not measured")
        return {}
    if not importlib.util.find_spec("flashoptim"):
        print("FlashOptim is not installed, so it is not measured: pip install flashoptim")
        return {}
    import flashoptim

    return {
        "FlashOptim AdamW": lambda p: flashoptim.FlashAdamW(p, lr=1e-5),
        "FlashOptim Lion": lambda p: flashoptim.FlashLion(p, lr=1e-5, weight_decay=0.1),
    }
