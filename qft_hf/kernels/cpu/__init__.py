"""The operators on CPUs: compiled by numba where that pays, else the reference itself."""

from ..reference import accumulate_, dequantize, lion_step_float_, quantize, squared_norm
from .lion import lion_step_

__all__ = [
    "accumulate_",
    "dequantize",
    "lion_step_",
    "lion_step_float_",
    "quantize",
    "squared_norm",
]
