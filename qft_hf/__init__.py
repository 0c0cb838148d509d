"""Full-parameter fine-tuning with INT8 weights, gradients and optimizer state, in the Trainer.

Importing the package registers the optimizers `"qft_lion"`, `"qft_adamw"` and `"qft_sgd"` and the
quantization method `"qft"`.
"""

from .hf import (
    QFTConfig,
    QFTTrainer,
    QFTTrainingArguments,
    chunk_loss_,
    dequantize_model_,
    estimate_memory,
    estimate_side_memory,
    load_side_network,
    quantize_model_,
    recommend,
    save_side_network,
)
from .memory import MemoryEstimate, MemoryLedger, memory_ledger
from .nn import QFTEmbedding, QFTLinear
from .optim import QFTSGD, QFTAdamW, QFTLion, QFTOptimizer
from .quant import QFTWeight
from .side import QSTConfig, attach_side_network, side_parameters
from .version import __version__

__all__ = [
    "QFTSGD",
    "MemoryEstimate",
    "MemoryLedger",
    "QFTAdamW",
    "QFTConfig",
    "QFTEmbedding",
    "QFTLinear",
    "QFTLion",
    "QFTOptimizer",
    "QFTTrainer",
    "QFTTrainingArguments",
    "QFTWeight",
    "QSTConfig",
    "__version__",
    "attach_side_network",
    "chunk_loss_",
    "dequantize_model_",
    "estimate_memory",
    "estimate_side_memory",
    "load_side_network",
    "memory_ledger",
    "quantize_model_",
    "recommend",
    "save_side_network",
    "side_parameters",
]
