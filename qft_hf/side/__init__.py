"""Quantized side tuning: a small network that learns from the hidden states of a frozen base."""

from .attach import (
    NAME,
    NEW_ROWS,
    attach_side_network,
    side_network_of,
    side_parameters,
    trained_heads,
    trained_modules,
)
from .config import DOWNSAMPLES, QSTConfig
from .network import SideNetwork
from .sizes import side_config
from .stack import layer_stack

__all__ = [
    "DOWNSAMPLES",
    "NAME",
    "NEW_ROWS",
    "QSTConfig",
    "SideNetwork",
    "attach_side_network",
    "layer_stack",
    "side_config",
    "side_network_of",
    "side_parameters",
    "trained_heads",
    "trained_modules",
]
