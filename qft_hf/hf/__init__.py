"""The only package that imports transformers: configuration, loading, arguments and Trainer."""

from . import quantizer as quantizer  # registers the quantization method
from .arguments import QFTTrainingArguments
from .config import QFTConfig
from .convert import dequantize_model_, quantize_model_
from .registration import register_optimizer
from .trainer import QFTTrainer

register_optimizer()

__all__ = [
    "QFTConfig",
    "QFTTrainer",
    "QFTTrainingArguments",
    "dequantize_model_",
    "quantize_model_",
    "register_optimizer",
]
