"""The only package that imports transformers: configuration, loading, arguments and Trainer."""

from . import quantizer as quantizer  # registers the quantization method
from .arguments import QFTTrainingArguments
from .chunked_loss import chunk_loss_
from .clipping import install_clipping
from .config import QFTConfig
from .convert import dequantize_model_, quantize_model_
from .estimate import estimate_memory, estimate_side_memory
from .guards import install_guards
from .optimizers import is_accumulating
from .processes import install_processes
from .recommendation import Recommendation, recommend
from .reference_model import install_references
from .registration import register_optimizer
from .resizing import install_resizing
from .side_network import install_side_networks, load_side_network, save_side_network
from .trainer import QFTTrainer

register_optimizer()
install_guards()
install_resizing()
install_references()
install_clipping()
install_side_networks()
install_processes()

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
