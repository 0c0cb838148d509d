"""Full-parameter fine-tuning with INT8 weights, gradients and Lion momentum, in the Trainer.

Importing the package registers `optim="qft_lion"` and the quantization method `"qft"`.
"""

from .gradients import GradientStack
from .hf import (
    QFTConfig,
    QFTTrainer,
    QFTTrainingArguments,
    dequantize_model_,
    quantize_model_,
)
from .memory import MemoryLedger, memory_ledger
from .nn import QFTEmbedding, QFTLinear
from .optim import QFTLion
from .quant import QFTWeight
from .version import __version__

__all__ = [
    "GradientStack",
    "MemoryLedger",
    "QFTConfig",
    "QFTEmbedding",
    "QFTLinear",
    "QFTLion",
    "QFTTrainer",
    "QFTTrainingArguments",
    "QFTWeight",
    "__version__",
    "dequantize_model_",
    "memory_ledger",
    "quantize_model_",
]
