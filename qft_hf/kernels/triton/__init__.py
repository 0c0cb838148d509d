"""The operators on NVIDIA GPUs, in Triton; importing registers them.

Imported only when a tensor on such a device arrives.
"""

from . import (
    adamw,
    dequantized_product,
    embedding,
    floats,
    gradients,
    int8_product,
    layer_input,
    layer_output,
    lion,
    output_gradient,
    quantization,
    weight,
)

__all__ = [
    "adamw",
    "dequantized_product",
    "embedding",
    "floats",
    "gradients",
    "int8_product",
    "layer_input",
    "layer_output",
    "lion",
    "output_gradient",
    "quantization",
    "weight",
]
