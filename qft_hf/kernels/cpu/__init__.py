"""The operators on CPUs, compiled by numba where it is faster; the import registers them."""

from .compiled import find_place

find_place()  # before numba compiles anything

from . import (  # noqa: E402, F401 importing them registers the operators
    adamw,
    dequantized_product,
    embedding,
    floats,
    gradients,
    int8_product,
    layer_input,
    lion,
    outlier_gradient,
    output_gradient,
    quantization,
    weight,
)
