"""Optimizers of INT8 weights."""

from .base import QFTOptimizer
from .lion import QFTLion
from .sgd import QFTSGD

__all__ = ["QFTSGD", "QFTLion", "QFTOptimizer"]
