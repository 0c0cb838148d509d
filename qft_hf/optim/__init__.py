"""Optimizers of INT8 weights."""

from .adamw import QFTAdamW
from .base import QFTOptimizer
from .lion import QFTLion
from .sgd import QFTSGD

__all__ = ["QFTSGD", "QFTAdamW", "QFTLion", "QFTOptimizer"]
