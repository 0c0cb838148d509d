"""The operators on CPUs: compiled by numba where that pays, else the reference itself."""

from ..reference import lion_step_float_
from .gradient import accumulate_, squared_norm
from .lion import lion_step_
from .quantize import dequantize, quantize

__all__ = [
    "accumulate_",
    "dequantize",
    "lion_step_",
    "lion_step_float_",
    "quantize",
    "squared_norm",
]
