"""Operators on raw tensors: codes and scales in, codes and scales out.

An operator is a documented function with its checks, whose body is its reference in plain PyTorch
(`operators.py`). `cpu/` and `triton/` register faster implementations, which return the same bits
except for norms (the last bits of FP64), `dequantized_matmul`, `int8_linear` and
`outlier_products`, whose sums of floats have no fixed order. Tensors that belong together are
passed as one of the values of `values.py`. No operator knows tensor subclasses or modules.
"""

from .adamw import adamw_step_
from .dequantized_product import dequantized_matmul
from .embedding import embedding_gradient_
from .expanded_products import expand, expanded_input_gradient, expanded_linear
from .floats import lion_step_floats_, step_floats_
from .gradients import accumulate_, squared_norm, squared_norms
from .int8_product import int8_matmul, requantized_matmul
from .layer_input import quantize_input
from .layer_output import int8_linear
from .lion import lion_step_, quantize_and_lion_step_
from .outlier_gradient import outlier_products
from .output_gradient import quantize_gradient
from .quantization import dequantize, quantize
from .values import AdamW, Input, Lion, Moments, Quantized, Rounding, Roundings, Weight
from .weight import step_weight_

__all__ = [
    "AdamW",
    "Input",
    "Lion",
    "Moments",
    "Quantized",
    "Rounding",
    "Roundings",
    "Weight",
    "accumulate_",
    "adamw_step_",
    "dequantize",
    "dequantized_matmul",
    "embedding_gradient_",
    "expand",
    "expanded_input_gradient",
    "expanded_linear",
    "int8_linear",
    "int8_matmul",
    "lion_step_",
    "lion_step_floats_",
    "outlier_products",
    "quantize",
    "quantize_and_lion_step_",
    "quantize_gradient",
    "quantize_input",
    "requantized_matmul",
    "squared_norm",
    "squared_norms",
    "step_floats_",
    "step_weight_",
]
