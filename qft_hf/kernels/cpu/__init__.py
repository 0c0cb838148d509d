"""The operators on CPUs, compiled by numba where that pays; importing registers them."""

from . import (
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
