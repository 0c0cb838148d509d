"""Optimizers of INT8 weights."""

from .adamw import QFTAdamW
from .base import QFTOptimizer, fit_states
from .lion import QFTLion
from .sgd import QFTSGD

__all__ = ["QFTSGD", "QFTAdamW", "QFTLion", "QFTOptimizer", "fit_states"]
