"""The only package that imports transformers: configuration, loading, arguments and Trainer."""

from . import quantizer as quantizer  # registers the quantization method
from . import wrapping as wrapping  # wraps methods of transformers and Accelerate
from .arguments import QFTTrainingArguments
from .chunked_loss import chunk_loss_
from .config import QFTConfig
from .convert import dequantize_model_, quantize_model_
from .estimate import estimate_memory, estimate_side_memory
from .optimizers import is_accumulating
from .recommendation import Recommendation, recommend
from .registration import register_optimizer
from .side_network import load_side_network, save_side_network
from .trainer import QFTTrainer

register_optimizer()

__all__ = [
    "QFTConfig",
    "QFTTrainer",
    "QFTTrainingArguments",
    "Recommendation",
    "chunk_loss_",
    "dequantize_model_",
    "estimate_memory",
    "estimate_side_memory",
    "is_accumulating",
    "load_side_network",
    "quantize_model_",
    "recommend",
    "register_optimizer",
    "save_side_network",
]
