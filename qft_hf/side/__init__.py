"""Quantized side tuning: a small network that learns from the hidden states of a frozen base."""

from .config import DOWNSAMPLES, QSTConfig
from .sizes import side_config

__all__ = ["DOWNSAMPLES", "QSTConfig", "side_config"]
