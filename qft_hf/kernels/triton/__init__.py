"""Triton implementations of the operators for NVIDIA GPUs, registered on import.

The package is imported when an operator gets its first tensor on such a device.
"""

from . import (  # noqa: F401 importing them registers the operators
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
