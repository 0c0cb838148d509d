"""The operators on CPUs, compiled by numba where that pays, else the reference itself."""

from ..reference import sgd_step_floats_
from .column_absmax import column_absmax
from .dequantized_matmul import dequantized_matmul
from .embedding import embedding_gradient_
from .gradient import accumulate_, squared_norm
from .int8_matmul import int8_matmul, requantized_matmul
from .lion import lion_step_
from .lion_float import lion_step_floats_
from .quantize import dequantize, quantize
from .quantize_and_lion import quantize_and_lion_step_
from .quantize_gradient import quantize_gradient
from .sgd import sgd_step_

__all__ = [
    "accumulate_",
    "column_absmax",
    "dequantize",
    "dequantized_matmul",
    "embedding_gradient_",
    "int8_matmul",
    "lion_step_",
    "lion_step_floats_",
    "quantize",
    "quantize_and_lion_step_",
    "quantize_gradient",
    "requantized_matmul",
    "sgd_step_",
    "sgd_step_floats_",
    "squared_norm",
]
