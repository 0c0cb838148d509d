"""The operators on CPUs, compiled by numba where that pays; importing registers them."""

from . import (
    adamw,
    columns,
    dequantized_product,
    embedding,
    floats,
    gradients,
    int8_product,
    lion,
    output_gradient,
    quantization,
    weight,
)

__all__ = [
    "adamw",
    "columns",
    "dequantized_product",
    "embedding",
    "floats",
    "gradients",
    "int8_product",
    "lion",
    "output_gradient",
    "quantization",
    "weight",
]
